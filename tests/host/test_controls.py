"""The controls as nodes: on the host's samplers, on single and combined guidances."""

from __future__ import annotations

import pytest
import torch

BLANK = [[None, {}]]
WHOLE = {"start_percent": 0.0, "end_percent": 1.0}


@pytest.fixture(scope="module")
def sample(run, adm):
    """sample(guidance, **changes) -> two pictures of the Guided KSampler."""

    def go(guidance=None, **changes):
        inputs = {
            "seed": 7, "steps": 6, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0,
            "strength": "absolute", "cap": 1.0, "positive": BLANK, "negative": BLANK,
            "latent_image": {"samples": torch.zeros(2, 3, 16, 16)},
        }  # fmt: skip
        return run("SDGGuidedKSampler", model=adm, guidance=guidance, **(inputs | changes))["samples"]

    return go


@pytest.fixture(scope="module")
def text(run, noisy_clip):
    return run("SDGTextGuidance", noisy_clip=noisy_clip, text="a red hat", scale=150.0, **WHOLE)


@pytest.fixture(scope="module")
def content(run, noisy_clip):
    image = torch.rand(1, 20, 24, 3, generator=torch.Generator().manual_seed(0))
    return run("SDGContentGuidance", noisy_clip=noisy_clip, image=image, scale=200.0, **WHOLE)


@pytest.fixture(scope="module")
def both(run, text, content):
    return run("SDGCombineGuidance", guidance_1=text, guidance_2=content)


@pytest.fixture
def encoded(pack, noisy_clip, monkeypatch):
    """Counts the encoder's calls."""
    calls, forward = [], type(noisy_clip.model).forward

    def counted(self, image, t, depth):
        calls.append(len(image))
        return forward(self, image, t, depth)

    monkeypatch.setattr(type(noisy_clip.model), "forward", counted)
    return calls


def schedule(run, guidance, curve="constant", points="0:1, 1:1", every=1):
    return run("SDGGuidanceSchedule", guidance=guidance, curve=curve, points=points, every=every)


def test_a_schedule_by_default_changes_no_bit(run, sample, both):
    assert torch.equal(sample(schedule(run, both)), sample(both))


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm_2", "dpmpp_2m"])
def test_a_schedule_of_zero_leaves_the_hosts_bits(run, sample, both, sampler):
    assert torch.equal(sample(schedule(run, both, points="0:0"), sampler_name=sampler), sample(sampler_name=sampler))


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm_2"])
def test_every_second_step_halves_the_encoders_calls(run, sample, content, encoded, sampler):
    sample(content, sampler_name=sampler)  # its references are cached from here on
    encoded.clear()
    sample(content, sampler_name=sampler)
    every, encoded[:] = len(encoded), []
    sample(schedule(run, content, every=2), sampler_name=sampler)
    print(f"{sampler}: {every} calls, every second step {len(encoded)}")
    assert len(encoded) <= every / 2 + 2


def test_the_second_run_of_a_queue_looks_at_no_reference(run, sample, noisy_clip, encoded):
    image = torch.rand(1, 20, 24, 3, generator=torch.Generator().manual_seed(5))  # that no other test has shown it
    new = run("SDGContentGuidance", noisy_clip=noisy_clip, image=image, scale=200.0, **WHOLE)
    first = sample(new)
    once, encoded[:] = len(encoded), []
    assert torch.equal(sample(new), first)
    assert len(encoded) - 1 == (once - 1) / 2  # one pass of each run counts memory, on the meta device


def test_quality_changes_no_bit_and_fast_asks_less(run, sample, content, encoded):
    calls = {}
    exact = sample(content)
    for speed in ("quality", "balanced", "fast"):
        encoded.clear()
        picture = sample(run("SDGGuidanceSpeed", guidance=content, speed=speed))
        calls[speed] = len(encoded)
        assert torch.equal(picture, exact) == (speed == "quality")
    assert calls["quality"] > calls["balanced"] > calls["fast"] > 0


def test_a_schedule_acts_where_its_curve_does(run, sample, text):
    """Two curves that add up to 1 over disjoint parts act in disjoint steps."""
    early, late = (schedule(run, text, points=points) for points in ("0:1, 0.5:0", "0:0, 0.5:1"))
    plain = sample()
    assert all(not torch.equal(sample(part), plain) for part in (early, late))
    together = run("SDGCombineGuidance", guidance_1=early, guidance_2=late)
    assert torch.allclose(sample(together), sample(text), atol=1e-5)


