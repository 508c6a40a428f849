"""The diffusion model of the 128 px world: one UNet on its latents that predicts v at an angle.

x = cos(a) x_0 + sin(a) eps and v = cos(a) eps - sin(a) x_0, with the angle a in 0..pi/2 and the timestep
1000 * a * 2 / pi. Angles are uniform, spread evenly over each batch: weighed by x_0's error, every octave of little
noise counts as much as the last one. The same weights are served as eps, v and flow models.

`python train_world_latent.py --out DIR` needs the latents of train_world_autoencoder.py in --out.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from loop import Plan, Told, spawn, train

from sdg_core.models import ADMConfig, ADMUNet

CONFIG = ADMConfig(
    image_size=32,
    model_channels=64,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_levels=(0, 1),
    head_channels=32,
    learn_sigma=False,
    resblock_updown=False,
    patch=2,
    prediction="v",
    beta_schedule="scaled_linear",
    channels=4,
)
VECTORS = ("time_embed.0", "input_blocks.0.0", "out.2")  # names of matrices that are not Muon's: the ends


class Loss:
    """Mean squared error of v."""

    def __init__(self, model: torch.nn.Module, latents: Tensor, share: int) -> None:
        self.model, self.latents, self.share = model, latents, share

    def __call__(self, step: int, generator: torch.Generator | None) -> tuple[Tensor, Told]:
        device = self.latents.device
        x_0 = self.latents[torch.randint(len(self.latents), (self.share,), generator=generator, device=device)].float()
        eps = torch.randn(x_0.shape, generator=generator, device=device)
        offset = torch.rand(1, generator=generator, device=device)
        u = (torch.arange(self.share, device=device) + offset) / self.share
        angle = (u * math.pi / 2).view(-1, 1, 1, 1)
        x, v = angle.cos() * x_0 + angle.sin() * eps, angle.cos() * eps - angle.sin() * x_0
        error = (self.model(x, 1000 * u) - v).square().mean(dim=(1, 2, 3))
        low, high = (part.mean() for part in error.detach().chunk(2))
        return error.mean(), {"low noise": low, "high": high}


def job(rank: int, processes: int, out: Path, images: int, compiled: bool, bfloat16: bool) -> None:
    plan = Plan(
        out / "world_latent.pt", images, batch=64, lr=1e-3, seed=13, weight_decay=0.0, ema=0.998,
        processes=processes, rank=rank, muon=0.02, vectors=VECTORS, decay=0.5,
        bfloat16=bfloat16,
    )  # fmt: skip
    torch.manual_seed(plan.seed)
    model = ADMUNet(CONFIG)
    latents = torch.from_numpy(np.load(out / "world_latents_train.npy", mmap_mode="c"))
    train(plan, model, Loss(torch.compile(model) if compiled else model, latents, plan.share))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=1_300_000)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--bfloat16", action="store_true", help="faster on CPUs that compute in it (avx512_bf16, amx)")
    args = parser.parse_args()
    run = functools.partial(job, out=args.out, images=args.images, compiled=args.compile, bfloat16=args.bfloat16)
    spawn(run, args.processes)
