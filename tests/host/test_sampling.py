"""Guided sampling through the host, compared with the core and with the host's own sampler."""

from __future__ import annotations

import pytest
import torch

BLANK = [[None, {}]]


@pytest.fixture(scope="module")
def sample(run):
    """sample(model, guidance, **changes) -> pictures (B, 3, H, W) of the Guided KSampler."""

    def go(model, guidance=None, latent=None, **changes):
        latent = run("SDGEmptyPixelLatent", width=16, height=16, batch_size=2) if latent is None else latent
        inputs = {
            "seed": 7, "steps": 4, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0,
            "strength": "absolute", "cap": 1.0, "positive": BLANK, "negative": BLANK,
        }  # fmt: skip
        return run("SDGGuidedKSampler", model=model, latent_image=latent, guidance=guidance, **(inputs | changes))["samples"]

    return go


@pytest.fixture(scope="module")
def text(run, noisy_clip):
    return run(
        "SDGTextGuidance", noisy_clip=noisy_clip, text="a red hat", scale=150.0, start_percent=0.0, end_percent=1.0
    )


def test_guidance_changes_the_picture(sample, adm, text):
    assert (sample(adm, text) - sample(adm)).abs().mean() > 1e-3
