"""The artists' controls: when, where and how far a guidance acts.

Each is one field of a ``Term``; without any, nothing changes.

Controls that need the gradient of one guidance by itself make its term stand *apart*: it gets a pass of its own. All
others go on sharing one pass.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .device import beside

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


@dataclass(frozen=True, eq=False)
class Region:
    """Where a guidance reads and acts, by masks m (N, 1, h, w) in 0..1: 1 inside, 0 outside.

        shift' = m * shift,   the encoder sees m * picture + (1 - m) * grey

    and distances of maps and Gram matrices average over places with the weight m. ``picture``: for what is sampled, one
    mask, or one for each picture (each frame of a video). ``reference``: for the references, one or one each. None is
    everywhere. m rises from 0 at the mask's edge to 1 over ``feather``, a part of its shorter side, inwards.
    """

    picture: Tensor | None = None
    reference: Tensor | None = None
    feather: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.feather <= 0.5:
            raise ValueError(f"Got a feather of {self.feather}; wanted 0 (a sharp edge) to 0.5, a part of the picture.")
        for name, mask in (("mask", self.picture), ("reference mask", self.reference)):
            if mask is not None and not bool((feathered(mask, self.feather) > 0).any()):
                raise ValueError(
                    f"Got a {name} of which nothing is left at a feather of {self.feather}; wanted some place to act. "
                    "Draw a larger one, or lower feather."
                )

    def of_picture(self, number: Tensor, size: tuple[int, int], like: Tensor) -> Tensor | None:
        """The masks (B, 1, H, W) of the pictures of these numbers (B,), on the CPU, at a size, with the device and
        precision of another tensor; None is everywhere."""
        if self.picture is None:
            return None
        mask = _at_size(self, size, like.device, like.dtype)
        return mask.expand(len(number), -1, -1, -1) if len(mask) == 1 else mask[beside(number % len(mask), mask)]

    def of_references(self, count: int, size: tuple[int, int]) -> Tensor | None:
        """The masks (count or 1, 1, H, W) of references at a size. Raises ValueError where their numbers differ."""
        if self.reference is None:
            return None
        if len(self.reference) not in (1, count):
            raise ValueError(
                f"Got {len(self.reference)} reference masks for {count} reference pictures; wanted one for all, or one "
                "for each. Connect another reference_mask."
            )
        return F.interpolate(feathered(self.reference, self.feather), size, mode="area")


@functools.lru_cache(maxsize=32)
def _at_size(region: Region, size: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """The masks (N, 1, H, W) of the pictures: a run asks for them at every step."""
    assert region.picture is not None
    with torch.inference_mode(False):
        return F.interpolate(feathered(region.picture.clone(), region.feather), size, mode="area").to(device, dtype)


def feathered(mask: Tensor, feather: float) -> Tensor:
    """A mask (N, 1, h, w) whose edge rises over ``feather`` of the shorter side, inwards: 0 stays 0, exactly.

    m' = m * max(0, 2 mean(m) - 1), the mean over a square of that radius; the picture's own border is no edge.
    """
    radius = round(feather * min(mask.shape[-2:]))
    if radius == 0:
        return mask
    wide = F.pad(mask, (radius,) * 4, mode="replicate")
    return mask * (2 * F.avg_pool2d(wide, 2 * radius + 1, stride=1) - 1).clamp(min=0)


SOFT = 0.05
"""Over how much similarity a guidance that isn't adapted fades out before its goal."""


@dataclass(frozen=True)
class Goal:
    """A similarity where a guidance stops. s = 1 - (best - F) is 1 for the reference itself: the cosine of embeddings,
    or 1 minus the relative squared distance of maps or Gram matrices.

        gap = similarity - s for a scale above 0,   s - similarity for one below (away from it)

    Not ``adapted``, the scale counts while there is a gap, times min(1, gap / SOFT), and nothing after: without that
    softness it would go on and off at the goal from step to step. ``adapted``: s is that of the model's estimate, and
    instead of the scale each step's shift d is what moves the score by a lift, to first order (Polyak's step length),
    where the cap lets it:

        d = +- lift * G / |G|^2,   G = dF / d denoised (for encoders of noise: alpha dF / dx_t)
        lift = (gap + missed) / (1 - sigma_i / sigma_{i-1}) * (best - F_t) / (best - F_0)
        missed = (gap_{i-1} + missed_{i-1}) / 2

    with F_0 the score of the estimate and F_t the one whose gradient it is, of x_t for encoders of noise: the same part
    of the way to the best. Of a shift of denoised only the part 1 - sigma_{i+1} / sigma_i is in x after the step
    (Euler's; the next noise level is not known yet, so the last ratio stands for it), and the model may take some of it
    back: what was missed before is asked for again, at most as much again (the integral part of a PI controller, with
    a leak), until the score is on the other side. From alpha_i^2 v > sigma_i^2 on, v the data's variance, the estimate
    is good enough to be read, and encoders of noise do so: under little noise the score of x_t may be at its best while
    that of the picture isn't. What was never short of the goal is left alone; what was pulled beyond it is taken back.
    """

    similarity: float
    adapted: bool = True

    def __post_init__(self) -> None:
        if not -1 <= self.similarity <= 1:
            raise ValueError(
                f"Got a similarity of {self.similarity} to reach; wanted -1 to 1, where 1 is the reference itself. "
                "Usual: 0.25 to 0.35 for a text, 0.6 to 0.9 for pictures."
            )

    def gap(self, score: Tensor, best: float, scale: float) -> Tensor:
        """How far scores (B,) still are from it, below 0 beyond it; ``best`` is the score of the reference."""
        return math.copysign(1.0, scale) * (self.similarity - 1 + best - score)


