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


@pytest.mark.parametrize("name", ["cfg", "denoise", "cap"])
def test_nan_is_no_number(run, sampler, name):
    wrong(run, f"Got {name} nan; wanted a finite number", "SDGGuidedKSampler", **sampler | {name: math.nan})


def test_nan_is_no_scale_weight_or_crossover(run, noisy_clip, clean_clip, text):
    wrong(run, "Got scale nan", "SDGTextGuidance", noisy_clip=noisy_clip, text="a", scale=math.nan, **WHOLE)
    wrong(run, "Got weight_3 nan", "SDGCombineGuidance", guidance_1=text, weight_3=math.nan)
    wrong(run, "Got crossover nan", "SDGEncoderCrossfade", noisy=noisy_clip, clean=clean_clip, crossover=math.nan)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_pictures_with_numbers_that_are_not_finite_are_refused(run, noisy_clip, number):
    image = torch.rand(1, 16, 16, 3)
    image[0, 3, 3, 1] = number
    wrong(run, "not finite", "SDGContentGuidance", noisy_clip=noisy_clip, image=image, scale=1.0, **WHOLE)


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
    with pytest.raises(RuntimeError, match="shape"), memory.explained("a thing"):
        torch.zeros(2, 3) @ torch.zeros(2, 3)
    with pytest.raises(comfy.model_management.OOM_EXCEPTION), memory.explained("a thing"):
        raise comfy.model_management.OOM_EXCEPTION("allocate memory")
