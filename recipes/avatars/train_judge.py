"""The judge of the bundled world: attributes of renders that no other model was trained on.

Own split, own seed, own augmentation (shift, blur, a little noise: generated pictures are softer than renders).
`python train_judge.py --data DIR --out DIR` trains (or resumes) and prints its accuracy on held-out renders.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from data import LABELS, load
from loop import Plan, Told, spawn, train
from small_clip import shifted

from sdg_core.avatars import Judge


class Loss:
    """Cross-entropy of every attribute that the picture shows."""

    def __init__(self, judge: Judge, images: Tensor, labels: Tensor, batch: int) -> None:
        self.judge, self.images, self.labels, self.batch = judge, images, labels, batch

    def __call__(self, step: int, generator: torch.Generator) -> tuple[Tensor, Told]:
        index = torch.randint(len(self.images), (self.batch,), generator=generator)
        image = shifted(self.images[index].float() / 127.5 - 1, generator)
        amount = torch.rand(2, self.batch, 1, 1, 1, generator=generator)
        blurred = F.avg_pool2d(F.pad(image, (1,) * 4, mode="replicate"), 3, 1)
        image = torch.lerp(image, blurred, amount[0]) + 0.15 * amount[1] * torch.randn(image.shape, generator=generator)
        logits, _ = self.judge(image)
        losses = [
            F.cross_entropy(logits[name], self.labels[index, i], ignore_index=-1) for i, name in enumerate(LABELS)
        ]
        return torch.stack(losses).sum(), {}


@torch.no_grad()
def accuracy(judge: Judge, images: Tensor, labels: np.ndarray) -> dict[str, float]:
    """Share of held-out renders that show an attribute and where the judge is right."""
    parts = [judge.verdict(batch.float() / 127.5 - 1) for batch in images.split(500)]
    result = {}
    for i, name in enumerate(LABELS):
        guess, truth = torch.cat([p[name] for p in parts]), torch.from_numpy(labels[:, i]).long()
        result[name] = (guess == truth)[truth >= 0].float().mean().item()
    return result


def job(rank: int, processes: int, data: Path, out: Path, images: int) -> None:
    plan = Plan(out / "judge.pt", images, batch=128, lr=1.5e-3, seed=4, ema=0.995)
    torch.manual_seed(plan.seed)
    judge = Judge(LABELS)
    pictures, labels = load(data, "judge")
    pictures = torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()
    judge.load_state_dict(train(plan, judge, Loss(judge, pictures, torch.from_numpy(labels).long(), plan.share)))
    held_out, truth = load(data, "test")
    print(accuracy(judge, torch.from_numpy(held_out).permute(0, 3, 1, 2), truth))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=128_000)
    args = parser.parse_args()
    spawn(lambda rank, n: job(rank, n, args.data, args.out, args.images), 1)
