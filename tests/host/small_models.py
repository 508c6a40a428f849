"""The families of architectures.py small enough for milliseconds a step, in any precision, without a file.

Their networks are those of the host, built from reduced configs. Import this after ComfyUI is on the path.
"""

from __future__ import annotations

import math
from dataclasses import replace

import comfy.model_management as mm
import comfy.model_patcher
import comfy.supported_models
import torch
from architectures import ARCHITECTURES, Architecture
from comfy_extras.nodes_flux import FluxGuidance
from torch import nn

CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32, "head_width": 32},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
WIDTH = 64
SIDE = 8
LEVELS = {"num_res_blocks": [1, 1], "channel_mult": [1, 2], "context_dim": WIDTH}
CONTEXT = {"target": "torch.nn.Linear", "params": {"in_features": WIDTH, "out_features": 128}}
SMALLER = {
    "SD15": LEVELS | {"model_channels": 32, "transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1]},
    "SDXL": LEVELS
    | {"model_channels": 64, "transformer_depth": [0, 1], "transformer_depth_output": [0, 0, 1, 1]}
    | {"transformer_depth_middle": 1},
    "SD3": {"depth": 2, "context_embedder_config": CONTEXT, "x_block_self_attn_layers": [0]},
    "Flux": {"hidden_size": 256, "num_heads": 2, "vec_in_dim": WIDTH, "context_in_dim": WIDTH},
    "WAN21_T2V": {"dim": 128, "num_heads": 1, "ffn_dim": 256, "num_layers": 1, "freq_dim": 64, "text_dim": WIDTH},
}


def small(family: str) -> Architecture:
    """The architecture with a smaller network, latents and conditioning, without CFG."""
    whole = ARCHITECTURES[family]
    shape = (1, whole.unet["in_channels"] if "in_channels" in whole.unet else whole.unet["in_dim"])
    shape += (2, SIDE, SIDE) if family == "WAN21_T2V" else (SIDE, SIDE)
    return replace(
        whole,
        unet=whole.unet | SMALLER[family],
        latent=lambda: {"samples": torch.zeros(shape)},
        cfg=1.0,
        reduced=whole.reduced or "smaller",
        width=WIDTH,
        pooled=WIDTH if family == "Flux" else whole.pooled,
        finish=_with_flux_guidance if family == "Flux" else whole.finish,
    )


def _with_flux_guidance(conditioning: list) -> list:
    """4 counts as 4000, which bfloat16 holds; the usual 3.5 it reads as 3.504, and then differs by more than itself."""
    return FluxGuidance.execute(conditioning, 4.0).args[0]


def build(
    architecture: Architecture, dtype: torch.dtype, compute: torch.dtype | None = None
) -> comfy.model_patcher.ModelPatcher:
    """A MODEL with random weights kept in ``dtype`` and computed with in ``compute`` (None: the same).

    The weights are those of the float32 model, rounded.
    """
    config = getattr(comfy.supported_models, architecture.family)(dict(architecture.unet))
    config.set_inference_dtype(dtype, compute)
    model = config.get_model({}, device=torch.device("cpu"))
    draw(model.diffusion_model)
    patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    return patcher(model.eval(), load_device=mm.get_torch_device(), offload_device=mm.unet_offload_device())


def draw(network: nn.Module) -> None:
    """Weights that keep the size of what passes through, from a fixed seed; norms and biases that do nothing."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in network.requires_grad_(False).state_dict().items():
        norm = float(name.endswith((".weight", ".scale")))
        values = torch.randn(tensor.shape, generator=generator) * math.prod(tensor.shape[1:]) ** -0.5
        tensor.copy_(values if tensor.ndim > 1 else torch.full(tensor.shape, norm))
