"""The NoisyCLIP of the bundled world: self-supervised fine-tuning of the small CLIP, as in SDG section 3.3.

The student sees x_t and t, the frozen teacher the clean picture: symmetric InfoNCE at logits x100, plus a multiple of
1 - cosine, which keeps the embedding where the text tower expects it. No captions.

Two phases: t uniform over the schedule, as in the paper; then the noise uniform in its angle, arctan(sigma / alpha). In
the linear schedule half of all t show nothing of the picture, and their loss is noise for the rest.

`python train_noisy_clip.py --data DIR --out DIR` needs the checkpoint of train_clip.py in --out.
"""

from __future__ import annotations

import argparse
import copy
import sys
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

import train_clip
from data import load
from loop import Plan, Told, spawn, train
from train_clip import shifted

from sdg_core.encoders import NoisyCLIP, NoisyCLIPConfig, noisy

CONFIG = NoisyCLIPConfig(clip=train_clip.CONFIG, noise_size=train_clip.NOISE_SIZE, hidden=128, sinusoid=128)


@dataclass(frozen=True)
class Phase:
    """One part of the training: where it is kept, images seen, learning rate, weight of 1 - cosine, how t is drawn."""

    name: str
    images: int
    lr: float
    cosine_weight: float
    by_angle: bool


PHASES = (
    Phase("noisy_clip_uniform", 200_000, 6e-4, 10.0, by_angle=False),
    Phase("noisy_clip", 160_000, 5e-4, 50.0, by_angle=True),
)


def trained_clip(out: Path, labels) -> tuple[torch.nn.Module, Tensor]:
    """The CLIP of train_clip.py with its EMA weights, and the token ids of its small table."""
    used = train_clip.vocabulary(labels)
    clip = train_clip.build(len(used))
    clip.load_state_dict(torch.load(out / "clip.pt", weights_only=True)["ema"])
    return clip.eval(), used


class Loss:
    """InfoNCE between noisy and clean embeddings of the same pictures, and their cosine."""

    def __init__(self, student: NoisyCLIP, teacher: NoisyCLIP, images: Tensor, batch: int, phase: Phase) -> None:
        self.student, self.teacher, self.images, self.batch = student, teacher, images, batch
        self.phase = phase
        self.info_nce = open_clip.ClipLoss()

    def __call__(self, step: int, generator: torch.Generator) -> tuple[Tensor, Told]:
        index = torch.randint(len(self.images), (self.batch,), generator=generator)
        x_0 = shifted(self.images[index].float() / 127.5 - 1, generator)
        t = self.draw_t(torch.rand(self.batch, generator=generator))
        x_t = noisy(x_0, torch.randn(x_0.shape, generator=generator), t, self.student.table)
        with torch.no_grad():
            clean = embed(self.teacher, x_0, torch.zeros(1))
        seen = embed(self.student, x_t, t)
        contrast = self.info_nce(seen, clean, torch.tensor(100.0))
        cosine = (seen * clean).sum(1).mean()
        return contrast + self.phase.cosine_weight * (1 - cosine), {"info_nce": contrast, "cosine": cosine}

    def draw_t(self, u: Tensor) -> Tensor:
        """t (B,) from uniform numbers (B,)."""
        return self.student.table.timestep((u * torch.pi / 2).tan()) if self.phase.by_angle else 999 * u


def embed(model: NoisyCLIP, image: Tensor, t: Tensor) -> Tensor:
    image = image.contiguous(memory_format=torch.channels_last)
    return F.normalize(model(image, t, model.full_depth).embed, dim=-1)


@torch.no_grad()
def retrieval(model: NoisyCLIP, teacher: NoisyCLIP, images: Tensor, t: float) -> str:
    """Retrieval@1 and @5 in 1000 clean embeddings, and the cosine, of pictures noised to t."""
    x_0 = images[:1000].float() / 127.5 - 1
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))
    clean = embed(teacher, x_0, torch.zeros(1))
    seen = embed(model, noisy(x_0, eps, torch.full((1000,), t), model.table), torch.tensor([t]))
    rank = (seen @ clean.T).argsort(1, descending=True).eq(torch.arange(1000)[:, None])
    cosine = (seen * clean).sum(1).mean().item()
    return f"@1 {rank[:, :1].any(1).float().mean():.3f} @5 {rank[:, :5].any(1).float().mean():.3f} cos {cosine:.3f}"


def job(rank: int, processes: int, data: Path, out: Path) -> None:
    torch.manual_seed(3)
    pictures, labels = load(data, "train")
    clip, _ = trained_clip(out, labels)
    teacher = NoisyCLIP(CONFIG, copy.deepcopy(clip)).eval().requires_grad_(False)
    student = NoisyCLIP(CONFIG, clip).eval()  # eval: the batch statistics stay the teacher's
    student.text.requires_grad_(False)
    pictures = torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()
    for phase in PHASES:
        plan = Plan(out / f"{phase.name}.pt", phase.images, batch=128, lr=phase.lr, seed=3)
        student.load_state_dict(train(plan, student, Loss(student, teacher, pictures, plan.share, phase)))
    held_out = torch.from_numpy(load(data, "test")[0]).permute(0, 3, 1, 2)
    for t in (0, 100, 300, 500, 700, 900):
        print(t, "noisy", retrieval(student, teacher, held_out, t), "clean", retrieval(teacher, teacher, held_out, t))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    spawn(lambda rank, n: job(rank, n, args.data, args.out), 1)
