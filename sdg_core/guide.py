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
from .gradient import Chunks, Sight, Target
from .guidance import Encoder, Guidance, Term, fit
from .schedule import Convention, expand
from .views import PIXEL_VIEW, View

log = logging.getLogger(__name__)

REFERENCE_SEED = 0
"""Seed of the noise that references get: one noise for all references, steps, samples and runs, so reproducible."""

LEVELS_KEPT = 4
"""Noise levels whose reference features stay in memory."""

CLEAN = -1.0
"""The noise level under which features of clean references are kept."""

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

    ``percent_to_sigma`` maps a fraction of the run to the model's sigma (0 -> above every sigma, 1 -> 0). ``view_of``
    says through which view an encoder looks at this model. ``variance`` is that of the model's data, per element: 0.25
    for pixels in -1..1, about 1 for scaled latents; encoders of denoised need it.
    """

    terms: tuple[Term, ...]
    convention: Convention
    percent_to_sigma: Callable[[float], float]
    strength: Strength = field(default_factory=Strength)
    view_of: Callable[[Encoder], View] = lambda encoder: PIXEL_VIEW
    variance: float = 0.25
    trace: list[StepTrace] = field(default_factory=list)
    _targets: dict[float, dict[int, Features]] = field(default_factory=dict)
    _chunks: Chunks = field(default_factory=Chunks)

    def weights(self, sigma: Tensor, frame: Tensor | None = None, frames: int = 1) -> Tensor:
        """Scale of every term at sigma (B,): (K, B), 0 outside its interval and where x_t holds no signal.

        ``frame`` (B,) counts 0..frames - 1 where the samples are frames of videos.
        """
        alpha = self.convention.alpha(sigma)
        weights = torch.zeros(len(self.terms), len(sigma), device=sigma.device)
        for row, term in zip(weights, self.terms, strict=True):
            start, end = self.percent_to_sigma(term.start), self.percent_to_sigma(term.end)
            row.copy_(term.scale * ((alpha > MIN_ALPHA) & (sigma <= start) & (sigma > end)))
            if term.fade is not None:
                row.mul_(term.fade(sigma / alpha.clamp(min=MIN_ALPHA)))
            if term.frames is not None and frame is not None:
                chosen = torch.tensor([f % frames for f in check_frames(term.frames, frames)], device=frame.device)
                row.mul_(torch.isin(frame, chosen))
        return weights


@dataclass(frozen=True)
class Batch:
    """What one model evaluation gave, as pictures: x_t and denoised (B, C, H, W) at sigma (B,).

    Frames of videos are samples like others; ``frame`` (B,) then counts them from 0 to ``frames`` - 1.
    """

    x_t: Tensor
    denoised: Tensor
    sigma: Tensor
    frame: Tensor | None = None
    frames: int = 1

    @classmethod
    def of(cls, denoised: Tensor, x_t: Tensor, sigma: Tensor) -> Batch:
        """From pictures (B, C, H, W) or videos (B, C, T, H, W). Raises ValueError for other shapes."""
        if x_t.ndim == 4:
            return cls(x_t, denoised, sigma)
        if x_t.ndim != 5:
            raise ValueError(
                f"Got a latent of shape {tuple(x_t.shape)}; guidance reads pictures (batch, channels, height, width) "
                "and videos (batch, channels, frames, height, width)."
            )
        B, T = x_t.shape[0], x_t.shape[2]
        x, d = (v.transpose(1, 2).flatten(0, 1) for v in (x_t, denoised))
        return cls(x, d, sigma.repeat_interleave(T), torch.arange(T, device=sigma.device).repeat(B), T)

    def take(self, rows: Tensor) -> Batch:
        """Some of its samples."""
        frame = None if self.frame is None else self.frame[rows]
        return Batch(self.x_t[rows], self.denoised[rows], self.sigma[rows], frame, self.frames)

    def unfold(self, shift: Tensor) -> Tensor:
        """(B T, C, H, W) back to the shape that came in."""
        return shift if self.frame is None else shift.unflatten(0, (-1, self.frames)).transpose(1, 2)


def guide(denoised: Tensor, x_t: Tensor, sigma: Tensor, run: GuidanceRun) -> Tensor:
    """The guided estimate of x_0.

    denoised, x_t: (B, C, H, W), or videos (B, C, T, H, W), in the model's own scaling; sigma: (B,). Returns
    ``denoised`` itself, untouched, where every scale is 0. Otherwise a new tensor of denoised's dtype:

        denoised' = denoised + sigma^2 / alpha * grad_{x_t} F        (absolute strength, before the cap)
    """
    shift = guidance_shift(denoised, x_t, sigma, run)
    return denoised if shift is None else denoised + shift.to(denoised.dtype)


def guidance_shift(denoised: Tensor, x_t: Tensor, sigma: Tensor, run: GuidanceRun) -> Tensor | None:
    """What ``guide`` adds, float32, or None where there is nothing to add."""
    batch = Batch.of(denoised.detach(), x_t.detach(), sigma.float().expand(len(x_t)))
    weights = run.weights(batch.sigma, batch.frame, batch.frames)
    if not bool((weights != 0).any()):
        return None
    grad, scores = guidance_gradient(batch, weights, run)
    alpha, s = (expand(v, batch.x_t) for v in (run.convention.alpha(batch.sigma), batch.sigma))
    usable = alpha > MIN_ALPHA
    alpha = torch.where(usable, alpha, torch.ones_like(alpha))
    shift = torch.where(usable, s.square() / alpha * grad, torch.zeros_like(grad))
    step = (batch.x_t.float() - alpha * batch.denoised.float()) / alpha  # sigma / alpha * eps: the model's own step
    shift, pull, capped = _bounded(shift, rms(step), run.strength)
    run.trace.append(StepTrace(float(sigma.flatten()[0]), scores, pull, capped))
    return batch.unfold(shift)


def guidance_gradient(batch: Batch, weights: Tensor, run: GuidanceRun) -> tuple[Tensor, Tensor]:
    """grad_{x_t} F (B, C, H, W) and the scores (K, B), by every encoder that has a weight here.

    A batch at several noise levels is taken level by level, because references are looked at at one level at a time.
    Samples without any weight (a video's other frames) are left out.
    """
    grad = torch.zeros_like(batch.x_t, dtype=torch.float32)
    scores = torch.zeros_like(weights)
    for level in batch.sigma.unique():
        for encoder, members in _by_encoder(run.terms, weights):
            rows = torch.nonzero((batch.sigma == level) & (weights[members] != 0).any(dim=0)).flatten()
            if len(rows):
                some = weights[members][:, rows]
                part, part_scores = _encoder_gradient(encoder, members, batch.take(rows), some, run)
                grad[rows] += part
                scores[torch.tensor(members)[:, None], rows] = part_scores
    return grad, scores


def _encoder_gradient(
    encoder: Encoder, members: list[int], batch: Batch, weights: Tensor, run: GuidanceRun
) -> tuple[Tensor, Tensor]:
    """The part of one encoder, at one noise level: of x_t in its own scaling (SNR matching), or of denoised.

    The gradient of a score of denoised, G, counts as alpha v / (alpha^2 v + sigma^2) G, so that Tweedie's sigma^2 /
    alpha turns it into the posterior variance, which is exact for Gaussian data of variance v per element.
    """
    view, x, sigma = run.view_of(encoder), batch.x_t, batch.sigma
    terms = [run.terms[k] for k in members]
    alpha = run.convention.alpha(sigma)
    if encoder.reads == "denoised":
        sight = Sight(view, torch.ones_like(sigma), torch.zeros_like(sigma[:1]))
        targets = [_target(run, k, encoder, view, batch, None) for k in members]
        grad, scores = run._chunks.gradient(encoder, terms, weights, targets, batch.denoised, sight)
        factor = alpha * run.variance / (alpha.square() * run.variance + sigma.square())
        return grad * expand(factor, x), scores
    ratio, norm = encoder_noise(encoder, view.size(*x.shape[-2:]), sigma, run.convention)
    sight = Sight(view, alpha / norm, encoder.table.timestep(ratio[:1]))
    targets = [_target(run, k, encoder, view, batch, ratio[:1]) for k in members]
    u = x.float() / expand(norm, x)
    grad, scores = run._chunks.gradient(encoder, terms, weights, targets, u, sight)
    return grad / expand(norm, x), scores


def encoder_noise(
    encoder: Encoder, size: tuple[int, int], sigma: Tensor, convention: Convention
) -> tuple[Tensor, Tensor]:
    """SNR matching: the noise ratio (B,) that the encoder sees, and the divisor (B,) that takes x_t to its VP scaling.

    An encoder that averages g-times-smaller noise out of a larger picture, ``size`` (h, w), sees sigma / alpha * g.
    """
    alpha = convention.alpha(sigma).clamp(min=MIN_ALPHA)
    ratio = sigma / alpha * encoder.noise_gain(*size)
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


def _target(run: GuidanceRun, k: int, encoder: Encoder, view: View, batch: Batch, ratio: Tensor | None) -> Target:
    """The target of term k at this noise: references get the run's fixed noise, and are looked at once per sigma.

    Only the latest noise levels are kept; a sampler of higher order comes back to those. References of encoders that
    read denoised (``ratio`` None) are clean and stay.
    """
    level = run._targets.setdefault(CLEAN if ratio is None else float(ratio[0]), {})
    if k not in level:
        look = functools.partial(_look, encoder, view, batch.x_t, ratio)
        level[k] = run.terms[k].guidance.target(look).to(batch.x_t.device)
    noisy = [key for key in run._targets if key != CLEAN]
    for key in noisy[:-LEVELS_KEPT]:
        del run._targets[key]
    return Target(level[k], _frame_references(run.terms[k].guidance, batch))


def _frame_references(guidance: Guidance, batch: Batch) -> Tensor | None:
    """Which reference each frame follows: several are spread evenly over the frames of a video, from first to last."""
    count = len(getattr(guidance, "image", ()))
    if batch.frame is None or count < 2:
        return None
    return (batch.frame * (count - 1) / max(batch.frames - 1, 1)).round().long()


def _look(
    encoder: Encoder, view: View, x_t: Tensor, ratio: Tensor | None, image: Tensor, depth: int | None
) -> Features:
    """Features of references (R, 3, h, w) at the size of the view, with the fixed noise at ratio (1,), if any."""
    x_0 = fit(image.to(x_t.device), *view.size(*x_t.shape[-2:]))
    depth = depth or encoder.full_depth
    with torch.no_grad():
        if ratio is None:
            return encoder(x_0, torch.zeros(1, device=x_t.device), depth)
        generator = torch.Generator().manual_seed(REFERENCE_SEED)
        noise = view.noise(torch.randn(1, *x_t.shape[1:], generator=generator).to(x_t.device))
        u = (x_0 + noise * ratio / encoder.noise_gain(*x_0.shape[-2:])) / (1 + ratio.square()).sqrt()
        return encoder(u, encoder.table.timestep(ratio), depth)


def check_frames(chosen: tuple[int, ...], frames: int) -> tuple[int, ...]:
    """The chosen frames, if the video has them. Raises ValueError otherwise."""
    if not chosen or not all(-frames <= f < frames for f in chosen):
        raise ValueError(
            f"Got the frames {list(chosen)}; this video has {frames} latent frames, 0..{frames - 1}, or -{frames}..-1 "
            "from the end. Choose among those; a latent frame holds several of the video's."
        )
    return chosen


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