@pytest.mark.parametrize("points", ["fast", "0:1:2", "0", "0:1, half:2"])
def test_points_that_are_none_are_refused(run, text, points):
    with pytest.raises(ValueError, match=r"Got the points .*pairs of numbers"):
        schedule(run, text, points=points)
    with pytest.raises(ValueError, match="rising"):
        schedule(run, text, points="0.5:1, 0.2:1")


# Where


@pytest.fixture
def shifts(pack, monkeypatch):
    """The shifts of all steps."""
    seen, original = [], pack.seam.guidance_shift

    def recorded(*args):
        seen.append(original(*args))
        return seen[-1]

    monkeypatch.setattr(pack.seam, "guidance_shift", recorded)
    return seen


@pytest.mark.parametrize("sampler", ["euler", "heun", "euler_ancestral"])
def test_outside_its_mask_no_step_is_shifted(run, sample, both, shifts, sampler):
    mask = torch.zeros(1, 32, 32)
    mask[:, 8:, :16] = 1
    sample(run("SDGGuidanceMask", guidance=both, mask=mask, feather=0.1), sampler_name=sampler)
    assert len(shifts) >= 6
    for shift in shifts:
        assert not shift[..., :4, :].any()
        assert not shift[..., 8:].any()
        assert shift[..., 4:, :8].any()


def test_no_mask_changes_no_bit(run, sample, both):
    assert torch.equal(sample(run("SDGGuidanceMask", guidance=both)), sample(both))


def test_a_reference_mask_hides_the_rest_of_the_reference(run, sample, noisy_clip):
    image, mask = torch.rand(1, 16, 16, 3, generator=torch.Generator().manual_seed(1)), torch.zeros(1, 16, 16)
    mask[:, :, :8] = 1
    pictures = []
    for right in (0.0, 1.0):
        changed = image.clone()
        changed[:, :, 8:] = right
        style = run(
            "SDGStyleGuidance", noisy_clip=noisy_clip, image=changed, scale=300.0, layers="4,5", centred=True, **WHOLE
        )
        pictures.append(sample(run("SDGGuidanceMask", guidance=style, reference_mask=mask)))
    assert torch.equal(*pictures)


@pytest.mark.parametrize(
    "mask", [torch.zeros(1, 8, 8), torch.full((1, 8, 8), float("nan")), torch.ones(1, 3, 8, 8), "left"]
)
def test_masks_that_are_none_are_refused(run, text, mask):
    with pytest.raises(ValueError, match=r"mask of which nothing is left|input mask got .* wanted a MASK"):
        run("SDGGuidanceMask", guidance=text, mask=mask)


# How far


def test_a_target_pulls_until_it_is_reached(run, sample, content, shifts):
    """Of random weights every two pictures are alike: 1 is never reached, and -1 always is."""
    plain = sample()
    assert not torch.equal(sample(run("SDGGuidanceTarget", guidance=content, similarity=1.0)), plain)
    shifts.clear()
    assert torch.equal(sample(run("SDGGuidanceTarget", guidance=content, similarity=-1.0)), plain)
    assert shifts
    assert all(not shift.any() for shift in shifts)


def test_away_is_the_negative_scale_until_its_similarity(run, sample, noisy_clip):
    def pushed(scale):
        return run("SDGTextGuidance", noisy_clip=noisy_clip, text="a red hat", scale=scale, **WHOLE)

    negative = sample(pushed(-150.0))
    for scale in (150.0, -150.0):
        away = run("SDGGuidanceAway", guidance=pushed(scale), until=-1.0)
        assert torch.allclose(sample(away), negative, atol=1e-4)
    assert torch.equal(sample(run("SDGGuidanceAway", guidance=pushed(150.0), until=1.0)), sample())


@pytest.mark.parametrize("value", [2.0, float("nan")])
def test_similarities_that_are_none_are_refused(run, text, value):
    for node, name in (("SDGGuidanceTarget", "similarity"), ("SDGGuidanceAway", "until")):
        with pytest.raises(ValueError, match=r"wanted -1 to 1|finite number"):
            run(node, guidance=text, **{name: value})


# Which way


