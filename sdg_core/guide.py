"""The correction: guided denoised = denoised + sigma^2 / alpha * grad F, for any model and sampler (Tweedie)."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from .features import Features
from .gradient import score_gradient
from .guidance import Encoder, Term, fit
from .schedule import Convention, expand

log = logging.getLogger(__name__)

REFERENCE_SEED = 0
"""Seed of the noise that references get: one noise for all references, steps, samples and runs, so reproducible."""

LEVELS_KEPT = 4
"""Noise levels whose reference features stay in memory."""

MIN_ALPHA = 1e-4
"""Below this signal scale (flow models at sigma = 1) x_t holds nothing to read: the step is not guided."""


@dataclass(frozen=True)
class Strength:
    """How scores become a shift of denoised.

    "absolute": the paper's scale, shift = sigma^2 / alpha * grad F. "relative": the direction of that, with a size of
    ``cap`` times the model's own step, so the same number pulls alike for any model and resolution.
    ``cap``: the shift's RMS is at most this multiple of the model's own eps step, per sample; None is no bound.
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


@dataclass(frozen=True)
class StepTrace:
    """What one guided step did: scores (K, B), RMS of the shift over the model's own step (B,), where the cap bound.

    ``sigma`` is the first sample's.
    """

    sigma: float
    scores: Tensor
    pull: Tensor
    capped: Tensor


@dataclass
class GuidanceRun:
    """State of one sampling run: born with it, dropped with it.

    ``percent_to_sigma`` maps a fraction of the run to the model's sigma (0 -> above every sigma, 1 -> 0).
    """

    terms: tuple[Term, ...]
    convention: Convention
    percent_to_sigma: Callable[[float], float]
    strength: Strength = field(default_factory=Strength)
    trace: list[StepTrace] = field(default_factory=list)
    _targets: dict[float, dict[int, Features]] = field(default_factory=dict)

    def weights(self, sigma: Tensor) -> Tensor:
        """Scale of every term at sigma (B,): (K, B), 0 outside its interval and where x_t holds no signal."""
        readable = self.convention.alpha(sigma) > MIN_ALPHA
        weights = torch.zeros(len(self.terms), len(sigma), device=sigma.device)
        for row, term in zip(weights, self.terms, strict=True):
            start, end = self.percent_to_sigma(term.start), self.percent_to_sigma(term.end)
            row.copy_(term.scale * (readable & (sigma <= start) & (sigma > end)))
        return weights


def guide(denoised: Tensor, x_t: Tensor, sigma: Tensor, run: GuidanceRun) -> Tensor:
    """The guided estimate of x_0.

    denoised, x_t: (B, 3, H, W) in the model's own scaling; sigma: (B,). Returns ``denoised`` itself, untouched, where
    every scale is 0. Otherwise a new tensor of denoised's dtype:

        denoised' = denoised + sigma^2 / alpha * grad_{x_t} F        (absolute strength, before the cap)
    """
    shift = guidance_shift(denoised, x_t, sigma, run)
    return denoised if shift is None else denoised + shift.to(denoised.dtype)


def guidance_shift(denoised: Tensor, x_t: Tensor, sigma: Tensor, run: GuidanceRun) -> Tensor | None:
    """What ``guide`` adds, float32, or None where there is nothing to add."""
    sigma = sigma.float().expand(len(x_t))
    weights = run.weights(sigma)
    if not bool((weights != 0).any()):
        return None
    grad, scores = guidance_gradient(x_t, sigma, weights, run)
    alpha, s = expand(run.convention.alpha(sigma), x_t), expand(sigma, x_t)
    usable = alpha > MIN_ALPHA
    alpha = torch.where(usable, alpha, torch.ones_like(alpha))
    shift = torch.where(usable, s.square() / alpha * grad, torch.zeros_like(grad))
    step = (x_t.float() - alpha * denoised.float()) / alpha  # sigma / alpha * eps: the model's own step
    shift, pull, capped = _bounded(shift, rms(step), run.strength)
    run.trace.append(StepTrace(float(sigma[0]), scores, pull, capped))
    return shift


