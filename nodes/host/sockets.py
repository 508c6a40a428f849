"""What comes in through the host's own sockets, checked where it enters.

The host compares the names of types on both ends of a link, and a node may give anything under any name. A prompt may
also hold a plain value where a link should be; the host lets that through as well.
"""

from __future__ import annotations

import comfy.model_base
import comfy.sd
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ..inputs import shown

LATENT_MAKERS = "Empty Pixel Latent (SDG) or Empty Latent Image"


def to_model(model: object) -> ModelPatcher:
    """A MODEL. Raises ValueError for anything else."""
    if not isinstance(model, ModelPatcher) or not isinstance(model.model, comfy.model_base.BaseModel):
        raise _refused("model", model, "a MODEL, a diffusion model", "Load Checkpoint or Load ADM (SDG)")
    return model


def to_latent(latent: object) -> dict:
    """A LATENT that holds something. Raises ValueError for anything else."""
    samples = latent.get("samples") if isinstance(latent, dict) else latent
    nested = getattr(samples, "is_nested", False) and not isinstance(samples, Tensor)
    if not isinstance(latent, dict) or not (nested or isinstance(samples, Tensor)):
        raise _refused("latent_image", samples, "a LATENT, with a tensor of samples", LATENT_MAKERS)
    if not nested and (samples.ndim < 3 or samples.numel() == 0):
        raise _refused("latent_image", samples, "one with pixels", LATENT_MAKERS)
    if not nested and not samples.is_floating_point():
        raise _refused("latent_image", samples, "one of floating-point numbers", LATENT_MAKERS)
    if not nested and samples.ndim > 3 and samples.shape[-2:].numel() == 1:
        raise _refused("latent_image", samples, "one of more than a single position", LATENT_MAKERS)
    numbers = latent.get("batch_index")
    if not nested and numbers is not None and len(samples) not in (1, len(numbers)):
        raise ValueError(
            f"Got a LATENT of {len(samples)} pictures with a batch_index of {len(numbers)}; wanted one number for each "
            "picture. Connect another LATENT, or make the batch anew with Latent From Batch."
        )
    return latent


def check_dimensions(model: ModelPatcher, latent: dict) -> None:
    """Raises ValueError where a latent has other dimensions or channels than the model's.

    Empty latents may have other channels, and videos one frame: the host makes them fit.
    """
    samples, space = latent["samples"], model.get_model_object("latent_format")
    if not isinstance(samples, Tensor):
        return
    channels, dimensions = space.latent_channels, getattr(space, "latent_dimensions", 2)
    sides = {1: "length", 2: "height, width", 3: "frames, height, width"}[dimensions]
    fits = samples.ndim == dimensions + 2 or (dimensions, samples.ndim) == (3, 4)
    if not fits or (samples.shape[1] != channels and bool(samples.any())):
        raise ValueError(
            f"Got a latent of shape {tuple(samples.shape)}; this model wants (batch, {channels}, {sides}). Start from "
            "another latent, or encode a picture with this model's own VAE."
        )


def to_conditioning(conditioning: object, name: str) -> list | None:
    """A CONDITIONING, or None where nothing is connected. Raises ValueError for anything else."""
    if conditioning is None:
        return None
    if not isinstance(conditioning, list) or not all(map(_is_cond, conditioning)):
        raise _refused(name, conditioning, "a CONDITIONING", "CLIP Text Encode, or the blank one of Load ADM (SDG)")
    return conditioning


def _is_cond(pair: object) -> bool:
    return isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[1], dict)


def to_vae(vae: object) -> comfy.sd.VAE | None:
    """A VAE, or None where nothing is connected. Raises ValueError for anything else."""
    if vae is None:
        return None
    module, patcher = getattr(vae, "first_stage_model", None), getattr(vae, "patcher", None)
    if not isinstance(module, nn.Module) or not isinstance(patcher, ModelPatcher):
        raise _refused("vae", vae, "a VAE", "Load VAE or Load Autoencoder (SDG)")
    return vae


def _refused(name: str, got: object, wanted: str, maker: str) -> ValueError:
    return ValueError(f"The input {name} got {shown(got)}; wanted {wanted}. Connect one, for example from {maker}.")
