"""ILVR (Choi et al. 2021, arXiv 2108.02938): a picture takes its low frequencies from a reference, the rest is free.

The paper replaces them after every step, phi a down- and up-sampling and y_t the reference noised to t:

    x_{t-1} = x' + phi(y_{t-1}) - phi(x')

Here they are replaced in the model's estimate of x_0, where the host's seam is:

    denoised' = denoised + phi(y_0) - phi(denoised)

The two agree in what the low frequencies of x are. A sampler's step is x' = a x_t + b denoised + c eps, with numbers
a, b, c that take alpha_t x_0 + sigma_t eps to alpha' x_0 + sigma' eps' where denoised is x_0; and phi is linear. With
phi(denoised) = phi(y_0), if phi(x_t) = alpha_t phi(y_0) + sigma_t phi(eps), then phi(x') = alpha' phi(y_0) + sigma'
phi(eps'): the reference noised to t - 1. Its noise is the sampler's own and not drawn anew at each step, so samplers
without noise can do it too. At the start, x_T = sigma_T eps has nothing of the reference yet; the a's of the steps
shrink what is missing, and the last one, a = 0, leaves none of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .device import Placed
from .precision import added, precise
from .schedule import expand


@dataclass(frozen=True, eq=False)
class LowFrequencies:
    """The low frequencies that a run's pictures are held to, between two fractions of the run.

    ``reference`` (1 or B, C, H, W), or with frames (1 or B, C, 1 or T, H, W), is clean and in the model's own space.
    ``factor``: what is coarser than so many pixels (or latent pixels) is the reference's; see ``low_pass``.
    """

    reference: Tensor
    factor: int
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        check_range(self.factor, self.start, self.end)

    def hold(self, denoised: Tensor, sigma: Tensor, percent_to_sigma: Callable[[float], float]) -> Tensor:
        """The estimate (B, C, ..., H, W) with the reference's low frequencies; itself, untouched, outside the range.

        sigma (B,) or (1,) in the terms of ``percent_to_sigma``: a fraction of the run -> sigma.
        """
        start, end = percent_to_sigma(self.start), percent_to_sigma(self.end)
        inside = (sigma <= start) & (sigma > end)
        if not bool(inside.any()):
            return denoised
        wanted = self.reference.to(precise(denoised))
        held = added(denoised, low_pass(wanted - denoised, self.factor))
        return held if bool(inside.all()) else torch.where(expand(inside, denoised), held, denoised)


def check_range(factor: int, start: float, end: float) -> None:
    """Raises ValueError for a factor below 1 and for a range that is none."""
    if factor < 1:
        raise ValueError(
            f"Got a down factor of {factor}; wanted 1 or more. Usual: 4 to 32 for pixels, 2 to 8 for latents."
        )
    if not 0 <= start < end <= 1:
        raise ValueError(
            f"Got a reference that holds from {start} to {end}; wanted 0 <= start < end <= 1. "
            "Set start below end, both as fractions of the run."
        )


def low_pass(x: Tensor, factor: int) -> Tensor:
    """phi: means over areas of factor x factor, and the smooth picture that has just these means. (..., H, W) -> same.

    A projection (phi(phi(x)) = phi(x)): so the low frequencies, once replaced, are the reference's and stay so.
    """
    exact = precise(x)
    rows, columns = (_kept(side, factor).like(exact) for side in x.shape[-2:])
    return rows @ exact @ columns.T


@functools.lru_cache(maxsize=16)
def _kept(size: int, factor: int) -> Placed:
    """phi along one axis, (size, size) in float64: U (D U)^-1 D, D the means over areas, U the linear interpolation."""
    few = max(1, round(size / factor))
    down = F.adaptive_avg_pool1d(torch.eye(size, dtype=torch.float64)[None], few)[0].T
    up = F.interpolate(torch.eye(few, dtype=torch.float64)[None], size, mode="linear", align_corners=False)[0].T
    means: Tensor = torch.linalg.solve(down @ up, down)
    return Placed(up @ means)
