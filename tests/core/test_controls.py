"""The artists' controls: what each does to a step and to a run."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sdg_core.method import (
    EASES,
    ContentGuidance,
    Convention,
    Curve,
    GuidanceRun,
    Strength,
    StructureGuidance,
    StyleGuidance,
    Term,
    TextGuidance,
    guide,
)

pytestmark = pytest.mark.usefixtures("float64")

UNBOUND = Strength(cap=None)


def percent_to_sigma(percent: float) -> float:
    return math.inf if percent <= 0 else 10 * (1 - percent)


def make_run(*terms: Term, strength: Strength = UNBOUND, convention: Convention = Convention.VE) -> GuidanceRun:
    return GuidanceRun(terms, convention, percent_to_sigma, strength)


@pytest.fixture
def step(draw):
    """denoised and x_t (4, 3, 8, 8) at sigma 2."""
    x_0, eps = draw(4, 3, 8, 8).clamp(-1, 1), draw(4, 3, 8, 8, seed=1)
    return 0.9 * x_0, x_0 + 2 * eps, torch.full((4,), 2.0)


@pytest.fixture
def image(draw):
    return draw(1, 3, 8, 8, seed=2).clamp(-1, 1)


@pytest.fixture
def kinds(draw, image):
    """One guidance of every kind, for the toy encoder."""
    return {
        "text": TextGuidance(F.normalize(draw(1, 5, seed=3), dim=-1)),
        "content": ContentGuidance(image),
        "structure": StructureGuidance(image, layers=(1, 2)),
        "style": StyleGuidance(image, layers=(2,)),
        "style_centred": StyleGuidance(image, layers=(1,), centred=True),
    }


@pytest.fixture(params=["noisy", "denoised"])
def encoder(request, tiny_encoder):
    encoder = tiny_encoder()
    encoder.reads = request.param
    return encoder


def shift_of(step: tuple[Tensor, Tensor, Tensor], run: GuidanceRun, sigma: float | None = None) -> Tensor:
    denoised, x_t, at = step
    return guide(denoised, x_t, at if sigma is None else torch.full_like(at, sigma), run) - denoised


# When


@pytest.mark.parametrize(
    ("ease", "wanted"),
    [("constant", 1.0), ("linear", 1.5), ("ease in", 1.25), ("ease out", 1.75), ("ease in and out", 1.5)],
)
def test_a_curve_runs_through_its_points_by_its_ease(ease, wanted):
    curve = Curve(((0.2, 1.0), (0.6, 2.0), (0.8, 0.5)), ease)
    got = curve(torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8, 1.0]))
    torch.testing.assert_close(got, torch.tensor([1.0, 1.0, wanted, 2.0, 0.5, 0.5]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("ease", EASES)
def test_a_curve_of_one_point_is_constant(ease):
    assert Curve(((0.5, 0.7),), ease)(torch.tensor([0.0, 0.5, 1.0])).tolist() == [0.7] * 3


@pytest.mark.parametrize(
    "points",
    [(), ((0.5, 1.0), (0.5, 2.0)), ((0.6, 1.0), (0.2, 1.0)), ((1.2, 1.0),), ((0.0, -1.0),), ((0.0, math.nan),)],
)
def test_points_that_make_no_curve_are_refused(points):
    with pytest.raises(ValueError, match="each a part of the run from 0 to 1, rising, and a factor of 0 or more"):
        Curve(points)


def test_percent_is_the_inverse_of_percent_to_sigma(tiny_encoder, kinds):
    run = make_run(Term(kinds["text"], tiny_encoder(), 1.0))
    got = run.percent(torch.tensor([1e6, 10.0, 7.5, 0.1]))
    torch.testing.assert_close(got, torch.tensor([0.0, 0.0, 0.25, 0.99]), rtol=0, atol=1e-8)


@pytest.mark.parametrize("strength", [UNBOUND, Strength("relative", 0.3)])
def test_a_curve_multiplies_the_shift(strength, encoder, kinds, step):
    term = Term(kinds["text"], encoder, 5.0)
    curved = replace(term, curves=(Curve(((0.0, 0.0), (1.0, 1.0))), Curve(((0.5, 0.5),))))
    for sigma in (8.0, 2.0):
        plain, got = (shift_of(step, make_run(t, strength=strength), sigma) for t in (term, curved))
        torch.testing.assert_close(got, (1 - sigma / 10) * 0.5 * plain, rtol=1e-7, atol=1e-9)


def test_where_the_curve_is_zero_denoised_itself_comes_back_and_no_encoder_is_asked(encoder, kinds, step):
    denoised, x_t, _ = step
    curve = Curve(((0.0, 0.0), (0.3, 0.0), (0.5, 1.0), (0.8, 0.0)))
    run = make_run(Term(kinds["content"], encoder, 5.0, curves=(curve,)), strength=Strength())
    for sigma, acts in [(50.0, False), (10.0, False), (7.01, False), (6.0, True), (2.0, False), (0.5, False)]:
        before = encoder.calls
        assert (guide(denoised, x_t, torch.full((4,), sigma), run) is not denoised) == acts
        assert (encoder.calls > before) == acts


def test_a_curve_of_one_changes_no_bit(encoder, kinds, step):
    term = Term(kinds["structure"], encoder, 5.0)
    for strength in (Strength(), Strength("relative", 0.3)):
        runs = [make_run(t, strength=strength) for t in (term, replace(term, curves=(Curve(),)))]
        assert torch.equal(*(guide(*step, run) for run in runs))


def sampled(draw, run: GuidanceRun, calls: list[float]) -> list[Tensor]:
    """The shifts of model calls at these noise levels, all on the same picture."""
    x_0, eps = draw(2, 3, 8, 8).clamp(-1, 1), draw(2, 3, 8, 8, seed=1)
    return [shift_of((0.9 * x_0, x_0 + s * eps, torch.full((2,), s)), run) for s in calls]


EULER = [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0]
HEUN = [9.0, 8.0, 8.0, 7.0, 7.0, 6.0, 6.0, 5.0, 5.0, 4.0]
HEUNPP2 = [9.0, 8.0, 7.0, 8.0, 7.0, 6.0, 7.0, 6.0, 5.0]


@pytest.mark.parametrize(("calls", "every", "passes"), [
    (EULER, 1, 8), (EULER, 2, 4), (EULER, 3, 3), (HEUN, 2, 3), (HEUNPP2, 2, 3),
])  # fmt: skip
def test_every_kth_step_costs_a_kth_of_the_encoders_calls(calls, every, passes, encoder, kinds, draw):
    """A pass is one call on the picture and, for an encoder of noise, one on the reference."""
    sampled(draw, make_run(Term(kinds["content"], encoder, 5.0, every=every)), calls)
    assert encoder.calls == (2 * passes if encoder.reads == "noisy" else passes + 1)


def test_between_the_last_gradient_serves_at_each_steps_own_noise(tiny_encoder, kinds, draw):
    """Of denoised: sigma^2 v / (alpha^2 v + sigma^2) G with G from the step before."""
    clean = tiny_encoder()
    clean.reads = "denoised"
    first, second = sampled(draw, make_run(Term(kinds["text"], clean, 5.0, every=2)), [3.0, 2.0])
    factor = {s: s**2 * 0.25 / (0.25 + s**2) for s in (3.0, 2.0)}
    torch.testing.assert_close(second / factor[2.0], first / factor[3.0], rtol=1e-9, atol=1e-9)
    noisy = tiny_encoder()
    first, second = sampled(draw, make_run(Term(kinds["text"], noisy, 5.0, every=2)), [3.0, 2.0])
    torch.testing.assert_close(second / 4 * 5**0.5, first / 9 * 10**0.5, rtol=1e-9, atol=1e-9)


def test_the_steps_where_the_gradient_is_taken_are_exact(encoder, kinds, draw):
    term = Term(kinds["content"], encoder, 5.0)
    exact, reused = (sampled(draw, make_run(replace(term, every=k)), EULER) for k in (1, 2))
    for i in range(0, len(EULER), 2):
        torch.testing.assert_close(reused[i], exact[i], rtol=1e-9, atol=1e-12)


def test_a_batch_with_reuse_equals_its_samples_alone(encoder, kinds, step):
    denoised, x_t, _ = step
    term = Term(kinds["content"], encoder, 5.0, every=2)
    together, alone = make_run(term), [make_run(term) for _ in range(4)]
    for sigma in (3.0, 2.0, 1.0):
        batch = guide(denoised, x_t, torch.full((4,), sigma), together)
        singles = [guide(denoised[i : i + 1], x_t[i : i + 1], torch.tensor([sigma]), alone[i]) for i in range(4)]
        torch.testing.assert_close(batch, torch.cat(singles), rtol=1e-9, atol=1e-9)


def test_every_less_than_one_is_refused(tiny_encoder, kinds):
    with pytest.raises(ValueError, match="every 0 steps; wanted 1"):
        Term(kinds["text"], tiny_encoder(), 5.0, every=0)
