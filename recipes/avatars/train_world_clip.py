"""The small CLIP of the 128 px world: renders at 64 px, captions in several words for every attribute.

Three phases: pictures against random captions of them; besides, every picture against one phrase for each value of an
attribute (as UniCL, Yang et al. 2022, contrasts with labels): what takes few pixels, a pair of glasses, is drowned in
whole captions; besides, a linear probe of the embedding that tells the values apart: a mouth is seen by no picture
feature and named by no text feature at first, and between two zeros no gradient flows.

`python train_world_clip.py --data DIR --out DIR` trains (or resumes) and prints zero-shot accuracies.
"""

from __future__ import annotations

import argparse
import random
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from data import LABELS
from loop import Plan, Told, spawn, train
from open_clip.model import CLIP
from small_clip import CONFIG, build, prepare, shifted, token_table, tokenizer
from torch import Tensor, nn
from world_data import caption, in_memory, load, phrases

PHASES = (
    ("world_clip_captions", 180_000, 0.02, 0.0, 0.0),
    ("world_clip_phrases", 100_000, 0.01, 1.0, 0.0),
    ("world_clip_probe", 110_000, 0.015, 1.0, 1.0),
)
"""Where each is kept, images seen, Muon's rate, weights of the phrases and of the probe."""
CAPTIONS, PHRASES = 16, 256  # captions of a picture, and ways to say every value, to draw from
SMALL = ("expression",)  # counts four times in phrases and probe
VECTORS = ("embedding", "positional", "logit_scale", "probe")  # names of matrices that are not Muon's


def vocabulary(labels: np.ndarray) -> Tensor:
    """Ids of all tokens that the captions use, ascending (so that the end token stays the largest)."""
    rng = random.Random(0)
    return torch.unique(tokenizer()([caption(row, rng) for row in labels[:40_000]]))


class Scaled(nn.Module):
    """Times a constant: embeddings have length one."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


class Loss:
    """Symmetric InfoNCE between pictures and random captions of them (open_clip's ClipLoss), and the phrases'."""

    def __init__(
        self,
        model: nn.ModuleDict,
        images: Tensor,
        said: tuple[Tensor, Tensor, Tensor],
        batch: int,
        weights: tuple[float, float],
    ) -> None:
        self.model, self.probe, self.images = model["clip"], model["probe"], images
        self.batch, self.weights = batch, weights
        self.targets, self.captions, self.phrases = (rows.to(images.device) for rows in said)
        self.loss = open_clip.ClipLoss()

    def __call__(self, step: int, generator: torch.Generator | None) -> tuple[Tensor, Told]:
        draw = {"generator": generator, "device": self.images.device}
        index = torch.randint(len(self.images), (self.batch,), **draw)
        images = shifted(self.images[index].float() / 127.5 - 1, generator, reach=4)
        which = torch.randint(self.captions.shape[1], (self.batch,), **draw)
        image, text, scale = self.model(prepare(images), self.captions[index, which].long())
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=4.6052)
        with torch.autocast(images.device.type, enabled=False):  # logits of 100 times a cosine need their digits
            captions = self.loss(image.float(), text.float(), scale.float())
        targets, (phrase, probe) = self.targets[index].long(), self.weights
        parts = {"captions": captions}
        if phrase:
            every = self.phrases[torch.randint(len(self.phrases), (1,), **draw)].squeeze(0).long()
            values = self.model.encode_text(every, normalize=True)
            parts["phrases"] = phrase * by_attribute(scale * image @ values.T, targets)
        if probe:
            parts["probe"] = probe * by_attribute(self.probe(image), targets)
        return sum(parts.values()), parts


def every_value(rng: random.Random) -> list[str]:
    """Every value of every attribute, each said once."""
    head = rng.choice(("a person with {}", "{}"))
    return [
        rng.choice(phrases(name, value)) if name == "style" else head.format(rng.choice(phrases(name, value)))
        for name, values in LABELS.items()
        for value in values
    ]


def _captions(labels: np.ndarray, seed: int) -> np.ndarray:
    """Tokens (N, CAPTIONS, L) of random captions. No tensor: between processes it would travel by shared memory."""
    rng, tokens = random.Random(seed), tokenizer()
    said = tokens([caption(row, rng) for row in labels for _ in range(CAPTIONS)])
    return said.view(len(labels), CAPTIONS, -1).numpy()


def said_of(labels: np.ndarray, processes: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """What is said of pictures: labels (N, A) int8, captions (N, CAPTIONS, L) and PHRASES times every value (P, V, L).

    Tokens are rows of the small table, uint8.
    """
    table, rng, read = token_table(vocabulary(labels)).to(torch.uint8), random.Random(0), tokenizer()
    parts = np.array_split(labels, max(1, len(labels) // 2000))
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:  # a fork keeps the locks of torch's threads
        captions = torch.cat([table[torch.from_numpy(part)] for part in pool.map(_captions, parts, range(len(parts)))])
    values = torch.stack([table[read(every_value(rng))] for _ in range(PHRASES)])
    return torch.from_numpy(labels), captions, values


def by_attribute(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of the attributes that a picture shows: logits (B, all values), targets (B, A), -1 unknown."""
    parts, total, whole = logits.split([len(values) for values in LABELS.values()], dim=1), 0.0, 0.0
    for i, (name, part) in enumerate(zip(LABELS, parts, strict=True)):
        weight = 4.0 if name in SMALL else 1.0
        total += weight * F.cross_entropy(part, targets[:, i], ignore_index=-1)
        whole += weight
    return total / whole


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


def with_probe(clip: CLIP) -> nn.ModuleDict:
    """The CLIP, and a linear probe of its embedding for every value of every attribute."""
    values = sum(len(v) for v in LABELS.values())
    return nn.ModuleDict({"clip": clip, "probe": nn.Sequential(Scaled(16.0), nn.Linear(CONFIG["embed_dim"], values))})


def job(rank: int, processes: int, data: Path, out: Path) -> None:
    torch.manual_seed(12)
    pictures, labels = load(data, "train", 64)
    used = vocabulary(labels)
    model, images = build(len(used)), in_memory(pictures)
    both, said = with_probe(model), said_of(labels)
    for name, count, muon, *weights in PHASES:
        plan = Plan(
            out / f"{name}.pt", count, batch=128, lr=muon / 20, seed=12, weight_decay=0.05, muon=muon, vectors=VECTORS
        )
        both.load_state_dict(train(plan, both, Loss(both, images, said, plan.share, tuple(weights))))
    torch.save({"ema": model.state_dict()}, out / "world_clip.pt")
    held_out, truth = load(data, "test", 64)
    print(zero_shot(model, in_memory(held_out), truth, token_table(used)), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    spawn(lambda rank, n: job(rank, n, args.data, args.out), 1)
