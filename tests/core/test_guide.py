"""``guide``: what it adds to denoised, where, how much at most, and what it remembers between steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

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
    StyleGuidance,
    Term,
    TextGuidance,
    TimestepTable,
    guide,
    rms,
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
def kinds(draw):
    """One guidance of every kind, for the toy encoder; two references."""
    image = draw(2, 3, 12, 8, seed=2).clamp(-1, 1)
    return {
        "text": TextGuidance(F.normalize(draw(2, 5, seed=3), dim=-1)),
        "content": ContentGuidance(image),
        "structure": StructureGuidance(image, layers=(1, 2)),
        "style": StyleGuidance(image, layers=(2,)),
    }


@pytest.fixture
def all_terms(kinds):
    return lambda encoder, scale=5.0: tuple(Term(g, encoder, scale * (k + 1)) for k, g in enumerate(kinds.values()))


@pytest.mark.parametrize(
    ("convention", "sigma", "alpha"),
    [
        (Convention.VE, 0.05, 1.0),
        (Convention.VE, 2.0, 1.0),
        (Convention.VE, 80.0, 1.0),
        (Convention.FLOW, 0.3, 0.7),
        (Convention.VP, 0.6, 0.8),
    ],
)
def test_shift_is_sigma_squared_over_alpha_times_the_gradient(convention, sigma, alpha, tiny_encoder, kinds, step):
    encoder, (denoised, x_t, _) = tiny_encoder(), step
    x = x_t.clone().requires_grad_(True)
    t = TimestepTable.from_name("linear").timestep(torch.tensor([sigma / alpha]))
    embed = encoder(x / math.hypot(alpha, sigma), t, 3).embed
    score = 7 * F.cosine_similarity(embed[:, None], kinds["text"].embed[None], dim=-1).mean(dim=1)
    (grad,) = torch.autograd.grad(score.sum(), x)
    run = make_run(Term(kinds["text"], encoder, 7.0), convention=convention)
    got = guide(denoised, x_t, torch.full((4,), sigma), run)
    shift = sigma**2 / alpha * grad
    assert float(rms(shift).min()) > 0
    torch.testing.assert_close(got - denoised, shift, rtol=1e-9, atol=1e-9 * float(shift.abs().max()))


def test_without_terms_denoised_itself_comes_back(step):
    denoised, x_t, sigma = step
    assert guide(denoised, x_t, sigma, make_run()) is denoised


def test_scale_zero_returns_denoised_itself_and_asks_no_encoder(tiny_encoder, all_terms, step):
    encoder, (denoised, x_t, sigma) = tiny_encoder(), step
    assert guide(denoised, x_t, sigma, make_run(*all_terms(encoder, 0.0))) is denoised
    assert encoder.calls == 0


def test_a_scale_of_zero_beside_others_adds_nothing(tiny_encoder, kinds, step):
    encoder, idle = tiny_encoder(), tiny_encoder(1)
    terms = Term(kinds["text"], encoder, 5.0), Term(kinds["content"], idle, 0.0)
    assert torch.equal(guide(*step, make_run(*terms)), guide(*step, make_run(terms[0])))
    assert idle.calls == 0


def test_inputs_are_left_alone(tiny_encoder, all_terms, step):
    before = [v.clone() for v in step]
    got = guide(*step, make_run(*all_terms(tiny_encoder())))
    assert all(torch.equal(a, b) for a, b in zip(step, before, strict=True))
    assert not torch.equal(got, step[0])
    assert not got.requires_grad


def test_a_negative_scale_pushes_the_other_way(tiny_encoder, all_terms, step):
    pull, push = (guide(*step, make_run(*all_terms(tiny_encoder(), scale))) for scale in (5.0, -5.0))
    torch.testing.assert_close(pull - step[0], step[0] - push, rtol=1e-9, atol=1e-9)


def test_an_interval_begins_with_its_start_and_ends_before_its_end(tiny_encoder, kinds, step):
    denoised, x_t, _ = step
    run = make_run(Term(kinds["text"], tiny_encoder(), 5.0, start=0.2, end=0.6))
    inside, outside = (8.0, 5.0, 4.01), (100.0, 8.01, 4.0, 1.0)
    for sigma, acts in [(s, s in inside) for s in inside + outside]:
        assert (guide(denoised, x_t, torch.full((4,), sigma), run) is not denoised) == acts


def test_an_interval_counts_per_sample(tiny_encoder, kinds, step):
    denoised, x_t, _ = step
    run = make_run(Term(kinds["text"], tiny_encoder(), 5.0, start=0.2, end=0.6))
    got = guide(denoised, x_t, torch.tensor([9.0, 8.0, 5.0, 4.0]), run)
    assert [not torch.equal(a, b) for a, b in zip(got, denoised, strict=True)] == [False, True, True, False]


def test_the_whole_run_is_guided_by_default(tiny_encoder, kinds):
    run = make_run(Term(kinds["text"], tiny_encoder(), 5.0))
    assert run.weights(torch.tensor([1e6, 10.0, 1e-3])).tolist() == [[5.0, 5.0, 5.0]]


def test_flow_at_one_holds_no_signal_and_is_not_guided(tiny_encoder, all_terms, step):
    denoised, x_t, _ = step
    run = make_run(*all_terms(tiny_encoder()), convention=Convention.FLOW)
    assert guide(denoised, x_t, torch.ones(4), run) is denoised


def test_flow_at_one_does_not_touch_its_neighbours(tiny_encoder, kinds, step):
    denoised, x_t, _ = step
    run = make_run(Term(kinds["text"], tiny_encoder(), 5.0), convention=Convention.FLOW)
    got = guide(denoised, x_t, torch.tensor([1.0, 0.5, 1.0, 0.5]), run)
    wanted = guide(denoised, x_t, torch.full((4,), 0.5), run)
    assert torch.equal(got[0::2], denoised[0::2])
    torch.testing.assert_close(got[1::2], wanted[1::2])


@pytest.mark.parametrize("convention", [Convention.VE, Convention.FLOW])
@pytest.mark.parametrize("scale", [0.1, 1e6])
@pytest.mark.parametrize("variance", [0.01, 0.25, 1e4])
def test_cap_bounds_the_shift_by_the_models_own_step_and_the_datas_size(
    convention, scale, variance, tiny_encoder, all_terms, step
):
    denoised, x_t, _ = step
    sigma = torch.full((4,), 0.8)
    alpha = 1.0 if convention is Convention.VE else 0.2
    own = rms((x_t - alpha * denoised) / alpha)
    most = (0.5 * own).clamp(max=2 * variance**0.5)
    run = make_run(*all_terms(tiny_encoder(), scale), strength=Strength(cap=0.5), convention=convention)
    run.variance = variance
    shift = guide(denoised, x_t, sigma, run) - denoised
    free_run = make_run(*all_terms(tiny_encoder(), scale), convention=convention)
    free = guide(denoised, x_t, sigma, free_run) - denoised
    bound = rms(free) > most
    assert bool(bound.all()) == bool(bound.any()) == (scale == 1e6)
    assert bool((most < 0.5 * own).all()) == (variance < 1)
    wanted = free * (most / rms(free)).clamp(max=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(shift, wanted, rtol=1e-9, atol=1e-9)
    assert run.trace[0].capped.tolist() == bound.tolist()
    torch.testing.assert_close(run.trace[0].pull, rms(wanted) / own, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_relative_strength_is_a_fraction_of_the_models_own_step(scale, tiny_encoder, all_terms, step):
    denoised, x_t, sigma = step
    run = make_run(*all_terms(tiny_encoder(), scale), strength=Strength("relative", 0.3))
    shift = guide(denoised, x_t, sigma, run) - denoised
    torch.testing.assert_close(rms(shift), 0.3 * rms(x_t - denoised), rtol=1e-9, atol=0)
    free = guide(denoised, x_t, sigma, make_run(*all_terms(tiny_encoder(), 1.0))) - denoised
    similarity = F.cosine_similarity(shift.flatten(1), free.flatten(1))
    torch.testing.assert_close(similarity, torch.ones(4), rtol=0, atol=1e-9)


def test_without_a_cap_the_shift_grows_with_the_scale(tiny_encoder, all_terms, step):
    one, many = (guide(*step, make_run(*all_terms(tiny_encoder(), scale))) - step[0] for scale in (1.0, 1e4))
    torch.testing.assert_close(many, 1e4 * one, rtol=1e-9, atol=1e-2)


def test_a_step_of_zero_leaves_nothing_to_pull_with(tiny_encoder, all_terms, step):
    _, x_t, sigma = step
    for strength in (Strength(), Strength("relative", 0.5)):
        assert torch.equal(guide(x_t.clone(), x_t, sigma, make_run(*all_terms(tiny_encoder()), strength=strength)), x_t)


@dataclass(frozen=True, eq=False)
class BrokenGuidance:
    """A score whose gradient is ``value`` in the second sample."""

    value: float

    def depth(self, encoder) -> int:
        return encoder.full_depth

    def target(self, look) -> Features:
        return Features(())

    def score(self, features: Features, target: Features) -> Tensor:
        factor = torch.ones(len(features.embed))
        factor[1] = self.value
        return features.embed.sum(dim=1) * factor


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e306])
@pytest.mark.parametrize("strength", [UNBOUND, Strength(), Strength("relative", 0.5)])
def test_a_gradient_that_is_not_finite_leaves_its_sample_unguided(value, strength, tiny_encoder, step):
    denoised, x_t, sigma = step
    run = make_run(Term(BrokenGuidance(value), tiny_encoder(), 100.0), strength=strength)
    healthy = make_run(Term(BrokenGuidance(1.0), tiny_encoder(), 100.0), strength=strength)
    got, wanted = guide(denoised, x_t, sigma, run), guide(denoised, x_t, sigma, healthy)
    assert torch.equal(got[1], denoised[1])
    others = [0, 2, 3]
    torch.testing.assert_close(got[others], wanted[others])
    assert torch.isfinite(run.trace[0].pull).all()


def test_a_huge_scale_stays_finite(tiny_encoder, all_terms, step):
    for scale in (1e6, 1e30):
        got = guide(*step, make_run(*all_terms(tiny_encoder(), scale), strength=Strength()))
        assert torch.isfinite(got).all()


def test_a_batch_equals_its_samples_alone(tiny_encoder, all_terms, step):
    for strength in (UNBOUND, Strength(cap=0.1), Strength("relative", 0.5)):
        batch = guide(*step, make_run(*all_terms(tiny_encoder()), strength=strength))
        for i in range(4):
            single = guide(*(v[i : i + 1] for v in step), make_run(*all_terms(tiny_encoder()), strength=strength))
            torch.testing.assert_close(batch[i : i + 1], single, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["text", "content", "structure", "style"])
def test_a_batch_of_several_sigmas_equals_its_samples_alone(kind, tiny_encoder, kinds, step):
    denoised, x_t, _ = step
    sigma = torch.tensor([0.5, 2.0, 7.0, 2.0])
    batch = guide(denoised, x_t, sigma, make_run(Term(kinds[kind], tiny_encoder(), 50.0)))
    for i in range(4):
        single = (v[i : i + 1] for v in (denoised, x_t, sigma))
        wanted = guide(*single, make_run(Term(kinds[kind], tiny_encoder(), 50.0)))
        torch.testing.assert_close(batch[i : i + 1], wanted, rtol=1e-9, atol=1e-9)


def test_terms_add_up_in_any_order(tiny_encoder, all_terms, step):
    terms = all_terms(tiny_encoder())
    together = guide(*step, make_run(*terms)) - step[0]
    alone = [guide(*step, make_run(term)) - step[0] for term in terms]
    torch.testing.assert_close(together, sum(alone), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(guide(*step, make_run(*terms[::-1])) - step[0], together, rtol=1e-9, atol=1e-9)


def test_two_encoders_gradients_add(tiny_encoder, kinds, step):
    terms = Term(kinds["content"], tiny_encoder(0), 5.0), Term(kinds["style"], tiny_encoder(1, gain=0.5), 9.0)
    together = guide(*step, make_run(*terms)) - step[0]
    alone = [guide(*step, make_run(term)) - step[0] for term in terms]
    torch.testing.assert_close(together, alone[0] + alone[1], rtol=1e-9, atol=1e-9)
    assert [term.encoder.calls for term in terms] == [3, 3]  # the reference once, the picture together and alone


def test_one_forward_per_encoder_for_several_terms(tiny_encoder, all_terms, step):
    encoder = tiny_encoder()
    run = make_run(*all_terms(encoder))
    guide(*step, run)
    first = encoder.calls
    guide(*step, run)
    assert encoder.calls == first + 1


def test_references_are_looked_at_once_per_sigma(tiny_encoder, kinds, step):
    denoised, x_t, sigma = step
    encoder = tiny_encoder()
    run = make_run(Term(kinds["content"], encoder, 5.0), Term(kinds["text"], encoder, 5.0))
    calls = []
    for s in (2.0, 2.0, 1.0, 2.0, 1.0):
        guide(denoised, x_t, torch.full_like(sigma, s), run)
        calls.append(encoder.calls)
    assert calls == [2, 3, 5, 6, 7]


def test_reference_noise_is_the_same_in_every_run(tiny_encoder, all_terms, step):
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        run = make_run(*all_terms(tiny_encoder()))
        results += [guide(*step, run), guide(*step, run)]
    assert all(torch.equal(result, results[0]) for result in results)


def test_the_global_random_state_is_left_alone(tiny_encoder, all_terms, step):
    encoder = tiny_encoder()
    state = torch.random.get_rng_state()
    guide(*step, make_run(*all_terms(encoder)))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_inference_mode_changes_nothing(tiny_encoder, all_terms, step):
    wanted = guide(*step, make_run(*all_terms(tiny_encoder())))
    with torch.inference_mode():
        encoder = tiny_encoder().requires_grad_(False)
        before = list(encoder.parameters())
        run, inputs = make_run(*all_terms(encoder)), [v.clone() for v in step]
        got = [guide(*inputs, run) for _ in range(2)]
    for result in got:
        torch.testing.assert_close(result, wanted)
    assert all(a is b for a, b in zip(encoder.parameters(), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_models_dtype_comes_back(dtype, tiny_encoder, all_terms, step):
    denoised, x_t, sigma = step
    got = guide(denoised.to(dtype), x_t.to(dtype), sigma.to(dtype), make_run(*all_terms(tiny_encoder())))
    wanted = guide(denoised.to(dtype).float(), x_t.to(dtype).float(), sigma, make_run(*all_terms(tiny_encoder())))
    assert got.dtype == dtype
    torch.testing.assert_close(got, wanted.to(dtype), rtol=0.02, atol=0.02)


def test_trace_holds_the_scores_of_every_term(tiny_encoder, kinds, step):
    encoder, (denoised, x_t, sigma) = tiny_encoder(), step
    run = make_run(Term(kinds["text"], encoder, 5.0), Term(kinds["content"], encoder, 5.0, start=0.9))
    guide(denoised, x_t, sigma, run)
    (trace,) = run.trace
    t = encoder.table.timestep(torch.tensor([2.0]))
    embed = encoder(x_t / math.sqrt(5), t, 3).embed
    text = F.cosine_similarity(embed[:, None], kinds["text"].embed[None], dim=-1).mean(dim=1)
    assert trace.sigma == 2.0
    torch.testing.assert_close(trace.scores[0], text.detach(), rtol=1e-9, atol=1e-9)
    assert not trace.scores[1].any()


class AveragingEncoder:
    """Reads k x k means, and keeps what it read; its claim of noise is 1 / k. A plain function, no module."""

    full_depth = 2
    reads = "noisy"

    def __init__(self, k: int) -> None:
        self.k, self.seen = k, []
        self.table = TimestepTable.from_name("linear")

    def __call__(self, image: Tensor, t: Tensor, depth: int) -> Features:
        small = F.avg_pool2d(image, self.k)
        self.seen.append((small.detach(), t))
        return Features((small,), small.mean(dim=(2, 3)))

    def noise_gain(self, height: int, width: int) -> float:
        return 1 / self.k


@pytest.mark.parametrize("convention", [Convention.VE, Convention.FLOW])
@pytest.mark.parametrize("k", [1, 2, 8])
def test_an_encoder_that_averages_sees_less_noise(k, convention, draw):
    """x_0 is a constant c: the encoder must read sqrt(abar_t) c with noise sqrt(1 - abar_t) at the t that it gets."""
    sigma, c, encoder = torch.tensor([0.6]), 0.5, AveragingEncoder(k)
    alpha = float(convention.alpha(sigma))
    x_t = alpha * c + sigma * draw(1, 3, 512, 512)
    run = make_run(Term(StructureGuidance(torch.full((1, 3, 512, 512), c), (1,)), encoder, 1.0), convention=convention)
    guide(torch.full_like(x_t, c), x_t, sigma, run)
    assert len(encoder.seen) == 2
    for seen, t in encoder.seen:  # the reference, then the picture
        ratio = float(encoder.table.sigma(t))
        assert ratio == pytest.approx(0.6 / alpha / k, rel=1e-4)
        abar = 1 / (1 + ratio**2)
        deviations = 5 / math.sqrt(seen.numel())  # five standard errors
        assert float(seen.mean()) == pytest.approx(math.sqrt(abar) * c, abs=deviations * math.sqrt(1 - abar))
        assert float(seen.std()) == pytest.approx(math.sqrt(1 - abar), rel=deviations)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "loud"}, '"loud"; wanted "absolute" or "relative"'),
        ({"cap": 0.0}, "cap of 0.0; wanted a positive number"),
        ({"cap": -1.0}, "cap of -1.0"),
        ({"cap": math.nan}, "cap of nan"),
        ({"mode": "relative", "cap": None}, "Relative strength needs a cap"),
    ],
)
def test_strengths_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Strength(**settings)
