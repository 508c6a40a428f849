"""What nodes say to values that the host lets through: plain values and foreign things where a link should be, NaN."""

from __future__ import annotations

import math

import pytest
import torch

WHOLE = {"start_percent": 0.0, "end_percent": 1.0}
SAMPLING = {
    "seed": 0, "steps": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0,
    "strength": "absolute", "cap": 1.0,
}  # fmt: skip
FOREIGN = ["word", 7, math.nan, [1], {"a": 1}, object(), torch.zeros(2, 2), torch.nn.Linear(2, 2)]


def wrong(run, message, node_id, **inputs):
    with pytest.raises(ValueError, match=message):
        run(node_id, **inputs)


@pytest.fixture(scope="module")
def text(run, noisy_clip):
    return run("SDGTextGuidance", noisy_clip=noisy_clip, text="a", scale=9.0, **WHOLE)


@pytest.fixture
def sampler(adm, text) -> dict:
    """Inputs of a Guided KSampler that runs."""
    return {"model": adm, "guidance": text, "latent_image": {"samples": torch.zeros(1, 3, 16, 16)}, **SAMPLING}


@pytest.mark.parametrize("value", FOREIGN, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("name", ["model", "guidance", "positive", "negative", "vae"])
def test_guided_ksampler_refuses_what_is_no_such_value(run, sampler, name, value):
    wrong(run, rf"The input {name} got .*wanted .*Connect", "SDGGuidedKSampler", **sampler | {name: value})


@pytest.mark.parametrize("value", [*FOREIGN, None], ids=lambda value: type(value).__name__)
def test_sockets_that_need_a_value_refuse_others(comfy, run, adm, noisy_clip, text, value):
    wrong(
        run, "noisy_clip got .*wanted a NOISY_CLIP", "SDGTextGuidance", noisy_clip=value, text="a", scale=1.0, **WHOLE
    )
    wrong(run, "noisy got .*wanted a NOISY_CLIP", "SDGEncoderCrossfade", noisy=value, clean=noisy_clip, crossover=-1.0)
    wrong(run, "guidance got .*wanted an SDG_GUIDANCE", "SDGGuidanceFrames", guidance=value, frames="0")
    wrong(
        run, "model got .*wanted a MODEL", "SDGApplyGuidance", model=value, guidance=text, strength="absolute", cap=1.0
    )
    wrong(
        run, "guidance got .*SDG_GUIDANCE", "SDGApplyGuidance", model=adm, guidance=value, strength="absolute", cap=1.0
    )
    saved = {"name": "a", "dataset": "", "licence": "", "half": True}
    wrong(run, "noisy_clip got .*wanted a NOISY_CLIP", "SDGSaveNoisyCLIP", noisy_clip=value, **saved)


@pytest.mark.parametrize("value", FOREIGN, ids=lambda value: type(value).__name__)
def test_optional_sockets_refuse_other_values(run, value):
    wrong(run, "guidance_2 got .*wanted an SDG_GUIDANCE", "SDGCombineGuidance", guidance_2=value)
    wrong(run, "guidance got .*wanted an SDG_GUIDANCE", "SDGPaperSampler", guidance=value)


def test_a_patcher_of_something_else_is_neither_a_model_nor_an_encoder(pack, run, sampler):
    linear = pack.host.patch_module(torch.nn.Linear(2, 2))
    wrong(run, "model got a .*wanted a MODEL", "SDGGuidedKSampler", **sampler | {"model": linear})
    wrong(run, "wanted a NOISY_CLIP", "SDGTextGuidance", noisy_clip=linear, text="a", scale=1.0, **WHOLE)


@pytest.mark.parametrize(
    ("latent", "said"),
    [
        (None, "got nothing"),
        ("word", "got 'word'"),
        ({}, "got nothing; wanted a LATENT"),
        ({"samples": [[0.0]]}, "got a list"),
        (torch.zeros(1, 3, 16, 16), "wanted a LATENT"),
        ({"samples": torch.zeros(0, 3, 16, 16)}, r"shape \(0, 3, 16, 16\); wanted one with pixels"),
        ({"samples": torch.zeros(1, 3, 0, 16)}, "with pixels"),
        ({"samples": torch.zeros(1, 3, 16, 16, dtype=torch.int64)}, "wanted one of floating-point numbers"),
        ({"samples": torch.zeros(2, 3, 16, 16), "batch_index": [0]}, "2 pictures with a batch_index of 1"),
    ],
)
def test_latents_that_hold_nothing_are_refused(run, sampler, latent, said):
    wrong(run, said, "SDGGuidedKSampler", **sampler | {"latent_image": latent})


@pytest.mark.parametrize("shape", [(1, 5, 16, 16), (1, 3, 256), (1, 3, 2, 16, 16)])
def test_unguided_latents_of_other_dimensions_than_the_models_are_refused(run, sampler, shape):
    latent = {"samples": torch.ones(shape)}
    wrong(
        run, r"wants \(batch, 3, height, width\)", "SDGGuidedKSampler",
        **sampler | {"latent_image": latent, "guidance": None},
    )  # fmt: skip


def test_a_vae_of_another_model_is_refused(run, adm, clean_clip, autoencoder):
    text = run("SDGTextGuidance", noisy_clip=clean_clip, text="a hat", scale=9.0, **WHOLE)
    applied = {"model": adm, "guidance": text, "strength": "absolute", "cap": 1.0, "view": "decoded"}
    wrong(run, "latents of 4 channels.* have 3.* Connect", "SDGApplyGuidance", **applied, vae=autoencoder)


@pytest.mark.parametrize("name", ["cfg", "denoise", "cap"])
def test_nan_is_no_number(run, sampler, name):
    wrong(run, f"Got {name} nan; wanted a finite number", "SDGGuidedKSampler", **sampler | {name: math.nan})


@pytest.mark.parametrize(("steps", "denoise"), [(2, 1e-300), (2, 1e-6), (10_000, 0.009)])
def test_a_schedule_without_end_is_refused(run, sampler, steps, denoise):
    wrong(run, "Set denoise to 0.01 or more", "SDGGuidedKSampler", **sampler | {"steps": steps, "denoise": denoise})


def test_nan_is_no_scale_weight_or_crossover(run, noisy_clip, clean_clip, text):
    wrong(run, "Got scale nan", "SDGTextGuidance", noisy_clip=noisy_clip, text="a", scale=math.nan, **WHOLE)
    wrong(run, "Got weight_3 nan", "SDGCombineGuidance", guidance_1=text, weight_3=math.nan)
    wrong(run, "Got crossover nan", "SDGEncoderCrossfade", noisy=noisy_clip, clean=clean_clip, crossover=math.nan)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_pictures_with_numbers_that_are_not_finite_are_refused(run, noisy_clip, number):
    image = torch.rand(1, 16, 16, 3)
    image[0, 3, 3, 1] = number
    wrong(run, "not finite", "SDGContentGuidance", noisy_clip=noisy_clip, image=image, scale=1.0, **WHOLE)


def test_pictures_of_complex_numbers_are_refused(run, noisy_clip):
    image = torch.rand(1, 16, 16, 3).to(torch.complex64)
    wrong(run, "not real", "SDGContentGuidance", noisy_clip=noisy_clip, image=image, scale=1.0, **WHOLE)


@pytest.mark.parametrize("image", ["word", None, [[0.0]], torch.rand(1, 16, 16, 5), torch.rand(0, 16, 16, 3)])
def test_what_is_no_picture_is_refused(run, pack, noisy_clip, image):
    wrong(run, r"wanted \(batch, height", "SDGContentGuidance", noisy_clip=noisy_clip, image=image, scale=1.0, **WHOLE)
    if image is not None:
        with pytest.raises(ValueError, match=r"wanted \(batch, height"):
            pack.finetune.pictures("", [image], 32, 0)


def test_long_texts_are_shown_in_part_and_ranges_have_an_end(run, text):
    for frames in ("0-999999999999", "9" * 5000):
        with pytest.raises(ValueError, match="five digits at most") as error:
            run("SDGGuidanceFrames", guidance=text, frames=frames)
        assert len(str(error.value)) < 300


def test_a_name_that_no_file_can_have_is_refused(pack, run, noisy_clip):
    with pytest.raises(ValueError, match="200 bytes at most") as error:
        pack.finetune.keep(noisy_clip.model, "n" * 400, True, {})
    assert len(str(error.value)) < 300


def test_a_picture_larger_than_memory_is_refused_before_it_is_made(run):
    wrong(run, r"4096 pictures of 16384 x 16384, .* GB are free", "SDGEmptyPixelLatent", width=2**14, height=2**14,
          batch_size=4096)  # fmt: skip


def test_memory_that_ends_on_the_cpu_is_explained(pack, comfy):
    memory = pack.memory
    with pytest.raises(ValueError, match=r"Out of memory: a thing did not fit\. Choose"), memory.explained("a thing"):
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"Choose a smaller .*\(could not create"), memory.explained("a thing"):
        raise RuntimeError("could not create a primitive")  # oneDNN, where a convolution's working memory has no room
    with pytest.raises(RuntimeError, match="shape"), memory.explained("a thing"):
        torch.zeros(2, 3) @ torch.zeros(2, 3)
    with pytest.raises(comfy.model_management.OOM_EXCEPTION), memory.explained("a thing"):
        raise comfy.model_management.OOM_EXCEPTION("allocate memory")


