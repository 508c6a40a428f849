"""The artists' controls: what each does to a step and to a run."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sdg_core.method import (
    EASES,
    PACES,
    PIXEL_VIEW,
    Augment,
    Batch,
    Blend,
    ContentGuidance,
    Convention,
    Curve,
    DirectionGuidance,
    Features,
    Goal,
    GuidanceRun,
    Region,
    Several,
    Strength,
    StructureGuidance,
    StyleGuidance,
    Term,
    TextGuidance,
    TimestepTable,
    combine,
    feathered,
    gram,
    guide,
    rms,
)
from sdg_core.models import euler, guided

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


def test_in_its_lead_every_level_has_a_gradient_of_its_own(encoder, kinds, draw):
    exact, led = Term(kinds["content"], encoder, 5.0), Term(kinds["content"], encoder, 5.0, every=99, lead=0.5)
    passes = sum(sigma > make_run(led).sigma_at(0.5) for sigma in EULER)
    assert 1 < passes < len(EULER) - 1
    got = sampled(draw, make_run(led), EULER)
    assert encoder.calls == (2 * passes if encoder.reads == "noisy" else passes + 1)  # the reference's besides
    wanted = sampled(draw, make_run(exact), EULER)
    for i in range(passes):
        torch.testing.assert_close(got[i], wanted[i], rtol=1e-9, atol=1e-12)


def test_a_batch_with_reuse_equals_its_samples_alone(encoder, kinds, step):
    denoised, x_t, _ = step
    term = Term(kinds["content"], encoder, 5.0, every=2)
    together, alone = make_run(term), [make_run(term) for _ in range(4)]
    for sigma in (3.0, 2.0, 1.0):
        batch = guide(denoised, x_t, torch.full((4,), sigma), together)
        singles = [guide(denoised[i : i + 1], x_t[i : i + 1], torch.tensor([sigma]), alone[i]) for i in range(4)]
        torch.testing.assert_close(batch, torch.cat(singles), rtol=1e-9, atol=1e-9)


def test_a_pace_leaves_alone_what_is_slower_or_ends_earlier(tiny_encoder, kinds):
    term = Term(kinds["text"], tiny_encoder(), 5.0, 0.1, 0.9)
    paced = [PACES[name].of(term) for name in ("quality", "balanced", "fast")]
    assert [(term.every, term.end) for term in paced] == [(1, 0.9), (3, 0.9), (3, 0.6)]
    assert [term.lead for term in paced] == pytest.approx([0.0, 0.34, 0.3])
    slow = PACES["fast"].of(replace(term, every=5, end=0.5))
    assert (slow.every, slow.lead, slow.end) == (5, 0.0, 0.5)
    late = PACES["fast"].of(replace(term, start=0.8))
    assert 0.8 < late.end < 0.9


def test_every_less_than_one_is_refused(tiny_encoder, kinds):
    with pytest.raises(ValueError, match="every 0 steps; wanted 1"):
        Term(kinds["text"], tiny_encoder(), 5.0, every=0)


# Where

KINDS = ["text", "content", "structure", "style", "style_centred"]


@pytest.fixture
def mask():
    """The left three columns of an 8 x 8 picture, and a corner."""
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :3], mask[..., 5:, 6:] = 1, 1
    return mask


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", [UNBOUND, Strength("relative", 0.5)])
def test_outside_its_mask_nothing_is_shifted_and_nothing_read(kind, strength, encoder, kinds, step, mask, draw):
    denoised, x_t, at = step
    run = make_run(Term(kinds[kind], encoder, 5.0, region=Region(mask)), strength=strength)
    other = make_run(*run.terms, strength=UNBOUND)
    for sigma in (5.0, 2.0, 0.5):
        shift = shift_of(step, run, sigma)
        assert not (shift * (1 - mask)).any()
        assert (shift * mask).abs().amax() > 0
        free = shift_of(step, make_run(*run.terms), sigma)
        changed = [v + (1 - mask) * draw(4, 3, 8, 8, seed=9) for v in (denoised, x_t)]
        torch.testing.assert_close(shift_of((*changed, at), other, sigma), free, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_of_the_whole_picture_is_no_mask(kind, encoder, kinds, step):
    term, whole = Term(kinds[kind], encoder, 5.0), torch.ones(1, 1, 5, 7)
    for region in (Region(whole), Region(whole, whole), Region(None, whole)):
        masked = make_run(replace(term, region=region), strength=Strength("relative", 0.5))
        plain = make_run(term, strength=Strength("relative", 0.5))
        torch.testing.assert_close(shift_of(step, masked), shift_of(step, plain), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["content", "structure", "style", "style_centred"])
def test_of_the_reference_only_what_its_mask_shows_is_read(kind, encoder, kinds, step, mask, draw):
    changed = kinds[kind].image + (1 - mask) * draw(1, 3, 8, 8, seed=9)
    region = Region(reference=mask)
    terms = [
        Term(guidance, encoder, 5.0, region=region) for guidance in (kinds[kind], replace(kinds[kind], image=changed))
    ]
    shifts = [shift_of(step, make_run(term)) for term in terms]
    torch.testing.assert_close(*shifts, rtol=1e-9, atol=1e-9)
    plain = [shift_of(step, make_run(replace(term, region=None))) for term in terms]
    assert float((plain[0] - plain[1]).abs().max()) > 1e-3


def test_negative_pictures_are_read_whole_and_may_be_more_than_masks(encoder, step, image, mask, draw):
    others = draw(3, 3, 8, 8, seed=5)
    region = Region(reference=mask)
    guidance = ContentGuidance(image, negative=others)
    got = shift_of(step, make_run(Term(guidance, encoder, 5.0, region=region)))
    masked = replace(guidance, negative=others * mask)
    assert float((got - shift_of(step, make_run(Term(masked, encoder, 5.0, region=region)))).abs().max()) > 1e-4
    pair = replace(guidance, image=torch.cat([image, others[:1]]))
    both = Region(reference=torch.cat([mask, mask]))
    assert bool(shift_of(step, make_run(Term(pair, encoder, 5.0, region=both))).isfinite().all())


@pytest.mark.parametrize("centred", [False, True])
def test_a_masked_gram_is_the_gram_of_the_part(centred, draw):
    feature_map, where = draw(2, 4, 6, 8), torch.zeros(2, 1, 12, 16)
    where[..., :8, 4:12] = 1
    torch.testing.assert_close(gram(feature_map, centred, where), gram(feature_map[..., :4, 2:6], centred))


def test_structure_compares_places_by_their_weight(tiny_encoder, kinds, step, image, draw):
    """F = -sum_p m_p |a_p - b_p|^2 / sum_p m_p |b_p|^2, by a soft mask of the size of the map."""
    denoised = step[0]
    encoder, mask = tiny_encoder(), torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    encoder.reads = "denoised"
    run = make_run(Term(StructureGuidance(image, (1,)), encoder, 5.0, region=Region(mask)))
    guide(*step, run)
    t = torch.zeros(1)
    a, b = (encoder(mask * x, t, 1).maps[0] for x in (denoised, image))
    wanted = -(mask * (a - b).square()).flatten(1).sum(1) / (mask * b.square()).sum()
    torch.testing.assert_close(run.trace[0].scores[0], wanted.detach(), rtol=1e-9, atol=1e-9)


def test_inside_its_mask_a_guidance_pulls_as_strongly_as_elsewhere(encoder, kinds, step, mask):
    run = make_run(Term(kinds["style"], encoder, 5.0, region=Region(mask)), strength=Strength("relative", 0.3))
    shift = shift_of(step, run)
    inside = shift.square().sum(dim=(1, 2, 3)) / (3 * mask.sum())
    torch.testing.assert_close(inside.sqrt(), 0.3 * rms(step[1] - step[0]), rtol=1e-9, atol=1e-9)


def test_a_second_look_at_one_noise_level_takes_a_gradient_of_its_own(encoder, kinds, step, mask):
    run = make_run(Term(kinds["content"], encoder, 5.0, region=Region(mask)))
    shift_of(step, run)
    other = tuple(v.flip(0) for v in step)
    torch.testing.assert_close(shift_of(other, run), shift_of(other, make_run(*run.terms)), rtol=1e-9, atol=1e-9)


def test_each_picture_has_its_own_mask(encoder, kinds, step):
    masks = (torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(0)) > 0.5).double()
    term = Term(kinds["content"], encoder, 5.0)
    batch = shift_of(step, make_run(replace(term, region=Region(masks))))
    for i in range(4):
        single = tuple(v[i : i + 1] for v in step)
        alone = shift_of(single, make_run(replace(term, region=Region(masks[i : i + 1]))))
        torch.testing.assert_close(batch[i : i + 1], alone, rtol=1e-9, atol=1e-9)


def test_a_feather_rises_inwards_and_leaves_the_outside_zero(mask):
    square = torch.zeros(1, 1, 32, 32)
    square[..., 8:24, :20] = 1
    soft = feathered(square, 0.125)
    assert not (soft * (1 - square)).any()
    row = soft[0, 0, 16]
    assert row[:16].tolist() == [1.0] * 16
    assert (row[15:21].diff() < 0).all()
    assert feathered(square, 0.0) is square
    with pytest.raises(ValueError, match=r"mask of which nothing is left at a feather of 0\.5"):
        Region(F.one_hot(torch.tensor([[[4]]]), 9).double().expand(1, 1, 9, 9), feather=0.5)
    with pytest.raises(ValueError, match="nothing is left"):
        Region(torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"feather of 0\.7"):
        Region(mask, feather=0.7)


def test_reference_masks_must_fit_the_references(tiny_encoder, kinds, step):
    region = Region(reference=torch.ones(3, 1, 8, 8))
    with pytest.raises(ValueError, match="3 reference masks for 1 reference"):
        guide(*step, make_run(Term(kinds["content"], tiny_encoder(), 5.0, region=region)))


def test_a_mask_on_one_guidance_leaves_the_others_alone(encoder, kinds, step, mask):
    masked, plain = Term(kinds["style"], encoder, 5.0, region=Region(mask)), Term(kinds["text"], encoder, 5.0)
    together = shift_of(step, make_run(masked, plain))
    alone = [shift_of(step, make_run(term)) for term in (masked, plain)]
    torch.testing.assert_close(together, alone[0] + alone[1], rtol=1e-9, atol=1e-9)


def test_inference_mode_masks_as_well(tiny_encoder, kinds, step, mask):
    term = Term(kinds["structure"], tiny_encoder(), 5.0)
    wanted = guide(*step, make_run(replace(term, region=Region(mask, mask, 0.1))))
    with torch.inference_mode():
        region = Region(mask.clone(), mask.clone(), 0.1)
        got = guide(*(v.clone() for v in step), make_run(replace(term, encoder=tiny_encoder(), region=region)))
    torch.testing.assert_close(got, wanted)


# How far

LIFT = 2.0
"""By how many gaps a goal's first shift moves the score: half of it is taken to stay."""


