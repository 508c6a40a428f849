"""One network, three faces: trained once, on the angle, and served exactly as an eps, a v or a flow model.

With tan(a) = sigma / alpha, x_t of every convention is a multiple of x_vp = cos(a) x_0 + sin(a) eps. The network reads
x_vp at the time 1000 * a / (pi / 2) and gives v = cos(a) eps - sin(a) x_0 (Salimans and Ho 2022, arXiv 2202.00512), so

    eps = sin(a) x_vp + cos(a) v,    x_0 = cos(a) x_vp - sin(a) v,    flow = eps - x_0.

An eps and a v model are given x_vp and a timestep of their schedule, whose noise ratio is tan(a). A flow model is given
x_t = (1 - s) x_0 + s eps and 1000 s: tan(a) = s / (1 - s), and x_vp = x_t / hypot(1 - s, s) = (sin(a) + cos(a)) x_t.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ..method import TimestepTable, expand, precise

Number = TypeVar("Number", float, Tensor)

FACES = ("eps", "v", "flow")

FLOW_SHIFT = 1.5
"""Of the flow that a network of the angle passes for: its run then has about the noise of the scaled linear schedule's
at every part, and what was chosen for an eps or v face fits it."""


def shifted(time: Number, shift: float) -> Number:
    """sigma of a flow at the part ``time`` of its run that is still to go: shift t / (1 + (shift - 1) t), which is
    shift times the noise ratio t / (1 - t) of the straight line (Esser et al. 2024, arXiv 2403.03206). As the host's,
    to the bit."""
    return time if shift == 1 else shift * time / (1 + (shift - 1) * time)


@dataclass(frozen=True)
class Face:
    """What the network passes for: ``prediction`` is one of ``FACES``; the timesteps of eps and v are ``table``'s."""

    prediction: str
    table: TimestepTable

    def __call__(self, network: Callable[[Tensor, Tensor], Tensor], x: Tensor, timesteps: Tensor) -> Tensor:
        """The model of this face at x (B, C, H, W) and timesteps (B,): its prediction, in shape and dtype of x.

        The network is given x_vp in the dtype of x; angle, time and sums are in that precision, at least float32.
        """
        a = self.angle(timesteps).to(precise(x))
        sin, cos = expand(a.sin(), x), expand(a.cos(), x)
        x_vp = precise(x) * (sin + cos) if self.prediction == "flow" else precise(x)
        v = network(x_vp.to(x), 1000 / (torch.pi / 2) * a)
        eps, x_0 = sin * x_vp + cos * v, cos * x_vp - sin * v
        return {"eps": eps, "v": v, "flow": eps - x_0}[self.prediction].to(x)

    def angle(self, timesteps: Tensor) -> Tensor:
        """a (B,) in 0..pi/2: of the flow in the precision of timesteps, else in float64 on the CPU, as the table is."""
        if self.prediction == "flow":
            s = precise(timesteps) / 1000
            return torch.atan2(s, 1 - s)
        return self.table.sigma(timesteps).atan()
