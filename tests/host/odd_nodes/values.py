"""Nodes that give pictures, latents, models and other values of kinds that no node pack is prepared for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import comfy.latent_formats
import comfy.model_management as mm
import comfy.model_patcher
import comfy.model_sampling
import comfy.supported_models
import numpy as np
import torch
from torch import Tensor

PICTURES: dict[str, Callable[[], object]] = {
    "plain": lambda: torch.rand(1, 16, 16, 3),
    "nan": lambda: torch.full((1, 16, 16, 3), torch.nan),
    "one nan": lambda: torch.rand(1, 16, 16, 3).index_fill(1, torch.tensor([3]), torch.nan),
    "infinite": lambda: torch.full((1, 16, 16, 3), torch.inf),
    "no pictures": lambda: torch.rand(0, 16, 16, 3),
    "no pixels": lambda: torch.rand(1, 0, 16, 3),
    "one pixel": lambda: torch.rand(1, 1, 1, 3),
    "a line": lambda: torch.rand(1, 1, 300, 3),
    "one channel": lambda: torch.rand(1, 16, 16, 1),
    "alpha": lambda: torch.rand(1, 16, 16, 4),
    "five channels": lambda: torch.rand(1, 16, 16, 5),
    "no batch": lambda: torch.rand(16, 16, 3),
    "video": lambda: torch.rand(1, 2, 16, 16, 3),
    "integers": lambda: torch.randint(0, 255, (1, 16, 16, 3), dtype=torch.uint8),
    "half": lambda: torch.rand(1, 16, 16, 3).half(),
    "complex": lambda: torch.rand(1, 16, 16, 3).to(torch.complex64),
    "out of range": lambda: torch.randn(1, 16, 16, 3) * 1e6,
    "numpy": lambda: np.zeros((1, 16, 16, 3), np.float32),
    "list": lambda: [[0.0, 0.5, 1.0]],
    "none": lambda: None,
}
LATENTS: dict[str, Callable[[], object]] = {
    "plain": lambda: {"samples": torch.zeros(1, 3, 32, 32)},
    "four channels": lambda: {"samples": torch.zeros(1, 4, 16, 16)},
    "nan": lambda: {"samples": torch.full((1, 3, 32, 32), torch.nan)},
    "one pixel": lambda: {"samples": torch.zeros(1, 3, 1, 1)},
    "no pictures": lambda: {"samples": torch.zeros(0, 3, 32, 32)},
    "no pixels": lambda: {"samples": torch.zeros(1, 3, 0, 32)},
    "five channels": lambda: {"samples": torch.ones(1, 5, 32, 32)},
    "video": lambda: {"samples": torch.zeros(1, 3, 2, 32, 32)},
    "flat": lambda: {"samples": torch.zeros(1, 3, 256)},
    "odd sides": lambda: {"samples": torch.zeros(1, 3, 17, 33)},
    "integers": lambda: {"samples": torch.zeros(1, 3, 32, 32, dtype=torch.int64)},
    "other mask": lambda: {"samples": torch.zeros(1, 3, 32, 32), "noise_mask": torch.rand(3, 7, 5)},
    "batch index": lambda: {"samples": torch.zeros(2, 3, 32, 32), "batch_index": [0]},
    "no samples": dict,
    "samples none": lambda: {"samples": None},
    "samples list": lambda: {"samples": [[0.0]]},
    "bare tensor": lambda: torch.zeros(1, 3, 32, 32),
    "none": lambda: None,
}
VALUES: dict[str, Callable[[], object]] = {
    "none": lambda: None,
    "word": lambda: "word",
    "number": lambda: 7,
    "nan": lambda: float("nan"),
    "list": lambda: [1, "two"],
    "empty list": list,
    "dict": lambda: {"a": 1},
    "object": object,
    "type": lambda: dict,
    "function": lambda: lambda *args, **kwargs: None,
    "tensor": lambda: torch.rand(2, 3),
    "module": lambda: torch.nn.Linear(2, 2),
    "patcher": lambda: patched(torch.nn.Linear(2, 2)),
    "model": lambda: stable_diffusion(),
    "conditioning": lambda: [[torch.zeros(1, 4, 32), {}]],
}


def patched(module: torch.nn.Module) -> comfy.model_patcher.ModelPatcher:
    return comfy.model_patcher.ModelPatcher(module, mm.get_torch_device(), mm.unet_offload_device())


def stable_diffusion() -> comfy.model_patcher.ModelPatcher:
    """The host's own first Stable Diffusion, with few and random weights."""
    config = comfy.supported_models.SD15(
        {
            "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1],
            "channel_mult": [1, 1], "transformer_depth": [1, 0], "transformer_depth_output": [1, 1, 0, 0],
            "transformer_depth_middle": 0, "context_dim": 32, "num_heads": 1, "use_spatial_transformer": True,
            "use_linear_in_transformer": False, "adm_in_channels": None, "use_temporal_attention": False,
            "legacy": False,
        }
    )  # fmt: skip
    config.set_inference_dtype(torch.float32, None)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = config.get_model({}, device=torch.device("cpu"))
        for parameter in model.diffusion_model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    return patched(model)


