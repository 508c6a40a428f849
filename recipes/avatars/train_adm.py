"""The unconditional ADM of the bundled world: v-prediction, learned sigma, linear schedule, 32 px.

It learns the 128 px world's renders, averaged to 32 px.

`python train_adm.py --data DIR --out DIR` trains (or resumes) on the CPU.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from loop import Plan, Told, spawn, train
from world_data import in_memory, load

from sdg_core.method import TimestepTable
from sdg_core.models import ADMConfig, ADMUNet

CONFIG = ADMConfig(
    image_size=32,
    model_channels=64,
    channel_mult=(1, 2, 2),
    num_res_blocks=1,
    attention_levels=(1, 2),
    head_channels=32,
    resblock_updown=False,
    patch=2,
    prediction="v",
    beta_schedule="linear",
)
VARIANCE_WEIGHT = 0.01  # of the variational term that trains the learned sigma (Nichol and Dhariwal 2021, eq. 16)
LEVELS = 4096  # of noise, their angles spread evenly: every octave of little noise counts
STRIDE = 25  # its steps span 1..STRIDE timesteps, so that the learned sigma also fits respaced sampling


class Loss:
    """Squared error of v, angles spread evenly over each batch, plus the variational bound of the variance channels."""

    def __init__(self, model: ADMUNet, images: Tensor, share: int) -> None:
        self.model, self.images, self.share = model, images, share
        table = TimestepTable.from_name("linear")
        angles = torch.pi / 2 * (torch.arange(LEVELS) + 0.5) / LEVELS
        self.levels = table.timestep(angles.tan()).round().long().to(images.device)
        self.abar = table.abar.float().to(images.device)

    def __call__(self, step: int, generator: torch.Generator | None) -> tuple[Tensor, Told]:
        device = self.images.device
        index = torch.randint(len(self.images), (self.share,), generator=generator, device=device)
        x_0 = self.images[index].float() / 127.5 - 1
        offset = torch.rand(1, generator=generator, device=device)
        u = (torch.arange(self.share, device=device) + offset) / self.share
        t = self.levels[(u * LEVELS).long().clamp(max=LEVELS - 1)]
        eps = torch.randn(x_0.shape, generator=generator, device=device)
        abar = self.abar[t].view(-1, 1, 1, 1)
        x_t = abar.sqrt() * x_0 + (1 - abar).sqrt() * eps
        v, fraction = self.model(x_t, t).chunk(2, dim=1)
        error = (v.float() - (abar.sqrt() * eps - (1 - abar).sqrt() * x_0)).square().mean()
        denoised = (abar.sqrt() * x_t - (1 - abar).sqrt() * v).detach()
        stride = torch.randint(1, STRIDE + 1, (self.share,), generator=generator, device=device)
        bound = self.variance_bound(x_0, denoised, fraction.float(), t, stride)
        return error + VARIANCE_WEIGHT * bound, {"v": error, "bound": bound}

    def variance_bound(self, x_0: Tensor, denoised: Tensor, fraction: Tensor, t: Tensor, stride: Tensor) -> Tensor:
        """KL(q(x_{t-k} | x_t, x_0) || p) in nats per element for strides k, its mean detached; t = 0 counts as 1."""
        t = t.clamp(min=1)
        abar, before = (self.abar[i].view(-1, 1, 1, 1) for i in (t, (t - stride).clamp(min=0)))
        beta = 1 - abar / before
        tilde = beta * (1 - before) / (1 - abar)
        gap = before.sqrt() * beta / (1 - abar) * (x_0 - denoised)
        log_variance = (fraction + 1) / 2 * (beta.log() - tilde.log()) + tilde.log()
        ratio = (tilde + gap.square()) * (-log_variance).exp()
        return 0.5 * (log_variance - tilde.log() - 1 + ratio).clamp(max=20).mean()


def halved(pictures: Tensor) -> Tensor:
    """Pictures (N, 3, 64, 64) uint8 averaged to half their size."""
    return torch.cat([F.avg_pool2d(part.float(), 2).round().byte() for part in pictures.split(1000)])


def job(rank: int, processes: int, data: Path, out: Path, images: int, compiled: bool) -> None:
    plan = Plan(out / "adm.pt", images, batch=64, lr=8e-4, seed=1, processes=processes, rank=rank)
    torch.manual_seed(plan.seed)
    model = ADMUNet(CONFIG)
    pictures = halved(in_memory(load(data, "train", 64)[0]))
    forward = torch.compile(model) if compiled else model
    train(plan, model, Loss(forward, pictures, plan.share))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=240_000)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="a third faster after two minutes of compiling")
    args = parser.parse_args()
    run = functools.partial(job, data=args.data, out=args.out, images=args.images, compiled=args.compile)
    spawn(run, args.processes)
