"""An ADM as a denoiser: its output at sigma as an estimate of x_0, and the noise levels that its samplers take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..method import Convention, TimestepTable, expand, precise
from .adm import ADMUNet
from .faces import shifted


@dataclass(frozen=True)
class Prediction:
    """A model's estimate at one step: ``denoised`` (B, C, H, W), and, where Sigma is learned, where the log variance
    lies between beta_tilde (0) and beta (1), same shape."""

    denoised: Tensor
    variance_fraction: Tensor | None = None


class ADMDenoiser:
    """An ADM UNet as a denoiser, in VE scaling, or, where it predicts the flow, in FLOW scaling.

    Pixels of eps and v models are clamped to -1..1 (the paper's clip_denoised); flows and latents have no bounds.
    """

    def __init__(self, unet: ADMUNet) -> None:
        self.unet = unet
        self.table = TimestepTable.from_name(unet.config.beta_schedule)
        self.convention = Convention.FLOW if unet.config.prediction == "flow" else Convention.VE

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what it draws."""
        config = self.unet.config
        return config.channels, config.image_size, config.image_size

    def predict(self, x: Tensor, sigma: Tensor) -> Prediction:
        """Denoised and the variance fraction at sigma (B,), read at the nearest timestep of training.

        A gradient flows back to an x that asks for one, and to nothing else.
        """
        s, config = expand(precise(sigma), x), self.unet.config
        if self.convention is Convention.FLOW:
            with torch.set_grad_enabled(x.requires_grad):
                return Prediction(x - self.unet(x, 1000 * sigma) * s)
        with torch.set_grad_enabled(x.requires_grad):
            power = s.square() + 1
            out = self.unet(x / power.sqrt(), self.table.timestep(sigma).round())
        mean, variance = out.chunk(2, dim=1) if config.learn_sigma else (out, None)
        denoised = x - mean * s if config.prediction == "eps" else x / power - mean * s / power.sqrt()
        bounded = denoised if config.latent_format is not None else denoised.clamp(-1, 1)
        return Prediction(bounded, None if variance is None else (variance + 1) / 2)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.predict(x, sigma).denoised

    def sigmas(self, steps: int) -> Tensor:
        """The sampler's noise levels, (steps + 1,): ComfyUI's "normal" schedule, or the flow's line with its shift."""
        if self.convention is Convention.FLOW:
            return shifted(torch.arange(steps, -1, -1) / steps, self.unet.config.flow_shift)  # to the host's bits
        return normal_sigmas(self.table, steps)

    def initial(self, noise: Tensor, sigmas: Tensor) -> Tensor:
        """x at the first sigma, from unit noise."""
        return noise * sigmas[0] if self.convention is Convention.FLOW else initial(noise, sigmas[0])

    def noised(self, x_0: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
        """x at the first sigma, from clean x_0 and unit noise."""
        s = sigmas[0]
        return (1 - s) * x_0 + s * noise if self.convention is Convention.FLOW else x_0 + s * noise

    def percent_to_sigma(self) -> Callable[[float], float]:
        """Fraction of the run -> sigma, as ComfyUI counts it."""
        if self.convention is Convention.FLOW:
            return lambda percent: shifted(1 - percent, self.unet.config.flow_shift)
        return percent_to_sigma(self.table)


def normal_sigmas(table: TimestepTable, steps: int) -> Tensor:
    """ComfyUI's "normal" schedule: timesteps from the last to the first, equally spaced, then 0: (steps + 1,).

    Interpolated in float32 with the host's operations: guidance amplifies the last bit of a sigma.
    """
    log_ratio = table.ratio.log().float()
    t = torch.linspace(len(log_ratio) - 1, 0, steps, dtype=torch.float32)
    low, high, w = log_ratio[t.floor().long()], log_ratio[t.ceil().long()], t.frac()
    return torch.cat([((1 - w) * low + w * high).exp(), log_ratio.new_zeros(1)])


def percent_to_sigma(table: TimestepTable) -> Callable[[float], float]:
    """Fraction of the run -> sigma, as ComfyUI counts it: 0 is above every sigma, 1 is 0."""

    def sigma(percent: float) -> float:
        if percent <= 0 or percent >= 1:
            return float("inf") if percent <= 0 else 0.0
        return float(table.sigma(torch.tensor((1 - percent) * (len(table.ratio) - 1))))

    return sigma


def initial(noise: Tensor, sigma: Tensor) -> Tensor:
    """x at the first sigma, from unit noise: the variance of noised data, as ComfyUI starts a full denoise."""
    return noise * (1 + sigma.square()).sqrt()