def test_direction_edits_one_way_or_the_other(run, sample, noisy_clip):
    image = torch.rand(1, 16, 16, 3, generator=torch.Generator().manual_seed(2))
    texts = {"from_text": "a person", "to_text": "a person with glasses"}
    swapped = {"from_text": texts["to_text"], "to_text": texts["from_text"]}

    def edited(texts, scale):
        common = {"noisy_clip": noisy_clip, "image": image, "scale": scale, **WHOLE}
        return sample(run("SDGDirectionGuidance", **common, **texts))

    assert not torch.equal(edited(texts, 50.0), sample())
    assert torch.allclose(edited(swapped, 50.0), edited(texts, -50.0), atol=1e-3)
    with pytest.raises(ValueError, match="wanted a change"):
        edited(texts | {"to_text": "a person"}, 50.0)
    with pytest.raises(ValueError, match="empty text"):
        edited(texts | {"to_text": " "}, 50.0)


# How many


def test_each_picture_of_a_batch_follows_its_own_reference(run, sample, noisy_clip):
    images = torch.rand(2, 16, 16, 3, generator=torch.Generator().manual_seed(3))

    def contents(images):
        return run("SDGContentGuidance", noisy_clip=noisy_clip, image=images, scale=200.0, **WHOLE)

    each = sample(run("SDGGuidanceReferences", guidance=contents(images), choice="one each", weights=""))
    for i in range(2):
        alone = sample(contents(images[i : i + 1]))[i]
        assert torch.allclose(each[i], alone, atol=1e-3)
    mean = sample(run("SDGGuidanceReferences", guidance=contents(images), choice="mean", weights=""))
    assert torch.allclose(mean, sample(contents(images)), atol=1e-3)
    with pytest.raises(ValueError, match="numbers separated by commas"):
        run("SDGGuidanceReferences", guidance=contents(images), choice="mean", weights="much")


# Together


def test_combine_guidance_by_default_adds_up(run, sample, both, text, content):
    assert torch.equal(
        sample(run("SDGCombineGuidance", guidance_1=text, guidance_2=content, conflicts="add up", balance=0.0)),
        sample(both),
    )


def test_projected_and_balanced_guidances_do_not_depend_on_their_inputs_order(run, sample, text, content):
    settings = {"conflicts": "project", "balance": 1.0}
    one = run("SDGCombineGuidance", guidance_1=text, guidance_2=content, **settings)
    other = run("SDGCombineGuidance", guidance_1=content, guidance_4=text, **settings)
    assert torch.allclose(
        sample(one, strength="relative", cap=0.3), sample(other, strength="relative", cap=0.3), atol=1e-4
    )
    assert not torch.equal(sample(one), sample())
    with pytest.raises(ValueError, match="wanted one of: add up, project"):
        run("SDGCombineGuidance", guidance_1=text, conflicts="fight")


# Steadily


def test_a_clean_encoder_looks_at_crops(run, sample, clean_clip, text):
    clean = run("SDGTextGuidance", noisy_clip=clean_clip, text="a red hat", scale=150.0, **WHOLE)
    settings = {"crops": 2, "least": 0.6, "spherical": False}
    cropped = sample(run("SDGGuidanceAugment", guidance=clean, **settings))
    assert not torch.equal(cropped, sample(clean))
    assert torch.equal(cropped, sample(run("SDGGuidanceAugment", guidance=clean, **settings)))
    off = run("SDGGuidanceAugment", guidance=clean, crops=0, least=0.7, spherical=False)
    assert torch.equal(sample(off), sample(clean))
    with pytest.raises(ValueError, match="noisy CLIPs only"):
        run("SDGGuidanceAugment", guidance=text, **settings)
    mixed = run("SDGCombineGuidance", guidance_1=text, guidance_2=clean)
    assert torch.isfinite(sample(run("SDGGuidanceAugment", guidance=mixed, **settings))).all()


# Budget


def test_a_budget_says_what_it_chose(run, sample, both, encoded, caplog):
    with caplog.at_level("INFO"):
        sample(run("SDGGuidanceBudget", guidance=both, percent=1.0), steps=12)
    (line,) = [record.message for record in caplog.records if "Budget:" in record.message]
    print(line)
    assert "for at most 1 % more, one every" in line
    strict, encoded[:] = len(encoded), []
    sample(both, steps=12)
    assert strict < len(encoded)
