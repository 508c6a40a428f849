"""The NoisyCLIP of the latent test world: the pixel one, fine-tuned on the linear view of noisy latents.

Half of each batch is the linear picture of a latent, half the picture itself averaged to latent size (what references
are); both get the noise that a latent has through the view: white in space, correlated between colours.

`python train_noisy_clip_linear.py --data DIR --out DIR` needs the latents of train_autoencoder.py in --out.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from data import load as load_split
from loop import Plan, spawn, train

from sdg_core.avatars import BUNDLED
from sdg_core.encoders import NoisyCLIP, load_clip, load_noisy_clip
from sdg_core.method import LinearView, expand, unit

IMAGES, COSINE_WEIGHT = 150_000, 30.0
MEASURED = (0, 20, 50, 100, 200, 300, 400, 500, 600, 700, 800, 900, 999)


def view_of(out: Path) -> LinearView:
    """The linear view of the trained autoencoder."""
    kept = torch.load(out / "latent_format.pt", weights_only=True)
    return LinearView("avatars", kept["factors"], kept["bias"])


def student(view: LinearView, side: int = 16) -> NoisyCLIP:
    """The bundled pixel encoder, told that it reads ``view``."""
    model = load_noisy_clip(BUNDLED / "noisy_clip.safetensors")
    covariance = tuple(map(tuple, view.covariance.tolist()))
    model.config = dataclasses.replace(model.config, noise_size=side, view=view.name, covariance=covariance)
    model.noise_size = side
    return model


def clean_embeddings(data: Path, split: str) -> Tensor:
    """Embeddings (N, D) of full pictures by the clean CLIP."""
    teacher = load_clip(BUNDLED / "clip.safetensors")
    pictures = torch.from_numpy(load_split(data, split)[0]).permute(0, 3, 1, 2)
    with torch.no_grad():
        parts = [teacher(p.float() / 127.5 - 1, torch.zeros(1), teacher.full_depth).embed for p in pictures.split(256)]
    return unit(torch.cat(parts))


def small_pictures(data: Path, split: str) -> Tensor:
    """Pictures averaged to latent size: (N, 3, 16, 16) in -1..1, float16."""
    pictures = torch.from_numpy(load_split(data, split)[0]).permute(0, 3, 1, 2)
    return torch.cat([F.avg_pool2d(part.float() / 127.5 - 1, 2).half() for part in pictures.split(1024)])


def seen(view: LinearView, x_0: Tensor, eps: Tensor, ratio: Tensor) -> Tensor:
    """Clean linear pictures with the view's noise at ``ratio`` (B,), in VP scaling."""
    return (x_0 + expand(ratio, x_0) * view.noise(eps)) / expand((1 + ratio.square()).sqrt(), x_0)


class Loss:
    """InfoNCE between noisy and clean embeddings of the same pictures, and their cosine."""

    def __init__(self, model: NoisyCLIP, view: LinearView, latents: Tensor, small: Tensor, clean: Tensor, share: int):
        self.model, self.view, self.latents, self.small, self.clean = model, view, latents, small, clean
        self.share, self.info_nce = share, open_clip.ClipLoss()

    def __call__(self, step: int, generator: torch.Generator) -> tuple[Tensor, str]:
        index = torch.randint(len(self.latents), (self.share,), generator=generator)
        latents, small = self.latents[index].float(), self.small[index].float()
        exact = torch.rand(self.share, 1, 1, 1, generator=generator) < 0.5
        x_0 = torch.where(exact, self.view.picture(latents, torch.ones(self.share)), small)
        angle = torch.rand(self.share, generator=generator) * torch.pi / 2
        ratio = angle.tan().clamp(1e-3, 150)
        u = seen(self.view, x_0, torch.randn(latents.shape, generator=generator), ratio)
        image = u.contiguous(memory_format=torch.channels_last)
        embed = unit(self.model(image, self.model.table.timestep(ratio), self.model.full_depth).embed)
        clean = self.clean[index]
        contrast = self.info_nce(embed, clean, torch.tensor(100.0))
        cosine = (embed * clean).sum(1).mean()
        return contrast + COSINE_WEIGHT * (1 - cosine), f"info_nce {contrast.item():.3f} cosine {cosine.item():.3f}"


@torch.no_grad()
def measure(model: NoisyCLIP, view: LinearView, latents: Tensor, clean: Tensor) -> list[tuple[float, float, float]]:
    """Rows (t, retrieval@1 in the clean embeddings, the same of the clean CLIP on the same noisy pictures)."""
    teacher, rows = load_clip(BUNDLED / "clip.safetensors"), []
    eps = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    x_0 = view.picture(latents, torch.ones(len(latents)))
    for t in MEASURED:
        ratio = model.table.sigma(torch.tensor([float(t)])).float()
        u = seen(view, x_0, eps, ratio.expand(len(latents)))
        found = []
        for encoder in (model, teacher):
            embed = unit(encoder(u, torch.tensor([float(t)]), encoder.full_depth).embed)
            found.append(float(((embed @ clean.T).argmax(1) == torch.arange(len(clean))).float().mean()))
        rows.append((float(t), *found))
    return rows


def job(rank: int, processes: int, data: Path, out: Path, images: int) -> None:
    torch.manual_seed(7)
    view = view_of(out)
    model = student(view).requires_grad_(True)  # stays in eval mode: the batch statistics are the teacher's
    model.text.requires_grad_(False)
    latents = torch.load(out / "latents_train.pt", weights_only=True)
    plan = Plan(out / "noisy_clip_linear.pt", images, batch=128, lr=4e-4, seed=7, processes=processes, rank=rank)
    loss = Loss(model, view, latents, small_pictures(data, "train"), clean_embeddings(data, "train"), plan.share)
    model.load_state_dict(train(plan, model, loss))
    test = torch.load(out / "latents_test.pt", weights_only=True)[:1000].float()
    rows = measure(model, view, test, clean_embeddings(data, "test")[:1000])
    torch.save(rows, out / "noisy_clip_linear_retrieval.pt")
    for t, noisy, clean in rows:
        print(f"t {t:.0f} noisy @1 {noisy:.3f} clean @1 {clean:.3f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=IMAGES)
    args = parser.parse_args()
    spawn(functools.partial(job, data=args.data, out=args.out, images=args.images), 1)
