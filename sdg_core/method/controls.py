"""The artists' controls: when a guidance acts. Each is one field of a ``Term``; without any, nothing changes.

Controls that need the gradient of one guidance by itself make its term stand *apart*: it gets a pass of its own. All
others go on sharing one pass.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Ease = Literal["constant", "linear", "ease in", "ease out", "ease in and out"]
EASES: tuple[Ease, ...] = get_args(Ease)

_EASED: dict[Ease, Callable[[Tensor], Tensor]] = {
    "constant": torch.zeros_like,
    "linear": lambda u: u,
    "ease in": lambda u: u.square(),
    "ease out": lambda u: 1 - (1 - u).square(),
    "ease in and out": lambda u: u.square() * (3 - 2 * u),
}


@dataclass(frozen=True)
class Curve:
    """A factor on the strength over the run, through ``points`` (p, v), p from 0 (pure noise) to 1 (finished):

        v(p) = v_i + (v_{i+1} - v_i) * e((p - p_i) / (p_{i+1} - p_i))

    e(u) by ``ease``: 0 (constant: a point's value holds up to the next), u, u^2, 1 - (1 - u)^2, u^2 (3 - 2 u). Before
    the first point and after the last their values hold.
    """

    points: tuple[tuple[float, float], ...] = ((0.0, 1.0),)
    ease: Ease = "linear"

    def __post_init__(self) -> None:
        positions = [p for p, _ in self.points]
        rising = all(a < b for a, b in itertools.pairwise(positions))
        values = all(math.isfinite(v) and v >= 0 for _, v in self.points)
        if not positions or not rising or not all(0 <= p <= 1 for p in positions) or not values:
            raise ValueError(
                f"Got a curve through the points {list(self.points)}; wanted one or more, each a part of the run from "
                "0 to 1, rising, and a factor of 0 or more there. Write for example 0:0, 0.3:1, 1:0.2."
            )
        if self.ease not in EASES:
            raise ValueError(f'Got the curve "{self.ease}"; wanted one of: {", ".join(EASES)}.')

    def __call__(self, percent: Tensor) -> Tensor:
        """The factors at parts of the run (B,)."""
        p, v = percent.new_tensor(self.points).T.contiguous()
        right = torch.searchsorted(p, percent.contiguous(), right=True).clamp(1, max(len(p) - 1, 1))
        left = right - 1
        right = right.clamp(max=len(p) - 1)
        part = ((percent - p[left]) / (p[right] - p[left]).clamp(min=1e-12)).clamp(0, 1)
        between = v[left] + (v[right] - v[left]) * _EASED[self.ease](part)
        return torch.where(percent >= p[right], v[right], between)


def check_every(every: int) -> int:
    """Every how many steps, if that is 1 or more. Raises ValueError otherwise."""
    if every < 1:
        raise ValueError(f"Got a gradient every {every} steps; wanted 1 (every step) or more. Set it to 1, 2 or 3.")
    return every
