"""Presets as nodes: a guidance that was kept and loaded gives the same picture, bit for bit, and no file does harm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

BLANK = [[None, {}]]
WHOLE = {"start_percent": 0.0, "end_percent": 1.0}


@pytest.fixture(autouse=True)
def folder(comfy, monkeypatch, tmp_path) -> Path:
    """models/sdg_presets of this test."""
    monkeypatch.setitem(comfy.folder_paths.folder_names_and_paths, "sdg_presets", ([str(tmp_path)], {".json"}))
    comfy.folder_paths.filename_list_cache.clear()
    return tmp_path


@pytest.fixture(scope="module")
def sample(run, adm):
    """sample(guidance) -> two pictures of the Guided KSampler."""

    def go(guidance=None):
        inputs = {
            "seed": 7, "steps": 5, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0,
            "strength": "absolute", "cap": 1.0, "positive": BLANK, "negative": BLANK,
            "latent_image": {"samples": torch.zeros(2, 3, 16, 16)},
        }  # fmt: skip
        return run("SDGGuidedKSampler", model=adm, guidance=guidance, **inputs)["samples"]

    return go


@pytest.fixture
def again(pack, run, folder):
    """again(guidance, **encoders) -> the same one, kept and loaded."""

    def go(guidance, **encoders):
        with torch.inference_mode():
            said = pack.nodes["SDGSavePreset"].execute(guidance=guidance, name="kept").ui
        return run("SDGLoadPreset", preset_name=said["text"][0], **encoders)

    return go


def picture(seed: int, count: int = 1, exact: bool = True) -> torch.Tensor:
    """IMAGE (count, 20, 24, 3), as a file gives it, or of any numbers."""
    image = torch.rand(count, 20, 24, 3, generator=torch.Generator().manual_seed(seed))
    return (image * 255).round() / 255 if exact else image


def kinds(run, clip) -> dict:
    """One guidance of each kind, by name, through one encoder or a pair."""
    shared = {"noisy_clip": clip, **WHOLE}
    words = {"from_text": "a hat", "to_text": "a red hat"}
    return {
        "text": run("SDGTextGuidance", text=" a red hat, größer\n", scale=150.0, **shared),
        "content": run("SDGContentGuidance", image=picture(0, exact=False), scale=200.0, **shared),
        "structure": run("SDGStructureGuidance", image=picture(1, 2), layers="2,3", scale=100.0, **shared),
        "style": run("SDGStyleGuidance", image=picture(2, 2), layers="1, 4", scale=300.0, centred=True, **shared),
        "direction": run("SDGDirectionGuidance", image=picture(3), scale=80.0, **words, **shared),
    }


NAMES = ["text", "content", "structure", "style", "direction"]

CONTROLS = {
    "schedule": ("SDGGuidanceSchedule", {"curve": "ease in", "points": "0:0, 0.3:1, 1:0.2", "every": 2}),
    "mask": ("SDGGuidanceMask", {"mask": torch.eye(16)[None], "reference_mask": torch.ones(1, 9, 9), "feather": 0.0}),
    "target": ("SDGGuidanceTarget", {"similarity": 0.8}),
    "away": ("SDGGuidanceAway", {"until": -0.3}),
    "references": ("SDGGuidanceReferences", {"choice": "nearest", "weights": ""}),
}


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_gives_the_same_bits(run, sample, noisy_clip, again, name):
    guidance = kinds(run, noisy_clip)[name]
    assert torch.equal(sample(again(guidance, noisy_clip=noisy_clip)), sample(guidance))
    assert not torch.equal(sample(guidance), sample())


@pytest.mark.parametrize("name", CONTROLS)
def test_every_control_gives_the_same_bits(run, sample, noisy_clip, again, name):
    node, values = CONTROLS[name]
    plain = kinds(run, noisy_clip)["style"]
    changed = run(node, guidance=plain, **values)
    assert torch.equal(sample(again(changed, noisy_clip=noisy_clip)), sample(changed))
    assert not torch.equal(sample(changed), sample(plain))


@pytest.mark.parametrize(("conflicts", "balance"), [("add up", 0.0), ("project", 0.0), ("add up", 0.7)])
def test_a_combination_gives_the_same_bits(run, sample, noisy_clip, again, conflicts, balance):
    parts = kinds(run, noisy_clip)
    inner = run("SDGCombineGuidance", guidance_1=parts["text"], guidance_2=parts["style"], weight_2=-0.5, balance=0.4)
    whole = run(
        "SDGCombineGuidance", guidance_1=inner, weight_1=0.3, guidance_3=parts["content"], weight_3=1.1,
        conflicts=conflicts, balance=balance,
    )  # fmt: skip
    assert torch.equal(sample(again(whole, noisy_clip=noisy_clip)), sample(whole))


def test_a_pair_with_crops_gives_the_same_bits(run, sample, noisy_clip, clean_clip, again):
    pair = run("SDGEncoderCrossfade", noisy=noisy_clip, clean=clean_clip, crossover=400.0)
    text = run("SDGGuidanceAugment", guidance=kinds(run, pair)["text"], crops=3, least=0.5, spherical=True)
    both = run("SDGCombineGuidance", guidance_1=text, guidance_2=kinds(run, pair)["content"])
    loaded = again(both, noisy_clip=pair)
    assert torch.equal(sample(loaded), sample(both))
    assert len(loaded.terms) == len(both.terms) == 4
    with pytest.raises(ValueError, match="for clean encoders"):
        again(both, noisy_clip=noisy_clip)


def test_a_negative_text_is_kept(run, sample, noisy_clip, again):
    inputs = {"noisy_clip": noisy_clip, "text": "a red hat", "scale": 150.0, **WHOLE}
    guidance = run("SDGTextGuidance", negative=" a person ", **inputs)
    (term,) = guidance.terms
    assert term.guidance.negative_texts == ("a person",)
    assert torch.equal(sample(again(guidance, noisy_clip=noisy_clip)), sample(guidance))
    assert not torch.equal(sample(run("SDGTextGuidance", **inputs)), sample(guidance))
    blank = run("SDGTextGuidance", negative=" ", **inputs)
    assert torch.equal(sample(run("SDGTextGuidance", **inputs)), sample(blank))


def test_negative_pictures_are_kept(run, sample, noisy_clip, again):
    inputs = {"noisy_clip": noisy_clip, "image": picture(0, exact=True), "scale": 300.0, **WHOLE}
    guidance = run("SDGContentGuidance", negative=torch.cat([picture(1, exact=True), picture(2, exact=True)]), **inputs)
    assert torch.equal(sample(again(guidance, noisy_clip=noisy_clip)), sample(guidance))
    assert not torch.equal(sample(run("SDGContentGuidance", **inputs)), sample(guidance))


def test_frames_and_budget_are_kept(run, noisy_clip, again):
    guidance = run("SDGGuidanceFrames", guidance=kinds(run, noisy_clip)["text"], frames="0-2,-1")
    guidance = run("SDGGuidanceBudget", guidance=guidance, percent=12.5)
    (term,) = again(guidance, noisy_clip=noisy_clip).terms
    assert (term.frames, term.budget) == ((0, 1, 2, -1), 12.5)


def test_a_class_gives_the_same_bits_and_wants_its_classifier(run, sample, noisy_clip, again):
    classifier = run("SDGLoadClassifier", classifier_name="random.safetensors")
    guidance = run("SDGClassifierGuidance", classifier=classifier, class_name="pink hair", scale=30.0, **WHOLE)
    both = run("SDGCombineGuidance", guidance_1=guidance, guidance_2=kinds(run, noisy_clip)["text"])
    assert torch.equal(sample(again(both, noisy_clip=noisy_clip, classifier=classifier)), sample(both))
    for given, missing in (({"noisy_clip": noisy_clip}, "classifier"), ({"classifier": classifier}, "noisy_clip")):
        with pytest.raises(ValueError, match=f"input {missing} is empty"):
            again(both, **given)


def test_a_class_that_the_classifier_lacks_is_refused(run, folder, again):
    classifier = run("SDGLoadClassifier", classifier_name="random.safetensors")
    again(
        run("SDGClassifierGuidance", classifier=classifier, class_name="1", scale=1.0, **WHOLE), classifier=classifier
    )
    said = json.loads((folder / "kept.json").read_text())
    said["guidances"][0]["number"] = 207
    (folder / "other.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match=r"no class \"207\""):
        run("SDGLoadPreset", preset_name="other.json", classifier=classifier)


def test_another_encoder_reads_the_texts_anew(run, sample, noisy_clip, clean_clip, again):
    through_clean = kinds(run, clean_clip)["text"]
    assert torch.equal(sample(again(kinds(run, noisy_clip)["text"], noisy_clip=clean_clip)), sample(through_clean))


def test_files_are_numbered_and_names_that_leave_the_folder_are_refused(run, noisy_clip, again, folder):
    guidance = kinds(run, noisy_clip)["text"]
    for _ in range(3):
        again(guidance, noisy_clip=noisy_clip)
    assert sorted(path.name for path in folder.iterdir()) == ["kept.json", "kept_02.json", "kept_03.json"]
    for name in ("../kept", "/tmp/kept", "", ".kept", "a/b", "n" * 300):
        with pytest.raises(ValueError, match="plain file name"):
            run("SDGSavePreset", guidance=guidance, name=name)


@pytest.mark.parametrize("name", ["../../etc/passwd", "gone.json", "/etc/passwd"])
def test_files_elsewhere_are_not_read(run, noisy_clip, name):
    with pytest.raises(ValueError, match="no file"):
        run("SDGLoadPreset", preset_name=name, noisy_clip=noisy_clip)


@pytest.mark.parametrize("data", [b"\xff\xfe\x00", b"", b"\x80\x04K\x01.", b"{}"])
def test_what_is_no_preset_is_refused(run, noisy_clip, folder, data):
    (folder / "bad.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"preset|not a text"):
        run("SDGLoadPreset", preset_name="bad.json", noisy_clip=noisy_clip)


def test_foreign_things_on_sockets_are_refused(run, noisy_clip, again):
    with pytest.raises(ValueError, match="wanted an SDG_GUIDANCE"):
        run("SDGSavePreset", guidance="text", name="a")
    with pytest.raises(ValueError, match="wanted a NOISY_CLIP"):
        again(kinds(run, noisy_clip)["text"], noisy_clip="clip")
