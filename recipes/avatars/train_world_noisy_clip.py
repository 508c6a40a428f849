"""The NoisyCLIPs of both worlds: their CLIP, fine-tuned to read noise, as in SDG section 3.3 without captions.

The student sees a noisy small picture, targets are the clean embeddings of the 64 px pictures: symmetric InfoNCE at
logits x100, plus a multiple of 1 - cosine, which keeps embeddings where the text tower expects them. Noise is uniform
in its angle, arctan(sigma / alpha).

- latents: half of each batch is the linear picture of a latent, half the picture itself averaged to latent size (what
  references are); both get the noise that a latent has through the view.
- pixels: pictures of 32 px with white noise.

`python train_world_noisy_clip.py {latents,pixels} --data DIR --out DIR` needs train_world_clip.py's CLIP in --out, and
for latents train_world_autoencoder.py's files.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

import small_clip
from loop import Plan, Told, spawn, train
from train_world_clip import VECTORS, vocabulary
from world_data import load

from sdg_core.encoders import NoisyCLIP, NoisyCLIPConfig
from sdg_core.method import PIXEL_VIEW, LinearView, View, expand, unit

SIDE, NAME, COSINE_WEIGHT = 32, "avatars", 30.0
LEVELS = 4096  # of noise, their angles spread evenly
MEASURED = (0, 20, 50, 100, 200, 300, 400, 500, 600, 700, 800, 900, 999)
SEEDS = {"latents": 17, "pixels": 3}


def view_of(out: Path, world: str) -> View:
    """The linear view of the trained autoencoder, or pixels."""
    if world == "pixels":
        return PIXEL_VIEW
    kept = torch.load(out / "world_format.pt", weights_only=True)
    return LinearView(NAME, kept["factors"], kept["bias"])


def trained_clip(out: Path, words: int) -> torch.nn.Module:
    """The CLIP of train_world_clip.py with its averaged weights."""
    clip = small_clip.build(words)
    clip.load_state_dict(torch.load(out / "world_clip.pt", weights_only=True)["ema"])
    return clip.eval()


def student(out: Path, words: int, view: View) -> NoisyCLIP:
    """The trained CLIP, conditioned on noise and told what it reads."""
    covariance = tuple(map(tuple, view.covariance.tolist())) if isinstance(view, LinearView) else None
    config = NoisyCLIPConfig(
        clip=small_clip.CONFIG, noise_size=SIDE, hidden=128, sinusoid=128, view=view.name, covariance=covariance
    )
    return NoisyCLIP(config, trained_clip(out, words)).eval()  # eval: the batch statistics stay the clean CLIP's


def seen(view: View, x_0: Tensor, eps: Tensor, ratio: Tensor) -> Tensor:
    """Clean small pictures with the view's noise at ``ratio`` (B,), in VP scaling."""
    return (x_0 + expand(ratio, x_0) * view.noise(eps)) / expand((1 + ratio.square()).sqrt(), x_0)


class Pictures:
    """What the student looks at: ``latents`` (N, C, 32, 32) through the view, ``small`` (N, 3, 32, 32), both float16.

    Pixels have no latents but their pictures.
    """

    def __init__(self, view: View, latents: Tensor | None, small: Tensor) -> None:
        self.view, self.small = view, small
        self.latents = small if latents is None else latents

    def clean(self, index: Tensor, exact: Tensor) -> Tensor:
        """Pictures without noise: the view's where ``exact`` (B, 1, 1, 1), else those averaged to its size."""
        latents = self.latents[index].float()
        signal = torch.ones(len(index), device=latents.device)
        return torch.where(exact, self.view.picture(latents, signal), self.small[index].float())


class Loss:
    """InfoNCE between noisy and clean embeddings of the same pictures, and their cosine."""

    def __init__(self, model: NoisyCLIP, pictures: Pictures, clean: Tensor, share: int) -> None:
        self.model, self.pictures, self.clean, self.share = model, pictures, clean, share
        self.info_nce, self.scale = open_clip.ClipLoss(), torch.tensor(100.0)
        ratio = (torch.pi / 2 * (torch.arange(LEVELS) + 0.5) / LEVELS).tan().clamp(1e-3, 150)
        self.levels = torch.stack([ratio, model.table.timestep(ratio)]).to(clean.device)

    def __call__(self, step: int, generator: torch.Generator | None) -> tuple[Tensor, Told]:
        device = self.clean.device
        index = torch.randint(len(self.clean), (self.share,), generator=generator, device=device)
        exact = torch.rand(self.share, 1, 1, 1, generator=generator, device=device) < 0.5
        x_0 = self.pictures.clean(index, exact)
        level = torch.randint(LEVELS, (self.share,), generator=generator, device=device)
        ratio, t = self.levels[:, level]
        eps = torch.randn(self.pictures.latents[index].shape, generator=generator, device=device)
        u = seen(self.pictures.view, x_0, eps, ratio).contiguous(memory_format=torch.channels_last)
        embed = unit(self.model(u, t, self.model.full_depth).embed)
        clean = self.clean[index]
        with torch.autocast(device.type, enabled=False):  # logits of 100 times a cosine need their digits
            contrast = self.info_nce(embed.float(), clean, self.scale)
        cosine = (embed * clean).sum(1).mean()
        return contrast + COSINE_WEIGHT * (1 - cosine), {"info_nce": contrast, "cosine": cosine}


