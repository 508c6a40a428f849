"""The autoencoder of the 128 px world: 128 x 128 x 3 <-> 32 x 32 x C, on crops of 64 px. And its linear picture.

`python train_world_autoencoder.py --data DIR --out DIR` trains (or resumes), then writes the latents of the splits, and
the linear factors that give a small picture from a latent. With `--use autoencoder.safetensors` it writes those of a
finished one.

The loss is L1, squared error, L1 of the differences between neighbours (flat areas flat, lines sharp), and L1 of a
linear picture that is trained along, so that colours lie in the latents where a linear view finds them.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from loop import Plan, Told, spawn, train
from world_data import load

from sdg_core.files import load as load_file
from sdg_core.method import LatentFormat
from sdg_core.models import TinyAutoencoder, load_tiny_autoencoder

CHANNELS, DOWNSCALE, CROP = 4, 4, 64
CONFIG = {
    "width": [32, 64],
    "encoder_blocks": [1, 2],
    "decoder_blocks": [2, 1],
    "decoder_width": [96, 32],
    "channels": CHANNELS,
    "patch": 2,
}
NOISE = 0.05  # added to latents while training: a diffusion model's are never exact
SQUARED, EDGES, LINEAR, PENALTY = 2.0, 1.0, 0.1, 1e-3


def build() -> nn.ModuleDict:
    """The autoencoder, and the linear picture (in 0..1) that is trained along with it."""
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in CONFIG.items()}
    return nn.ModuleDict({"autoencoder": TinyAutoencoder(**options), "linear": nn.Conv2d(CHANNELS, 3, 1)})


def differences(x: Tensor) -> tuple[Tensor, Tensor]:
    """Between neighbours, down and across."""
    return x[:, :, 1:] - x[:, :, :-1], x[:, :, :, 1:] - x[:, :, :, :-1]


class Loss:
    def __init__(self, model: nn.ModuleDict, pictures: np.ndarray, share: int) -> None:
        self.model, self.pictures, self.share = model, pictures, share

    def __call__(self, step: int, generator: torch.Generator) -> tuple[Tensor, Told]:
        x = self.crops(generator)
        autoencoder: TinyAutoencoder = self.model["autoencoder"]
        z = autoencoder.encoder(x)
        again = autoencoder.decoder(z + NOISE * torch.randn(z.shape, generator=generator))
        error = again - x
        edges = sum((a - b).abs().mean() for a, b in zip(differences(again), differences(x), strict=True))
        linear = (self.model["linear"](z) - F.avg_pool2d(x, DOWNSCALE)).abs().mean()
        squared = error.square().mean()
        loss = error.abs().mean() + SQUARED * squared + EDGES * edges + LINEAR * linear + PENALTY * z.square().mean()
        psnr = -10 * squared.detach().log10()
        return loss, {"psnr": psnr, "linear": linear, "rms": z.square().mean().sqrt()}

    def crops(self, generator: torch.Generator) -> Tensor:
        """Random crops (B, 3, 64, 64) in 0..1, at every place that keeps whole latent pixels; half of them mirrored."""
        numbers = torch.randint(len(self.pictures), (self.share,), generator=generator).tolist()
        reach = (self.pictures.shape[1] - CROP) // DOWNSCALE + 1
        corners = (torch.randint(reach, (self.share, 2), generator=generator) * DOWNSCALE).tolist()
        crops = [self.pictures[n, y : y + CROP, x : x + CROP] for n, (y, x) in zip(numbers, corners, strict=True)]
        x = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 255
        mirrored = torch.rand(self.share, 1, 1, 1, generator=generator) < 0.5
        return torch.where(mirrored, x.flip(3), x).contiguous(memory_format=torch.channels_last)


def job(rank: int, processes: int, data: Path, out: Path, images: int) -> None:
    torch.manual_seed(11)
    model = build().to(memory_format=torch.channels_last)
    plan = Plan(
        out / "world_autoencoder.pt", images, batch=64, lr=2e-3, seed=11, ema=0.998, weight_decay=0.0,
        processes=processes, rank=rank, muon=0.02, decay=0.5,
    )  # fmt: skip
    model.load_state_dict(train(plan, model, Loss(model, load(data, "train", 128)[0], plan.share)))
    if rank == 0:
        export_latents(model["autoencoder"].eval(), data, out)


def use(file: Path, data: Path, out: Path) -> None:
    """Latents of a finished autoencoder, in the format that its file names."""
    out.mkdir(parents=True, exist_ok=True)
    space = LatentFormat.from_json(load_file(file, "autoencoder")[0]["latent_format"])
    export_latents(load_tiny_autoencoder(file), data, out, space)


@torch.no_grad()
def export_latents(model: TinyAutoencoder, data: Path, out: Path, space: LatentFormat | None = None) -> None:
    """`world_latents_<split>.npy` (N, C, 32, 32) float16 of zero mean and unit variance over everything, and
    `world_format.pt`: shift and scale (model latents are (z - shift) * scale), factors (3, C) and bias (3,) of the
    linear picture in -1..1, and how much of the small picture's variance it explains. ``space`` fixes all four."""
    shift, scale = (None, None) if space is None else (torch.tensor(space.shift), torch.tensor(space.scale))
    for split in ("train", "test"):
        pictures, _ = load(data, split, 128)
        raw = torch.cat([model.encoder(part) for part in parts(pictures)])
        if shift is None:
            shift, scale = raw.mean(), 1 / raw.std()
        np.save(out / f"world_latents_{split}.npy", ((raw - shift) * scale).half().numpy())
    latents = {split: np.load(out / f"world_latents_{split}.npy", mmap_mode="r") for split in ("train", "test")}
    factors, bias, explained = fit_factors(latents, data)
    if space is not None:
        factors, bias = torch.tensor(space.factors), torch.tensor(space.bias)
    kept = {"shift": shift, "scale": scale, "factors": factors, "bias": bias, "explained": explained}
    torch.save(kept, out / "world_format.pt")
    print(f"held out: {measured(model, data)}, linear picture explains {explained:.4f}", flush=True)


