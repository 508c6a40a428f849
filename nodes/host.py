"""Everything peculiar to ComfyUI: where guidance enters a sampling run, and how its memory and files are managed."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import comfy.model_management as mm
import comfy.model_patcher
import comfy.model_sampling as ms
import folder_paths
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor
from torch.func import functional_call

from ..sdg_core.checkpoint import BUNDLED
from ..sdg_core.guidance import Term
from ..sdg_core.guide import GuidanceRun, Strength, guidance_shift
from ..sdg_core.noisy_clip import NoisyCLIP
from ..sdg_core.schedule import Convention, expand

log = logging.getLogger(__name__)

BUNDLED_NAME = "avatars (bundled)"
FOLDERS = {"noisy_clip": {".safetensors"}, "adm": {".safetensors", ".pt", ".pth"}}
KEY = "sdg"

# CoreModelPatcher (ComfyUI 0.12 and newer) keeps plain torch modules fully resident under dynamic memory management.
Patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)


@dataclass(frozen=True, eq=False)
class HostGuidance:
    """What the SDG_GUIDANCE socket carries: terms, and the patchers through which the host loads their encoders."""

    terms: tuple[Term, ...]
    patchers: tuple[comfy.model_patcher.ModelPatcher, ...]


# Files


def register_folders() -> None:
    """Makes models/noisy_clip and models/adm known, beside what extra_model_paths.yaml says.

    ``add_model_folder_path`` would do, but it gives a new folder no list of extensions, and then every file is listed.
    """
    for name, extensions in FOLDERS.items():
        paths, _ = folder_paths.folder_names_and_paths.get(name, ([], set()))
        own = os.path.join(folder_paths.models_dir, name)
        folder_paths.folder_names_and_paths[name] = (paths if own in paths else [*paths, own], extensions)


def model_names(folder: str) -> list[str]:
    """What a loader offers: the bundled model, then the files of the model folder."""
    return [BUNDLED_NAME, *folder_paths.get_filename_list(folder)]


def model_path(folder: str, name: str) -> Path:
    """The file behind a name of ``model_names``. Raises ValueError where it is missing."""
    if name == BUNDLED_NAME:
        path = BUNDLED / f"{folder}.safetensors"
        if not path.is_file():
            raise ValueError(
                f"The bundled model {path.name} is missing from {path.parent}. "
                f"Install this node pack again, or choose a file of your own in models/{folder}."
            )
        return path
    found = folder_paths.get_full_path(folder, name)
    if found is None:
        raise ValueError(f"There is no file {name} in models/{folder}. Put it there, or choose another.")
    return Path(found)


def fingerprint(folder: str, name: str) -> str:
    """Changes when the file does, so that the host's cache of the loaded model does too."""
    path = model_path(folder, name)
    stat = path.stat()
    return f"{path}:{stat.st_mtime_ns}:{stat.st_size}"


# Encoders


def patch_encoder(clip: NoisyCLIP) -> comfy.model_patcher.ModelPatcher:
    """An encoder under the host's memory management."""
    return Patcher(clip, load_device=mm.get_torch_device(), offload_device=mm.text_encoder_offload_device())


def load_encoder(patcher: comfy.model_patcher.ModelPatcher) -> NoisyCLIP:
    """The encoder, whole, on its device, for use outside a sampling run."""
    mm.load_models_gpu([patcher])
    make_resident(patcher.model, patcher.load_device)
    return patcher.model


def make_resident(module: torch.nn.Module, device: torch.device) -> None:
    """Moves what the host left behind: short of memory it loads leaf modules only, and never a module's own
    parameters (CLIP's positional embedding) or buffers, but calls the model loaded all the same."""
    if any(t.device.type != device.type for t in chain(module.parameters(), module.buffers())):
        module.to(device)


def activation_bytes(clip: NoisyCLIP) -> int:
    """Memory that the gradient of one picture takes: every layer's float32 output, forward and backward.

    Counted in a pass on the meta device, which computes nothing.
    """
    size, total = clip.config.image_size, 0

    def count(layer: torch.nn.Module, inputs: tuple, output: object) -> None:
        nonlocal total
        total += 4 * output.numel() if isinstance(output, Tensor) else 0

    hooks = [layer.register_forward_hook(count) for layer in clip.tower.modules() if not list(layer.children())]
    weights = {name: t.to("meta") for name, t in chain(clip.named_parameters(), clip.named_buffers())}
    image, t = torch.empty(1, 3, size, size, device="meta"), torch.empty(1, device="meta")
    try:
        with torch.no_grad():
            functional_call(clip, weights, (image, t, clip.full_depth))
    finally:
        for hook in hooks:
            hook.remove()
    return 2 * total


