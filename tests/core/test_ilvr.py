"""ILVR: the low frequencies of a finished picture are the reference's, its high ones are free. In float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sdg_core.method import ContentGuidance, Convention, GuidanceRun, LowFrequencies, Term, low_pass
from sdg_core.models import euler, euler_ancestral, euler_ancestral_flow, guided, held

pytestmark = pytest.mark.usefixtures("float64")

MEAN, VARIANCE, FACTOR = 0.3, 0.5, 4
SIGMAS = {
    "ve": torch.tensor([9.0, 5.0, 2.0, 0.8, 0.3, 0.0], dtype=torch.float64),
    "flow": torch.tensor([1.0, 0.8, 0.6, 0.3, 0.1, 0.0], dtype=torch.float64),
}


def denoiser(convention: str):
    """E[x_0 | x_t] of data whose pixels are N(MEAN, VARIANCE), independent."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        alpha = (1 - sigma if convention == "flow" else torch.ones_like(sigma)).view(-1, 1, 1, 1)
        s = sigma.view(-1, 1, 1, 1)
        return MEAN + alpha * VARIANCE / (alpha**2 * VARIANCE + s**2) * (x - alpha * MEAN)

    return denoise


def percent(convention: str):
    """Fraction of the run -> sigma, linear in the steps of SIGMAS."""

    def sigma(fraction: float) -> float:
        if fraction <= 0 or fraction >= 1:
            return math.inf if fraction <= 0 else 0.0
        place = fraction * (len(SIGMAS[convention]) - 1)
        return float(SIGMAS[convention][int(place)])

    return sigma


def start(convention: str, draw) -> Tensor:
    return draw(2, 3, 16, 12) * SIGMAS[convention][0]


def reference(draw) -> Tensor:
    return draw(1, 3, 16, 12, seed=5)


@pytest.mark.parametrize("shape", [(16, 16), (16, 12), (15, 22), (3, 9)])
def test_low_pass_is_a_linear_projection_that_keeps_means_over_areas(shape, draw):
    x, y = draw(2, 3, *shape), draw(2, 3, *shape, seed=1)
    low = low_pass(x, FACTOR)
    torch.testing.assert_close(low_pass(low, FACTOR), low, rtol=0, atol=1e-12)
    torch.testing.assert_close(low_pass(2 * x - y, FACTOR), 2 * low - low_pass(y, FACTOR), rtol=0, atol=1e-12)
    few = [max(1, round(side / FACTOR)) for side in shape]
    torch.testing.assert_close(F.adaptive_avg_pool2d(low, few), F.adaptive_avg_pool2d(x, few), rtol=0, atol=1e-12)
    flat = torch.full((1, 1, *shape), 0.7)
    torch.testing.assert_close(low_pass(flat, FACTOR), flat, rtol=0, atol=1e-12)