def parts(pictures: np.ndarray, size: int = 100) -> Iterator[Tensor]:
    """Pictures in 0..1, a few at a time."""
    return (
        torch.from_numpy(pictures[i : i + size].copy()).permute(0, 3, 1, 2).float() / 255
        for i in range(0, len(pictures), size)
    )


@torch.no_grad()
def measured(model: TinyAutoencoder, data: Path, count: int = 2000) -> str:
    """PSNR over everything and averaged over pictures, and the grain, of pictures of the test split."""
    errors, grain = [], []
    for x in parts(load(data, "test", 128)[0][:count]):
        again = model.decoder(model.encoder(x)).clamp(0, 1)
        errors.append((again - x).square().mean(dim=(1, 2, 3)))
        grain.append(laplacian(again * 2 - 1))
    error = torch.cat(errors)
    over_all, mean = -10 * error.mean().log10(), (-10 * error.log10()).mean()
    return f"PSNR {over_all:.2f} dB, mean of pictures {mean:.2f} dB, grain {torch.cat(grain).mean():.4f}"


def laplacian(x: Tensor) -> Tensor:
    """Median absolute Laplacian of pictures in -1..1: (B,)."""
    inner = x[..., 1:-1, 1:-1]
    around = x[..., :-2, 1:-1] + x[..., 2:, 1:-1] + x[..., 1:-1, :-2] + x[..., 1:-1, 2:]
    return (around - 4 * inner).abs().flatten(1).median(dim=1).values


def fit_factors(latents: dict[str, np.ndarray], data: Path) -> tuple[Tensor, Tensor, float]:
    """Least squares from latents to the picture averaged to latent size: factors (3, C), bias (3,), held-out R^2."""
    rows = dict.fromkeys(latents, 6_000)

    def pair(split: str) -> tuple[Tensor, Tensor]:
        z = torch.from_numpy(latents[split][: rows[split]].astype(np.float32)).movedim(1, -1).reshape(-1, CHANNELS)
        small = [F.avg_pool2d(part * 2 - 1, DOWNSCALE) for part in parts(load(data, split, 128)[0][: rows[split]])]
        table = torch.cat([z, torch.ones(len(z), 1)], dim=1).double()
        return table, torch.cat(small).movedim(1, -1).reshape(-1, 3).double()

    table, wanted = pair("train")
    solution = torch.linalg.solve(table.T @ table, table.T @ wanted)  # (C + 1, 3)
    held, truth = pair("test")
    explained = 1 - float((held @ solution - truth).square().sum() / (truth - truth.mean(0)).square().sum())
    return solution[:CHANNELS].T.float().contiguous(), solution[CHANNELS].float(), explained


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=320_000)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--use", type=Path)
    args = parser.parse_args()
    if args.use is not None:
        use(args.use, args.data, args.out)
        sys.exit()
    spawn(functools.partial(job, data=args.data, out=args.out, images=args.images), args.processes)
