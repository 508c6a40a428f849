"""How strongly a step is guided: the size of the shift, bounded by (or set to) a multiple of the model's own step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .device import brought
from .schedule import expand

REACH = 2.0
"""How many standard deviations of the data an absolute shift has at most.

The model's own step at the first noise levels is many: a shift as large leaps beyond what was asked for, to the loudest
picture that shows some of it.
"""


@dataclass(frozen=True)
class Strength:
    """How scores become a shift of denoised.

    "absolute": the paper's scale, shift = sigma^2 / alpha * grad F.
    "relative": the direction of that, of a fixed size at every step and for every sample:

        shift = cap * rms(step) * grad F / rms(grad F),  step = (x_t - alpha * denoised) / alpha = sigma / alpha * eps

    Both are in units of x_0, so at one noise level sigma / alpha one number is one shift, in every convention and at
    every size. Euler's next x_t / alpha depends on sigma / alpha and on denoised alone, so a whole run of one model
    is pulled alike too; ``avatars.relative`` measures how alike, of models trained apart (docs/relative.md).
    ``cap``: the shift's RMS is at most this multiple of the model's own eps step, per sample, and, absolute, at most
    ``REACH`` standard deviations of the data, which targets are free of; None is no bound.
    """

    mode: Literal["absolute", "relative"] = "absolute"
    cap: float | None = 1.0

    def __post_init__(self) -> None:
        if self.mode not in ("absolute", "relative"):
            raise ValueError(f'Got the strength "{self.mode}"; wanted "absolute" or "relative".')
        if self.cap is not None and not self.cap > 0:
            raise ValueError(f"Got a cap of {self.cap}; wanted a positive number, or None for no bound.")
        if self.mode == "relative" and self.cap is None:
            raise ValueError("Relative strength needs a cap: the fraction of the model's own step to shift by.")


class Bounded(NamedTuple):
    """A shift (B, ...) of its final size, that size over the model's step (B,), where the cap bound it (B,), what it
    was multiplied by (B,), and where it was not finite and became 0 (B,)."""

    shift: Tensor
    pull: Tensor
    capped: Tensor
    factor: Tensor
    broken: Tensor


def bounded(shift: Tensor, step: Tensor, strength: Strength, variance: float, *parts: Tensor | None) -> Bounded:
    """The shift (B, ...) with its RMS bounded by (or, relative, set to) cap * step (B,), per sample; never non-finite.

    absolute: shift' = shift * min(1, bound / rms(shift)), bound = min(cap * step, REACH * sqrt(variance))
    relative: shift' = shift * cap * step / rms(shift)

    ``variance`` is that of the data, per element. ``parts`` (B,) multiply the bound.
    """
    size = rms(shift)
    broken = ~torch.isfinite(size)
    shift = torch.where(expand(broken, shift), torch.zeros_like(shift), shift)
    size = torch.where(broken, torch.zeros_like(size), size)
    tiny = torch.finfo(torch.float32).tiny
    factor, capped = torch.ones_like(size), torch.zeros_like(broken)
    if strength.cap is not None:
        bound = strength.cap * step
        if strength.mode == "absolute":
            bound = bound.clamp(max=REACH * math.sqrt(variance))
        for part in parts:
            bound = bound if part is None else bound * brought(part.to(bound.dtype), bound)
        allowed = bound / size.clamp(min=tiny)
        factor = allowed if strength.mode == "relative" else allowed.clamp(max=1)
        factor = torch.where(size > 0, factor, torch.zeros_like(factor))
        capped = (allowed < 1) & (strength.mode == "absolute")
    return Bounded(shift * expand(factor, shift), size * factor / step.clamp(min=tiny), capped, factor, broken)


def rms(x: Tensor) -> Tensor:
    """Root mean square per sample: (B, ...) -> (B,)."""
    return x.square().flatten(1).mean(dim=1).sqrt()
