"""Samplers for use without a host, as generators: the caller owns progress and cancel.

``euler`` and ``euler_ancestral`` are the field's (Karras et al. 2022; k-diffusion) in VE scaling, as ComfyUI runs them.
``paper`` is SDG's own: the ancestral step of guided-diffusion with learned Sigma, its mean shifted by Sigma * grad F.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..method import Batch, Convention, GuidanceRun, LowFrequencies, expand, guidance_gradient, guide
from .denoiser import Prediction


@dataclass(frozen=True)
class Step:
    """One finished step: ``x`` after it (VE scaling), the guided estimate it used, and its count."""

    index: int
    steps: int
    sigma: float
    x: Tensor
    denoised: Tensor


Denoise = Callable[[Tensor, Tensor], Tensor]
"""(x (B, 3, H, W) in VE scaling, sigma (B,)) -> denoised."""

Predict = Callable[[Tensor, Tensor], Prediction]
"""The same with the variance."""


def guided(denoise: Denoise, run: GuidanceRun) -> Denoise:
    """A guided denoiser is a denoiser."""
    return lambda x, sigma: guide(denoise(x, sigma), x, sigma, run)


def held(denoise: Denoise, low: LowFrequencies, percent_to_sigma: Callable[[float], float]) -> Denoise:
    """A denoiser whose estimates have a reference's low frequencies (ILVR). Around ``guided``: then they keep them."""
    return lambda x, sigma: low.hold(denoise(x, sigma), sigma, percent_to_sigma)


@torch.no_grad()
def euler(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """Euler's method on the probability flow; on VP models it is DDIM. sigmas (n + 1,) decreasing to 0."""
    for i, (s, s_next) in enumerate(itertools.pairwise(sigmas)):
        denoised = denoise(x, s.expand(len(x)))
        x = x + (x - denoised) / s * (s_next - s)
        yield Step(i, len(sigmas) - 1, float(s), x, denoised)


@torch.no_grad()
def euler_ancestral(denoise: Denoise, x: Tensor, sigmas: Tensor, generator: torch.Generator) -> Iterator[Step]:
    """Euler steps down to sigma_down, then fresh noise up to the next sigma (eta 1)."""
    for i, (s, s_next) in enumerate(itertools.pairwise(sigmas)):
        denoised = denoise(x, s.expand(len(x)))
        up = torch.minimum(s_next, (s_next**2 * (s**2 - s_next**2) / s**2).sqrt())
        down = (s_next**2 - up**2).sqrt()
        x = x + (x - denoised) / s * (down - s)
        if s_next > 0:
            x = x + noise_like(x, generator) * up
        yield Step(i, len(sigmas) - 1, float(s), x, denoised)


@torch.no_grad()
def euler_ancestral_flow(denoise: Denoise, x: Tensor, sigmas: Tensor, generator: torch.Generator) -> Iterator[Step]:
    """Ancestral Euler steps for flow models, as ComfyUI runs them: down to s_next^2 / s, then signal and noise are
    brought to the next sigma."""
    for i, (s, s_next) in enumerate(itertools.pairwise(sigmas)):
        denoised = denoise(x, s.expand(len(x)))
        down = s_next * s_next / s
        x = down / s * x + (1 - down / s) * denoised
        if s_next > 0:
            shrink = (1 - s_next) / (1 - down)
            up = (s_next**2 - down**2 * shrink**2).clamp(min=0).sqrt()
            x = shrink * x + noise_like(x, generator) * up
        yield Step(i, len(sigmas) - 1, float(s), x, denoised)


@torch.no_grad()
def paper(
    predict: Predict, x: Tensor, sigmas: Tensor, generator: torch.Generator, run: GuidanceRun | None = None
) -> Iterator[Step]:
    """SDG's algorithm 1: x_{t-1} ~ N(mu + Sigma grad_{x_t} F, Sigma), respaced to the given sigmas.

    Works in VP scaling (x and sigmas come and go in VE). A learned Sigma is used; without one, beta_tilde.
    The gradient is taken as it is: ``run.strength`` does not apply. Steps stop at the last sigma above 0, where the
    mean is returned without noise. Raises ValueError for a run in another convention than VE.
    """
    if run is not None and run.convention is not Convention.VE:
        raise ValueError("The paper's sampler is made for diffusion models; this run guides a flow model. Use euler.")
    abar = 1 / (1 + sigmas.double().square())
    for i, s in enumerate(sigmas[:-1]):
        batch_sigma = s.expand(len(x))
        prediction = predict(x, batch_sigma)
        mean, variance = posterior(prediction, x * float(abar[i].sqrt()), float(abar[i]), float(abar[i + 1]))
        mean = mean + variance * _vp_gradient(prediction.denoised, x, batch_sigma, run) if run is not None else mean
        last = float(sigmas[i + 1]) == 0
        sample = mean if last else mean + variance.sqrt() * noise_like(x, generator)
        x = sample / float(abar[i + 1].sqrt())
        yield Step(i, len(sigmas) - 1, float(s), x, prediction.denoised)


def posterior(prediction: Prediction, x_t: Tensor, abar: float, abar_next: float) -> tuple[Tensor, Tensor]:
    """Mean and variance of p(x_{t-1} | x_t) in VP scaling between two (respaced) signal powers.

    beta = 1 - abar_t / abar_{t-1}; log Sigma = f log beta + (1 - f) log beta_tilde (Nichol and Dhariwal, eq. 15).
    At the last step (abar_next = 1) beta_tilde is 0 and Sigma falls back to beta.
    """
    beta = 1 - abar / abar_next
    mean = (
        abar_next**0.5 * beta / (1 - abar) * prediction.denoised
        + (1 - beta) ** 0.5 * (1 - abar_next) / (1 - abar) * x_t
    )
    tilde = beta * (1 - abar_next) / (1 - abar) or beta
    fraction = prediction.variance_fraction
    low, high = torch.tensor([tilde, beta], dtype=torch.float64).log().tolist()
    log_variance = torch.full_like(mean, low) if fraction is None else fraction * high + (1 - fraction) * low
    return mean, log_variance.exp()


def noise_like(x: Tensor, generator: torch.Generator) -> Tensor:
    """Unit noise shaped like x, drawn on the generator's device."""
    return torch.randn(x.shape, dtype=x.dtype, device=generator.device, generator=generator).to(x.device)


def _vp_gradient(denoised: Tensor, x: Tensor, sigma: Tensor, run: GuidanceRun) -> Tensor:
    """grad F in VP scaling at VE-scaled x: grad_u = grad_x * dx/du, with x = u * sqrt(1 + sigma^2)."""
    weights = run.weights(sigma)
    if not bool((weights != 0).any()):
        return torch.zeros_like(x)
    grad, _ = guidance_gradient(Batch.of(denoised, x, sigma), weights, run)
    return torch.nan_to_num(grad * expand((1 + sigma.square()).sqrt(), grad), posinf=0.0, neginf=0.0)
