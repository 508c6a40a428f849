"""The host's own model families, detected and loaded by its loaders from files of random weights, sampled guided.

Stable Diffusion 1.5 has its full size, with VAE and text encoder; the others are reduced, as architectures.py says.
"""

from __future__ import annotations

import gc
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from sdg_core.encoders import NoisyCLIP, NoisyCLIPConfig, build_clip, save_noisy_clip

FAMILIES = ["SD15", "SDXL", "SD3", "Flux", "WAN21_T2V"]
WHOLE = {"start_percent": 0.0, "end_percent": 1.0}
CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32, "head_width": 32},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@dataclass(frozen=True, eq=False)
class Loaded:
    """What the loaders gave for one architecture, and what its samplers want."""

    family: str
    model: object
    vae: object | None
    positive: list
    negative: list
    latent: dict
    cfg: float

    @property
    def sampling(self) -> dict:
        """Inputs that KSampler and Guided KSampler share."""
        return {
            "seed": 7, "steps": 2, "cfg": self.cfg, "sampler_name": "euler", "scheduler": "simple",
            "positive": self.positive, "negative": self.negative, "latent_image": self.latent, "denoise": 1.0,
        }  # fmt: skip


@pytest.fixture(scope="module")
def architectures(comfy) -> ModuleType:
    path = Path(__file__).with_name("architectures.py")
    spec = importlib.util.spec_from_file_location("sdg_test_architectures", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(comfy, tmp_path_factory) -> Path:
    """Where the host's loaders look for checkpoints and diffusion models."""
    folder = tmp_path_factory.mktemp("architectures")
    for kind in ("checkpoints", "diffusion_models"):
        comfy.folder_paths.add_model_folder_path(kind, str(folder))
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request, comfy, architectures, folder) -> Iterator[Loaded]:
    """One architecture at a time: gigabytes on the disk and in memory, which its successor must not find there."""
    gc.collect()
    architecture, path = architectures.ARCHITECTURES[request.param], folder / f"{request.param}.safetensors"
    architectures.write_model(architecture, path)
    try:
        yield load(comfy.nodes, architectures, architecture, path.name)
    finally:
        comfy.model_management.unload_all_models()
        path.unlink()


@torch.inference_mode()
def load(nodes: ModuleType, architectures: ModuleType, architecture, name: str) -> Loaded:
    if architecture.whole:
        model, clip, vae = nodes.CheckpointLoaderSimple().load_checkpoint(name)
        prompts = [nodes.CLIPTextEncode().encode(clip, text)[0] for text in ("a red hat", "a cat")]
    else:
        (model,), vae = nodes.UNETLoader().load_unet(name, "default"), None
        prompts = architectures.conditionings(architecture)
    return Loaded(architecture.family, model, vae, *prompts, architecture.latent(), architecture.cfg)


@pytest.fixture(scope="module")
def noisy_clip(run, models_folder, loaded):
    """A small random NoisyCLIP for the linear picture that the host makes of this architecture's latents."""
    latent = loaded.model.get_model_object("latent_format")
    factors = torch.tensor(latent.latent_rgb_factors).T
    covariance = tuple(map(tuple, (factors @ factors.T).tolist()))
    view = f"linear:{type(latent).__name__}"
    config = NoisyCLIPConfig(CLIP, noise_size=16, hidden=32, sinusoid=32, view=view, covariance=covariance)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = NoisyCLIP(config, build_clip(CLIP)).eval()
    save_noisy_clip(models_folder / f"noisy_clip/{loaded.family}.safetensors", encoder)
    return run("SDGLoadNoisyCLIP", noisy_clip_name=f"{loaded.family}.safetensors")


@pytest.fixture(scope="module")
def clean_clip(pack, run):
    """The bundled CLIP, which reads denoised estimates of any model."""
    return run("SDGLoadCLIP", clip_name=pack.host.BUNDLED_NAME, architecture="ViT-B-32", pretrained="")


@pytest.fixture(scope="module")
def plain(comfy, loaded) -> Tensor:
    """The host's own KSampler."""
    with torch.inference_mode():
        return comfy.nodes.KSampler().sample(loaded.model, **loaded.sampling)[0]["samples"]


@pytest.fixture(scope="module")
def guided(run, loaded, noisy_clip):
    """guided(scale, encoder, **view) -> latent of the Guided KSampler, pulled by text with relative strength."""

    def sample(scale: float, encoder: object = noisy_clip, **view) -> Tensor:
        guidance = run("SDGTextGuidance", noisy_clip=encoder, text="a red hat", scale=scale, **WHOLE)
        strength = {"strength": "relative", "cap": 0.5}
        inputs = {"model": loaded.model, "guidance": guidance, **loaded.sampling, **strength, **view}
        return run("SDGGuidedKSampler", **inputs)["samples"]

    return sample


def check_pulled(guided: Tensor, plain: Tensor) -> None:
    """Every picture, and every frame of a video, is finite and another one."""
    assert guided.shape == plain.shape
    assert guided.isfinite().all()
    change = (guided - plain).movedim(1, -3).flatten(0, -4)
    assert (change.square().flatten(1).mean(1).sqrt() > 1e-2 * plain.std()).all()


def test_host_reads_the_architecture_off_the_file(loaded, architectures):
    config = loaded.model.model.model_config
    wanted = architectures.ARCHITECTURES[loaded.family].unet
    assert type(config).__name__ == loaded.family
    assert {name: config.unet_config.get(name) for name in wanted} == wanted


def test_without_guidance_it_is_the_hosts_ksampler(run, loaded, plain):
    assert plain.isfinite().all()
    inputs = {"model": loaded.model, "guidance": None, **loaded.sampling, "strength": "absolute", "cap": 1.0}
    assert torch.equal(run("SDGGuidedKSampler", **inputs)["samples"], plain)


def test_scale_zero_leaves_the_bits(guided, plain):
    assert torch.equal(guided(0.0), plain)


def test_noisy_clip_guides(guided, plain):
    check_pulled(guided(100.0), plain)


def test_clean_clip_guides(guided, plain, clean_clip):
    check_pulled(guided(100.0, clean_clip), plain)


@pytest.mark.parametrize("loaded", ["SD15"], indirect=True)
def test_checkpoints_own_vae_guides_and_decodes(comfy, loaded, guided, plain, clean_clip):
    latent = guided(100.0, clean_clip, view="decoded", vae=loaded.vae)
    check_pulled(latent, plain)
    with torch.inference_mode():
        (image,) = comfy.nodes.VAEDecode().decode(loaded.vae, {"samples": latent})
    assert image.shape == (1, 128, 128, 3)
    assert image.std() > 0
    assert 0 <= image.min() <= image.max() <= 1
