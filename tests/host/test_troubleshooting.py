"""What the READMEs quote under "When something goes wrong" is provoked here, and reads as it is quoted."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
BLANK = [[None, {}]]


def quoted(readme: str) -> list[str]:
    """The messages that a README's table of troubles quotes, as patterns: "…" stands for anything."""
    text = (ROOT / readme).read_text(encoding="utf-8")
    rows = re.findall(r'^\|[^|]*?["“]([^"”]+?)["”][^|]*\|[^|]+\|$', text, re.MULTILINE)
    return [re.escape(row).replace("…", ".+") for row in rows]


@pytest.fixture
def refused(run):
    """refused(node, **inputs) -> what the error says."""

    def go(node: str, **inputs) -> str:
        with pytest.raises(Exception) as error:
            run(node, **inputs)
        return str(error.value)

    return go


@pytest.fixture
def draw(latent_adm) -> dict:
    """Inputs of a Guided KSampler that draws latents of the small model."""
    return {
        "model": latent_adm("eps"), "seed": 7, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal",
        "denoise": 1.0, "strength": "absolute", "cap": 1.0, "positive": BLANK, "negative": BLANK,
        "latent_image": {"samples": torch.zeros(4, 4, 16, 16)},
    }  # fmt: skip


@pytest.fixture
def said(run, pack, refused, draw, noisy_clip, linear_noisy_clip, clean_clip, monkeypatch, caplog) -> str:
    """What the pack says in each of the quoted troubles, a line each."""

    def text(clip):
        return run("SDGTextGuidance", noisy_clip=clip, text="a", scale=1.0, start_percent=0.0, end_percent=1.0)

    lines = [refused("SDGGuidedKSampler", guidance=text(noisy_clip), **draw)]
    gradient = pack.gradient.score_gradient

    def short_of_memory(encoder, terms, weights, targets, x, sight):
        if len(x) > 2:
            raise torch.OutOfMemoryError("Tried to allocate too much.")
        return gradient(encoder, terms, weights, targets, x, sight)

    with monkeypatch.context() as patched:
        patched.setattr(pack.gradient, "score_gradient", short_of_memory)
        run("SDGGuidedKSampler", guidance=text(linear_noisy_clip), **draw)
    draw["model"].model.diffusion_model.sizes_warned.clear()
    run("SDGGuidedKSampler", **draw | {"latent_image": {"samples": torch.zeros(1, 4, 40, 40)}})
    with pytest.raises(ValueError) as error, pack.memory.explained("pictures of this size"):
        torch.empty(2**60, dtype=torch.uint8)
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "accelerate", None)
        tuned = refused(
            "SDGFinetuneNoisyCLIP", clip=[clean_clip], images=[torch.rand(4, 32, 32, 3)], steps=[1], batch_size=[2],
            micro_batch=[2], learning_rate=[1e-4], train=["all"], timesteps=["angle"], seed=[0], size=[0], folder=[""],
        )  # fmt: skip
    return "\n".join([*lines, *(record.getMessage() for record in caplog.records), str(error.value), tuned])


@pytest.mark.parametrize("readme", ["README.md", "README.zh.md"])
def test_every_quoted_trouble_reads_as_quoted(readme, said):
    patterns = quoted(readme)
    assert len(patterns) == 5
    for pattern in patterns:
        assert re.search(pattern, said), f"{pattern} of {readme} is not in:\n{said}"
