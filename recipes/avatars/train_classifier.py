"""A noisy classifier of the 128 px world, for Classifier Guidance: ADM's own way, beside which text guidance stands.

Its classes are single attributes ("blue background", "pink hair", "glasses", ...). A picture shows one value of each
attribute, so every step draws one of its attributes as the label: of a picture, p(y | x_t) is then shared out evenly
among what it shows. It reads what the NoisyCLIP reads, the linear picture of noisy latents, with noise drawn uniform in
its angle.

`python train_classifier.py --data DIR --out DIR` trains (or resumes) on the CPU and prints its accuracy on held-out
renders. It needs the files of train_world_autoencoder.py in --out.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from data import LABELS
from loop import Plan, Told, spawn, train
from train_world_noisy_clip import SIDE, seen, view_of
from world_data import STYLE_WORDS, load, phrases

from sdg_core.method import View
from sdg_core.models import ADMConfig, Classifier, ClassifierConfig


def class_name(attribute: str, value: object) -> str:
    """('background', 'blue') -> 'blue background', ('style', 'pixel') -> 'pixel art', ('hat', False) -> 'no hat'."""
    return STYLE_WORDS[str(value)][0] if attribute == "style" else phrases(attribute, value)[0].removeprefix("a ")


NAMES = tuple(class_name(attribute, value) for attribute, values in LABELS.items() for value in values)
FIRST = np.cumsum([0, *map(len, LABELS.values())])[:-1]
"""The class of every attribute's first value."""

BODY = ADMConfig(
    image_size=SIDE, model_channels=32, channel_mult=(1, 2, 3), num_res_blocks=1, attention_levels=(1, 2),
    head_channels=32, patch=2,
)  # fmt: skip
TIMES = (0.0, 200.0, 400.0, 600.0)


def config(view: View) -> ClassifierConfig:
    """The classifier of what a view shows."""
    return ClassifierConfig(BODY, len(NAMES), NAMES, view.name, tuple(map(tuple, view.covariance.tolist())))


class Loss:
    """Cross-entropy of one attribute that the picture shows, drawn at random."""

    def __init__(self, classifier: Classifier, view: View, latents: np.ndarray, labels: Tensor, batch: int) -> None:
        self.classifier, self.view, self.latents, self.labels = classifier, view, latents, labels
        self.batch = batch

    def __call__(self, step: int, generator: torch.Generator) -> tuple[Tensor, Told]:
        index = torch.randint(len(self.latents), (self.batch,), generator=generator)
        latents = torch.from_numpy(self.latents[index.numpy()].astype(np.float32))
        ratio = (torch.rand(self.batch, generator=generator) * torch.pi / 2).tan().clamp(1e-3, 150)
        x_0 = self.view.picture(latents, torch.ones(self.batch))
        x_t = seen(self.view, x_0, torch.randn(latents.shape, generator=generator), ratio)
        shown = self.labels[index]
        column = torch.multinomial((shown >= 0).float(), 1, generator=generator)
        wanted = (shown.gather(1, column) + torch.from_numpy(FIRST)[column]).squeeze(1)
        return F.cross_entropy(self.classifier.logits(x_t, self.classifier.table.timestep(ratio)), wanted), {}


@torch.no_grad()
def accuracy(classifier: Classifier, view: View, latents: np.ndarray, labels: np.ndarray, t: float) -> dict[str, float]:
    """Share of held-out renders at t whose likeliest value of an attribute is the right one."""
    generator, ratio = torch.Generator().manual_seed(0), classifier.table.sigma(torch.tensor([t])).float()
    logits = []
    for start in range(0, len(latents), 500):
        z = torch.from_numpy(latents[start : start + 500].astype(np.float32))
        x_0 = view.picture(z, torch.ones(len(z)))
        x_t = seen(view, x_0, torch.randn(z.shape, generator=generator), ratio.expand(len(z)))
        logits.append(classifier.logits(x_t, torch.tensor([t])))
    parts, result = torch.cat(logits).split([len(values) for values in LABELS.values()], dim=1), {}
    for i, name in enumerate(LABELS):
        truth = torch.from_numpy(labels[:, i]).long()
        result[name] = (parts[i].argmax(1) == truth)[truth >= 0].float().mean().item()
    return result


def job(rank: int, processes: int, data: Path, out: Path, images: int) -> None:
    plan = Plan(out / "classifier.pt", images, batch=128, lr=1.5e-3, seed=8, weight_decay=0.05)
    torch.manual_seed(plan.seed)
    view = view_of(out, "latents")
    classifier = Classifier(config(view))
    latents = np.load(out / "world_latents_train.npy")
    labels = torch.from_numpy(np.load(data / "train_labels.npy")).long()
    classifier.load_state_dict(train(plan, classifier, Loss(classifier, view, latents, labels, plan.share)))
    held_out, truth = np.load(out / "world_latents_test.npy"), load(data, "test", 64)[1]
    for t in TIMES:
        found = accuracy(classifier.eval(), view, held_out, truth, t)
        print(f"t {t:.0f}: " + ", ".join(f"{name} {share:.3f}" for name, share in found.items()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=256_000)
    args = parser.parse_args()
    spawn(functools.partial(job, data=args.data, out=args.out, images=args.images), 1)
