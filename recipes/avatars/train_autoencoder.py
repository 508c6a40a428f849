"""The autoencoder of the latent test world, in TAESD's layout: 32 px pictures to 4 x 16 x 16 latents. And RGB factors.

`python train_autoencoder.py --data DIR --out DIR` trains (or resumes), then writes the latents of the train and test
splits and the linear factors that give a small picture from a latent.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from data import load
from loop import Plan, spawn, train

from sdg_core.models import tiny_decoder, tiny_encoder

WIDTH, LATENT_CHANNELS = 32, 4
NOISE = 0.1  # added to latents while training: a diffusion model's are never exact
PENALTY = 1e-3  # keeps latents near unit size, against the noise


def build() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "encoder": tiny_encoder(WIDTH, (1, 2), LATENT_CHANNELS),
            "decoder": tiny_decoder(WIDTH, (2, 1), LATENT_CHANNELS),
        }
    )


def job(rank: int, processes: int, data: Path, out: Path, images: int) -> None:
    torch.manual_seed(5)
    model = build().to(memory_format=torch.channels_last)
    pictures = torch.from_numpy(load(data, "train")[0]).permute(0, 3, 1, 2)
    plan = Plan(out / "autoencoder.pt", images, batch=32, lr=1e-3, seed=5, ema=0.995, processes=processes, rank=rank)

    def loss(step: int, generator: torch.Generator) -> tuple[Tensor, str]:
        index = torch.randint(len(pictures), (plan.share,), generator=generator)
        x = pictures[index].float() / 255
        z = model["encoder"](x)
        noise = torch.randn(z.shape, generator=generator)
        error = (model["decoder"](z + NOISE * noise) - x).abs().mean()
        return error + PENALTY * z.square().mean(), f"l1 {error.item():.4f} rms {z.square().mean().sqrt().item():.2f}"

    model.load_state_dict(train(plan, model, loss))
    if rank == 0:
        export_latents(model.eval(), data, out)


@torch.no_grad()
def export_latents(model: nn.ModuleDict, data: Path, out: Path) -> None:
    """`latents_<split>.pt` (N, 4, 16, 16) float16 with zero mean and unit variance, `latent_format.pt`: shift, scale,
    factors (3, 4) and bias (3,) of the linear picture, and the share of the small picture's variance they explain."""
    raw = {}
    for split in ("train", "test"):
        pictures = torch.from_numpy(load(data, split)[0]).permute(0, 3, 1, 2)
        raw[split] = torch.cat([model["encoder"](part.float() / 255) for part in pictures.split(256)])
    shift, scale = raw["train"].mean(), 1 / raw["train"].std()
    latents = {split: (z - shift) * scale for split, z in raw.items()}
    for split, z in latents.items():
        torch.save(z.half(), out / f"latents_{split}.pt")
    factors, bias, explained = fit_factors(latents, data)
    kept = {"shift": shift, "scale": scale, "factors": factors, "bias": bias, "explained": explained}
    torch.save(kept, out / "latent_format.pt")
    test = torch.from_numpy(load(data, "test")[0]).permute(0, 3, 1, 2).float() / 255
    again = torch.cat([model["decoder"](part).clamp(0, 1) for part in raw["test"].split(256)])
    psnr = -10 * (again - test).square().mean().log10()
    print(f"held-out PSNR {psnr:.1f} dB, linear picture explains {explained:.3f}, std by channel", flush=True)
    print(latents["train"].std(dim=(0, 2, 3)), latents["train"].mean(dim=(0, 2, 3)), factors, bias, flush=True)


def fit_factors(latents: dict[str, Tensor], data: Path) -> tuple[Tensor, Tensor, float]:
    """Least squares from latents to the picture averaged to latent size: factors (3, 4), bias (3,), held-out R^2.

    By the normal equations in float64: there are 16 million rows and five columns.
    """

    def small(split: str) -> Tensor:
        pictures = torch.from_numpy(load(data, split)[0]).permute(0, 3, 1, 2)
        return torch.cat([F.avg_pool2d(part.float() / 127.5 - 1, 2) for part in pictures.split(1024)])

    def rows(z: Tensor) -> Tensor:
        flat = z.movedim(1, -1).reshape(-1, LATENT_CHANNELS)
        return torch.cat([flat, torch.ones(len(flat), 1)], dim=1)

    wanted = {split: small(split).movedim(1, -1).reshape(-1, 3) for split in latents}
    table = rows(latents["train"]).double()
    solution = torch.linalg.solve(table.T @ table, table.T @ wanted["train"].double()).float()  # (5, 3)
    rest = rows(latents["test"]) @ solution - wanted["test"]
    explained = 1 - float(rest.square().sum() / (wanted["test"] - wanted["test"].mean(0)).square().sum())
    return solution[:LATENT_CHANNELS].T.contiguous(), solution[LATENT_CHANNELS].clone(), explained


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=64_000)
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    spawn(functools.partial(job, data=args.data, out=args.out, images=args.images), args.processes)
