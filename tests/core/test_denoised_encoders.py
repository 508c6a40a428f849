"""Guided sampling by an encoder that reads the denoised estimate D, where the answer is known.

Data x_0 ~ N(0, v) per element. At any noise x_0 | x_t ~ N(D, c), with c = sigma^2 v / (alpha^2 v + sigma^2). Two wishes
have an exact score F of D:

- a tilt, p(x_0) exp(h x_0) = N(v h, v): log E[exp(h x_0) | x_t] = h D + h^2 c / 2, so F = h D, at every noise alike;
- an observation y = x_0 + tau * noise: F = log p(y | x_t) = -(y - D)^2 / (2 (tau^2 + c)), for which the toy guidance is
  told c. The posterior is N(v y / (v + tau^2), v tau^2 / (v + tau^2)).

Then guided denoised is E[x_0 | x_t, wish], and samplers draw the wished distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sdg_core.method import (
    ContentGuidance,
    Convention,
    Features,
    GuidanceRun,
    Strength,
    StructureGuidance,
    Term,
    TimestepTable,
    guidance_shift,
    guide,
)
from sdg_core.models import (
    Prediction,
    Step,
    euler,
    euler_ancestral,
    euler_ancestral_flow,
    guided,
    initial,
    normal_sigmas,
    paper,
    percent_to_sigma,
)

pytestmark = pytest.mark.usefixtures("float64")

Y, TAU, TILT = 1.5, 0.5, 0.8
SHAPE = (4, 3, 32, 32)
STEPS = 250
TABLE = TimestepTable.from_name("linear")


class IdentityEncoder:
    """Its one map is the picture; it keeps what it read."""

    full_depth = 2
    reads = "denoised"

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __call__(self, image: Tensor, t: Tensor, depth: int) -> Features:
        self.seen.append((image.detach(), t))
        return Features((image,))


@dataclass(eq=False)
class Wish:
    """A score of D with a closed form, ``slope(D, c)`` its gradient by hand. ``spread`` is c (B,) at this step."""

    kind: str
    v: float
    spread: Tensor = field(default_factory=lambda: torch.zeros(1))

    def depth(self, encoder) -> int:
        return 1

    def target(self, look) -> Features:
        return Features(())

    def score(self, features: Features, target: Features) -> Tensor:
        (d,) = features.maps
        if self.kind == "tilt":
            return TILT * d.flatten(1).sum(dim=1)
        return -(Y - d).square().flatten(1).sum(dim=1) / (2 * (TAU**2 + self.spread))

    def line(self, alpha: float, sigma: float) -> tuple[float, float]:
        """E[x_0 | x_t, wish] = a x_t + b, from precisions and means."""
        precision = 1 / self.v + (alpha / sigma) ** 2
        if self.kind == "tilt":
            return alpha / sigma**2 / precision, TILT / precision
        precision += 1 / TAU**2
        return alpha / sigma**2 / precision, Y / TAU**2 / precision

    def answer(self) -> tuple[float, float]:
        """Mean and standard deviation of x_0 under the wish."""
        if self.kind == "tilt":
            return self.v * TILT, math.sqrt(self.v)
        return self.v * Y / (self.v + TAU**2), math.sqrt(self.v) * TAU / math.hypot(TAU, math.sqrt(self.v))


def make_denoise(wish: Wish, convention: Convention) -> Callable[[Tensor, Tensor], Tensor]:
    """E[x_0 | x_t] of the data; tells the wish how uncertain that is."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        alpha = convention.alpha(sigma)
        power = alpha.square() * wish.v + sigma.square()
        wish.spread = sigma.square() * wish.v / power
        return x * (alpha * wish.v / power).view(-1, 1, 1, 1)

    return denoise


def make_run(wish: Wish, convention: Convention, scale: float = 1.0) -> GuidanceRun:
    term = Term(wish, IdentityEncoder(), scale)
    return GuidanceRun((term,), convention, lambda p: math.inf if p <= 0 else 0.0, Strength(cap=None), variance=wish.v)


