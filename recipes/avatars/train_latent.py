"""The diffusion models of the latent test world: one UNet on the avatars' latents that predicts v, eps or the flow.

`python train_latent.py v --out DIR` needs the latents of train_autoencoder.py in --out. `eps` and `flow`
start from the weights of `v`: what a picture looks like is the same, only what is asked of the last layer differs.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from loop import Plan, spawn, train

from sdg_core.method import TimestepTable
from sdg_core.models import ADMConfig, ADMUNet

CONFIG = ADMConfig(
    image_size=16,
    model_channels=32,
    channel_mult=(3, 2),
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
IMAGES = {"v": 153_600, "eps": 64_000, "flow": 64_000}


class Loss:
    """Mean squared error of what the model predicts, at timesteps spread evenly over each batch.

    v and eps weigh by min(SNR, 5) in units of x_0; the flow is plain, with sigma uniform.
    """

    def __init__(self, model: torch.nn.Module, latents: Tensor, share: int, prediction: str) -> None:
        self.model, self.latents, self.share, self.prediction = model, latents, share, prediction
        self.abar = TimestepTable.from_name(CONFIG.beta_schedule).abar.float()

    def __call__(self, step: int, generator: torch.Generator) -> tuple[Tensor, str]:
        index = torch.randint(len(self.latents), (self.share,), generator=generator)
        x_0 = self.latents[index].float()
        eps = torch.randn(x_0.shape, generator=generator)
        u = (torch.arange(self.share) + torch.rand(1, generator=generator)) / self.share
        alpha, sigma, t = self.noise_at(u)
        out = self.model(alpha * x_0 + sigma * eps, t)
        wanted = {"v": alpha * eps - sigma * x_0, "eps": eps, "flow": eps - x_0}[self.prediction]
        snr = (alpha / sigma).square()
        weight = {
            "v": (5 / (snr + 1)).clamp(max=1), "eps": (5 / snr).clamp(max=1), "flow": torch.ones_like(snr)
        }[self.prediction]  # fmt: skip
        error = (weight * (out - wanted).square()).mean()
        return error, self.prediction

    def noise_at(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """alpha and sigma (B, 1, 1, 1), and the timestep (B,) that the model is told, from u in 0..1."""
        if self.prediction == "flow":
            sigma = u.clamp(1e-3, 1).view(-1, 1, 1, 1)
            return 1 - sigma, sigma, sigma.flatten() * 1000
        t = (u * 1000).long().clamp(max=999)
        abar = self.abar[t].view(-1, 1, 1, 1)
        return abar.sqrt(), (1 - abar).sqrt(), t


def job(rank: int, processes: int, prediction: str, out: Path, images: int, compiled: bool) -> None:
    fresh = prediction == "v"
    plan = Plan(
        out / f"latent_{prediction}.pt",
        images,
        batch=128,
        lr=1e-3 if fresh else 6e-4,
        seed=6,
        processes=processes,
        rank=rank,
    )
    torch.manual_seed(plan.seed)
    model = ADMUNet(dataclasses.replace(CONFIG, prediction=prediction))
    if not fresh:
        model.load_state_dict(torch.load(out / "latent_v.pt", weights_only=True)["ema"])
    latents = torch.load(out / "latents_train.pt", weights_only=True)
    forward = torch.compile(model) if compiled else model
    train(plan, model, Loss(forward, latents, plan.share, prediction))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prediction", choices=IMAGES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    images = args.images or IMAGES[args.prediction]
    run = functools.partial(job, prediction=args.prediction, out=args.out, images=images, compiled=args.compile)
    spawn(run, args.processes)
