"""Guided sampling where the answer is known.

Data x_0 ~ N(0, 1) per element, and an observation y = x_0 + tau * noise. Then the denoiser, log p(y | x_t) and the
posterior p(x_0 | y) are exact: N(y / (1 + tau^2), tau^2 / (1 + tau^2)) = N(1.2, 0.4472^2) for y = 1.5, tau = 0.5.
A toy encoder and guidance give F = log p(y | x_t); nothing of the method is left out or approximated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from sdg_core.method import Convention, Features, GuidanceRun, Strength, Term, TimestepTable, guide
from sdg_core.models import Prediction, euler, euler_ancestral, guided, initial, normal_sigmas, paper

pytestmark = pytest.mark.usefixtures("float64")

Y, TAU = 1.5, 0.5
MEAN, STD = 1.2, 0.4472
STEPS = 250
SHAPE = (4, 3, 64, 64)


class ExactEncoder:
    """Its maps are the picture itself, and the signal power abar (B or 1, 1, 1, 1) at its t."""

    full_depth = 3
    reads = "noisy"

    table = TimestepTable.from_name("linear")

    def __call__(self, image: Tensor, t: Tensor, depth: int) -> Features:
        abar = 1 / (1 + self.table.sigma(t).square())
        return Features((image, abar.view(-1, 1, 1, 1)))

    def noise_gain(self, height: int, width: int) -> float:
        return 1.0


@dataclass(frozen=True, eq=False)
class ExactGuidance:
    """F = log p(y | u): in VP scaling x_0 | u ~ N(sqrt(abar) u, 1 - abar)."""

    def depth(self, encoder: ExactEncoder) -> int:
        return 2

    def target(self, look) -> Features:
        return Features((torch.full((1,), Y),))

    def score(self, features: Features, target: Features) -> Tensor:
        u, abar = features.maps
        return (-(target.maps[0] - abar.sqrt() * u).square() / (2 * (1 - abar + TAU**2))).flatten(1).sum(dim=1)


def exact_run(convention: Convention = Convention.VE, scale: float = 1.0) -> GuidanceRun:
    term = Term(ExactGuidance(), ExactEncoder(), scale)
    return GuidanceRun((term,), convention, lambda percent: math.inf if percent <= 0 else 0.0, Strength(cap=None))


def denoise(x: Tensor, sigma: Tensor) -> Tensor:
    """E[x_0 | x_t] in VE scaling."""
    return x / (1 + sigma.square().view(-1, 1, 1, 1))


def guided_line(sigma: float) -> tuple[float, float]:
    """E[x_0 | x_t, y] = a x_t + b in VE scaling: precisions add."""
    precision = 1 + 1 / sigma**2 + 1 / TAU**2
    return 1 / sigma**2 / precision, Y / TAU**2 / precision


def chain(lines: list[tuple[float, float, float]], mean: float, variance: float) -> tuple[float, float]:
    """Mean and standard deviation after x <- a x + b + c noise, for every (a, b, c)."""
    for a, b, c in lines:
        mean, variance = a * mean + b, a * a * variance + c * c
    return mean, math.sqrt(variance)


def assert_reaches(x: Tensor, lines: list[tuple[float, float, float]], start: float) -> None:
    """The samples have the moments of the discretised chain (to five standard errors), near the posterior's."""
    mean, std = chain(lines, 0.0, start)
    assert float(x.mean()) == pytest.approx(mean, abs=5 * std / math.sqrt(x.numel()))
    assert float(x.std()) == pytest.approx(std, abs=5 * std / math.sqrt(2 * x.numel()))
    assert mean == pytest.approx(MEAN, abs=0.02)
    assert std == pytest.approx(STD, abs=0.02)


def last(steps) -> Tensor:
    *_, step = steps
    return step.x


@pytest.fixture(scope="module")
def sigmas() -> Tensor:
    return normal_sigmas(TimestepTable.from_name("linear"), STEPS).double()