def last(steps) -> Tensor:
    *_, step = steps
    return step.x


@pytest.fixture(params=["tilt", "observation"])
def kind(request) -> str:
    return request.param


@pytest.fixture(params=[0.25, 1.0])
def v(request) -> float:
    return request.param


@pytest.mark.parametrize(
    ("convention", "sigma"),
    [(Convention.VE, s) for s in (0.011, 0.3, 1.0, 14.6, 157.0)] + [(Convention.FLOW, s) for s in (0.01, 0.4, 0.9)],
)
def test_guide_is_the_posterior_mean(convention, sigma, kind, v, draw):
    wish, batch = Wish(kind, v), torch.full((2,), sigma)
    alpha = float(convention.alpha(batch[0]))
    x_t = draw(2, 3, 8, 8) * math.sqrt(alpha**2 * v + sigma**2)
    a, b = wish.line(alpha, sigma)
    got = guide(make_denoise(wish, convention)(x_t, batch), x_t, batch, make_run(wish, convention))
    torch.testing.assert_close(got, a * x_t + b, rtol=0, atol=1e-9)


def test_guide_is_the_posterior_mean_at_each_samples_sigma(v, draw):
    wish, sigma = Wish("tilt", v), torch.tensor([0.05, 1.0, 1.0, 60.0])
    x_t = draw(4, 3, 8, 8) * (v + sigma.square()).sqrt().view(-1, 1, 1, 1)
    got = guide(make_denoise(wish, Convention.VE)(x_t, sigma), x_t, sigma, make_run(wish, Convention.VE))
    wanted = [a * x + b for x, s in zip(x_t, sigma, strict=True) for a, b in [wish.line(1.0, float(s))]]
    torch.testing.assert_close(got, torch.stack(wanted), rtol=0, atol=1e-9)


def euler_lines(wish: Wish, sigmas: list[float], flow: bool) -> list[tuple[float, float, float]]:
    """x <- a x + b + c noise of Euler's steps, dx / dsigma = (x - denoised) / sigma in both conventions."""
    lines = []
    for s, s_next in pairwise(sigmas):
        alpha = 1 - s if flow else 1.0
        a, b = wish.line(alpha, s) if alpha > 0 else (0.0, 0.0)  # where there is no signal, the prior's mean
        h = (s_next - s) / s
        lines.append((1 + h * (1 - a), -h * b, 0.0))
    return lines


def ancestral_lines(wish: Wish, sigmas: list[float], flow: bool) -> list[tuple[float, float, float]]:
    """Data and noise are estimated; k of the estimated noise is kept, and the rest of the next sigma drawn anew.

    A step down to s'^2 / s, its signal then brought to the next one's scale: x' = alpha' D + k eps + noise.
    """
    lines = []
    for s, s_next in pairwise(sigmas):
        down = s_next**2 / s
        alpha, alpha_next, alpha_down = (1 - s, 1 - s_next, 1 - down) if flow else (1.0, 1.0, 1.0)
        a, b = wish.line(alpha, s) if alpha > 0 else (0.0, 0.0)
        k = down * alpha_next / alpha_down
        pull = alpha_next - k * alpha / s  # eps = (x - alpha D) / s
        lines.append((k / s + pull * a, pull * b, math.sqrt(s_next**2 - k**2)))
    return lines


def chain(lines: list[tuple[float, float, float]], variance: float) -> tuple[float, float]:
    """Mean and standard deviation after all lines, from mean 0."""
    mean = 0.0
    for a, b, c in lines:
        mean, variance = a * mean + b, a * a * variance + c * c
    return mean, math.sqrt(variance)


