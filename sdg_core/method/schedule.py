"""What x_t means at sigma, and which timestep of an encoder's training schedule has that noise.

x_t = alpha * x_0 + sigma * eps. Three conventions:

- ``VE``: alpha = 1 (eps, v and EDM models in k-diffusion's scaling),
- ``FLOW``: alpha = 1 - sigma (SD3, Flux and kin),
- ``VP``: alpha = sqrt(1 - sigma^2) (DDPM's own scaling, what noisy encoders read).

Dividing any x_t by sqrt(alpha^2 + sigma^2) gives VP; the ratio sigma / alpha names the noise in every convention.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .device import brought
from .precision import precise

MIN_ALPHA = 1e-4
"""Below this signal scale (flow models at sigma = 1) x_t holds nothing to read: the step is not guided."""


class Convention(enum.Enum):
    """How a model's x_t is scaled."""

    VE = "ve"
    FLOW = "flow"
    VP = "vp"

    def alpha(self, sigma: Tensor) -> Tensor:
        """Signal scale at noise level sigma, same shape."""
        if self is Convention.VE:
            return torch.ones_like(sigma)
        if self is Convention.FLOW:
            return 1 - sigma
        return (1 - sigma.square()).clamp(min=0).sqrt()


def betas(name: str, timesteps: int = 1000) -> Tensor:
    """The field's training schedules, float64 (timesteps,).

    guided-diffusion's: "linear" runs from 1e-4 to 2e-2 (at 1000 steps), "cosine" is Nichol and Dhariwal's with betas
    at most 0.999. Latent diffusion's: "scaled_linear", the square of a line whose ends square to 8.5e-4 and 1.2e-2.
    """
    if name == "linear":
        scale = 1000 / timesteps
        return torch.linspace(scale * 1e-4, scale * 2e-2, timesteps, dtype=torch.float64)
    if name == "cosine":
        t = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
        abar = torch.cos((t + 0.008) / 1.008 * torch.pi / 2).square()
        return (1 - abar[1:] / abar[:-1]).clamp(max=0.999)
    if name == "scaled_linear":
        return torch.linspace(8.5e-4**0.5, 1.2e-2**0.5, timesteps, dtype=torch.float64).square()
    raise ValueError(f'Got the noise schedule "{name}"; wanted "linear", "cosine" or "scaled_linear".')


@dataclass(frozen=True)
class TimestepTable:
    """A discrete schedule: the noise of every timestep, ``ratio[t] = sqrt((1 - abar_t) / abar_t)``, ascending (T,)."""

    ratio: Tensor

    @classmethod
    def from_name(cls, name: str) -> TimestepTable:
        abar = torch.cumprod(1 - betas(name), 0)
        return cls(((1 - abar) / abar).sqrt())

    @property
    def abar(self) -> Tensor:
        """Cumulative signal power (T,): 1 / (1 + ratio^2)."""
        return 1 / (1 + self.ratio.square())

    def timestep(self, ratio: Tensor) -> Tensor:
        """The (fractional) timestep whose sigma / alpha is ``ratio``, by linear interpolation in its logarithm.

        Any shape, in the precision of ``ratio``, at least float32; clamped to 0..T-1.
        """
        table = self.ratio.log()  # on the CPU, in float64, which some devices lack
        wanted = ratio.cpu().double().clamp(min=1e-12).log()
        right = torch.searchsorted(table, wanted.contiguous()).clamp(1, len(table) - 1)
        left = right - 1
        part = (wanted - table[left]) / (table[right] - table[left])
        return (left + part).clamp(0, len(table) - 1).to(precise(ratio))

    def sigma(self, timestep: Tensor) -> Tensor:
        """The inverse of ``timestep``: the noise ratio at a fractional timestep, float64, on the CPU."""
        table = self.ratio.log()
        t = timestep.cpu().double().clamp(0, len(table) - 1)
        left = t.floor().long().clamp(max=len(table) - 2)
        return (table[left] + (t - left) * (table[left + 1] - table[left])).exp()


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoids of t (B,), cosines first: (B, dim), in the precision of t, at least float32. ``dim`` is even."""
    t, half = precise(timesteps), dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=t.dtype, device=t.device) / half)
    angles = t[:, None] * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def expand(value: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, ...) on the device of ``like`` (B, ...), so that it broadcasts over it."""
    return brought(value, like).reshape(-1, *(1,) * (like.ndim - 1))
