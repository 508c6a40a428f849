"""Retrieval under noise: ranks by brute force, perfect and blind encoders, the file's metadata."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from sdg_core.avatars import BUNDLED, LATENT, bundled_latent_encoder, latent_space, load_bundled_clip
from sdg_core.commands import main
from sdg_core.commands.evaluate import bundled_renders
from sdg_core.encoders import NoisyCLIPConfig, from_clean, load_noisy_clip
from sdg_core.training import (
    PLAIN,
    ImageSet,
    Retrieval,
    StudentSight,
    as_rows,
    draw_chart,
    measure_retrieval,
    retrieval_lines,
)
from sdg_core.training.retrieval import _score


@pytest.fixture(scope="module")
def images() -> ImageSet:
    pictures = np.random.default_rng(0).integers(0, 256, (12, 4, 4, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    return ImageSet(list(torch.from_numpy(pictures)), 32, PLAIN)


def test_ranks_are_those_of_sorting(draw):
    embed, wanted = (F.normalize(draw(40, 3, seed=s), dim=1) for s in (1, 2))
    embed = F.normalize(embed + 0.7 * wanted, dim=1)
    order = (embed @ wanted.T).argsort(1, descending=True)
    at = [float((order[:, :k] == torch.arange(40)[:, None]).any(1).float().mean()) for k in (1, 5)]
    assert _score(embed, wanted) == pytest.approx((*at, float((embed * wanted).sum(1).mean())))
    assert 0 < at[0] < at[1] < 1


@pytest.mark.parametrize("embed", [torch.full((8, 3), math.nan), torch.ones(8, 3)])
def test_what_tells_no_pictures_apart_finds_none(embed):
    found_at_1, found_at_5, _ = _score(embed, torch.ones(8, 3))
    assert (found_at_1, found_at_5) == (0, 0)


def test_an_untrained_noisy_clip_reads_as_the_clean_one_does(images):
    clean = load_bundled_clip()
    curve = measure_retrieval(from_clean(clean, noise_size=32), clean, StudentSight(32), images, (0, 300, 999))
    for row in curve:
        assert row.noisy_at_1 == row.clean_at_1
        assert row.noisy_cosine == pytest.approx(row.clean_cosine, abs=1e-5)
    assert curve[0].clean_at_1 == 1
    assert curve[-1].clean_at_1 < 0.4


def test_bundled_noisy_clip_finds_three_times_more_than_the_clean_one():
    """Held-out renders that come with the pack, as latents; `sdg evaluate noisy-clip` measures all t."""
    sight = StudentSight(32, latent_space().linear_view(), *bundled_latent_encoder())
    noisy, clean = load_noisy_clip(LATENT / "noisy_clip.safetensors"), load_bundled_clip()
    pictures = ImageSet(bundled_renders(), sight.picture_size, PLAIN)
    for row in measure_retrieval(noisy, clean, sight, pictures, (300, 500, 700)):
        print(row)
        assert row.noisy_at_1 >= 3 * row.clean_at_1


def test_the_command_writes_chart_numbers_and_metadata(images, tmp_path, capsys):
    for i, picture in enumerate(images.sources):
        Image.fromarray(picture.numpy()).save(tmp_path / f"{i}.png")
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes((BUNDLED / "noisy_clip.safetensors").read_bytes())
    before = load_noisy_clip(copy).state_dict()
    command = ["evaluate", "noisy-clip", str(copy), "--images", str(tmp_path), "--arch", "avatars", "--json"]
    assert main(command) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["n"] == 12
    kept = load_noisy_clip(copy)
    assert [row["noisy_at_1"] for row in said["rows"]] == [row[1] for row in kept.config.retrieval]
    assert all(torch.equal(before[k], v) for k, v in kept.state_dict().items())
    assert Image.open(copy.with_suffix(".png")).width >= 600
    written = copy.stat().st_mtime_ns
    copy.with_suffix(".png").unlink()
    assert main([*command, "--no-write"]) == 0
    assert not copy.with_suffix(".png").exists()
    assert copy.stat().st_mtime_ns == written


def test_files_without_a_base_ask_for_one(images, tmp_path, capsys):
    Image.fromarray(images.sources[0].numpy()).save(tmp_path / "0.png")
    file = str(BUNDLED / "noisy_clip.safetensors")
    assert main(["evaluate", "noisy-clip", file, "--images", str(tmp_path)]) == 2
    assert "--arch" in capsys.readouterr().err


def test_one_picture_is_not_enough(images):
    clean = load_bundled_clip()
    with pytest.raises(ValueError, match="wanted 2 or more"):
        measure_retrieval(from_clean(clean), clean, StudentSight(32), images.first(1))


def test_measured_rows_are_told_in_words_and_cross_over():
    curve = [Retrieval(float(t), 0.9, 0.5, 1.0, 0.7, 0.8, 0.6) for t in (0, 500, 999)]
    assert retrieval_lines(as_rows(curve))[1] == "t 500: 90% (50%)"
    assert retrieval_lines([(0.0, 0.9, 0.5)]) == []
    assert NoisyCLIPConfig({}, retrieval=((0, 0.5, 0.9), (100, 0.5, 0.1))).crossover() == 50.0
    assert NoisyCLIPConfig({}, retrieval=((0, 0.5, 0.9, 1, 1, 1, 1), (100, 0.5, 0.1, 1, 1, 1, 1))).crossover() == 50.0


def test_the_chart_draws_both_curves():
    curve = [Retrieval(float(t), 0.9, 0.5, 1.0, 0.7, 0.8, 0.6) for t in (0, 500, 999)]
    alone, beside = draw_chart(curve, "alone"), draw_chart(curve, "with losses", [3.0, 2.0, 1.0])
    assert beside.width > alone.width
    colours = {tuple(c) for c in np.asarray(beside).reshape(-1, 3)}
    assert {(31, 119, 180), (127, 127, 127), (255, 127, 14)} <= colours