@pytest.mark.parametrize("convention", [Convention.VE, Convention.FLOW])
@pytest.mark.parametrize("ancestral", [False, True])
@pytest.mark.parametrize(("kind", "v"), [("tilt", 1.0), ("observation", 0.25)])
def test_samplers_reach_the_wished_distribution(convention, ancestral, kind, v, draw):
    wish, flow = Wish(kind, v), convention is Convention.FLOW
    sigmas = torch.linspace(1, 0, STEPS + 1) if flow else normal_sigmas(TABLE, STEPS)
    x = draw(*SHAPE) if flow else initial(draw(*SHAPE), sigmas[0])
    denoise = guided(make_denoise(wish, convention), make_run(wish, convention))
    if ancestral:
        sampler = euler_ancestral_flow if flow else euler_ancestral
        got = last(sampler(denoise, x, sigmas, torch.Generator().manual_seed(1)))
    else:
        got = last(euler(denoise, x, sigmas))
    lines = (ancestral_lines if ancestral else euler_lines)(wish, sigmas.double().tolist(), flow)
    mean, std = chain(lines, 1.0 if flow else 1 + float(sigmas[0]) ** 2)
    assert float(got.mean()) == pytest.approx(mean, abs=5 * std / math.sqrt(got.numel()))
    assert float(got.std()) == pytest.approx(std, abs=5 * std / math.sqrt(2 * got.numel()))
    assert (mean, std) == pytest.approx(wish.answer(), abs=0.02)


def test_the_papers_sampler_reaches_the_tilt(draw):
    """In VP scaling, for v = 1: x_{t-1} ~ N(sqrt(1 - beta) u + beta * grad_u F, beta), with grad_u F = h dD/du."""
    wish, sigmas = Wish("tilt", 1.0), normal_sigmas(TABLE, STEPS)
    abar = [1 / (1 + s**2) for s in sigmas.double().tolist()]
    lines = []
    for now, after in pairwise(abar):
        beta = 1 - now / after
        noise = math.sqrt(beta) if after < 1 else 0.0
        lines.append((math.sqrt(1 - beta), beta * TILT * math.sqrt(now), noise))
    denoise, run = make_denoise(wish, Convention.VE), make_run(wish, Convention.VE)
    got = last(
        paper(
            lambda x, s: Prediction(denoise(x, s), torch.ones_like(x)),
            initial(draw(*SHAPE), sigmas[0]),
            sigmas,
            torch.Generator().manual_seed(1),
            run,
        )
    )
    mean, std = chain(lines, 1.0)
    assert float(got.mean()) == pytest.approx(mean, abs=5 * std / math.sqrt(got.numel()))
    assert float(got.std()) == pytest.approx(std, abs=5 * std / math.sqrt(2 * got.numel()))
    assert (mean, std) == pytest.approx(wish.answer(), abs=0.02)


def test_the_encoder_reads_denoised_itself_and_no_time(v, draw):
    wish, x_t, sigma = Wish("tilt", v), draw(2, 3, 8, 8), torch.tensor([0.5, 2.0])
    run, denoised = make_run(wish, Convention.VE), draw(2, 3, 8, 8, seed=1)
    guide(denoised, x_t, sigma, run)
    seen = torch.cat([image for image, _ in run.terms[0].encoder.seen])
    assert torch.equal(seen, denoised)
    assert all(t.tolist() == [0.0] for _, t in run.terms[0].encoder.seen)


