"""Modules of this pack under the host's memory management."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import comfy.model_management as mm
import comfy.model_patcher
import torch
from torch import Tensor, nn
from torch.func import functional_call

from ...sdg_core.encoders import CleanCLIP
from ...sdg_core.method import is_out_of_memory
from ...sdg_core.models import Classifier

# CoreModelPatcher (ComfyUI 0.12 and newer) keeps plain torch modules fully resident under dynamic memory management.
Patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)


def patch_module(module: nn.Module) -> comfy.model_patcher.ModelPatcher:
    """An encoder or decoder that the host loads beside the model."""
    return Patcher(module, load_device=mm.get_torch_device(), offload_device=mm.text_encoder_offload_device())


def make_resident(module: nn.Module, device: torch.device) -> None:
    """Moves what the host left behind: short of memory it loads leaf modules only, and never a module's own
    parameters (CLIP's positional embedding) or buffers, but calls the model loaded all the same."""
    if any(t.device.type != device.type for t in chain(module.parameters(), module.buffers())):
        module.to(device)


def activation_bytes(encoder: CleanCLIP | Classifier) -> int:
    """Memory that the gradient of one picture takes: every layer's float32 output, forward and backward.

    Counted in a pass on the meta device, which computes nothing.
    """
    size, total, tower = encoder.image_size, 0, getattr(encoder, "tower", encoder)

    def count(layer: nn.Module, inputs: tuple, output: object) -> None:
        nonlocal total
        total += 4 * output.numel() if isinstance(output, Tensor) else 0

    hooks = [layer.register_forward_hook(count) for layer in tower.modules() if not list(layer.children())]
    weights = {name: t.to("meta") for name, t in chain(encoder.named_parameters(), encoder.named_buffers())}
    image, t = torch.empty(1, 3, size, size, device="meta"), torch.empty(1, device="meta")
    try:
        with torch.no_grad():
            functional_call(encoder, weights, (image, t, encoder.full_depth))
    finally:
        for hook in hooks:
            hook.remove()
    return 2 * total


def decoder_bytes(decoder: nn.Module, latent_size: torch.Size, upscale: int) -> int:
    """What the gradient of one decoded picture takes, if the decoder has it measured.

    Otherwise roughly: the widest layers' outputs, at full size, in float32.
    """
    measured, (height, width) = getattr(decoder, "bytes_per_position", None), latent_size[-2:]
    if measured is not None:
        return measured * height * width
    widest = max((m.out_channels for m in decoder.modules() if isinstance(m, nn.Conv2d)), default=64)
    layers = sum(isinstance(m, nn.Conv2d) for m in decoder.modules())
    return 4 * widest * layers * height * width * upscale**2 // 4


@contextmanager
def explained(what: str, cure: str = "Choose a smaller width, height or batch") -> Iterator[None]:
    """Says what did not fit, and what to do, where memory ends and the host does not know it: on a CPU torch raises a
    bare RuntimeError. What the host knows for it stays as it is: the host frees models for it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if _frees_models(error) or not is_out_of_memory(error):
            raise
        raise ValueError(
            f"Out of memory: {what} did not fit. {cure}, or close other programs. ({str(error)[:200]})"
        ) from error


def _frees_models(error: BaseException) -> bool:
    """Whether the host knows an error for memory that ended, and unloads its models; older ones know a card's alone."""
    known = getattr(mm, "is_oom", None)
    return bool(known(error)) if known else isinstance(error, mm.OOM_EXCEPTION)


def check_free(what: str, size: int) -> None:
    """Raises ValueError where ``size`` bytes are more than the machine has free: asking for them could end the host."""
    free = mm.get_free_memory(mm.intermediate_device())
    if size > free:
        raise ValueError(
            f"Got {what}, {size / 1e9:.1f} GB; {free / 1e9:.1f} GB are free. Choose a smaller width, height or batch."
        )