def test_controls_say_what_they_can_work_on(run, text):
    wrong(
        run, r"without reference pictures; wanted Content, .*take this node out", "SDGGuidanceReferences",
        guidance=text, choice="mean", weights="",
    )  # fmt: skip
    wrong(run, r"Got the speed .*warp.*wanted one of: quality", "SDGGuidanceSpeed", guidance=text, speed="warp")


def test_weights_of_references_leave_texts_alone(run, noisy_clip, text):
    """Content of two pictures and a text, combined: the two numbers are the pictures'."""
    pair = torch.rand(2, 16, 16, 3, generator=torch.Generator().manual_seed(0))
    content = run("SDGContentGuidance", noisy_clip=noisy_clip, image=pair, scale=9.0, **WHOLE)
    both = run("SDGCombineGuidance", guidance_1=content, guidance_2=text)
    made = run("SDGGuidanceReferences", guidance=both, choice="mean", weights="1, 0.5")
    assert [None if term.several is None else term.several.weights for term in made.terms] == [(1.0, 0.5), None]


def test_an_encoder_in_half_precision_is_not_saved(run):
    rounded = run("SDGLoadNoisyCLIP", noisy_clip_name="avatars (bundled)", precision="bf16")
    wrong(
        run, "Got an encoder in bfloat16; wanted fp32.*Set precision", "SDGSaveNoisyCLIP", noisy_clip=rounded, name="a",
        dataset="", licence="", half=True,
    )  # fmt: skip


def test_unknown_views_are_refused(run, sampler):
    wrong(run, r"Got the view 'sideways'; wanted one of: auto", "SDGGuidedKSampler", **sampler | {"view": "sideways"})