class LinearEncoder:
    """Its embedding is the picture's mean over places, (B, 3), and it reads denoised or, in VP scaling, x_t."""

    full_depth = 2
    table = TimestepTable.from_name("linear")

    def __init__(self, reads: str) -> None:
        self.reads, self.calls = reads, 0

    def __call__(self, image: Tensor, t: Tensor, depth: int) -> Features:
        self.calls += 1
        return Features((image,), image.mean(dim=(2, 3)))

    def noise_gain(self, height: int, width: int) -> float:
        return 1.0


@dataclass(frozen=True, eq=False)
class LinearGuidance:
    """F = the embedding's first number: what a shift does to it is exact."""

    best, aligned = 1.0, False

    def depth(self, encoder) -> int:
        return encoder.full_depth

    def target(self, look) -> Features:
        return Features(())

    def score(self, features: Features, target: Features) -> Tensor:
        return features.embed[:, 0]


@pytest.mark.parametrize("convention", [Convention.VE, Convention.FLOW])
@pytest.mark.parametrize("scale", [300.0, -2.0])
def test_a_step_towards_a_target_lifts_the_score_by_its_gap(convention, scale, step):
    """Of denoised: two gaps at the first step; nothing on the far side of the target."""
    denoised, x_t, _ = step
    sigma, encoder = torch.full((4,), 0.6), LinearEncoder("denoised")
    for goal in (0.4, -0.4):
        run = make_run(Term(LinearGuidance(), encoder, scale, goal=Goal(goal)), convention=convention)
        got = guide(denoised, x_t, sigma, run)[:, 0].mean(dim=(1, 2))
        before = denoised[:, 0].mean(dim=(1, 2))
        gap = (goal - before).clamp(min=0) if scale > 0 else (goal - before).clamp(max=0)
        wanted = before + LIFT * gap
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
        assert bool((got != before).any()) == ((scale > 0) == (goal > 0))


