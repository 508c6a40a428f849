"""Guidance Report: it is about the very latent that it gets, and changes nothing of it."""

from __future__ import annotations

import json

import pytest
import torch

BLANK = [[None, {}]]
WHOLE = {"start_percent": 0.0, "end_percent": 1.0}


@pytest.fixture(scope="module")
def sample(run, adm):
    """sample(guidance, ...) -> the LATENT of Guided KSampler."""

    def execute(guidance=None, steps=4, **others):
        inputs = {
            "model": adm, "seed": 7, "steps": steps, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal",
            "latent_image": {"samples": torch.zeros(2, 3, 16, 16)}, "denoise": 1.0, "strength": "absolute",
            "cap": 1.0, "guidance": guidance,
        }  # fmt: skip
        return run("SDGGuidedKSampler", **inputs | others)

    return execute


@pytest.fixture(scope="module")
def both(run, noisy_clip):
    """Text and content through one encoder."""
    text = run("SDGTextGuidance", noisy_clip=noisy_clip, text="a red hat", scale=150.0, **WHOLE)
    image = torch.rand(1, 16, 16, 3, generator=torch.Generator().manual_seed(0))
    content = run("SDGContentGuidance", noisy_clip=noisy_clip, image=image, scale=300.0, **WHOLE)
    return run("SDGCombineGuidance", guidance_1=text, guidance_2=content)


@pytest.fixture(scope="module")
def report(pack):
    """report(latent) -> everything that the node gives."""

    def execute(latent):
        with torch.inference_mode():
            return pack.nodes["SDGGuidanceReport"].execute(latent=latent).args

    return execute


def test_the_latent_passes_and_the_numbers_are_the_runs(report, sample, both):
    latent = sample(both, measure=True)
    passed, plot, text, said = report(latent)
    assert passed is latent
    assert plot.shape[0] == 1
    assert plot.shape[3] == 3
    assert 0 <= float(plot.min()) < float(plot.max()) <= 1
    said = json.loads(said)
    assert [part["name"] for part in said["guidances"]] == ['text "a red hat"', "content"]
    assert said["pictures"] == 2
    assert len(said["percent"]) == len(said["pull"]["each"]) == 4
    assert all(value is not None for part in said["guidances"] for value in part["size"]["mean"])
    assert text.splitlines()[0].startswith("4 guided evaluations of 2 pictures")


def test_measuring_changes_no_bit_of_the_picture(sample, both):
    assert torch.equal(sample(both, measure=True)["samples"], sample(both)["samples"])


def test_a_latent_that_was_changed_afterwards_is_refused(comfy, report, sample, both, adm):
    latent = sample(both)
    with torch.inference_mode():
        sampled = comfy.nodes.KSampler().sample(adm, 1, 2, 1.0, "euler", "normal", BLANK, BLANK, latent, 0.5)[0]
        scaled = comfy.nodes.LatentUpscale().upscale(latent, "bilinear", 256, 256, "disabled")[0]
    for other in (sampled, scaled, {**latent, "samples": latent["samples"].clone()}):
        with pytest.raises(ValueError, match="another node changed"):
            report(other)
    assert report(dict(latent))[3] == report(latent)[3]


def test_of_two_guided_runs_each_latent_has_its_own(report, sample, both):
    first = sample(both)
    second = sample(both, latent_image=first, steps=6)
    plain = sample(None, latent_image=second)
    assert [len(json.loads(report(latent)[3])["percent"]) for latent in (first, second, plain)] == [4, 6, 0]
    assert report(plain)[2] == "No guidance acted in this run."


def test_what_carries_no_report_is_refused(report):
    for other in ({"samples": torch.zeros(1, 3, 8, 8)}, {}, None, "latent"):
        with pytest.raises(ValueError, match="wanted one as Guided KSampler"):
            report(other)


def test_metadata_hold_a_report_for_every_node(pack):
    class Hidden:
        unique_id, extra_pnginfo = "5", {"workflow": {}}

    class Other(Hidden):
        unique_id = "6"

    class Nowhere:
        unique_id, extra_pnginfo = "5", None

    empty = pack.method.GuidanceReport()
    for hidden in (Hidden, Other, Nowhere, None):
        pack.host.keep_with_pictures(hidden, empty)
    assert set(Hidden.extra_pnginfo["sdg_report"]) == {"5", "6"}
    assert Hidden.extra_pnginfo["sdg_report"]["5"] == json.loads(empty.to_json())
