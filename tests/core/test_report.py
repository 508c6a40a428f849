"""The report of a run: what it says of each guidance is what that guidance does by itself."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sdg_core.method import (
    Blend,
    ContentGuidance,
    Convention,
    Curve,
    Goal,
    GuidanceReport,
    GuidanceRun,
    Strength,
    Term,
    TextGuidance,
    combine,
    draw_report,
    guidance_shift,
    guide,
    rms,
)

pytestmark = pytest.mark.usefixtures("float64")

UNBOUND = Strength(cap=None)


def percent_to_sigma(percent: float) -> float:
    return math.inf if percent <= 0 else 10 * (1 - percent)


def make_run(*terms: Term, strength: Strength = UNBOUND, measured: bool = False) -> GuidanceRun:
    return GuidanceRun(terms, Convention.VE, percent_to_sigma, strength, measured=measured)


@pytest.fixture
def step(draw):
    """denoised and x_t (3, 3, 8, 8) at sigma 2."""
    x_0, eps = draw(3, 3, 8, 8).clamp(-1, 1), draw(3, 3, 8, 8, seed=1)
    return 0.9 * x_0, x_0 + 2 * eps, torch.full((3,), 2.0)


@pytest.fixture
def terms(tiny_encoder, draw):
    """Text and content through one encoder, text through another."""
    first, second = tiny_encoder(), tiny_encoder(seed=1)
    text, other = (TextGuidance(F.normalize(draw(1, 5, seed=s), dim=-1)) for s in (3, 4))
    content = ContentGuidance(draw(1, 3, 8, 8, seed=2).clamp(-1, 1))
    return Term(text, first, 5.0), Term(content, first, -3.0), Term(other, second, 2.0)


def step_rms(step):
    denoised, x_t, _ = step
    return rms(x_t - denoised)


def alone(step, term):
    """The shift of one guidance by itself, without a cap."""
    return guidance_shift(*step, make_run(term))


def close(series, wanted):
    assert series.each[-1] == pytest.approx(wanted.tolist(), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("apart", [False, True], ids=["one pass", "apart"])
def test_sizes_and_angles_are_those_of_each_guidance_by_itself(step, terms, apart):
    used = combine([(terms, 1.0)], Blend()) if apart else terms
    run = make_run(*used, measured=not apart)
    guide(*step, run)
    report = GuidanceReport.of(run)
    shifts = [alone(step, term) for term in terms]
    for part, shift in zip(report.guidances, shifts, strict=True):
        close(part.size, rms(shift) / step_rms(step))
    assert [angle.between for angle in report.angles] == [(0, 1), (0, 2), (1, 2)]
    for angle, (a, b) in zip(report.angles, itertools.combinations(shifts, 2), strict=True):
        close(angle.cosine, F.cosine_similarity(a.flatten(1), b.flatten(1)))
    close(report.pull, rms(sum(shifts)) / step_rms(step))


def test_measuring_changes_no_bit(step, terms):
    plain, measured = (guide(*step, make_run(*terms, strength=Strength(), measured=m)) for m in (False, True))
    assert torch.equal(plain, measured)


def test_what_is_not_known_is_not_made_up(step, terms):
    run = make_run(*terms)
    guide(*step, run)
    report = GuidanceReport.of(run)
    assert [part.size.known for part in report.guidances] == [False, False, True]
    assert not any(angle.cosine.known for angle in report.angles)
    assert "turn on measure" in report.lines()[-1]


def test_each_picture_of_a_batch_is_reported_as_if_it_were_alone(step, terms):
    run = make_run(*terms, strength=Strength(cap=0.05), measured=True)
    guide(*step, run)
    whole = GuidanceReport.of(run)
    for i in range(3):
        one = make_run(*terms, strength=Strength(cap=0.05), measured=True)
        guide(*(part[i : i + 1] for part in step), one)
        single = GuidanceReport.of(one)
        for a, b in [(whole.pull, single.pull), (whole.capped, single.capped)] + [
            pair
            for x, y in zip(whole.guidances, single.guidances, strict=True)
            for pair in ((x.score, y.score), (x.size, y.size))
        ]:
            assert a.each[0][i] == pytest.approx(b.each[0][0], rel=1e-9)
    assert whole.pull.mean[0] == pytest.approx(sum(whole.pull.each[0]) / 3)


@pytest.mark.parametrize("mode", ["absolute", "relative"])
def test_sizes_are_those_in_the_shift_under_its_cap(step, terms, mode):
    term = terms[2]
    cap = 0.5 * float((rms(alone(step, term)) / step_rms(step)).median())
    run = make_run(term, strength=Strength(mode, cap))
    shift = guidance_shift(*step, run)
    report = GuidanceReport.of(run)
    close(report.guidances[0].size, rms(shift) / step_rms(step))
    close(report.pull, rms(shift) / step_rms(step))
    bound = rms(alone(step, term)) > cap * step_rms(step)
    assert report.capped.each[0] == tuple((bound & (mode == "absolute")).double().tolist())


def test_a_goal_beside_relative_strength_has_its_part_of_the_shift(step, terms):
    """The sum of the parts, by their sizes and angles, is the whole: |a + b|^2 = |a|^2 + |b|^2 + 2 |a| |b| cos."""
    free, aimed = terms[2], Term(terms[0].guidance, terms[0].encoder, 1.0, goal=Goal(0.9))
    run = make_run(free, aimed, strength=Strength("relative", 0.3))
    guide(*step, run)
    report = GuidanceReport.of(run)
    (a, b), cosine = (np.array(part.size.each[0]) for part in report.guidances), report.angles[0].cosine.each[0]
    assert report.pull.each[0] == pytest.approx(np.sqrt(a**2 + b**2 + 2 * a * b * np.array(cosine)), rel=1e-9)
    assert b.min() > 0


def test_where_a_guidance_does_not_act_there_is_nothing(step, terms):
    off = Curve(((0.0, 1.0), (0.95, 0.0)), "constant")
    late = Term(terms[2].guidance, terms[2].encoder, 2.0, start=0.9, curves=(off,))
    run = make_run(terms[0], late)
    for sigma in (2.0, 0.9, 0.4):
        guide(step[0], step[1], torch.full((3,), sigma), run)
    report = GuidanceReport.of(run)
    assert [value is None for value in report.guidances[1].score.mean] == [True, False, True]
    assert [value is None for value in report.guidances[1].size.mean] == [True, False, True]
    assert report.percent == pytest.approx((0.8, 0.91, 0.96), abs=1e-4)
    assert report.sigma == (2.0, 0.9, 0.4)


def test_seconds_are_those_of_the_passes_and_of_the_model(step, terms):
    """A clock that goes on with passes through encoders and with the model only."""
    now = [0.0]
    run = GuidanceRun(terms, Convention.VE, percent_to_sigma, UNBOUND, measured=True, clock=lambda: now[0])
    for encoder, took in ((terms[0].encoder, 4.0), (terms[2].encoder, 7.0)):
        encoder.register_forward_hook(lambda *_, took=took: now.__setitem__(0, now[0] + took))
    for _ in range(2):
        now[0] += 10.0
        guide(*step, run)
    report = GuidanceReport.of(run)
    assert report.model_seconds == (None, 10.0)
    first, second, third = (part.seconds for part in report.guidances)
    assert first == second  # one pass, divided
    assert third[1] == 7.0
    assert first[1] == 2.0


def test_scale_zero_and_no_guidance_say_so(step, terms):
    run = make_run(Term(terms[0].guidance, terms[0].encoder, 0.0))
    assert guide(*step, run) is step[0]
    assert GuidanceReport.of(run).lines() == ["No guidance acted in this run."]
    assert draw_report(GuidanceReport()).size == (1100, 700)


def test_json_is_strict_and_holds_the_numbers(step, terms):
    run = make_run(*terms, measured=True, strength=Strength(cap=0.2))
    for sigma in (5.0, 2.0):
        guide(step[0], step[1], torch.full((3,), sigma), run)
    report = GuidanceReport.of(run)

    def refuse(word):
        raise AssertionError(word)

    said = json.loads(report.to_json(), parse_constant=refuse)
    assert (said["version"], said["pictures"], said["strength"], said["cap"]) == (1, 3, "absolute", 0.2)
    assert said["pull"]["mean"] == pytest.approx(report.pull.mean, rel=1e-5)
    for part, wanted in zip(said["guidances"], report.guidances, strict=True):
        assert (part["name"], part["scale"]) == (wanted.name, wanted.scale)
        assert np.array(part["score"]["each"]) == pytest.approx(np.array(wanted.score.each), rel=1e-5)
    assert said["guidances"][0]["score"]["each"][0] == pytest.approx(run.trace[0].scores[0].tolist(), rel=1e-5)


def test_a_gradient_that_is_not_finite_is_unknown(step, terms, draw):
    broken = Term(TextGuidance(torch.full((1, 5), math.nan)), terms[2].encoder, 1.0)
    run = make_run(terms[0], broken)
    guide(*step, run)
    report = GuidanceReport.of(run)
    assert report.guidances[1].score.mean == (None,)
    assert report.angles[0].cosine.mean == (None,)
    json.loads(report.to_json())


def test_the_plot_shows_a_run(step, terms):
    """Another run is another picture; the same one the same."""
    plots = []
    for scale in (1.0, 1.0, 30.0):
        run = GuidanceRun(combine([(terms, scale)]), Convention.VE, percent_to_sigma, clock=lambda: 0.0, measured=True)
        for sigma in (5.0, 2.0, 1.0):
            guide(step[0], step[1], torch.full((3,), sigma), run)
        plots.append(np.asarray(draw_report(GuidanceReport.of(run))))
    assert (plots[0] == plots[1]).all()
    assert (plots[0] != plots[2]).any()
