"""The correction: guided denoised = denoised + sigma^2 / alpha * grad F, for any model and sampler (Tweedie)."""

from __future__ import annotations

import torch
from torch import Tensor

from .features import Encoder, reads_noise
from .gradient import Sight
from .precision import added
from .references import Batch
from .run import GuidanceRun, StepTrace
from .schedule import MIN_ALPHA, Convention, expand
from .strength import bounded, rms


def guide(denoised: Tensor, x_t: Tensor, sigma: Tensor, run: GuidanceRun) -> Tensor:
    """The guided estimate of x_0.

    denoised, x_t: (B, C, H, W), or videos (B, C, T, H, W), in the model's own scaling; sigma: (B,). Returns
    ``denoised`` itself, untouched, where every scale is 0. Otherwise a new tensor of denoised's dtype:

        denoised' = denoised + sigma^2 / alpha * grad_{x_t} F        (absolute strength, before the cap)
    """
    shift = guidance_shift(denoised, x_t, sigma, run)
    return denoised if shift is None else added(denoised, shift)


def guidance_shift(denoised: Tensor, x_t: Tensor, sigma: Tensor, run: GuidanceRun) -> Tensor | None:
    """What ``guide`` adds, in the precision of x_t, at least float32, or None where there is nothing to add."""
    batch = Batch.of(denoised, x_t, sigma)
    weights = run.weights(batch.sigma, batch.frame, batch.frames)
    if not bool((weights != 0).any()):
        return None
    grad, scores = guidance_gradient(batch, weights, run)
    alpha, s = (expand(v, batch.x_t) for v in (run.convention.alpha(batch.sigma), batch.sigma))
    usable = alpha > MIN_ALPHA
    alpha = torch.where(usable, alpha, torch.ones_like(alpha))
    shift = torch.where(usable, s.square() / alpha * grad, torch.zeros_like(grad))
    step = (batch.x_t - alpha * batch.denoised) / alpha  # sigma / alpha * eps: the model's own step
    shift, pull, capped = bounded(shift, rms(step), run.strength)
    run.trace.append(StepTrace(float(sigma.flatten()[0]), scores, pull, capped))
    return batch.unfold(shift)


def guidance_gradient(batch: Batch, weights: Tensor, run: GuidanceRun) -> tuple[Tensor, Tensor]:
    """grad_{x_t} F (B, C, H, W) and the scores (K, B), by every encoder that has a weight (K, B) here."""
    grad, scores = torch.zeros_like(batch.x_t), torch.zeros_like(weights)
    for encoder, members, rows in run.active(weights, batch):
        some = weights[members][:, rows]
        part, part_scores = _encoder_gradient(encoder, members, batch.take(rows), some, run)
        grad[rows] += part
        scores[torch.tensor(members)[:, None], rows] = part_scores.to(scores)
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
    if not reads_noise(encoder):
        sight = Sight(view, torch.ones_like(sigma), torch.zeros_like(sigma[:1]))
        targets = [run.references.target(k, run.terms[k].guidance, encoder, view, batch, None) for k in members]
        grad, scores = run.chunks.gradient(encoder, terms, weights, targets, batch.denoised, sight)
        factor = alpha * run.variance / (alpha.square() * run.variance + sigma.square())
        return grad * expand(factor, x), scores
    ratio, norm = encoder_noise(encoder, view.size(*x.shape[-2:]), sigma, run.convention)
    sight = Sight(view, alpha / norm, encoder.table.timestep(ratio[:1]))
    targets = [run.references.target(k, run.terms[k].guidance, encoder, view, batch, ratio[:1]) for k in members]
    grad, scores = run.chunks.gradient(encoder, terms, weights, targets, x / expand(norm, x), sight)
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