def test_a_target_allows_for_the_part_of_a_shift_that_stays_and_asks_again_for_what_was_missed(step):
    """At sigma 2 after 2.5, a fifth of a shift stays: the lift is five gaps, and half as many for the step before,
    which moved nothing here; a quarter at the next, until the score is beyond the target."""
    denoised, x_t, _ = step
    run = make_run(Term(LinearGuidance(), LinearEncoder("denoised"), 1.0, goal=Goal(0.3)), strength=Strength(cap=None))
    before = denoised[:, 0].mean(dim=(1, 2))

    def lift(sigma: float, estimate: Tensor = denoised) -> Tensor:
        return (guide(estimate, x_t, torch.full((4,), sigma), run) - estimate)[:, 0].mean(dim=(1, 2))

    for sigma, gaps in ((2.5, 2.0), (2.0, 5 * 1.5), (1.6, 5 * 1.75)):
        torch.testing.assert_close(lift(sigma), gaps * (0.3 - before), rtol=1e-9, atol=1e-9)
    beyond = denoised.clone()
    beyond[:, 0] += (0.4 - before)[:, None, None]
    torch.testing.assert_close(lift(1.28, beyond), torch.full((4,), 5 * -0.1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("convention", [Convention.VE, Convention.FLOW])
def test_a_target_of_the_noisy_picture_reads_the_estimate_under_little_noise(convention, step):
    """From alpha^2 v > sigma^2 on: what a shift does to the score of the estimate is exact."""
    denoised, x_t, _ = step
    sigma = torch.full((4,), 0.3)
    run = make_run(Term(LinearGuidance(), LinearEncoder("noisy"), 1.0, goal=Goal(0.9)), convention=convention)
    after, before = (v[:, 0].mean(dim=(1, 2)) for v in (guide(denoised, x_t, sigma, run), denoised))
    torch.testing.assert_close(after, before + LIFT * (0.9 - before), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(run.trace[0].scores[0], before, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("convention", [Convention.VE, Convention.FLOW])
def test_a_target_of_the_noisy_picture_counts_the_signal_that_a_shift_brings(convention, step):
    """The gap is that of the estimate, the gradient that of x_t: the same part of the way to the best score."""
    denoised, x_t, _ = step
    sigma, encoder = torch.full((4,), 0.6), LinearEncoder("noisy")
    alpha = float(convention.alpha(sigma)[0])
    run = make_run(Term(LinearGuidance(), encoder, 1.0, goal=Goal(0.9)), convention=convention)
    moved = x_t + alpha * (guide(denoised, x_t, sigma, run) - denoised)
    before, after = (x[:, 0].mean(dim=(1, 2)) / math.hypot(alpha, 0.6) for x in (x_t, moved))
    present = denoised[:, 0].mean(dim=(1, 2))
    wanted = before + LIFT * (0.9 - present) * (1 - before) / (1 - present)
    torch.testing.assert_close(after, wanted, rtol=1e-9, atol=1e-9)


def test_a_target_is_reached_inside_a_mask(step, mask):
    denoised, x_t, sigma = step
    encoder = LinearEncoder("denoised")
    run = make_run(Term(LinearGuidance(), encoder, 1.0, goal=Goal(0.3), region=Region(mask)))
    after = (mask * guide(denoised, x_t, sigma, run))[:, 0].mean(dim=(1, 2))
    before = (mask * denoised)[:, 0].mean(dim=(1, 2))
    torch.testing.assert_close(after, before + LIFT * (0.3 - before), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("strength", [Strength(cap=0.1), Strength("relative", 0.1)])
def test_a_target_stays_under_the_cap_and_stops_where_it_is_reached(strength, encoder, kinds, step):
    denoised, x_t, sigma = step
    term = Term(kinds["content"], encoder, 5.0)
    far = make_run(replace(term, goal=Goal(1.0)), strength=strength)
    pull = rms(guide(denoised, x_t, sigma, far) - denoised) / rms(x_t - denoised)
    assert float(pull.max()) <= 0.1 + 1e-9
    assert float(pull.min()) > 0
    score = float(far.trace[0].scores.max())
    near = make_run(replace(term, goal=Goal(score + 1e-9)), strength=strength)
    stopped = guide(denoised, x_t, sigma, near) - denoised
    assert float(rms(stopped)[far.trace[0].scores[0].argmax()]) < 1e-6
    assert not shift_of(step, make_run(replace(term, goal=Goal(-1.0)), strength=strength)).any()


def test_beside_a_target_relative_strength_keeps_its_size(encoder, kinds, step):
    """A target that is reached adds nothing to the other's fixed pull."""
    free, aimed = Term(kinds["style"], encoder, 5.0), Term(kinds["text"], encoder, 5.0, goal=Goal(-1.0))
    strength = Strength("relative", 0.3)
    alone, beside = (shift_of(step, make_run(*terms, strength=strength)) for terms in ((free,), (free, aimed)))
    torch.testing.assert_close(beside, alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["text", "content", "structure", "style"])
def test_a_run_meets_its_target_where_the_guidance_can(kind, encoder, kinds, draw):
    """Euler's method on a Gaussian prior: the finished picture has the similarity asked for, to 0.02.

    Without a cap: on this prior the model's own late steps are nearly nothing, while a random noisy encoder's score of
    one and the same picture goes on changing with t.
    """
    sigmas = torch.cat([torch.linspace(3.0, 0.02, 40), torch.zeros(1)])
    start = 3.2 * draw(3, 3, 8, 8, seed=5)

    def final(term: Term, strength: Strength | None = None) -> Tensor:
        run = make_run(term, strength=strength or Strength())
        denoise = guided(lambda x, sigma: 0.3 * x / (0.3 + sigma.square().view(-1, 1, 1, 1)), run)
        *_, last = euler(denoise, start, sigmas)
        seen = make_run(replace(term, goal=None))
        guide(last.x, last.x, sigmas[-2].expand(3), seen)
        return seen.trace[0].scores[0] + 1 - term.guidance.best

    term = Term(kinds[kind], encoder, 1e-9)
    free, best = final(term), final(replace(term, scale=1e4))
    assert bool((best > free).all())
    wanted = float(free.max() + 0.6 * (best.min() - free.max()))
    assert float(free.max()) < wanted < float(best.min())
    got = final(replace(term, goal=Goal(wanted)), Strength(cap=None))
    print(f"{kind}: unguided {free.tolist()}, target {wanted:.3f}, got {got.tolist()}, unlimited {best.tolist()}")
    torch.testing.assert_close(got, torch.full((3,), wanted), rtol=0, atol=0.02)


# Away


def test_away_stops_where_nothing_is_left(encoder, kinds, step):
    """A negative scale until the similarity is 0: the plain push, fading over the last 0.05, and nothing below."""
    push = Term(kinds["content"], encoder, -5.0)
    away = replace(push, goal=Goal(0.0, adapted=False))
    run = make_run(away)
    got, plain = shift_of(step, run), shift_of(step, make_run(push))
    factor = (run.trace[0].scores[0] / 0.05).clamp(0, 1)
    torch.testing.assert_close(got, factor.view(-1, 1, 1, 1) * plain, rtol=1e-9, atol=1e-9)
    middle = float(run.trace[0].scores[0].median())
    some = shift_of(step, make_run(replace(push, goal=Goal(middle, adapted=False))))
    moved = some.abs().flatten(1).amax(dim=1) > 0
    assert moved.tolist() == (run.trace[0].scores[0] > middle).tolist()
    assert 0 < int(moved.sum()) < 4


def test_similarity_of_maps_is_one_minus_their_distance(encoder, kinds, step):
    """Away from a structure at a distance above 1 from it there is no more push."""
    push = Term(kinds["structure"], encoder, -5.0)
    run = make_run(push)
    guide(*step, run)
    distance = -run.trace[0].scores[0]
    until = float(1 - distance.median())
    got = shift_of(step, make_run(replace(push, goal=Goal(until, adapted=False))))
    assert (got.abs().flatten(1).amax(dim=1) > 0).tolist() == (1 - distance > until).tolist()


@pytest.mark.parametrize("similarity", [1.5, -2.0, math.nan])
def test_similarities_that_are_none_are_refused(similarity):
    with pytest.raises(ValueError, match="wanted -1 to 1, where 1 is the reference itself"):
        Goal(similarity)


# Which way


def test_direction_is_the_cosine_of_two_changes(encoder, image, draw, step):
    """F = cos(E(x) - E(picture), T(to) - T(from)), embeddings on the unit sphere, written out."""
    denoised, x_t, sigma = step
    change = draw(1, 5, seed=7)
    run = make_run(Term(DirectionGuidance(image, change), encoder, 5.0))
    guide(denoised, x_t, sigma, run)
    noisy, batch = encoder.reads == "noisy", Batch.of(denoised, x_t, sigma)
    (target,) = run.references.targets([0], run.terms, PIXEL_VIEW, batch, sigma[:1] if noisy else None)
    t = encoder.table.timestep(sigma[:1]) if noisy else torch.zeros(1)
    seen = encoder(x_t / 5**0.5 if noisy else denoised, t, 3).embed
    moved = F.normalize(seen, dim=1) - target.features.embed
    wanted = F.cosine_similarity(moved, change, dim=1)
    torch.testing.assert_close(run.trace[0].scores[0], wanted.detach(), rtol=1e-9, atol=1e-9)


def test_direction_is_best_along_the_change_whatever_the_picture(draw):
    pictures, change = F.normalize(draw(2, 5), dim=1), 0.1 * draw(1, 5, seed=1)
    for picture in pictures:
        guidance = DirectionGuidance(torch.zeros(1, 3, 8, 8), change)
        target = guidance.target(lambda image, depth, picture=picture: Features((), 3.0 * picture[None]))
        along = F.normalize(picture + change, dim=1)  # the sphere bends it a little
        other = F.normalize(picture - change, dim=1)
        towards, away = (float(guidance.score(Features((), e), target)) for e in (along, other))
        assert towards > 0.7
        assert away < -0.7


def test_two_texts_that_say_the_same_are_no_direction(image):
    with pytest.raises(ValueError, match="wanted a change"):
        DirectionGuidance(image, torch.zeros(1, 5))


# How many


@pytest.fixture
def three(draw):
    """Three references, and guidances of every kind that follow them."""
    images = draw(3, 3, 8, 8, seed=11).clamp(-1, 1)
    return images, {
        "content": ContentGuidance(images),
        "structure": StructureGuidance(images, layers=(1, 2)),
        "style": StyleGuidance(images, layers=(2,)),
        "direction": DirectionGuidance(images, draw(1, 5, seed=7)),
    }


REFERRING = ["content", "structure", "style", "direction"]


def scores_of(step, guidance, encoder, several: Several | None) -> tuple[Tensor, Tensor]:
    """The scores (B,) and the shift."""
    run = make_run(Term(guidance, encoder, 5.0, several=several))
    shift = shift_of(step, run)
    return run.trace[0].scores[0], shift


@pytest.mark.parametrize("kind", REFERRING)
def test_mean_and_nearest_are_those_of_the_single_references(kind, encoder, three, step):
    images, guidances = three
    alone = [scores_of(step, replace(guidances[kind], image=images[r : r + 1]), encoder, None) for r in range(3)]
    scores, shifts = (torch.stack(values) for values in zip(*alone, strict=True))
    weights = torch.tensor([1.0, 2.0, 0.5])
    got = scores_of(step, guidances[kind], encoder, Several("mean", (1.0, 2.0, 0.5)))
    part = weights / weights.sum()
    torch.testing.assert_close(got[0], (part[:, None] * scores).sum(0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got[1], torch.einsum("r,rbchw->bchw", part, shifts), rtol=1e-9, atol=1e-9)
    got = scores_of(step, guidances[kind], encoder, Several("nearest", (1.0, 2.0, 0.5)))
    nearest = ((guidances[kind].best - scores) / weights[:, None]).argmin(dim=0)
    torch.testing.assert_close(got[0], scores[nearest, torch.arange(4)], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got[1], shifts[nearest, torch.arange(4)], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("choice", ["mean", "nearest"])
@pytest.mark.parametrize("kind", REFERRING)
def test_the_order_of_references_does_not_matter(kind, choice, encoder, three, step):
    images, guidances = three
    order, weights = [2, 0, 1], (1.0, 2.0, 0.5)
    ordered = replace(guidances[kind], image=images[order])
    one = scores_of(step, guidances[kind], encoder, Several(choice, weights))
    other = scores_of(step, ordered, encoder, Several(choice, tuple(weights[r] for r in order)))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", REFERRING)
def test_a_mean_without_weights_is_the_guidance_as_it_was(kind, encoder, three, step):
    _, guidances = three
    for a, b in zip(*(scores_of(step, guidances[kind], encoder, s) for s in (None, Several("mean"))), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_references_take_turns_over_the_steps(encoder, three, step):
    images, guidances = three
    run = make_run(Term(guidances["content"], encoder, 5.0, several=Several("in turn", (1.0, 2.0, 1.0))))
    turns = []
    for sigma in (9.0, 8.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0):
        shift = shift_of(step, run, sigma)
        alone = [
            shift_of(step, make_run(Term(replace(guidances["content"], image=images[r : r + 1]), encoder, 5.0)), sigma)
            for r in range(3)
        ]
        (turn,) = [r for r in range(3) if torch.allclose(shift, alone[r], rtol=1e-9, atol=1e-12)]
        turns.append(turn)
    assert turns[1] == turns[2]  # a second look at one noise level
    del turns[2]
    assert [turns.count(r) for r in range(3)] == [2, 4, 2]
    assert sorted(turns[:4]) == [0, 1, 1, 2]


def test_each_picture_of_a_batch_follows_its_own_reference(encoder, three, step):
    images, guidances = three
    _, shift = scores_of(step, guidances["style"], encoder, Several("one each"))
    for i in range(4):
        single = tuple(v[i : i + 1] for v in step)
        alone = replace(guidances["style"], image=images[i % 3 : i % 3 + 1])
        torch.testing.assert_close(shift[i : i + 1], scores_of(single, alone, encoder, None)[1], rtol=1e-9, atol=1e-9)


def test_weights_must_fit_the_references(encoder, three, step):
    with pytest.raises(ValueError, match="2 weights for 3 references"):
        scores_of(step, three[1]["content"], encoder, Several("mean", (1.0, 2.0)))
    for weights in ((1.0, 0.0), (-1.0,), (math.nan,)):
        with pytest.raises(ValueError, match="wanted numbers above 0"):
            Several("mean", weights)


# Together


def shares_of(step, terms: tuple[Term, ...], alone: tuple[Term, ...], strength: Strength) -> Tensor:
    """The size of every term's part of the shift (K, B): the shift in the basis of what the terms do alone."""
    shift = shift_of(step, make_run(*terms, strength=strength)).flatten(1)
    basis = torch.stack([F.normalize(shift_of(step, make_run(term)).flatten(1), dim=1) for term in alone], dim=2)
    parts = torch.linalg.lstsq(basis, shift[..., None]).solution
    torch.testing.assert_close((basis @ parts)[..., 0], shift, rtol=1e-7, atol=1e-9)
    return parts[..., 0].T


@pytest.mark.parametrize("strength", [Strength("relative", 0.3), UNBOUND])
def test_balanced_guidances_pull_by_their_weights_whatever_their_gradients(strength, encoder, kinds, step):
    terms = [
        Term(kinds["text"], encoder, 200.0),
        Term(kinds["style"], encoder, 1000.0),
        Term(kinds["content"], encoder, 3.0),
    ]
    equal = shares_of(step, combine([((t,), 1.0) for t in terms], Blend(1.0)), terms, strength)
    print("equal weights, sizes over their mean:", (equal / equal.mean(dim=0)).tolist())
    torch.testing.assert_close(equal, equal.mean(dim=0).expand_as(equal), rtol=1e-6, atol=0)
    weighted = shares_of(
        step, combine(list(zip([(t,) for t in terms], (1.0, 2.0, 3.0), strict=True)), Blend(1.0)), terms, strength
    )
    torch.testing.assert_close(weighted[1:] / weighted[0], torch.tensor([[2.0], [3.0]]).expand(2, 4), rtol=1e-6, atol=0)


def test_a_balance_of_zero_is_the_plain_sum(encoder, kinds, step):
    terms = [((Term(kinds[kind], encoder, 5.0),), w) for kind, w in (("text", 1.0), ("style", -2.0))]
    plain, blended = (shift_of(step, make_run(*combine(terms, blend))) for blend in (None, Blend(0.0)))
    torch.testing.assert_close(blended, plain, rtol=1e-9, atol=1e-9)


def test_two_gradients_in_conflict_lose_what_is_against_the_other(draw):
    a, b = draw(2, 3, 4, 4), draw(2, 3, 4, 4, seed=1)
    b = b - 2 * a  # a conflict, in both samples
    got = Blend(project=True)(torch.stack([a, b]), torch.ones(2, 2))
    dots = (a * b).flatten(1).sum(1).view(2, 1, 1, 1)
    norms = [v.square().flatten(1).sum(1).view(2, 1, 1, 1) for v in (a, b)]
    torch.testing.assert_close(got[0], a - dots / norms[1] * b, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got[1], b - dots / norms[0] * a, rtol=1e-9, atol=1e-9)


def test_projection_is_the_nearest_that_lowers_no_score_in_any_order(draw):
    common = draw(1, 2, 3, 4, 4)
    signs = torch.tensor([1.0, -1.0, -0.5, 0.8]).view(4, 1, 1, 1, 1)
    grads = draw(4, 2, 3, 4, 4, seed=1) + signs * common
    blend = Blend(project=True)
    got = blend(grads, torch.ones(4, 2))
    dots = torch.einsum("kbchw,jbchw->bkj", got, grads)
    own = torch.eye(4, dtype=torch.bool)
    assert float(torch.einsum("kbchw,jbchw->bkj", grads, grads).min()) < -1
    assert float(dots[:, ~own].min()) > -1e-6
    assert float(torch.einsum("kbchw,jbchw->kb", got, grads).min()) > -1e-6  # the sum of all, against each
    # nearest: what was given up lies in the cone of those it works against (Moreau), so it is orthogonal to the rest
    given = got - grads
    assert float((given * got).flatten(2).sum(2).abs().max()) < 1e-6
    order = [2, 0, 3, 1]
    torch.testing.assert_close(blend(grads[order], torch.ones(4, 2)), got[order], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("count", [2, 3])
def test_a_gradient_that_is_not_finite_leaves_other_samples_alone(count, draw):
    grads = draw(count, 2, 3, 4, 4)
    grads[0, 1] = -grads[1, 1]
    whole = Blend(project=True)(grads, torch.ones(count, 2))
    grads[1, 0, 0, 0, 0] = math.nan
    got = Blend(project=True)(grads, torch.ones(count, 2))
    torch.testing.assert_close(got[:, 1], whole[:, 1], rtol=1e-9, atol=1e-9)
    assert not bool(got[1, 0].isfinite().all())


def test_gradients_without_conflict_stay_as_they_are(draw):
    grads = draw(3, 2, 3, 4, 4).abs()
    assert torch.equal(Blend(project=True)(grads, torch.ones(3, 2)), grads)


def test_opposite_gradients_cancel_and_copies_do_not_count_twice(draw):
    a = draw(1, 3, 4, 4)
    got = Blend(project=True)(torch.stack([a, -a, -2 * a]), torch.ones(3, 1))
    assert float(got.abs().max()) < 1e-6


def test_together_does_not_depend_on_the_order_or_on_the_batch(encoder, kinds, step):
    terms = [
        Term(kinds["text"], encoder, 50.0),
        Term(kinds["content"], encoder, -80.0),
        Term(kinds["style"], encoder, 9.0),
    ]

    def blended(order: list[int], step) -> Tensor:
        return shift_of(step, make_run(*combine([((terms[k],), 1.0 + k) for k in order], Blend(0.5, True))))

    batch = blended([0, 1, 2], step)
    torch.testing.assert_close(blended([2, 0, 1], step), batch, rtol=1e-9, atol=1e-9)
    for i in range(4):
        single = blended([0, 1, 2], tuple(v[i : i + 1] for v in step))
        torch.testing.assert_close(batch[i : i + 1], single, rtol=1e-9, atol=1e-9)


def test_a_balance_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"balance of 1\.5; wanted 0"):
        Blend(1.5)


# Steadily


@pytest.fixture
def clean(tiny_encoder):
    encoder = tiny_encoder()
    encoder.reads = "denoised"
    return encoder


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_the_mean_over_the_crops(kind, clean, kinds, step):
    """Written out: the score of each crop, the reference of structure cropped alike."""
    denoised, x_t, sigma = step
    augment, guidance = Augment(3, 0.6), kinds[kind]
    run = make_run(Term(guidance, clean, 5.0, augment=augment))
    got = guide(denoised, x_t, sigma, run) - denoised
    crops = augment.crops((8, 8), torch.Generator().manual_seed(0))
    assert len({(c.top, c.left, c.height, c.width, c.flip) for c in crops}) == 3
    x, t, scores = denoised.clone().requires_grad_(True), torch.zeros(1), []
    for crop in crops:

        def look(image, depth, crop=crop):
            return clean(crop(image) if kind == "structure" else image, t, depth or 3)

        scores.append(guidance.score(clean(crop(x), t, 3), guidance.target(look)))
    score = torch.stack(scores).mean(dim=0)
    (grad,) = torch.autograd.grad(score.sum(), x)
    torch.testing.assert_close(run.trace[0].scores[0], score.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got, 5 * 4 * 0.25 / (0.25 + 4) * grad, rtol=1e-9, atol=1e-9)


def test_crops_are_the_same_in_every_run_and_others_at_every_step(clean, kinds, step):
    term = Term(kinds["style"], clean, 5.0, augment=Augment(2))
    runs = [make_run(term) for _ in range(2)]
    first, again = ([shift_of(step, run) for _ in range(2)] for run in runs)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(*first)
    for i in range(4):
        single = shift_of(tuple(v[i : i + 1] for v in step), make_run(term))
        torch.testing.assert_close(first[0][i : i + 1], single, rtol=1e-9, atol=1e-9)


def test_crops_lie_in_the_picture():
    generator = torch.Generator().manual_seed(1)
    for crop in Augment(64, 0.5).crops((9, 16), generator):
        assert 4 <= crop.height <= 9
        assert 8 <= crop.width <= 16
        assert 0 <= crop.top <= 9 - crop.height
        assert 0 <= crop.left <= 16 - crop.width


def test_an_augmented_mask_reads_inside_only(clean, kinds, step, mask, draw):
    term = Term(kinds["structure"], clean, 5.0, augment=Augment(3), region=Region(mask))
    denoised, x_t, sigma = step
    shift = shift_of(step, make_run(term))
    assert not (shift * (1 - mask)).any()
    changed = denoised + (1 - mask) * draw(4, 3, 8, 8, seed=9)
    torch.testing.assert_close(shift_of((changed, x_t, sigma), make_run(term)), shift, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("angle", [1e-3, 0.5, 2.0, 3.0])
def test_the_spherical_score_falls_with_the_angles_square(angle):
    embed = torch.tensor([[math.cos(angle), math.sin(angle)]], requires_grad=True)
    guidance = TextGuidance(torch.tensor([[1.0, 0.0]]), spherical=True)
    score = guidance.score(Features((), embed), guidance.target(lambda image, depth: Features(())))
    (grad,) = torch.autograd.grad(score.sum(), embed)
    assert float(score.detach()) == pytest.approx(1 - angle**2 / 2, abs=1e-6)
    assert float(grad.norm()) == pytest.approx(angle, rel=1e-5)  # of the cosine it is sin(angle)


def test_the_spherical_score_is_finite_at_the_reference_and_opposite_it():
    guidance = TextGuidance(torch.tensor([[1.0, 0.0]]), spherical=True)
    embed = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    score = guidance.score(Features((), embed), guidance.target(lambda image, depth: Features(())))
    (grad,) = torch.autograd.grad(score.sum(), embed)
    assert torch.isfinite(score).all()
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("spherical", [False, True])
def test_a_negative_text_is_that_text_away_at_half_the_scale(tiny_encoder, step, spherical):
    encoder = tiny_encoder().double()
    words = torch.eye(5, dtype=torch.float64)[:2]
    wanted, other = (TextGuidance(words[i : i + 1], spherical) for i in (0, 1))
    both = TextGuidance(wanted.embed, spherical, negative=other.embed)
    step = tuple(part.double() for part in step)
    one, two = (
        shift_of(step, make_run(*terms))
        for terms in ((Term(both, encoder, 5.0),), (Term(wanted, encoder, 5.0), Term(other, encoder, -2.5)))
    )
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)
    assert (one - shift_of(step, make_run(Term(wanted, encoder, 5.0)))).norm() > 0.01 * one.norm()


def test_crops_for_an_encoder_of_noise_are_refused(tiny_encoder, kinds):
    with pytest.raises(ValueError, match="for an encoder of noise; wanted a clean one"):
        Term(kinds["text"], tiny_encoder(), 5.0, augment=Augment())
    with pytest.raises(ValueError, match="Got 0 crops"):
        Augment(0)


# Budget


class Clock:
    """Seconds that pass only where a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(("percent", "every"), [(10.0, 3), (15.0, 2), (30.0, 1), (1.0, 30), (1000.0, 1)])
def test_a_budget_takes_gradients_as_often_as_it_allows(percent, every, encoder, kinds, step, monkeypatch):
    """A model call of 10 s, a gradient of 3 s, the first one of 50 s."""
    clock, forward = Clock(), type(encoder).forward
    costs = iter([50.0] + [3.0] * 1000)

    def slow(self, image, t, depth):
        if len(image) == 4:  # the pictures, not the reference
            clock.now += next(costs)
        return forward(self, image, t, depth)

    monkeypatch.setattr(type(encoder), "forward", slow)
    run = make_run(Term(kinds["content"], encoder, 5.0, budget=percent))
    run.clock = clock
    spent, model = [], 0.0
    for i in range(62):
        clock.now += 10
        before = clock.now
        shift_of(step, run, 9.0 - i * 0.1)
        spent.append(clock.now - before)
        model += 10 if i >= 2 else 0
    taken = [i for i, cost in enumerate(spent) if cost]
    assert run.budget.every == every
    assert taken == [0, *range(1, 62, every)]
    assert sum(spent[2:]) <= percent / 100 * model + 1e-9
    assert f"for at most {percent:g} % more, one every {every} steps" in str(run.budget)


def test_the_smallest_budget_counts_for_all_that_have_one(tiny_encoder, kinds):
    encoder = tiny_encoder()
    terms = [Term(kinds["text"], encoder, 5.0, budget=b) for b in (50.0, 20.0, None)]
    run = make_run(*terms)
    assert run.budget.percent == 20.0
    run.budget.every = 4
    assert [run.every(k, 1.0) for k in range(3)] == [4, 4, 1]
    assert make_run(terms[2]).budget is None


@pytest.mark.parametrize("percent", [0.0, -1.0, math.nan, math.inf])
def test_budgets_that_are_none_are_refused(percent, tiny_encoder, kinds):
    with pytest.raises(ValueError, match="wanted above 0"):
        Term(kinds["text"], tiny_encoder(), 5.0, budget=percent)
