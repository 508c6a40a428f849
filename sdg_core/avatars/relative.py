"""How far one relative strength pulls, measured on the latent models: eps, v and flow, at three sizes.

Three measures of a guided run beside its unguided twin from the same noise:

- ``step``: RMS of a step's shift over that of the model's own step sigma / alpha * eps. By definition the cap.
- ``pull``: RMS distance of x_t / alpha between the two, averaged over the steps. An effect: nothing fixes it.
- ``finished``: that distance of the finished latents: what the model has not undone by then.

Distances are in units of x_0, whose variance is about 1. All models take the same noise levels sigma / alpha in Euler
steps, under which one denoiser gives the same x_t / alpha in every convention. The models are one network's faces, so
what differs then is the size, and what the conventions make of rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..method import Convention, GuidanceRun, Strength, Term, TimestepTable, expand, guide, rms
from ..models import euler, normal_sigmas, percent_to_sigma
from .world import RELATIVE_INTERVAL, Pull, World

SIZES = (24, 32, 48)
"""Sides of the latents. The model learned at 32."""

NOISE = TimestepTable.from_name("scaled_linear")
"""The noise levels of every run: latent diffusion's, from sigma / alpha = 14.6."""


class Effect(NamedTuple):
    """Of every sample (B,): ``step``, the mean over its guided steps, ``pull`` and ``finished``."""

    step: Tensor
    pull: Tensor
    finished: Tensor


def measure_effect(world: World, pull: Pull, noise: Tensor, strength: Strength, steps: int) -> Effect:
    """What one guidance does to runs from unit noise (B, C, H, W) of any size that the model takes."""
    assert pull.kind != "class"
    assert pull.kind != "direction"
    start, end = RELATIVE_INTERVAL[pull.kind]
    term = replace(world.term(pull), start=start, end=end)
    guided = _Recorded(world, _open_run(world, term, strength))
    plain = _Recorded(world, _open_run(world, replace(term, scale=0.0), strength))
    paths = zip(_path(guided, noise, steps), _path(plain, noise, steps), strict=True)
    distances = torch.stack([rms(x - twin) for x, twin in paths])
    return Effect(torch.stack(guided.steps).mean(dim=0), distances.mean(dim=0), distances[-1])


def targets(world: World) -> list[Pull]:
    """Two wishes of every kind."""
    prompts = [Pull("text", "a person with glasses"), Pull("text", "a person with blue background")]
    images = [Pull(kind, world.renders[i]) for kind in ("content", "structure", "style") for i in (3, 77)]
    return [*prompts, *images]


def sigma_at(ratio: Tensor, convention: Convention) -> Tensor:
    """The sigma of a noise level sigma / alpha, any shape, in VE or FLOW scaling; infinite noise is sigma 1 in FLOW."""
    return ratio if convention is Convention.VE else 1 / (1 + 1 / ratio)


def deviation(values: Sequence[float]) -> float:
    """The largest distance of a value from the mean of all, as a part of it."""
    mean = sum(values) / len(values)
    return max(abs(value / mean - 1) for value in values)


@dataclass
class _Recorded:
    """A guided denoiser that measures its shifts: ``steps``, one (B,) for every guided step."""

    world: World
    run: GuidanceRun
    steps: list[Tensor] = field(default_factory=list)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        estimate = self.world.denoiser(x, sigma)
        result = guide(estimate, x, sigma, self.run)
        if result is not estimate:
            alpha = expand(self.run.convention.alpha(sigma), x)
            self.steps.append(rms(result - estimate) / rms(x / alpha - estimate))
        return result


def _open_run(world: World, term: Term, strength: Strength) -> GuidanceRun:
    """A run whose fractions mean the same noise in every convention."""
    convention, to_ratio = world.denoiser.convention, percent_to_sigma(NOISE)
    run = world.open_run((term,), strength)
    return replace(run, percent_to_sigma=lambda percent: float(sigma_at(torch.tensor(to_ratio(percent)), convention)))


def _path(denoise: _Recorded, noise: Tensor, steps: int) -> list[Tensor]:
    """x_t / alpha (B, C, H, W) after every step."""
    convention = denoise.run.convention
    sigmas = sigma_at(normal_sigmas(NOISE, steps), convention)
    run = euler(denoise, noise * sigmas[0], sigmas)
    return [step.x / convention.alpha(sigma) for step, sigma in zip(run, sigmas[1:], strict=True)]
