"""Compiled image towers: the same features and gradients, in float32: torch compiles no attention in float64."""

from __future__ import annotations

import copy
import shutil

import open_clip
import pytest
import torch

from sdg_core.encoders import NoisyCLIP, NoisyCLIPConfig

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
TOWERS = {
    "resnet": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
    "vit": {"image_size": 32, "layers": 4, "width": 32, "head_width": 16, "patch_size": 8},
}


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, and g++ is not here.")
@pytest.mark.parametrize("tower", TOWERS)
def test_a_compiled_tower_is_the_tower(tower, draw):
    """At one noise level and at another, at several in one batch, to every depth that a guidance asks for."""
    build = {"embed_dim": 16, "vision_cfg": TOWERS[tower], "text_cfg": TEXT}
    torch.manual_seed(0)
    plain = NoisyCLIP(NoisyCLIPConfig(build), open_clip.CLIP(**build)).eval().requires_grad_(False)
    for parameter in plain.conditioning.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    compiled = copy.deepcopy(plain)
    compiled.compile_tower()
    for t in ([300.0], [700.0], [300.0, 700.0]):
        for depth in (3, plain.full_depth):
            found = []
            for encoder in (plain, compiled):
                image = draw(2, 3, 32, 32).requires_grad_()
                features = encoder(image, torch.tensor(t), depth)
                last = features.maps[-1] if features.embed is None else features.embed
                (slope,) = torch.autograd.grad(last.square().sum(), image)
                found.append((last.detach(), slope))
            for ours, theirs in zip(found[1], found[0], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))
