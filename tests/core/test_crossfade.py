"""Two encoders that share the work: the weights of a fade, and where a noisy encoder hands over to a clean one."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F

from sdg_core.encoders import NoisyCLIPConfig
from sdg_core.encoders.noisy_clip import DEFAULT_CROSSOVER
from sdg_core.method import ContentGuidance, Convention, Fade, GuidanceRun, Strength, Term, TextGuidance, guidance_shift

pytestmark = pytest.mark.usefixtures("float64")

RATIOS = torch.logspace(-3, 3, 601, dtype=torch.float64)


@pytest.mark.parametrize("ratio", [0.01, 0.7, 30.0])
@pytest.mark.parametrize("width", [1.5, 2.0, 10.0])
def test_a_fade_is_linear_in_the_logarithm_of_the_noise(ratio, width):
    fade = Fade(ratio, rising=True, width=width)
    places = [(0.0, 0.5), (1.0, 1.0), (-1.0, 0.0), (0.5, 0.75), (-0.5, 0.25), (3.0, 1.0), (-3.0, 0.0)]
    at = torch.tensor([ratio * width**exponent for exponent, _ in places])
    torch.testing.assert_close(fade(at), torch.tensor([weight for _, weight in places]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("width", [1.5, 2.0, 10.0])
def test_a_rising_and_a_falling_fade_add_up_to_one(width):
    rising, falling = Fade(0.7, True, width)(RATIOS), Fade(0.7, False, width)(RATIOS)
    torch.testing.assert_close(rising + falling, torch.ones(601), rtol=0, atol=1e-9)
    assert bool((rising.diff() >= 0).all())
    assert bool((falling.diff() <= 0).all())
    assert (float(rising[0]), float(rising[-1])) == (0.0, 1.0)


def test_no_noise_belongs_to_the_falling_one():
    assert (float(Fade(0.7, True)(torch.zeros(1))), float(Fade(0.7, False)(torch.zeros(1)))) == (0.0, 1.0)


@pytest.fixture
def pair(tiny_encoder, draw):
    """A noisy encoder above the crossing and a clean one below, as terms without a fade; and their fades."""
    noisy, clean = tiny_encoder(0), tiny_encoder(1)
    clean.reads = "denoised"
    guidance = TextGuidance(F.normalize(draw(1, 5, seed=3), dim=-1))
    return Term(guidance, noisy, 40.0), Term(guidance, clean, 40.0), Fade(0.7, True), Fade(0.7, False)


@pytest.fixture
def step(draw):
    x_0 = draw(3, 3, 8, 8).clamp(-1, 1)
    return 0.9 * x_0, x_0 + draw(3, 3, 8, 8, seed=1)


def shift(terms, step, sigma: torch.Tensor, convention: Convention):
    run = GuidanceRun(terms, convention, lambda p: math.inf if p <= 0 else 0.0, Strength(cap=None))
    return guidance_shift(*step, sigma, run), run


@pytest.mark.parametrize("convention", [Convention.VE, Convention.FLOW])
@pytest.mark.parametrize("ratio", [0.5, 0.7, 1.2])
def test_a_crossfaded_pair_is_the_weighted_sum(ratio, convention, pair, step):
    noisy, clean, rising, falling = pair
    sigma = torch.full((3,), ratio if convention is Convention.VE else ratio / (1 + ratio))
    weight = 0.5 + math.log2(ratio / 0.7) / 2
    assert 0 < weight < 1
    faded = (
        Term(noisy.guidance, noisy.encoder, 40.0, fade=rising),
        Term(noisy.guidance, clean.encoder, 40.0, fade=falling),
    )
    together, _ = shift(faded, step, sigma, convention)
    above, below = (shift((term,), step, sigma, convention)[0] for term in (noisy, clean))
    assert not torch.allclose(above, below, rtol=0.1)
    torch.testing.assert_close(together, weight * above + (1 - weight) * below, rtol=1e-9, atol=1e-9)


def test_beyond_the_width_only_one_encoder_works(pair, step):
    noisy, clean, rising, falling = pair
    faded = (
        Term(noisy.guidance, noisy.encoder, 40.0, fade=rising),
        Term(noisy.guidance, clean.encoder, 40.0, fade=falling),
    )
    for sigma, term, idle in [(2.0, noisy, clean), (0.2, clean, noisy)]:
        before = idle.encoder.calls
        batch = torch.full((3,), sigma)
        got, _ = shift(faded, step, batch, Convention.VE)
        assert idle.encoder.calls == before
        assert torch.equal(got, shift((term,), step, batch, Convention.VE)[0])


def test_samples_at_several_noise_levels_fade_by_themselves(pair, step, draw):
    """Above, at and below the crossing in one batch, for a guidance that also looks at a reference."""
    noisy, clean, rising, falling = pair
    guidance, sigma = ContentGuidance(draw(1, 3, 8, 8, seed=4).clamp(-1, 1)), torch.tensor([2.0, 0.7, 0.2])
    faded = tuple(Term(guidance, t.encoder, 40.0, fade=f) for t, f in ((noisy, rising), (clean, falling)))
    together, _ = shift(faded, step, sigma, Convention.VE)
    above, below = (shift((Term(guidance, t.encoder, 40.0),), step, sigma, Convention.VE)[0] for t in (noisy, clean))
    weight = torch.tensor([1.0, 0.5, 0.0]).view(3, 1, 1, 1)
    torch.testing.assert_close(together, weight * above + (1 - weight) * below, rtol=1e-9, atol=1e-9)


def config(*retrieval: tuple[float, float, float]) -> NoisyCLIPConfig:
    return NoisyCLIPConfig({"vision_cfg": {"image_size": 32}}, retrieval=retrieval)


def test_crossover_is_where_the_retrieval_curves_meet():
    """noisy: 0.70 at t = 100, 0.66 at 200; clean: 0.76, 0.54. Leads of 0.06 and -0.12: a third of the way."""
    rows = (0.0, 0.8, 0.9), (100.0, 0.70, 0.76), (200.0, 0.66, 0.54), (500.0, 0.5, 0.1)
    assert config(*rows).crossover() == pytest.approx(100 + 100 / 3)
    assert config(*rows[::-1]).crossover() == pytest.approx(100 + 100 / 3)
    again = NoisyCLIPConfig.from_json(json.loads(json.dumps(asdict(config(*rows)))))
    assert again == config(*rows)
    assert again.crossover() == pytest.approx(100 + 100 / 3)


def test_crossover_on_a_measured_tie_is_its_timestep():
    assert config((0.0, 0.8, 0.9), (100.0, 0.7, 0.7), (200.0, 0.6, 0.5)).crossover() == pytest.approx(100)


def test_crossover_without_measurements_is_the_default():
    assert config().crossover() == DEFAULT_CROSSOVER


def test_a_noisy_encoder_that_always_leads_never_hands_over():
    assert config((0.0, 0.9, 0.8), (100.0, 0.7, 0.5), (200.0, 0.6, 0.1)).crossover() == 0
    assert config((0.0, 0.9, 0.9), (100.0, 0.7, 0.5)).crossover() == 0
