"""A noisy classifier of the bundled world, for Classifier Guidance: ADM's own way, beside which text guidance stands.

Its classes are single attributes ("blue background", "pink hair", "glasses", ...). A picture shows one value of each
attribute, so every step draws one of its attributes as the label: of a picture, p(y | x_t) is then shared out evenly
among what it shows. t is drawn uniform in the noise's angle, as for the NoisyCLIP.

`python train_classifier.py --data DIR --out DIR [--to FILE]` trains (or resumes) on the CPU, writes our kind of file
and prints its accuracy on held-out renders. Put the file into models/classifier.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from data import LABELS, STYLE_WORDS, load, phrase
from loop import Plan, spawn, train
from train_clip import shifted

from sdg_core.encoders import noisy
from sdg_core.files import save
from sdg_core.models import ADMConfig, Classifier, ClassifierConfig


def class_name(attribute: str, value: object) -> str:
    """('background', 'blue') -> 'blue background', ('style', 'pixel') -> 'pixel art', ('hat', False) -> 'no hat'."""
    return STYLE_WORDS[str(value)] if attribute == "style" else phrase(attribute, value).removeprefix("a ")


NAMES = tuple(class_name(attribute, value) for attribute, values in LABELS.items() for value in values)
FIRST = np.cumsum([0, *map(len, LABELS.values())])[:-1]
"""The class of every attribute's first value."""

BODY = ADMConfig(
    image_size=32, model_channels=32, channel_mult=(1, 2, 3), num_res_blocks=1, attention_levels=(1, 2),
    head_channels=32, patch=2,
)  # fmt: skip
CONFIG = ClassifierConfig(BODY, len(NAMES), NAMES)
TIMES = (0.0, 200.0, 400.0, 600.0)


class Loss:
    """Cross-entropy of one attribute that the picture shows, drawn at random."""

    def __init__(self, classifier: Classifier, images: Tensor, labels: Tensor, batch: int) -> None:
        self.classifier, self.images, self.labels, self.batch = classifier, images, labels, batch

    def __call__(self, step: int, generator: torch.Generator) -> tuple[Tensor, str]:
        index = torch.randint(len(self.images), (self.batch,), generator=generator)
        x_0 = shifted(self.images[index].float() / 127.5 - 1, generator)
        angle = torch.rand(self.batch, generator=generator) * torch.pi / 2
        t = self.classifier.table.timestep(angle.tan())
        x_t = noisy(x_0, torch.randn(x_0.shape, generator=generator), t, self.classifier.table)
        shown = self.labels[index]
        column = torch.multinomial((shown >= 0).float(), 1, generator=generator)
        wanted = (shown.gather(1, column) + torch.from_numpy(FIRST)[column]).squeeze(1)
        return F.cross_entropy(self.classifier.logits(x_t, t), wanted), ""


@torch.no_grad()
def accuracy(classifier: Classifier, images: Tensor, labels: np.ndarray, t: float) -> dict[str, float]:
    """Share of held-out renders at t whose likeliest value of an attribute is the right one."""
    generator = torch.Generator().manual_seed(0)
    logits = []
    for batch in images.split(500):
        x_0 = batch.float() / 127.5 - 1
        time = torch.full((len(x_0),), t)
        x_t = noisy(x_0, torch.randn(x_0.shape, generator=generator), time, classifier.table)
        logits.append(classifier.logits(x_t, time))
    parts, result = torch.cat(logits).split([len(values) for values in LABELS.values()], dim=1), {}
    for i, name in enumerate(LABELS):
        truth = torch.from_numpy(labels[:, i]).long()
        result[name] = (parts[i].argmax(1) == truth)[truth >= 0].float().mean().item()
    return result


def job(rank: int, processes: int, data: Path, out: Path, images: int, to: Path) -> None:
    plan = Plan(out / "classifier.pt", images, batch=128, lr=1.5e-3, seed=8, weight_decay=0.05)
    torch.manual_seed(plan.seed)
    classifier = Classifier(CONFIG)
    pictures, labels = load(data, "train")
    pictures = torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()
    average = train(plan, classifier, Loss(classifier, pictures, torch.from_numpy(labels).long(), plan.share))
    classifier.load_state_dict(average)
    save(to, "classifier", asdict(CONFIG), average)
    held_out, truth = load(data, "test")
    for t in TIMES:
        found = accuracy(classifier.eval(), torch.from_numpy(held_out).permute(0, 3, 1, 2), truth, t)
        print(f"t {t:.0f}: " + ", ".join(f"{name} {share:.3f}" for name, share in found.items()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=192_000)
    parser.add_argument("--to", type=Path, help="default: classifier.safetensors in --out")
    args = parser.parse_args()
    to = args.to or args.out / "classifier.safetensors"
    spawn(lambda rank, n: job(rank, n, args.data, args.out, args.images, to), 1)
