"""Where a reference's low frequencies enter a sampling run of the host: two wrappers on a clone of the MODEL."""

from __future__ import annotations

from collections.abc import Callable

import comfy.model_patcher
import comfy.sd
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...sdg_core.method import Early, LowFrequencies, fit
from .decoders import format_name
from .scaling import scaling_of
from .seam import catch_uncond, percent_to_sigma

KEY = "sdg_ilvr"


def hold_low_frequencies(
    model: comfy.model_patcher.ModelPatcher,
    image: Tensor,
    factor: int,
    start: float,
    end: float,
    vae: comfy.sd.VAE | None,
) -> comfy.model_patcher.ModelPatcher:
    """A clone of ``model`` whose pictures have the low frequencies of ``image`` (R, 3, h, w) in -1..1.

    R is 1 or the batch. ``vae`` encodes it for latent models; pixel models don't read it. Raises ValueError where a
    latent model has none. The reference is made when a run opens, since only then its size is known.
    """
    scaling_of(model)
    latent = model.get_model_object("latent_format")
    if latent.latent_channels != 3 and vae is None:
        raise ValueError(
            f"This model draws latents ({format_name(latent)}), so the reference must become one too, and no VAE is "
            "connected. Connect the model's own, for example from Load Checkpoint or Load VAE."
        )
    held = model.clone()
    runs: list[LowFrequencies] = []  # a stack: a sampler may sample inside a run

    def outer_sample(executor, noise, *args, **kwargs):
        patcher = executor.class_obj.model_patcher
        runs.append(LowFrequencies(_reference(patcher, image, noise.shape, vae), factor, start, end))
        try:
            return executor(noise, *args, **kwargs)
        finally:  # also when interrupted
            runs.pop()

    held.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, outer_sample)
    held.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, _replacer(runs))
    _put_outermost(held)
    return held


def _replacer(runs: list[LowFrequencies]) -> Callable:
    def predict_noise(executor, x, sigma, model_options, seed):
        guider = executor.class_obj
        model_options, caught = catch_uncond(guider.model_options, model_options)
        early = Early(sigma)
        denoised = executor(x, sigma, model_options, seed)
        _, level = scaling_of(guider.model_patcher).core(x, early.read())
        percents = percent_to_sigma(guider.model_patcher)
        for uncond in caught:  # CFG++ samplers step along x - uncond, so its low frequencies count too
            uncond.copy_(runs[-1].hold(uncond, level, percents))
        return runs[-1].hold(denoised, level, percents)

    return predict_noise


def _put_outermost(model: comfy.model_patcher.ModelPatcher) -> None:
    """The host runs wrappers in the order of their keys, the first one outermost. This one replaces what all others,
    guidance among them, made of the low frequencies, whichever node comes first in the workflow."""
    wrappers = model.wrappers[WrappersMP.PREDICT_NOISE]
    model.wrappers[WrappersMP.PREDICT_NOISE] = {KEY: wrappers.pop(KEY), **wrappers}


def _reference(
    model: comfy.model_patcher.ModelPatcher, image: Tensor, shape: torch.Size, vae: comfy.sd.VAE | None
) -> Tensor:
    """The reference in the model's own space, for noise of a shape. Raises ValueError where they don't fit."""
    channels = model.get_model_object("latent_format").latent_channels
    if len(shape) not in (4, 5) or shape[1] != channels:
        raise ValueError(
            f"Got a latent of shape {tuple(shape)}; a reference holds pictures (batch, {channels}, height, width) and "
            f"videos (batch, {channels}, frames, height, width) here. Start from one of these, or take ILVR Reference "
            "(SDG) out of this model's path."
        )
    if len(image) not in (1, shape[0]):
        raise ValueError(
            f"Got {len(image)} references for a batch of {shape[0]}; wanted one for all, or one for each. Change the "
            "latent's batch size, or take one picture with Image From Batch."
        )
    if channels == 3:
        picture = fit(image, *shape[-2:])
        return picture if len(shape) == 4 else picture.unsqueeze(2)
    side = vae.spacial_compression_encode()
    pixels = (fit(image, *(side * size for size in shape[-2:])).movedim(1, -1) + 1) / 2
    encoded = torch.cat([vae.encode(one[None]) for one in pixels])  # video VAEs take a batch for frames
    latent = model.model.process_latent_in(encoded)
    if latent.shape[1] != channels or latent.ndim != len(shape) or latent.shape[-2:] != shape[-2:]:
        raise ValueError(
            f"This VAE makes latents of shape {tuple(latent.shape)} of the reference; the model wants {tuple(shape)}. "
            "Connect the model's own VAE."
        )
    return latent
