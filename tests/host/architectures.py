"""Checkpoint files with random weights that ComfyUI's own loaders detect: Stable Diffusion 1.5 and XL, 3, Flux, Wan.

Names and shapes come from the host. Each network is built from the config that the host's detection would read off a
file, on torch's meta device, which stores nothing; then its tensors are drawn and written in float16. Import this after
ComfyUI is on the path.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.sd1_clip
import comfy.supported_models
import nodes
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy_extras.nodes_flux import FluxGuidance
from comfy_extras.nodes_hunyuan import EmptyHunyuanLatentVideo
from comfy_extras.nodes_sd3 import EmptySD3LatentImage
from safetensors.torch import save_file
from torch import Tensor, nn

SIDE = 128
FRAMES = 5

Shapes = dict[str, torch.Size]


@dataclass(frozen=True)
class Architecture:
    """A model family of the host, and how to make a small run of it.

    ``family`` is the class of comfy.supported_models that the loader must choose, ``unet`` the config that it must read
    off the file. ``whole``: a checkpoint of full size with its VAE and text encoder; otherwise a diffusion model alone,
    ``reduced`` as said, with random conditioning of (``tokens``, ``width``) and a ``pooled`` vector.
    """

    family: str
    unet: Mapping[str, Any]
    latent: Callable[[], dict]
    cfg: float = 2.0
    reduced: str = ""
    tokens: int = 16
    width: int = 4096
    pooled: int = 0
    finish: Callable[[list], list] = field(default=lambda conditioning: conditioning)

    @property
    def whole(self) -> bool:
        return not self.reduced


def _empty_image() -> dict:
    return nodes.EmptyLatentImage().generate(SIDE, SIDE)[0]


def _empty_sd3_image() -> dict:
    return EmptySD3LatentImage.execute(SIDE, SIDE).args[0]


def _empty_video() -> dict:
    return EmptyHunyuanLatentVideo.execute(SIDE, SIDE, FRAMES).args[0]


def _with_flux_guidance(conditioning: list) -> list:
    return FluxGuidance.execute(conditioning, 3.5).args[0]


LDM = {
    "use_checkpoint": False,
    "image_size": 32,
    "use_spatial_transformer": True,
    "legacy": False,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "use_temporal_resblock": False,
    "use_temporal_attention": False,
}

FAMILIES = (
    Architecture(
        "SD15",
        LDM
        | {
            "adm_in_channels": None,
            "num_res_blocks": [2, 2, 2, 2],
            "channel_mult": [1, 2, 4, 4],
            "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
            "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
            "transformer_depth_middle": 1,
            "use_linear_in_transformer": False,
            "context_dim": 768,
        },
        _empty_image,
    ),
    Architecture(
        "SDXL",
        LDM
        | {
            "num_classes": "sequential",
            "adm_in_channels": 2816,
            "num_res_blocks": [2, 2, 2],
            "channel_mult": [1, 1, 1],
            "transformer_depth": [0, 0, 2, 2, 10, 10],
            "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
            "transformer_depth_middle": 10,
            "use_linear_in_transformer": True,
            "context_dim": 2048,
        },
        _empty_image,
        reduced="every block, 320 channels at all levels (released: 320, 640, 1280)",
        width=2048,
        pooled=1280,
    ),
    Architecture(
        "SD3",
        {
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 2,
            "depth": 4,
            "input_size": None,
            "adm_in_channels": 2048,
            "context_embedder_config": {
                "target": "torch.nn.Linear",
                "params": {"in_features": 4096, "out_features": 256},
            },
            "num_patches": 1024,
            "pos_embed_max_size": 32,
            "pos_embed_scaling_factor": None,
            "qk_norm": "rms",
            "x_block_self_attn_layers": [0, 1],
        },
        _empty_sd3_image,
        reduced="4 blocks of width 256, of them 2 with a second attention (released medium: 24 of 1536, 13)",
        pooled=2048,
    ),
    Architecture(
        "Flux",
        {
            "image_model": "flux",
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 2,
            "hidden_size": 3072,  # ComfyUI 0.8 takes 24 heads of 128, whatever the file says
            "num_heads": 24,
            "mlp_ratio": 4.0,
            "axes_dim": [16, 56, 56],
            "theta": 10000,
            "vec_in_dim": 768,
            "context_in_dim": 4096,
            "depth": 1,
            "depth_single_blocks": 1,
            "qkv_bias": True,
            "guidance_embed": True,
            "txt_ids_dims": [],
        },
        _empty_sd3_image,
        cfg=1.0,
        reduced="full width, 1 double and 1 single block (released: 19 and 38)",
        pooled=768,
        finish=_with_flux_guidance,
    ),
    Architecture(
        "WAN21_T2V",
        {
            "image_model": "wan2.1",
            "model_type": "t2v",
            "in_dim": 16,
            "out_dim": 16,
            "dim": 256,
            "num_heads": 2,
            "ffn_dim": 512,
            "num_layers": 2,
            "patch_size": (1, 2, 2),
            "freq_dim": 256,
            "window_size": (-1, -1),
            "qk_norm": True,
            "cross_attn_norm": True,
            "eps": 1e-6,
        },
        _empty_video,
        reduced="2 blocks of width 256 (released: 30 of 1536, 40 of 5120)",
    ),
)
ARCHITECTURES = {architecture.family: architecture for architecture in FAMILIES}


def write_model(architecture: Architecture, path: Path) -> None:
    """The architecture's file: a checkpoint in the layout of the first Stable Diffusion where ``whole``."""
    if architecture.whole:
        shapes = _prefixed("model.diffusion_model.", _unet(architecture))
        shapes |= _prefixed("first_stage_model.", _autoencoder())
        shapes |= _prefixed("cond_stage_model.transformer.", _text_encoder())
    else:
        shapes = _prefixed("", _unet(architecture))
    generator = torch.Generator().manual_seed(0)
    save_file({name: _draw(name, shape, generator) for name, shape in shapes.items()}, path)


def conditionings(architecture: Architecture) -> Iterator[list]:
    """Positive and negative, random, of the widths that the architecture's text encoders have."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        embeds = torch.randn(1, architecture.tokens, architecture.width, generator=generator)
        pooled = torch.randn(1, architecture.pooled, generator=generator)
        yield architecture.finish([[embeds, {"pooled_output": pooled} if architecture.pooled else {}]])


def _unet(architecture: Architecture) -> nn.Module:
    config = getattr(comfy.supported_models, architecture.family)(dict(architecture.unet))
    config.set_inference_dtype(torch.float16, None)
    return config.get_model({}, device=torch.device("meta")).diffusion_model


def _autoencoder() -> nn.Module:
    size = {"ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "resolution": 256}
    channels = {"double_z": True, "z_channels": 4, "in_channels": 3, "out_ch": 3, "dropout": 0.0}
    with torch.device("meta"):
        return AutoencoderKL(ddconfig=size | channels, embed_dim=4)


def _text_encoder() -> nn.Module:
    return comfy.sd1_clip.SDClipModel(device="meta", dtype=torch.float16).transformer


def _prefixed(prefix: str, model: nn.Module) -> Shapes:
    return {prefix + name: tensor.shape for name, tensor in model.state_dict().items()}


def _draw(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Norms that do nothing, biases of zero, and weights that keep the size of what passes through them."""
    if len(shape) < 2:
        return torch.full(shape, float(name.endswith((".weight", ".scale"))), dtype=torch.float16)
    std = math.prod(shape[1:]) ** -0.5
    return torch.randn(shape, generator=generator).mul_(std).half()