class Forbidden(torch.autograd.Function):
    """The identity; going back through it is an error."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        raise AssertionError("The gradient went back through the diffusion model.")


@pytest.fixture
def model_with_graph():
    """A denoiser that records a graph whatever its caller does, through which no gradient may pass."""
    weight = torch.tensor(0.7, requires_grad=True)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        with torch.enable_grad():
            return Forbidden.apply(weight * x)

    return weight, denoise


def test_no_gradient_reaches_the_diffusion_model(model_with_graph, draw):
    weight, denoise = model_with_graph
    run, x_t, sigma = make_run(Wish("observation", 1.0), Convention.VE), draw(2, 3, 8, 8), torch.full((2,), 2.0)
    denoised = denoise(x_t, sigma)
    assert denoised.requires_grad
    shift = guidance_shift(denoised, x_t, sigma, run)
    plain = guidance_shift(denoised.detach(), x_t, sigma, make_run(Wish("observation", 1.0), Convention.VE))
    assert float(shift.abs().min()) > 0
    assert torch.equal(shift, plain)
    assert weight.grad is None
    assert not any(v.requires_grad for v in (shift, run.trace[0].scores, run.trace[0].pull))


def test_sampling_keeps_no_graph(model_with_graph, draw):
    weight, denoise = model_with_graph
    run = make_run(Wish("observation", 1.0), Convention.VE)
    steps: list[Step] = list(euler(guided(denoise, run), draw(1, 3, 8, 8), torch.tensor([2.0, 1.0, 0.5, 0.0])))
    assert not any(v.requires_grad for step in steps for v in (step.x, step.denoised))
    assert not any(trace.scores.requires_grad for trace in run.trace)
    assert weight.grad is None


def denoised_encoder(tiny_encoder):
    encoder = tiny_encoder()
    encoder.reads = "denoised"
    return encoder


def test_references_are_looked_at_once_per_run(tiny_encoder, draw):
    """They are clean at every noise, so one look serves all: also at mixed noise levels, and after many of them."""
    encoder, image = denoised_encoder(tiny_encoder), draw(1, 3, 8, 8, seed=2).clamp(-1, 1)
    terms = Term(ContentGuidance(image), encoder, 5.0), Term(StructureGuidance(image, (1,)), encoder, 5.0)
    run = GuidanceRun(terms, Convention.VE, percent_to_sigma(TABLE))
    calls = []
    for s in (14.0, 9.0, 5.0, 3.0, 2.0, 1.0, 0.5):
        guide(draw(2, 3, 8, 8), draw(2, 3, 8, 8, seed=1), torch.full((2,), s), run)
        calls.append(encoder.calls)
    assert calls == list(range(2, 9))  # one look at the reference, then one pass a step
    guide(draw(2, 3, 8, 8), draw(2, 3, 8, 8, seed=1), torch.tensor([3.0, 1.0]), run)
    assert encoder.calls == calls[-1] + 2


def test_the_gradient_is_that_of_the_clean_score_times_the_posterior_variance(tiny_encoder, draw):
    """Written out in float64 for a real score, at two noise levels, in both conventions."""
    encoder, image = denoised_encoder(tiny_encoder), draw(1, 3, 8, 8, seed=2).clamp(-1, 1)
    denoised, x_t, v = draw(2, 3, 8, 8), draw(2, 3, 8, 8, seed=1), 0.25
    d = denoised.clone().requires_grad_(True)
    wanted_embed, embed = (encoder(x, torch.zeros(1), 3).embed for x in (image, d))
    (grad,) = torch.autograd.grad(7 * F.cosine_similarity(embed, wanted_embed.detach()).sum(), d)
    for convention, sigma in [(Convention.VE, (0.3, 8.0)), (Convention.FLOW, (0.2, 0.9))]:
        s = torch.tensor(sigma)
        alpha = convention.alpha(s)
        run = GuidanceRun(
            (Term(ContentGuidance(image), encoder, 7.0),), convention, lambda p: math.inf if p <= 0 else 0.0,
            Strength(cap=None), variance=v,
        )  # fmt: skip
        factor = s.square() * v / (alpha.square() * v + s.square())
        shift = guidance_shift(denoised, x_t, s, run)
        torch.testing.assert_close(shift, grad * factor.view(-1, 1, 1, 1), rtol=1e-9, atol=1e-9)


def test_a_clean_reference_needs_no_table(draw):
    """The toy has neither timesteps nor ``noise_gain``: nothing noisy is asked of an encoder of denoised."""
    encoder = IdentityEncoder()
    image = draw(1, 3, 8, 8).clamp(-1, 1)
    run = GuidanceRun((Term(StructureGuidance(image, (1,)), encoder, 1.0),), Convention.VE, lambda p: 100 * (1 - p))
    guide(draw(1, 3, 8, 8), draw(1, 3, 8, 8, seed=1), torch.tensor([1.0]), run)
    assert torch.equal(encoder.seen[0][0], image)