class AnyShape(torch.nn.Module):
    """A network that takes latents of any kind."""

    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.size = torch.nn.Parameter(torch.tensor(0.1), requires_grad=False)

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor | None = None, **others: object) -> Tensor:
        return x * self.size


def other(latent: type, sampling: type | None = None) -> Callable[[], comfy.model_patcher.ModelPatcher]:
    """A model of another latent format or another kind of sampling."""

    def build() -> comfy.model_patcher.ModelPatcher:
        model = stable_diffusion()
        model.model.diffusion_model, model.model.latent_format = AnyShape(), latent()
        if sampling is not None:
            kinds = (comfy.model_sampling.ModelSamplingDiscreteFlow, sampling)
            model.model.model_sampling = type("Sampling", kinds, {})()
        return model

    return build


class NoFactors(comfy.latent_formats.LatentFormat):
    latent_channels = 4


MODELS: dict[str, Callable[[], object]] = {
    "stable diffusion": stable_diffusion,
    "sound": other(comfy.latent_formats.StableAudio1),
    "no linear picture": other(NoFactors),
    "sixteen channels": other(comfy.latent_formats.Flux, comfy.model_sampling.CONST),
    "video": other(comfy.latent_formats.Wan21, comfy.model_sampling.CONST),
    "image to image": other(comfy.latent_formats.SD15, comfy.model_sampling.IMG_TO_IMG),
    "bare module": lambda: patched(torch.nn.Linear(2, 2)),
    "none": lambda: None,
    "word": lambda: "a model",
}


def odd(name: str, output: str, kinds: dict[str, Callable[[], object]]) -> type:
    """A node with one output, whose kind is chosen by a widget."""

    class Node:
        CATEGORY, FUNCTION, RETURN_TYPES = "odd", "give", (output,)

        @classmethod
        def INPUT_TYPES(cls) -> dict:
            return {"required": {"kind": (list(kinds),)}}

        def give(self, kind: str) -> tuple:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                return (kinds[kind](),)

    Node.__name__ = Node.__qualname__ = name
    return Node


class OddPictureList:
    """Pictures of different sizes, as a list."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_IS_LIST = "odd", "give", ("IMAGE",), (True,)

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"count": ("INT", {"default": 2, "min": 0, "max": 3})}}

    def give(self, count: int) -> tuple:
        return ([torch.full((1, 8 + i, 8, 3), 0.5) for i in range(count)],)


class OddSink:
    """An output node for anything. It tells whether all numbers are finite, and a digest of them."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "odd", "take", (), True

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"value": ("*", {})}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types: dict) -> bool:
        return True

    def take(self, value: object) -> dict:
        found = [t.contiguous().cpu() for t in tensors(value)]
        digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in found)).hexdigest()
        return {"ui": {"finite": [all(bool(torch.isfinite(t).all()) for t in found)], "digest": [digest]}}


def tensors(value: object) -> Iterator[Tensor]:
    """All tensors in a nest of dicts and lists."""
    if isinstance(value, Tensor):
        yield value
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    for part in parts:
        yield from tensors(part)


NODES = {
    "OddPicture": odd("OddPicture", "IMAGE", PICTURES),
    "OddLatent": odd("OddLatent", "LATENT", LATENTS),
    "OddModel": odd("OddModel", "MODEL", MODELS),
    "OddValue": odd("OddValue", "*", VALUES),
    "OddPictureList": OddPictureList,
    "OddSink": OddSink,
}
