"""Noisy encoders on latents, through the linear view: what they see, and the gradient that comes back."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sdg_core.method import (
    REFERENCE_SEED,
    ContentGuidance,
    Convention,
    Features,
    GuidanceRun,
    LinearView,
    Strength,
    StructureGuidance,
    StyleGuidance,
    Term,
    TextGuidance,
    TimestepTable,
    guide,
    rms,
)

pytestmark = pytest.mark.usefixtures("float64")

FACTORS = torch.tensor([[0.3, -0.2, 0.5, 0.1], [0.1, 0.4, -0.3, 0.2], [-0.5, 0.2, 0.1, 0.7]])
BIAS = torch.tensor([0.1, -0.3, 0.2])
VIEW = LinearView("toy", FACTORS, BIAS)
PACKED = LinearView("packed", FACTORS, BIAS, lambda x: F.pixel_shuffle(x, 2), patch=2)
TABLE = TimestepTable.from_name("linear")
NOISES = [(Convention.VE, 0.1), (Convention.VE, 3.0), (Convention.FLOW, 0.05), (Convention.FLOW, 0.7)]


def percent_to_sigma(percent: float) -> float:
    return math.inf if percent <= 0 else 0.0


def make_run(*terms: Term, convention=Convention.VE, cap: float | None = None, view: LinearView = VIEW) -> GuidanceRun:
    return GuidanceRun(terms, convention, percent_to_sigma, Strength(cap=cap), lambda encoder: view, variance=1.0)


def picture(x: Tensor, signal: float) -> Tensor:
    """A x + signal b."""
    return torch.einsum("rc,bchw->brhw", FACTORS.to(x), x) + signal * BIAS.to(x).view(3, 1, 1)


@pytest.fixture
def step(draw):
    """denoised and x_t (4, 4, 6, 6) at sigma 0.6."""
    x_0 = draw(4, 4, 6, 6)
    return 0.9 * x_0, 0.4 * x_0 + 0.6 * draw(4, 4, 6, 6, seed=1), torch.full((4,), 0.6)


@pytest.fixture
def all_terms(tiny_encoder, draw):
    """One guidance of every kind by a noisy encoder, with a scale."""
    image = draw(2, 3, 12, 8, seed=2).clamp(-1, 1)
    guidances = (
        TextGuidance(F.normalize(draw(2, 5, seed=3), dim=-1)),
        ContentGuidance(image),
        StructureGuidance(image, layers=(1, 2)),
        StyleGuidance(image, layers=(2,)),
    )
    encoder = tiny_encoder()
    return lambda scale=5.0: tuple(Term(guidance, encoder, scale) for guidance in guidances)


class RecordingEncoder:
    """Its one map is what it sees; it keeps that and its t. ``gain``: what it claims to do to white noise."""

    full_depth = 2
    reads = "noisy"
    table = TABLE

    def __init__(self, gain: float = 1.0) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []
        self.gain, self.sizes = gain, []

    def __call__(self, image: Tensor, t: Tensor, depth: int) -> Features:
        self.seen.append((image.detach(), t))
        return Features((image,))

    def noise_gain(self, height: int, width: int) -> float:
        self.sizes.append((height, width))
        return self.gain


@pytest.mark.parametrize(("convention", "sigma"), NOISES)
def test_the_encoder_sees_the_vp_scaled_picture(convention, sigma, draw):
    """sqrt(abar) (A x_0 + b) + sqrt(1 - abar) A eps, at the t of its schedule that has this abar."""
    x_0, eps, encoder = draw(2, 4, 6, 6), draw(2, 4, 6, 6, seed=1), RecordingEncoder()
    alpha = float(convention.alpha(torch.tensor(sigma)))
    reference = draw(1, 3, 6, 6, seed=2).clamp(-1, 1)
    run = make_run(Term(StructureGuidance(reference, (1,)), encoder, 1.0), convention=convention)
    guide(x_0, alpha * x_0 + sigma * eps, torch.full((2,), sigma), run)
    abar = alpha**2 / (alpha**2 + sigma**2)
    generator = torch.Generator().manual_seed(REFERENCE_SEED)
    fixed = torch.randn(1, 4, 6, 6, generator=generator)  # the references' noise is drawn in the latent space
    clean = [reference, picture(x_0, 1.0)]
    for (seen, t), wanted, noise in zip(encoder.seen, clean, (fixed, eps), strict=True):
        mixed = math.sqrt(abar) * wanted + math.sqrt(1 - abar) * picture(noise, 0.0)
        torch.testing.assert_close(seen, mixed, rtol=0, atol=1e-9)
        assert float(TABLE.sigma(t)) == pytest.approx(sigma / alpha, rel=1e-4)


@pytest.mark.parametrize("convention", [Convention.VE, Convention.FLOW])
def test_an_encoder_that_averages_noise_is_told_of_less(convention, draw):
    """With gain g the signal stays sqrt(abar) and the noise before its averaging is sqrt(1 - abar) / g."""
    x_0, eps, encoder, sigma, gain = draw(1, 4, 6, 6), draw(1, 4, 6, 6, seed=1), RecordingEncoder(0.5), 0.6, 0.5
    alpha = float(convention.alpha(torch.tensor(sigma)))
    run = make_run(Term(StructureGuidance(draw(1, 3, 6, 6, seed=2), (1,)), encoder, 1.0), convention=convention)
    guide(x_0, alpha * x_0 + sigma * eps, torch.full((1,), sigma), run)
    ratio = sigma / alpha * gain
    abar = 1 / (1 + ratio**2)
    seen, t = encoder.seen[-1]
    wanted = math.sqrt(abar) * picture(x_0, 1.0) + math.sqrt(1 - abar) / gain * picture(eps, 0.0)
    torch.testing.assert_close(seen, wanted, rtol=0, atol=1e-9)
    assert float(TABLE.sigma(t)) == pytest.approx(ratio, rel=1e-4)


def test_a_packed_latent_is_seen_at_its_unpacked_size(draw):
    encoder, x_t = RecordingEncoder(), draw(1, 16, 3, 5)
    run = make_run(Term(StructureGuidance(draw(1, 3, 9, 9), (1,)), encoder, 1.0), view=PACKED)
    shift = guide(torch.zeros_like(x_t), x_t, torch.ones(1), run)
    assert [tuple(seen.shape) for seen, _ in encoder.seen] == [(1, 3, 6, 10)] * 2
    assert set(encoder.sizes) == {(6, 10)}
    assert shift.shape == x_t.shape


@pytest.mark.parametrize(("convention", "sigma"), NOISES)
def test_the_shift_equals_finite_differences(convention, sigma, tiny_encoder, draw):
    """sigma^2 / alpha times the slope of a score written out in float64, for every number of the latent."""
    encoder, embed = tiny_encoder(), F.normalize(draw(1, 5, seed=3), dim=-1)
    x_t = draw(1, 4, 4, 4)
    alpha = float(convention.alpha(torch.tensor(sigma)))
    norm = math.hypot(alpha, sigma)
    precise, t = copy.deepcopy(encoder).double(), TABLE.timestep(torch.tensor([sigma / alpha])).double()

    def score(x: Tensor) -> Tensor:
        with torch.no_grad():
            seen = precise(picture(x / norm, alpha / norm), t, 3)
            return 7 * F.cosine_similarity(seen.embed, embed.double())

    h = 1e-5
    bumps = h * torch.eye(64, dtype=torch.float64).view(64, 4, 4, 4)
    slope = ((score(x_t.double() + bumps) - score(x_t.double() - bumps)) / (2 * h)).view(1, 4, 4, 4)
    wanted = sigma**2 / alpha * slope
    run = make_run(Term(TextGuidance(embed), encoder, 7.0), convention=convention)
    got = guide(torch.zeros_like(x_t), x_t, torch.tensor([sigma]), run)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-9, atol=1e-9 * float(wanted.abs().max()))


@pytest.mark.parametrize("cap", [None, 0.05])
@pytest.mark.parametrize("convention", [Convention.VE, Convention.FLOW])
def test_a_batch_of_four_equals_four_singles(convention, cap, all_terms, step):
    batch = guide(*step, make_run(*all_terms(50.0), convention=convention, cap=cap))
    for i in range(4):
        single = (v[i : i + 1] for v in step)
        wanted = guide(*single, make_run(*all_terms(50.0), convention=convention, cap=cap))
        torch.testing.assert_close(batch[i : i + 1], wanted, rtol=1e-9, atol=1e-9)


def test_scale_zero_returns_the_input_itself(all_terms, step):
    assert guide(*step, make_run(*all_terms(0.0))) is step[0]
    assert all(term.encoder.calls == 0 for term in all_terms(0.0))


def test_the_cap_counts_every_sample_by_itself(all_terms, step):
    """Samples whose own step is small are bound by it, the others keep their shift."""
    denoised, x_t, sigma = step
    free = guide(denoised, x_t, sigma, make_run(*all_terms(1.0))) - denoised
    size = rms(free)
    own = size * torch.tensor([0.5, 4.0, 0.25, 8.0])  # the model's own steps, beside the shifts
    far = denoised + (x_t - denoised) * (own / rms(x_t - denoised)).view(-1, 1, 1, 1)
    run = make_run(*all_terms(1.0), cap=1.0)
    free = guide(denoised, far, sigma, make_run(*all_terms(1.0))) - denoised
    shift = guide(denoised, far, sigma, run) - denoised
    bound = rms(free) > own
    assert bound.any()
    assert not bound.all()
    wanted = free * (own / rms(free)).clamp(max=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(shift, wanted, rtol=1e-9, atol=1e-9)
    assert run.trace[0].capped.tolist() == bound.tolist()