# How the model's x is scaled


@dataclass(frozen=True)
class Scaling:
    """A model's x and sigma in the terms of ``sdg_core``.

    Some flow models train with noise of another size, x = (1 - s) x_0 + s c eps. Divided by 1 - s + s c this is the
    usual flow at sigma = s c / (1 - s + s c); denoised does not change.
    """

    convention: Convention
    noise_scale: float = 1.0

    def norm(self, sigma: Tensor) -> Tensor:
        return 1 - sigma + self.noise_scale * sigma if self.noise_scale != 1 else torch.ones_like(sigma)

    def core(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(x (B, ...), sigma (B,)) in the core's convention."""
        if self.noise_scale == 1:
            return x, sigma
        return x / expand(self.norm(sigma), x), self.noise_scale * sigma / self.norm(sigma)


def scaling_of(model: comfy.model_patcher.ModelPatcher) -> Scaling:
    """Read off the class of the model's sampling. Raises ValueError for models whose x is no picture plus noise."""
    sampling = model.get_model_object("model_sampling")
    direct = tuple(getattr(ms, name) for name in ("IMG_TO_IMG", "IMG_TO_IMG_FLOW") if hasattr(ms, name))
    if isinstance(sampling, direct):
        raise ValueError(
            "This model turns one picture into another without noise, so there is nothing to guide step by step. "
            "Use a model that samples from noise, for example from Load ADM."
        )
    if isinstance(sampling, ms.CONST):
        return Scaling(Convention.FLOW, float(getattr(sampling, "noise_scale", 1.0)))
    return Scaling(Convention.VE)


def check_model(model: comfy.model_patcher.ModelPatcher) -> None:
    """Raises ValueError for models that guidance can't read: their x must be pixels (B, 3, H, W)."""
    latent = model.get_model_object("latent_format")
    if latent.latent_channels != 3 or latent.latent_dimensions != 2:
        raise ValueError(
            f"This model works in a latent space of {latent.latent_channels} channels; guidance currently reads pixel "
            "models (3 channels, height, width). Use a pixel model, for example from Load ADM."
        )
    scaling_of(model)


def open_run(model: comfy.model_patcher.ModelPatcher, terms: tuple[Term, ...], strength: Strength) -> GuidanceRun:
    """The state of one sampling run of ``model``, with start and end in the model's own noise range."""
    scaling, sampling = scaling_of(model), model.get_model_object("model_sampling")

    def percent_to_sigma(percent: float) -> float:
        sigma = torch.tensor(float(sampling.percent_to_sigma(percent)), dtype=torch.float64)
        return float(scaling.noise_scale * sigma / scaling.norm(sigma))

    return GuidanceRun(terms, scaling.convention, percent_to_sigma, strength)


# Conditioning


@dataclass(frozen=True)
class Conds:
    """What the host's sampler wants, whatever was connected."""

    positive: list
    negative: list
    cfg: float


def blank_conditioning() -> list:
    """CONDITIONING for models that read none, where a sampler node asks for it all the same."""
    return [[torch.zeros(1, 1, 1), {}]]


def conditioning(
    model: comfy.model_patcher.ModelPatcher, positive: list | None, negative: list | None, cfg: float
) -> Conds:
    """Conditioning with blanks where an unconditional model has none; cfg is then off (1), which halves the work.

    Raises ValueError where a model that takes a prompt has none.
    """
    missing = [name for name, cond in (("positive", positive), ("negative", negative)) if cond is None]
    if missing and not getattr(model.model, "unconditional", False):
        raise ValueError(
            f"This model takes prompts, but {' and '.join(missing)} is not connected. "
            "Connect CONDITIONING, for example from CLIP Text Encode."
        )
    blank = blank_conditioning()
    return Conds(
        blank if positive is None else positive,
        blank if negative is None else negative,
        1.0 if negative is None else cfg,
    )


# Where guidance enters


def attach(
    model: comfy.model_patcher.ModelPatcher, guidance: HostGuidance, strength: Strength
) -> comfy.model_patcher.ModelPatcher:
    """A clone of ``model`` that every sampler node samples guided. Without any scale it is a plain clone.

    Three wrappers, all plain functions (a host before 0.14 deep-copies callable objects and bound methods):
    PREDICT_NOISE sees each model evaluation once, after all CFG; OUTER_SAMPLE opens and drops the run, since the clone
    stays in the host's cache between runs; PREPARE_SAMPLING asks for the memory of the gradient.
    """
    check_model(model)
    guided = model.clone()
    terms = tuple(term for term in guidance.terms if term.scale != 0)
    if not terms:
        return guided
    runs: list[GuidanceRun] = []  # a stack: a sampler may sample inside a run
    guided.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _run_keeper(runs, terms, strength))
    guided.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, _corrector(runs, guidance.patchers))
    guided.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, _memory_reserver(guidance.patchers))
    loaded = guided.get_additional_models_with_key(KEY)
    guided.set_additional_models(KEY, [*loaded, *guidance.patchers])
    return guided


