"""What a step must not do twice, and that it never waits for its device."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from sdg_core.encoders import from_clean
from sdg_core.method import (
    Blend,
    ContentGuidance,
    Convention,
    Curve,
    DirectionGuidance,
    Fade,
    Features,
    Goal,
    GuidanceRun,
    LinearView,
    Region,
    Several,
    Strength,
    StructureGuidance,
    StyleGuidance,
    Term,
    TextGuidance,
    combine,
    guide,
)
from sdg_core.method.device import version_of
from sdg_core.method.targets import TargetCache, bytes_of, cache_of, content

NONE = Strength(cap=None)


def make_run(*terms: Term, strength: Strength = NONE, **others) -> GuidanceRun:
    return GuidanceRun(terms, Convention.VE, lambda p: 10.0 * (1 - p) if p > 0 else math.inf, strength, **others)


@pytest.fixture
def step(draw):
    x_0 = draw(2, 3, 8, 8).clamp(-1, 1)
    return 0.9 * x_0, x_0 + 2 * draw(2, 3, 8, 8, seed=1), torch.full((2,), 2.0)


@pytest.fixture
def four(draw):
    """Text, and three guidances by one picture, given as three tensors that are equal: as nodes make them."""

    def terms(encoder, seed: int = 2) -> tuple[Term, ...]:
        image = draw(1, 3, 8, 8, seed=seed).clamp(-1, 1)
        guidances = (
            TextGuidance(F.normalize(draw(1, 5, seed=3), dim=-1)),
            ContentGuidance(image),
            StructureGuidance(image.clone(), (1, 2)),
            StyleGuidance(image.clone(), (2,)),
        )
        return tuple(Term(guidance, encoder, 5.0) for guidance in guidances)

    return terms


# References


def test_guidances_of_one_picture_share_its_pass(tiny_encoder, four, step):
    encoder = tiny_encoder()
    guide(*step, make_run(*four(encoder)))
    assert encoder.calls == 2


def test_the_second_run_of_a_schedule_pays_for_no_reference(tiny_encoder, four, step):
    encoder, shifts = tiny_encoder(), []
    for calls in (4, 2):  # two noise levels
        encoder.calls = 0
        run = make_run(*four(encoder))
        shifts.append([guide(step[0], step[1], torch.full((2,), sigma), run) for sigma in (3.0, 2.0)])
        assert encoder.calls == calls
    assert all(torch.equal(a, b) for a, b in zip(*shifts, strict=True))


@pytest.mark.parametrize("guidances", [[1], [2, 3], [0, 1, 2, 3]])
def test_what_other_runs_left_changes_no_bit(guidances, tiny_encoder, four, step):
    """Float32: targets of earlier runs, with other guidances among them, are those that this run would make."""
    fresh, used = (tiny_encoder() for _ in range(2))
    for others in ([3], [1, 2], [2]):
        guide(*step, make_run(*(four(used)[k] for k in others)))
    made = [guide(*step, make_run(*(four(encoder)[k] for k in guidances))) for encoder in (fresh, used)]
    assert torch.equal(*made)


@pytest.mark.parametrize("change", ["picture", "layers", "mask", "noise level", "weights", "size", "precision"])
def test_what_a_target_depends_on_is_in_its_key(change, tiny_encoder, draw, step):
    encoder, image = tiny_encoder(), draw(1, 3, 8, 8, seed=2).clamp(-1, 1)
    term = Term(StructureGuidance(image, (1,)), encoder, 5.0)
    guide(*step, make_run(term))
    denoised, x_t, sigma = step
    if change == "picture":
        image[0, 0, 0, 0] += 1e-3  # the same tensor, changed in place
    elif change == "layers":
        term = replace(term, guidance=StructureGuidance(image, (2,)))
    elif change == "mask":
        term = replace(term, region=Region(reference=(draw(1, 1, 8, 8) > 0).float()))
    elif change == "noise level":
        sigma = sigma * 1.001
    elif change == "weights":
        with torch.no_grad():
            encoder.first.weight.add_(1e-3)
    elif change == "size":
        denoised, x_t = (F.interpolate(v, (12, 12)) for v in (denoised, x_t))
    else:
        denoised, x_t, sigma = (v.double() for v in (denoised, x_t, sigma))
    fresh = tiny_encoder()
    fresh.load_state_dict(encoder.state_dict())
    got, wanted = (guide(denoised, x_t, sigma, make_run(replace(term, encoder=e))) for e in (encoder, fresh))
    assert torch.equal(got, wanted)
    assert not torch.equal(got, denoised)


def test_a_version_counts_changes_also_of_weights_from_inference_mode():
    """Made there and turned normal later, as by a move to a card, they pass for normal and yet count nothing."""
    layer = torch.nn.Linear(2, 2, bias=False)
    before = version_of(layer)
    with torch.no_grad():
        layer.weight.mul_(2)
    assert version_of(layer) > before
    with torch.inference_mode():
        made = torch.nn.Linear(2, 2).requires_grad_(False)
    assert version_of(made) == 0
    made.double()
    assert not made.weight.is_inference()
    assert version_of(made) == 0


def test_the_cache_keeps_to_its_limit_and_forgets_what_was_used_least():
    cache = TargetCache(limit=1000)
    for key in range(3):
        cache.keep(key, Features((), torch.zeros(100)))  # 400 bytes
        cache.find(0)
    assert [cache.find(key) is not None for key in range(3)] == [True, False, True]
    cache.keep("large", Features((), torch.zeros(1000)))
    assert cache.find("large") is None
    assert cache.size == 800  # what is larger than all of it pushes nothing out
    cache.keep("again", Features((torch.zeros(10),), None))
    cache.keep("again", Features((torch.zeros(20),), None))
    assert cache.size - 800 == bytes_of(cache.find("again")) == 80


def test_targets_go_with_their_encoder(tiny_encoder, four, step):
    import gc
    import weakref

    encoder = tiny_encoder()
    guide(*step, make_run(*four(encoder)))
    target = weakref.ref(next(iter(cache_of(encoder)._known.values())))
    assert target() is not None
    del encoder
    gc.collect()
    assert target() is None


def test_a_style_is_kept_as_what_is_smaller(draw):
    """The map of a deep layer, the Gram matrix of a shallow one; the score is the same."""
    deep, shallow = draw(1, 64, 2, 2), draw(1, 4, 8, 8, seed=1)
    seen = Features((draw(3, 4, 8, 8, seed=2), draw(3, 64, 2, 2, seed=3)))
    for centred in (False, True):
        guidance = StyleGuidance(torch.zeros(1, 3, 8, 8), (1, 2), centred)
        target = guidance.target(lambda image, depth: Features((shallow, deep)))
        assert [tuple(t.shape) for t in target.maps] == [(1, 4, 4), (1, 64, 2, 2)]
        whole = Features(tuple(guidance._gram(m, None) for m in (shallow, deep)))
        assert torch.equal(guidance.score(seen, target), guidance.score(seen, whole))


def test_equal_contents_are_one_and_others_are_not(draw):
    image = draw(1, 3, 4, 4)
    assert content((ContentGuidance(image), None)) == content((ContentGuidance(image.clone()), None))
    others = [ContentGuidance(image + 1), ContentGuidance(image, True), StructureGuidance(image), image, image.double()]
    assert len({content(value) for value in [ContentGuidance(image), *others]}) == 6


# The time conditioning


def test_conditioning_is_computed_once_a_noise_level(noisy_clip):
    calls = []
    noisy_clip.conditioning.register_forward_hook(lambda *_: calls.append(1))
    image, t = torch.zeros(1, 3, 16, 16), torch.tensor([300.0])
    first, again = (noisy_clip(image, t.clone(), noisy_clip.full_depth).embed for _ in range(2))
    assert len(calls) == 1
    assert torch.equal(first, again)
    noisy_clip(image, t + 1, noisy_clip.full_depth)
    assert len(calls) == 2


def test_conditioning_follows_its_weights(noisy_clip):
    image, t = torch.zeros(1, 3, 16, 16), torch.tensor([300.0])
    first = noisy_clip(image, t, noisy_clip.full_depth).embed
    with torch.no_grad():
        noisy_clip.conditioning.emb_layers[1].bias.add_(0.1)
    changed = noisy_clip(image, t, noisy_clip.full_depth).embed
    assert not torch.equal(first, changed)
    noisy_clip.requires_grad_(True)
    torch.testing.assert_close(noisy_clip(image, t, noisy_clip.full_depth).embed, changed)


@pytest.fixture
def noisy_clip():
    from sdg_core.avatars import load_bundled_clip

    encoder = from_clean(load_bundled_clip()).requires_grad_(False)
    torch.nn.init.normal_(encoder.conditioning.emb_layers[1].weight, std=0.1)
    return encoder


# Nothing waits: on the meta device every read by the host raises

ONE = {
    "plain": lambda term: term,
    "schedule": lambda term: replace(term, curves=(Curve(((0.0, 1.0), (1.0, 0.1))),), every=2),
    "fade": lambda term: replace(term, fade=Fade(1.0, True)),
    "mask": lambda term: replace(term, region=Region(torch.eye(8)[None, None], feather=0.1)),
    "target": lambda term: replace(term, goal=Goal(0.5)),
    "away": lambda term: replace(term, scale=-5.0, goal=Goal(0.0, adapted=False)),
    "budget": lambda term: replace(term, budget=20.0),
}


@pytest.mark.parametrize("strength", [NONE, Strength(), Strength("relative", 0.25)])
@pytest.mark.parametrize("control", ONE)
@pytest.mark.parametrize("reads", ["noisy", "denoised"])
def test_no_step_waits_for_its_device(reads, control, strength, tiny_encoder, four, step):
    encoder = tiny_encoder().to("meta")
    encoder.reads = reads
    run = make_run(*map(ONE[control], four(encoder)), strength=strength)
    denoised, x_t = (v.to("meta") for v in step[:2])
    for sigma in (3.0, 2.0, 1.0):
        shifted = guide(denoised, x_t, torch.full((2,), sigma), run)
        assert shifted.device.type == "meta"
    assert len(run.trace) == 3


@pytest.mark.parametrize("case", ["several", "balance", "direction", "video", "linear view"])
def test_no_step_of_other_kinds_waits_either(case, tiny_encoder, four, step, draw):
    encoder, images = tiny_encoder().to("meta"), draw(2, 3, 8, 8, seed=2).clamp(-1, 1)
    terms, others = four(encoder), {}
    denoised, x_t = (v.to("meta") for v in step[:2])
    if case == "several":
        kinds = ("mean", "nearest", "in turn", "one each")
        terms = tuple(Term(ContentGuidance(images), encoder, 1.0, several=Several(kind)) for kind in kinds)
    elif case == "balance":
        terms = combine([((term,), 1.0) for term in terms], Blend(1.0))
    elif case == "direction":
        terms = (Term(DirectionGuidance(images, draw(1, 5)), encoder, 3.0),)
    elif case == "video":
        denoised, x_t = (v[:, :, None].expand(-1, -1, 4, -1, -1) for v in (denoised, x_t))
        terms = (*terms, Term(ContentGuidance(images), encoder, 2.0, frames=(0, -1)))
    else:
        view = LinearView("toy", torch.eye(3), torch.zeros(3))
        others = {"view_of": lambda encoder: view}
    run = make_run(*terms, strength=Strength(), **others)
    for sigma in (3.0, 2.0):
        assert guide(denoised, x_t, torch.full((2,), sigma), run).device.type == "meta"


def test_a_read_on_the_meta_device_does_raise():
    """What the two tests above go by."""
    for read in (float, bool, lambda x: x.tolist(), lambda x: torch.nonzero(x), lambda x: x.cpu()):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read(torch.zeros(1, device="meta"))


def test_steps_that_were_not_finite_are_told_of_on_any_device(tiny_encoder, four, step, caplog):
    run = make_run(Term(TextGuidance(torch.full((1, 5), math.nan)), tiny_encoder(), 1.0))
    guide(*step, run)
    assert "not finite in 2 samples" in caplog.text
    caplog.clear()
    run.warn()
    assert caplog.text == ""