def guidance_gradient(x_t: Tensor, sigma: Tensor, weights: Tensor, run: GuidanceRun) -> tuple[Tensor, Tensor]:
    """grad_{x_t} F (B, 3, H, W) and the scores (K, B). SNR matching brings x_t to each encoder's own scaling.

    A batch at several noise levels is taken level by level, because references are looked at at one level at a time.
    """
    grad = torch.zeros_like(x_t, dtype=torch.float32)
    scores = torch.zeros_like(weights)
    if bool((sigma != sigma[0]).any()):
        for level in sigma.unique():
            at = sigma == level
            grad[at], scores[:, at] = guidance_gradient(x_t[at], sigma[at], weights[:, at], run)
        return grad, scores
    for encoder, members in _by_encoder(run.terms, weights):
        ratio, norm = encoder_noise(encoder, x_t, sigma, run.convention)
        t = encoder.table.timestep(ratio[:1])
        targets = [_target(run, k, encoder, x_t, ratio) for k in members]
        terms = [run.terms[k] for k in members]
        u = x_t.float() / expand(norm, x_t)
        part, part_scores = score_gradient(encoder, terms, weights[members], targets, u, t)
        grad = grad + part / expand(norm, x_t)
        scores[members] = part_scores
    return grad, scores


def encoder_noise(encoder: Encoder, x_t: Tensor, sigma: Tensor, convention: Convention) -> tuple[Tensor, Tensor]:
    """SNR matching: the noise ratio (B,) that the encoder sees, and the divisor (B,) that takes x_t to its VP scaling.

    An encoder that averages g-times-smaller noise out of a larger picture sees sigma / alpha * g.
    """
    alpha = convention.alpha(sigma).clamp(min=MIN_ALPHA)
    ratio = sigma / alpha * encoder.noise_gain(*x_t.shape[-2:])
    return ratio, alpha * (1 + ratio.square()).sqrt()


def rms(x: Tensor) -> Tensor:
    """Root mean square per sample: (B, ...) -> (B,)."""
    return x.float().square().flatten(1).mean(dim=1).sqrt()


def _by_encoder(terms: tuple[Term, ...], weights: Tensor) -> list[tuple[Encoder, list[int]]]:
    """Terms with a weight, grouped by the encoder they share: one pass each."""
    groups: dict[int, tuple[Encoder, list[int]]] = {}
    for k, term in enumerate(terms):
        if bool((weights[k] != 0).any()):
            groups.setdefault(id(term.encoder), (term.encoder, []))[1].append(k)
    return list(groups.values())


def _target(run: GuidanceRun, k: int, encoder: Encoder, x_t: Tensor, ratio: Tensor) -> Features:
    """The target of term k at this noise: references get the run's fixed noise, and are looked at once per sigma.

    Only the latest noise levels are kept; a sampler of higher order comes back to those.
    """
    level = run._targets.setdefault(float(ratio[0]), {})
    if k not in level:
        look = functools.partial(_look, encoder, x_t, ratio[:1])
        level[k] = run.terms[k].guidance.target(look).to(x_t.device)
    while len(run._targets) > LEVELS_KEPT:
        del run._targets[next(iter(run._targets))]
    return level[k]


def _look(encoder: Encoder, x_t: Tensor, ratio: Tensor, image: Tensor, depth: int | None) -> Features:
    """Features of references (R, 3, h, w) at the size of x_t, with the fixed noise at ratio (1,)."""
    H, W = x_t.shape[-2:]
    generator = torch.Generator().manual_seed(REFERENCE_SEED)
    eps = torch.randn(1, 3, H, W, generator=generator).to(x_t.device)
    x_0 = fit(image.to(x_t.device), H, W)
    u = (x_0 + eps * ratio / encoder.noise_gain(H, W)) / (1 + ratio.square()).sqrt()
    with torch.no_grad():
        return encoder(u, encoder.table.timestep(ratio), depth or encoder.full_depth)


def _bounded(shift: Tensor, step: Tensor, strength: Strength) -> tuple[Tensor, Tensor, Tensor]:
    """The shift with its RMS bounded by (or, relative, set to) cap * step, per sample; never non-finite.

    Returns the shift, its RMS over the step's (B,), and where the cap bound (B,).
    """
    size = rms(shift)
    broken = ~torch.isfinite(size)
    if bool(broken.any()):
        log.warning("The guidance gradient was not finite in %d samples; their step is not guided.", int(broken.sum()))
        shift = torch.where(expand(broken, shift), torch.zeros_like(shift), shift)
        size = torch.where(broken, torch.zeros_like(size), size)
    tiny = torch.finfo(torch.float32).tiny
    factor, capped = torch.ones_like(size), torch.zeros_like(broken)
    if strength.cap is not None:
        allowed = strength.cap * step / size.clamp(min=tiny)
        factor = allowed if strength.mode == "relative" else allowed.clamp(max=1)
        factor = torch.where(size > 0, factor, torch.zeros_like(factor))
        capped = (allowed < 1) & (strength.mode == "absolute")
    return shift * expand(factor, shift), size * factor / step.clamp(min=tiny), capped