@pytest.mark.parametrize("sigma", [0.011, 0.1, 0.5, 1.0, 3.0, 14.6, 80.0, 157.0])
def test_guide_is_the_posterior_mean_in_ve(sigma, draw):
    x_t = draw(2, 3, 8, 8) * math.hypot(1, sigma)
    batch = torch.full((2,), sigma)
    a, b = guided_line(sigma)
    got = guide(denoise(x_t, batch), x_t, batch, exact_run())
    torch.testing.assert_close(got, a * x_t + b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("s", [0.011, 0.1, 0.35, 0.5, 0.8, 0.95, 0.99])
def test_guide_is_the_posterior_mean_in_flow(s, draw):
    alpha = 1 - s
    power = alpha**2 + s**2
    x_t = draw(2, 3, 8, 8) * math.sqrt(power)
    precision = 1 + alpha**2 / s**2 + 1 / TAU**2
    wanted = (alpha / s**2 * x_t + Y / TAU**2) / precision
    got = guide(alpha / power * x_t, x_t, torch.full((2,), s), exact_run(Convention.FLOW))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)


def test_guide_is_the_posterior_mean_at_each_samples_sigma(draw):
    sigma = torch.tensor([0.05, 1.0, 1.0, 60.0])
    x_t = draw(4, 3, 8, 8) * (1 + sigma.square()).sqrt().view(-1, 1, 1, 1)
    wanted = torch.stack([a * x + b for x, s in zip(x_t, sigma, strict=True) for a, b in [guided_line(float(s))]])
    torch.testing.assert_close(guide(denoise(x_t, sigma), x_t, sigma, exact_run()), wanted, rtol=0, atol=1e-9)


def test_euler_reaches_the_posterior(sigmas, draw):
    x = initial(draw(*SHAPE), sigmas[0])
    lines = []
    for s, s_next in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        a, b = guided_line(s)
        h = (s_next - s) / s
        lines.append((1 + h * (1 - a), -h * b, 0.0))
    got = last(euler(guided(denoise, exact_run()), x, sigmas))
    assert_reaches(got, lines, start=1 + float(sigmas[0]) ** 2)
    slope, offset = math.prod(a for a, _, _ in lines), chain(lines, 0.0, 0.0)[0]
    torch.testing.assert_close(got, slope * x + offset, rtol=0, atol=1e-9)


def test_euler_ancestral_reaches_the_posterior(sigmas, draw):
    x = initial(draw(*SHAPE), sigmas[0])
    lines = []
    for s, s_next in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        a, b = guided_line(s)
        down = s_next**2 / s
        h = (down - s) / s
        lines.append((1 + h * (1 - a), -h * b, math.sqrt(s_next**2 - down**2)))
    generator = torch.Generator().manual_seed(1)
    got = last(euler_ancestral(guided(denoise, exact_run()), x, sigmas, generator))
    assert_reaches(got, lines, start=1 + float(sigmas[0]) ** 2)


def test_papers_sampler_reaches_the_posterior(sigmas, draw):
    """Here x_{t-1} | x_t ~ N(sqrt(1 - beta) x_t, beta) in VP scaling: the exact Sigma is beta, fraction 1.

    Sigma * grad F shifts the mean to first order in beta, so the chain comes near the posterior and not onto it.
    """
    abar = [1 / (1 + s**2) for s in sigmas.double().tolist()]
    lines = []
    for now, after in pairwise(abar):
        beta = 1 - now / after
        pull = beta * math.sqrt(now) / (1 - now + TAU**2)
        noise = math.sqrt(beta) if after < 1 else 0.0
        lines.append((math.sqrt(1 - beta) - pull * math.sqrt(now), pull * Y, noise))

    def predict(x: Tensor, sigma: Tensor) -> Prediction:
        return Prediction(denoise(x, sigma), torch.ones_like(x))

    x, generator = initial(draw(*SHAPE), sigmas[0]), torch.Generator().manual_seed(1)
    got = last(paper(predict, x, sigmas, generator, exact_run()))
    assert_reaches(got, lines, start=1.0)


def test_scale_zero_gives_the_prior(sigmas, draw):
    got = last(euler(guided(denoise, exact_run(scale=0.0)), initial(draw(*SHAPE), sigmas[0]), sigmas))
    assert float(got.mean()) == pytest.approx(0.0, abs=0.03)
    assert float(got.std()) == pytest.approx(1.0, abs=0.03)