Choice = Literal["mean", "nearest", "in turn", "one each"]
CHOICES: tuple[Choice, ...] = get_args(Choice)


@dataclass(frozen=True)
class Several:
    """How one guidance follows several references r, with weights w_r (none: all 1), s_r their scores:

    - "mean": F = sum_r w_r s_r / sum_r w_r.
    - "nearest": F = s_r of the r with the least (best - s_r) / w_r, each sample its own.
    - "in turn": F = s_r, another r at each noise level, as often as its weight says.
    - "one each": F = s_r with r the number of the picture in its batch; weights don't count.
    """

    choice: Choice
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.choice not in CHOICES:
            raise ValueError(f'Got the choice "{self.choice}" of references; wanted one of: {", ".join(CHOICES)}.')
        if not all(math.isfinite(w) and w > 0 for w in self.weights):
            raise ValueError(
                f"Got the weights {list(self.weights)} of references; wanted numbers above 0. Take references with no "
                "weight out of the batch."
            )

    def weights_of(self, count: int) -> tuple[float, ...]:
        """The weights of so many references. Raises ValueError where there are others."""
        if self.weights and len(self.weights) != count:
            raise ValueError(
                f"Got {len(self.weights)} weights for {count} references; wanted one for each, or none. Write "
                f"{count} numbers with commas, or leave weights empty."
            )
        return self.weights or (1.0,) * count

    def joined(self, scores: Tensor, best: float) -> Tensor:
        """One score of every sample (B,) from those of all references (R, B): "mean" or "nearest"."""
        weights = self.weights_of(len(scores))
        if self.choice == "mean":
            return torch.stack([w * s for w, s in zip(weights, scores, strict=True)]).sum(dim=0) / sum(weights)
        far = torch.stack([(best - s) / w for w, s in zip(weights, scores.detach(), strict=True)])
        return scores.gather(0, far.argmin(dim=0, keepdim=True))[0]

    def turn(self, count: int, number: int) -> int:
        """Which of so many references is on at the turn of this number: the one that is furthest behind its weight."""
        weights, had = self.weights_of(count), [0] * count
        for _ in range(number + 1):
            latest = min(range(count), key=lambda r: (had[r] + 1) / weights[r])
            had[latest] += 1
        return latest


@dataclass(frozen=True)
class Crop:
    """A part of a picture (B, C, H, W), and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    flip: bool

    def __call__(self, picture: Tensor) -> Tensor:
        part = picture[..., self.top : self.top + self.height, self.left : self.left + self.width]
        return part.flip(-1) if self.flip else part


@dataclass(frozen=True)
class Augment:
    """A clean encoder looks at ``count`` random crops instead of the picture, every other one mirrored by chance:

        grad F = 1 / count * sum_i grad F(crop_i(denoised))

    which makes it harder to please by patterns that nobody sees. Sides are at least ``least`` of the picture's. All
    pictures of a batch get the same crops, other ones at each gradient, the same in each run.
    """

    count: int = 4
    least: float = 0.7

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 < self.least <= 1:
            raise ValueError(
                f"Got {self.count} crops of at least {self.least} of the picture; wanted 1 or more, of a part above 0 "
                "up to 1. Usual: 4 crops of 0.7."
            )

    def crops(self, size: tuple[int, int], generator: torch.Generator) -> list[Crop]:
        """The crops of pictures of a size (H, W)."""
        found = []
        for zoom, down, right, flip in torch.rand(self.count, 4, generator=generator, dtype=torch.float64).tolist():
            part = self.least + (1 - self.least) * zoom
            height, width = (max(1, round(side * part)) for side in size)
            top, left = int(down * (size[0] - height + 1)), int(right * (size[1] - width + 1))
            found.append(Crop(top, left, height, width, flip < 0.5))
        return found


def check_every(every: int) -> int:
    """Every how many steps, if that is 1 or more. Raises ValueError otherwise."""
    if every < 1:
        raise ValueError(f"Got a gradient every {every} steps; wanted 1 (every step) or more. Set it to 1, 2 or 3.")
    return every
