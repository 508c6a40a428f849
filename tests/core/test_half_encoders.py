"""Encoders whose image tower computes in bf16: the gradient points where float32's does, and all else is float32."""

from __future__ import annotations

import copy

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sdg_core.avatars import WorldName, open_world, seeded_noise
from sdg_core.encoders import CleanCLIP, NoisyCLIP, NoisyCLIPConfig, from_clean
from sdg_core.method import (
    ContentGuidance,
    Guidance,
    GuidanceRun,
    StructureGuidance,
    StyleGuidance,
    Term,
    TextGuidance,
    guidance_shift,
)

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
TOWERS = {
    "resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None},
    "vit": {"image_size": 32, "layers": 4, "width": 64, "head_width": 32, "patch_size": 8},
}


def half(encoder: CleanCLIP) -> CleanCLIP:
    encoder = copy.deepcopy(encoder)
    encoder.compute_in(torch.bfloat16)
    return encoder


@pytest.fixture(scope="module")
def world():
    return open_world(WorldName(model="v", route="noisy linear"))


@pytest.fixture(scope="module")
def rounded(world):
    return half(world.encoder)


@pytest.mark.parametrize("sigma", [8.0, 1.0, 0.2])
@pytest.mark.parametrize("kind", ["text", "content", "structure", "style"])
def test_the_gradient_turns_by_little(world, rounded, kind, sigma):
    """Within 20 degrees of float32's, of the bundled encoder (3 to 14 by one processor's rounding to 8 bits), and as a
    correction in float32."""
    reference = world.renders[3:4]
    guidance: dict[str, Guidance] = {
        "text": TextGuidance(world.encoder.encode_text(["a person with pink hair"])),
        "content": ContentGuidance(reference),
        "structure": StructureGuidance(reference),
        "style": StyleGuidance(reference),
    }
    at = torch.full((4,), sigma)
    x = seeded_noise(range(4), 32, 4) * sigma
    with torch.no_grad():
        denoised = world.denoiser(x, at)

    def shift(encoder: CleanCLIP) -> Tensor:
        run = world.open_run(())
        terms = (Term(guidance[kind], encoder, 100.0),)
        run = GuidanceRun(terms, run.convention, run.percent_to_sigma, run.strength, lambda _: world.view, 1.0)
        made = guidance_shift(denoised, x, at, run)
        assert made is not None
        return made

    exact, turned = shift(world.encoder), shift(rounded)
    cosine = F.cosine_similarity(exact.flatten(1), turned.flatten(1), dim=1)
    print(f"{kind} at {sigma}: cosines {[round(c, 4) for c in cosine.tolist()]}")
    assert turned.dtype == torch.float32
    assert bool(turned.isfinite().all())
    assert float(cosine.min()) > 0.94


def test_the_tower_takes_half_the_memory_and_texts_stay(world, rounded):
    def size(module: torch.nn.Module) -> int:
        return sum(p.numel() * p.element_size() for p in module.parameters())

    assert size(rounded.tower) * 2 == size(world.encoder.tower)
    assert {p.dtype for p in rounded.text.parameters()} == {torch.float32}
    assert torch.equal(rounded.encode_text(["a red hat"]), world.encoder.encode_text(["a red hat"]))


@pytest.mark.parametrize("conditioning", ["norms", "token"])
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("t", [[300.0], [300.0, 700.0]])
def test_every_tower_reads_at_one_time_and_at_several(tower, conditioning, t):
    if (tower, conditioning) == ("resnet", "token"):
        pytest.skip("A ResNet has no class token.")
    build = {"embed_dim": 16, "vision_cfg": TOWERS[tower], "text_cfg": TEXT}
    torch.manual_seed(0)
    encoder = NoisyCLIP(NoisyCLIPConfig(build, conditioning=conditioning), open_clip.CLIP(**build)).eval()
    for parameter in encoder.conditioning.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    image, times = torch.rand(2, 3, 64, 64) * 2 - 1, torch.tensor(t)
    with torch.no_grad():
        exact = encoder(image, times, encoder.full_depth)
        rounded = half(encoder)(image, times, encoder.full_depth)
    assert rounded.embed.dtype == torch.bfloat16
    assert float(F.cosine_similarity(exact.embed, rounded.embed.float(), dim=1).min()) > 0.99


def test_fine_tuning_starts_in_float32():
    build = {"embed_dim": 16, "vision_cfg": TOWERS["vit"], "text_cfg": TEXT}
    clean = CleanCLIP(open_clip.CLIP(**build), 32, build=build).eval()
    assert {p.dtype for p in from_clean(half(clean)).parameters()} == {torch.float32}
