"""The small CLIP of the 128 px world: renders at 64 px, captions in several words for every attribute.

Two phases: pictures against random captions of them, then besides every picture against one phrase for each value of an
attribute (as UniCL, Yang et al. 2022, contrasts with labels): what takes few pixels, a mouth or a pair of glasses, is
drowned in whole captions.

`python train_world_clip.py --data DIR --out DIR` trains (or resumes) and prints zero-shot accuracies.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from data import LABELS
from loop import Plan, spawn, train
from open_clip.model import CLIP
from torch import Tensor
from train_clip import build, prepare, shifted, token_table, tokenizer
from world_data import caption, in_memory, load, phrases

PHASES = (("world_clip_captions", 180_000, 0.02, 0.0), ("world_clip", 100_000, 0.01, 1.0))
"""Where each is kept, images seen, Muon's rate, weight of the phrases."""
VECTORS = ("embedding", "positional", "logit_scale")  # names of matrices that are not Muon's


def vocabulary(labels: np.ndarray) -> Tensor:
    """Ids of all tokens that the captions use, ascending (so that the end token stays the largest)."""
    rng = random.Random(0)
    return torch.unique(tokenizer()([caption(row, rng) for row in labels[:40_000]]))


class Loss:
    """Symmetric InfoNCE between pictures and random captions of them (open_clip's ClipLoss), and the phrases'."""

    def __init__(self, model: CLIP, images: Tensor, labels: np.ndarray, batch: int, weight: float) -> None:
        self.model, self.images, self.labels, self.batch = model, images, labels, batch
        self.weight, self.targets = weight, torch.from_numpy(labels).long()
        self.tokenizer, self.table = tokenizer(), token_table(vocabulary(labels))
        self.loss = open_clip.ClipLoss()

    def __call__(self, step: int, generator: torch.Generator) -> tuple[Tensor, str]:
        index = torch.randint(len(self.images), (self.batch,), generator=generator)
        images = shifted(self.images[index].float() / 127.5 - 1, generator, reach=4)
        rng = random.Random(int(torch.randint(2**62, (1,), generator=generator)))
        tokens = self.table[self.tokenizer([caption(self.labels[i], rng) for i in index.tolist()])]
        image, text, scale = self.model(prepare(images), tokens)
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=4.6052)
        captions = self.loss(image, text, scale)
        if not self.weight:
            return captions, f"scale {scale.item():.1f}"
        labelled = self.phrase_loss(image, scale, self.targets[index], rng)
        return captions + self.weight * labelled, f"captions {captions.item():.3f} phrases {labelled.item():.3f}"

    def phrase_loss(self, image: Tensor, scale: Tensor, targets: Tensor, rng: random.Random) -> Tensor:
        """Mean over the attributes of the cross-entropy between the values that a picture shows, each said once."""
        heads = rng.choice(("a person with {}", "{}"))
        said = {
            name: [rng.choice(phrases(name, v)) if name == "style" else heads.format(rng.choice(phrases(name, v)))
                   for v in values]
            for name, values in LABELS.items()
        }  # fmt: skip
        tokens = self.table[self.tokenizer([text for texts in said.values() for text in texts])]
        logits = scale * image @ self.model.encode_text(tokens, normalize=True).T
        parts = logits.split([len(values) for values in LABELS.values()], dim=1)
        losses = [F.cross_entropy(part, targets[:, i], ignore_index=-1) for i, part in enumerate(parts)]
        return torch.stack(losses).mean()


@torch.no_grad()
def zero_shot(model: CLIP, images: Tensor, labels: np.ndarray, table: Tensor) -> dict[str, list[float]]:
    """Accuracy per attribute on renders that show it, each value named by the first, second, last of its phrases."""
    model.eval()
    features = torch.cat(
        [model.encode_image(prepare(b.float() / 127.5 - 1), normalize=True) for b in images.split(500)]
    )
    result: dict[str, list[float]] = {}
    for column, (name, values) in enumerate(LABELS.items()):
        truth = torch.from_numpy(labels[:, column]).long()
        for choice in (0, 1, -1):
            words = [phrases(name, v)[choice] for v in values]
            said = words if name == "style" else [f"a person with {word}" for word in words]
            text = model.encode_text(table[tokenizer()(said)])
            guess = (features @ F.normalize(text, dim=-1).T).argmax(1)
            result.setdefault(name, []).append(round(float((guess == truth)[truth >= 0].float().mean()), 3))
    return result


def job(rank: int, processes: int, data: Path, out: Path) -> None:
    torch.manual_seed(12)
    pictures, labels = load(data, "train", 64)
    used = vocabulary(labels)
    model, images = build(len(used)), in_memory(pictures)
    for name, count, muon, weight in PHASES:
        plan = Plan(
            out / f"{name}.pt", count, batch=128, lr=muon / 20, seed=12, weight_decay=0.05, muon=muon, vectors=VECTORS
        )
        model.load_state_dict(train(plan, model, Loss(model, images, labels, plan.share, weight)))
    held_out, truth = load(data, "test", 64)
    print(zero_shot(model, in_memory(held_out), truth, token_table(used)), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    spawn(lambda rank, n: job(rank, n, args.data, args.out), 1)