def test_low_pass_is_smooth_and_factor_one_keeps_everything(draw):
    x = draw(1, 1, 16, 16)
    blocky = F.interpolate(F.avg_pool2d(x, 4), 16)
    smooth, steep = ((v[..., 1:] - v[..., :-1]).square().mean() for v in (low_pass(x, 4), blocky))
    assert smooth < 0.7 * steep
    torch.testing.assert_close(low_pass(x, 1), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(low_pass(x, 99), x.mean().expand_as(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("convention", SIGMAS)
def test_a_run_has_the_references_low_frequencies_and_its_own_high_ones(convention, draw):
    """At every step of Euler, with r = sigma_t / sigma_T: phi(x_t) = (1 - r) phi(y_0) + r phi(x_T).

    Pixels of this data are independent and of one variance, so the high frequencies run as if nothing was held.
    """
    x, y, sigmas = start(convention, draw), reference(draw), SIGMAS[convention]
    plain = list(euler(denoiser(convention), x, sigmas))
    steps = euler(held(denoiser(convention), LowFrequencies(y, FACTOR), percent(convention)), x, sigmas)
    for free, step in zip(plain, steps, strict=True):
        r = sigmas[step.index + 1] / sigmas[0]
        wanted = (1 - r) * low_pass(y, FACTOR) + r * low_pass(x, FACTOR)
        torch.testing.assert_close(low_pass(step.x, FACTOR), wanted, rtol=0, atol=1e-9)
        high = step.x - low_pass(step.x, FACTOR)
        torch.testing.assert_close(high, free.x - low_pass(free.x, FACTOR), rtol=0, atol=1e-9)
    assert float((step.x - free.x).abs().max()) > 0.1


def test_the_low_frequencies_of_a_noisy_step_are_the_reference_noised_to_it(draw):
    """phi(x_t) - phi(y_0) of an ancestral run is Gaussian of deviation sigma_t: phi(eps) times sigma_t, as ILVR's."""
    many, sigmas = 4000, SIGMAS["ve"]
    x, y = draw(many, 1, 8, 8) * sigmas[0], draw(1, 1, 8, 8, seed=5)
    noise = float(low_pass(draw(many, 1, 8, 8, seed=2), FACTOR).std())
    generator = torch.Generator().manual_seed(1)
    steps = list(euler_ancestral(held(denoiser("ve"), LowFrequencies(y, FACTOR), percent("ve")), x, sigmas, generator))
    for step in steps[2:-1]:
        apart = low_pass(step.x - y, FACTOR)
        assert float(apart.std()) == pytest.approx(float(sigmas[step.index + 1]) * noise, rel=0.04)
    torch.testing.assert_close(low_pass(steps[-1].x, FACTOR), low_pass(y, FACTOR).expand(many, 1, 8, 8))


def test_flow_models_with_fresh_noise_hold_it_too(draw):
    x, y = start("flow", draw), reference(draw)
    low = held(denoiser("flow"), LowFrequencies(y, FACTOR), percent("flow"))
    *_, last = euler_ancestral_flow(low, x, SIGMAS["flow"], torch.Generator().manual_seed(1))
    torch.testing.assert_close(low_pass(last.x, FACTOR), low_pass(y, FACTOR).expand_as(x), rtol=0, atol=1e-9)


def test_it_holds_under_guidance_which_moves_the_rest(tiny_encoder, draw):
    x, y, sigmas = start("ve", draw), reference(draw), SIGMAS["ve"]
    run = GuidanceRun((Term(ContentGuidance(draw(1, 3, 16, 12, seed=3).clamp(-1, 1)), tiny_encoder().double(), 50.0),),
                      Convention.VE, percent("ve"))  # fmt: skip
    low = LowFrequencies(y, FACTOR)
    *_, alone = euler(held(denoiser("ve"), low, percent("ve")), x, sigmas)
    *_, both = euler(held(guided(denoiser("ve"), run), low, percent("ve")), x, sigmas)
    torch.testing.assert_close(low_pass(both.x, FACTOR), low_pass(y, FACTOR).expand_as(x), rtol=0, atol=1e-9)
    assert float((both.x - alone.x).abs().max()) > 1e-3
    assert len(run.trace) == 5


def test_outside_its_range_a_step_is_the_models_own_bit_for_bit(draw):
    x, y, sigmas = start("ve", draw), reference(draw), SIGMAS["ve"]
    low = LowFrequencies(y, FACTOR, start=0.4, end=0.8)
    plain, steps = (list(euler(f, x, sigmas)) for f in (denoiser("ve"), held(denoiser("ve"), low, percent("ve"))))
    assert [torch.equal(a.denoised, b.denoised) for a, b in zip(plain, steps, strict=True)][:3] == [True, True, False]
    assert torch.equal(steps[1].x, plain[1].x)
    denoised = denoiser("ve")(steps[3].x, sigmas[4].expand(2))
    assert torch.equal(steps[4].denoised, denoised)
    assert low.hold(denoised, sigmas[4:5], percent("ve")) is denoised


def test_samples_at_other_noise_levels_are_left_alone(draw):
    denoised, y = draw(2, 3, 16, 12), reference(draw)
    low = LowFrequencies(y, FACTOR, end=0.5)
    out = low.hold(denoised, torch.tensor([5.0, 0.3]), percent("ve"))
    assert torch.equal(out[1], denoised[1])
    alone = low.hold(denoised[:1], torch.tensor([5.0]), percent("ve"))
    torch.testing.assert_close(out[:1], alone, rtol=0, atol=1e-12)


def test_halves_stay_halves_and_frames_are_pictures(draw):
    video, y = draw(1, 4, 3, 8, 8), draw(1, 4, 1, 8, 8, seed=2)
    out = LowFrequencies(y, FACTOR).hold(video, torch.tensor([2.0]), percent("ve"))
    single = LowFrequencies(y[:, :, 0], FACTOR).hold(video[:, :, 1], torch.tensor([2.0]), percent("ve"))
    torch.testing.assert_close(out[:, :, 1], single, rtol=0, atol=1e-12)
    half = LowFrequencies(y, FACTOR).hold(video.half(), torch.tensor([2.0]), percent("ve"))
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.double(), out, rtol=2e-3, atol=2e-3)


def test_impossible_settings_are_explained(draw):
    low = LowFrequencies(reference(draw), FACTOR)
    with pytest.raises(ValueError, match="down factor of 0; wanted 1 or more"):
        replace(low, factor=0)
    with pytest.raises(ValueError, match="Set start below end"):
        replace(low, start=0.5, end=0.5)
