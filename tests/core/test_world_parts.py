"""The parts of the 128 px world, on renders that none of them was trained on."""

from __future__ import annotations

import pytest
import torch

from sdg_core.avatars import LATENT, load_bundled_clip, load_held_out, load_judge, load_renders
from sdg_core.avatars.metrics import grain, psnr
from sdg_core.encoders import load_noisy_clip
from sdg_core.files import load
from sdg_core.method import LatentFormat, unit
from sdg_core.models import load_tiny_autoencoder

PROMPTS = {
    "background": "a person with {} background",
    "hair": "a person with {} hair",
    "length": "someone with {} hair",
}
OTHER_WORDS = {"glasses": ("bare eyes", "spectacles"), "hat": ("a bare head", "headgear")}


@pytest.fixture(scope="module")
def renders():
    """Pictures (N, 3, 128, 128) and labels of the sheet."""
    return load_renders(LATENT / "renders.png")


@pytest.fixture(scope="module")
def judge():
    return load_judge(LATENT / "judge.safetensors")


def test_the_autoencoder_keeps_lines_and_flat_areas(renders):
    autoencoder, picture = load_tiny_autoencoder(LATENT / "autoencoder.safetensors"), renders[0][:64]
    with torch.no_grad():
        latents = autoencoder.encoder((picture + 1) / 2)
        again = autoencoder.decoder(latents).clamp(0, 1) * 2 - 1
    assert latents.shape == (64, 4, 32, 32)
    assert psnr(again, picture).mean() > 32
    assert grain(again).mean() < 0.01


def test_the_judge_is_right_on_held_out_renders(judge):
    seen = load_held_out(LATENT / "held_out.safetensors")
    for column, (name, head) in enumerate(judge.heads.items()):
        truth = seen.labels[:, column]
        right = (head(seen.features).argmax(dim=1) == truth)[truth >= 0].float().mean()
        assert right > 0.9, name


def test_kept_features_are_what_the_judge_sees(judge, renders):
    seen, (pictures, labels) = load_held_out(LATENT / "held_out.safetensors"), renders
    with torch.no_grad():
        features = judge.features(pictures[:32])
    torch.testing.assert_close(features, seen.features[:32], rtol=0.02, atol=0.02)
    assert torch.equal(labels[:32], seen.labels[:32])


@pytest.mark.parametrize("name", [*PROMPTS, *OTHER_WORDS])
def test_the_clip_names_what_a_drawing_shows(judge, renders, name):
    clip, (pictures, labels) = load_bundled_clip(LATENT / "clip.safetensors"), renders
    values = judge.attributes[name]
    if name in PROMPTS:
        prompts = [PROMPTS[name].format(value) for value in values]
    else:
        prompts = [f"an avatar with {words}" for words in OTHER_WORDS[name]]
    truth = labels[:, list(judge.attributes).index(name)]
    with torch.no_grad():
        image = unit(clip(pictures, torch.zeros(1), clip.full_depth).embed)
        guess = (image @ unit(clip.encode_text(prompts)).T).argmax(dim=1)
    assert (guess == truth)[truth >= 0].float().mean() > 0.9


def test_the_noisy_clip_finds_latents_in_noise_where_the_clean_one_does_not(renders):
    """The linear picture of latents at sigma / alpha 1: looked up among the clean embeddings of 256 renders."""
    noisy, clean = load_noisy_clip(LATENT / "noisy_clip.safetensors"), load_bundled_clip(LATENT / "clip.safetensors")
    config, _ = load(LATENT / "autoencoder.safetensors", "autoencoder")
    space = LatentFormat.from_json(config["latent_format"])
    autoencoder, view = load_tiny_autoencoder(LATENT / "autoencoder.safetensors"), space.linear_view()
    assert noisy.config.view == view.name
    found = []
    with torch.no_grad():
        z = (
            torch.cat([autoencoder.encoder((part + 1) / 2) for part in renders[0].split(32)]) - space.shift
        ) * space.scale
        eps = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
        seen = (view.picture(z, torch.ones(len(z))) + view.noise(eps)) / 2**0.5
        wanted = unit(clean(renders[0], torch.zeros(1), clean.full_depth).embed)
        for encoder in (noisy, clean):
            embed = unit(encoder(seen, noisy.table.timestep(torch.ones(1)), encoder.full_depth).embed)
            found.append(float(((embed @ wanted.T).argmax(dim=1) == torch.arange(len(z))).float().mean()))
    assert z.std() == pytest.approx(1, abs=0.1)
    assert found[0] > 0.6 > 0.2 > found[1]