def _run_keeper(runs: list[GuidanceRun], terms: tuple[Term, ...], strength: Strength) -> Callable:
    def outer_sample(executor, *args, **kwargs):
        runs.append(open_run(executor.class_obj.model_patcher, terms, strength))
        try:
            return executor(*args, **kwargs)
        finally:  # also when interrupted
            report(runs.pop())

    return outer_sample


def _corrector(runs: list[GuidanceRun], patchers: Sequence[comfy.model_patcher.ModelPatcher]) -> Callable:
    def predict_noise(executor, x, sigma, model_options, seed):
        mm.throw_exception_if_processing_interrupted()
        check_latent(x)
        guider, run = executor.class_obj, runs[-1]
        for patcher in patchers:  # the original patchers, kept by this closure: a clone's death would unload them
            make_resident(patcher.model, x.device)
        model_options, caught = _catch_uncond(guider.model_options, model_options)
        denoised = executor(x, sigma, model_options, seed)
        shift = guidance_shift(denoised, *scaling_of(guider.model_patcher).core(x, sigma), run)
        if shift is None:
            return denoised
        for uncond in caught:
            uncond.add_(shift)
        return denoised + shift.to(denoised.dtype)

    return predict_noise


def _catch_uncond(guider_options: dict, model_options: dict) -> tuple[dict, list[Tensor]]:
    """The options for one model evaluation, and a list that holds the unconditional estimate, if a sampler reads it.

    CFG++ samplers step along x - uncond, which they keep through a post-CFG function of their own. Guidance must shift
    that tensor too, in place, or it counts 1 / (1 - sigma_next / sigma) times. Where the host hands out one tensor as
    both estimates, denoised is copied, so that it is not shifted twice.
    """
    key, caught = "sampler_post_cfg_function", []
    readers = model_options.get(key, [])
    if len(readers) <= len(guider_options.get(key, [])):
        return model_options, caught

    def catch(args: dict) -> Tensor:
        uncond, denoised = args["uncond_denoised"], args["denoised"]
        if uncond is None:
            return denoised
        caught[:] = [uncond]
        return denoised.clone() if denoised.data_ptr() == uncond.data_ptr() else denoised

    return {**model_options, key: [*readers, catch]}, caught


def _memory_reserver(patchers: Sequence[comfy.model_patcher.ModelPatcher]) -> Callable:
    """The host plans memory by the batch it is told of, so it is told of a larger one."""
    per_picture = sum(activation_bytes(patcher.model) for patcher in patchers)

    def prepare_sampling(executor, model, noise_shape, conds, *args, **kwargs):
        size, *rest = noise_shape
        one = model.memory_required([1, *rest])
        more = math.ceil(per_picture * size / (2 * one))  # the host doubles its batch, for positive and negative
        return executor(model, torch.Size([size + more, *rest]), conds, *args, **kwargs)

    return prepare_sampling


def check_latent(x: Tensor) -> None:
    """Raises ValueError for video and for nested latents (which arrive flattened)."""
    if x.ndim != 4 or x.shape[1] != 3:
        raise ValueError(
            f"Got a latent of shape {tuple(x.shape)}; guidance reads pictures, (batch, 3, height, width). "
            "Start from Empty Pixel Latent, or from an image encoded by the pixel_space VAE."
        )


def report(run: GuidanceRun) -> None:
    """One line in the log about a finished run."""
    capped = sum(int(step.capped.sum()) for step in run.trace)
    pictures = sum(len(step.capped) for step in run.trace)
    log.info("Guided %d model evaluations; the cap bound %d of %d shifts.", len(run.trace), capped, pictures)
