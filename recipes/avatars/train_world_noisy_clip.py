"""The NoisyCLIP of the 128 px world: its CLIP, fine-tuned on the linear view of noisy latents.

Half of each batch is the linear picture of a latent, half the picture itself averaged to latent size (what references
are); both get the noise that a latent has through the view. Targets are the clean embeddings of the 64 px pictures.

`python train_world_noisy_clip.py --data DIR --out DIR` needs train_world_clip.py's and train_world_autoencoder.py's.
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

import train_clip
from loop import Plan, spawn, train
from train_noisy_clip_linear import MEASURED, Loss, seen
from train_world_clip import VECTORS, vocabulary
from world_data import load

from sdg_core.encoders import NoisyCLIP, NoisyCLIPConfig
from sdg_core.method import LinearView, unit

SIDE, NAME = 32, "avatars"


def view_of(out: Path) -> LinearView:
    """The linear view of the trained autoencoder."""
    kept = torch.load(out / "world_format.pt", weights_only=True)
    return LinearView(NAME, kept["factors"], kept["bias"])


def trained_clip(out: Path, words: int) -> torch.nn.Module:
    """The CLIP of train_world_clip.py with its averaged weights."""
    clip = train_clip.build(words)
    clip.load_state_dict(torch.load(out / "world_clip.pt", weights_only=True)["ema"])
    return clip.eval()


def student(out: Path, words: int) -> NoisyCLIP:
    """The trained CLIP, conditioned on noise and told what it reads."""
    view = view_of(out)
    covariance = tuple(map(tuple, view.covariance.tolist()))
    config = NoisyCLIPConfig(
        clip=train_clip.CONFIG, noise_size=SIDE, hidden=128, sinusoid=128, view=view.name, covariance=covariance
    )
    return NoisyCLIP(config, trained_clip(out, words)).eval()  # eval: the batch statistics stay the clean CLIP's


@torch.no_grad()
def prepared(clip: torch.nn.Module, data: Path, split: str) -> tuple[Tensor, Tensor]:
    """Clean embeddings (N, D) of the 64 px pictures, and pictures averaged to latent size (N, 3, 32, 32), float16."""
    pictures, _ = load(data, split, 64)
    embeds, small = [], []
    for i in range(0, len(pictures), 250):
        x = torch.from_numpy(pictures[i : i + 250].copy()).permute(0, 3, 1, 2).float() / 127.5 - 1
        embeds.append(clip.encode_image(train_clip.prepare(x), normalize=True))
        small.append(F.avg_pool2d(x, 2).half())
    return torch.cat(embeds), torch.cat(small)


@torch.no_grad()
def retrieval(
    model: NoisyCLIP, clip: torch.nn.Module, view: LinearView, latents: Tensor, clean: Tensor
) -> list[tuple[float, float, float]]:
    """Rows (t, retrieval@1 in the clean embeddings, the same of the clean CLIP on the same noisy pictures)."""
    rows, eps = [], torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    x_0 = view.picture(latents, torch.ones(len(latents)))
    for t in MEASURED:
        ratio = model.table.sigma(torch.tensor([float(t)])).float()
        u = seen(view, x_0, eps, ratio.expand(len(latents)))
        found = []
        for embed in (
            unit(model(u, torch.tensor([float(t)]), model.full_depth).embed),
            clip.encode_image(train_clip.prepare(u), normalize=True),
        ):
            found.append(float(((embed @ clean.T).argmax(1) == torch.arange(len(clean))).float().mean()))
        rows.append((float(t), *found))
    return rows


def job(rank: int, processes: int, data: Path, out: Path, images: int) -> None:
    torch.manual_seed(17)
    words, view = len(vocabulary(load(data, "train", 64)[1])), view_of(out)
    model, clip = student(out, words).requires_grad_(True), trained_clip(out, words)
    model.text.requires_grad_(False)
    plan = Plan(
        out / "world_noisy_clip.pt", images, batch=128, lr=4e-4, seed=17, muon=0.01, vectors=VECTORS,
        processes=processes, rank=rank,
    )  # fmt: skip
    clean, small = prepared(clip, data, "train")
    latents = torch.from_numpy(np.load(out / "world_latents_train.npy", mmap_mode="r"))
    model.load_state_dict(train(plan, model, Loss(model, view, latents, small, clean, plan.share)))
    clean, _ = prepared(clip, data, "test")
    test = torch.from_numpy(np.load(out / "world_latents_test.npy")[:1000]).float()
    rows = retrieval(model, clip, view, test, clean[:1000])
    torch.save(rows, out / "world_noisy_clip_retrieval.pt")
    for t, noisy, plain in rows:
        print(f"t {t:.0f} noisy @1 {noisy:.3f} clean @1 {plain:.3f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=256_000)
    args = parser.parse_args()
    spawn(lambda rank, n: job(rank, n, args.data, args.out, args.images), 1)