@torch.no_grad()
def prepared(clip: torch.nn.Module, data: Path, split: str) -> tuple[Tensor, Tensor]:
    """Clean embeddings (N, D) of the 64 px pictures, and pictures averaged to latent size (N, 3, 32, 32), float16."""
    pictures, _ = load(data, split, 64)
    embeds, small = [], []
    for i in range(0, len(pictures), 250):
        x = torch.from_numpy(pictures[i : i + 250].copy()).permute(0, 3, 1, 2).float() / 127.5 - 1
        embeds.append(clip.encode_image(small_clip.prepare(x), normalize=True))
        small.append(F.avg_pool2d(x, 2).half())
    return torch.cat(embeds), torch.cat(small)


@torch.no_grad()
def retrieval(
    model: NoisyCLIP, clip: torch.nn.Module, pictures: Pictures, clean: Tensor
) -> list[tuple[float, float, float]]:
    """Rows (t, retrieval@1 in the clean embeddings, the same of the clean CLIP on the same noisy pictures)."""
    N, rows = len(clean), []
    eps = torch.randn(pictures.latents[:N].shape, generator=torch.Generator().manual_seed(0))
    x_0 = pictures.clean(torch.arange(N), torch.ones(N, 1, 1, 1, dtype=torch.bool))
    for t in MEASURED:
        ratio = model.table.sigma(torch.tensor([float(t)])).float()
        u = seen(pictures.view, x_0, eps, ratio.expand(N))
        found = []
        for embed in (
            unit(model(u, torch.tensor([float(t)]), model.full_depth).embed),
            clip.encode_image(small_clip.prepare(u), normalize=True),
        ):
            found.append(float(((embed @ clean.T).argmax(1) == torch.arange(N)).float().mean()))
        rows.append((float(t), *found))
    return rows


def measured(model: NoisyCLIP, world: str, data: Path, out: Path) -> list[tuple[float, float, float]]:
    """The retrieval of 1,000 held-out renders, printed and returned: see ``retrieval``."""
    clip = trained_clip(out, len(vocabulary(load(data, "train", 64)[1])))
    clean, small = prepared(clip, data, "test")
    pictures = Pictures(view_of(out, world), latents_of(out, world, "test"), small)
    rows = retrieval(model.eval(), clip, pictures, clean[:1000])
    for t, noisy, plain in rows:
        print(f"t {t:.0f} noisy @1 {noisy:.3f} clean @1 {plain:.3f}", flush=True)
    return rows


def job(rank: int, processes: int, world: str, data: Path, out: Path, images: int) -> None:
    torch.manual_seed(SEEDS[world])
    words, view = len(vocabulary(load(data, "train", 64)[1])), view_of(out, world)
    model, clip = student(out, words, view).requires_grad_(True), trained_clip(out, words)
    model.text.requires_grad_(False)
    plan = Plan(
        out / f"noisy_clip_{world}.pt", images, batch=128, lr=4e-4, seed=SEEDS[world], muon=0.01, vectors=VECTORS,
        processes=processes, rank=rank,
    )  # fmt: skip
    clean, small = prepared(clip, data, "train")
    pictures = Pictures(view, latents_of(out, world, "train"), small)
    model.load_state_dict(train(plan, model, Loss(model, pictures, clean, plan.share)))
    torch.save(measured(model, world, data, out), out / f"noisy_clip_{world}_retrieval.pt")


def latents_of(out: Path, world: str, split: str) -> Tensor | None:
    """The latents of a split, read from disk as they are used; None for pixels."""
    return None if world == "pixels" else torch.from_numpy(np.load(out / f"world_latents_{split}.npy", mmap_mode="c"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("world", choices=SEEDS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=200_000)
    args = parser.parse_args()
    spawn(lambda rank, n: job(rank, n, args.world, args.data, args.out, args.images), 1)
