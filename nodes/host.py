"""Everything peculiar to ComfyUI: where guidance enters a sampling run, and how its memory and files are managed."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management as mm
import comfy.model_patcher
import comfy.model_sampling as ms
import folder_paths
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..sdg_core.checkpoint import BUNDLED
from ..sdg_core.clip import CleanCLIP
from ..sdg_core.guidance import Fade, Term
from ..sdg_core.guide import GuidanceRun, Strength, guidance_shift
from ..sdg_core.schedule import Convention, expand
from ..sdg_core.views import DecodedView, View
from .patchers import activation_bytes, decoder_bytes, make_resident
from .views import ViewChoice, choose_view, data_variance

log = logging.getLogger(__name__)

BUNDLED_NAME = "avatars (bundled)"
FOLDERS = {
    "noisy_clip": {".safetensors", ".pt", ".pth"},
    "adm": {".safetensors", ".pt", ".pth"},
    "open_clip": {".safetensors", ".pt", ".pth", ".bin"},
}
KEY = "sdg"


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


def bundled_files(folder: str) -> dict[str, Path]:
    """Names and files of the models of a kind that come with the pack. Those of the latent test world are in the
    repository, not in the registry's package, so only what is there is offered."""
    world = {
        "avatars latent": "latent/noisy_clip",
        **{f"avatars latent {k}": f"latent/{k}" for k in ("eps", "v", "flow")},
    }
    names = {"adm": ["avatars latent eps", "avatars latent v", "avatars latent flow"], "noisy_clip": ["avatars latent"]}
    files = {f"{name} (bundled)": BUNDLED / f"{world[name]}.safetensors" for name in names.get(folder, [])}
    first = {"open_clip": "clip"}.get(folder, folder)
    return {BUNDLED_NAME: BUNDLED / f"{first}.safetensors", **{n: path for n, path in files.items() if path.is_file()}}


def model_names(folder: str) -> list[str]:
    """What a loader offers: the bundled models, then the files of the model folder."""
    return [*bundled_files(folder), *folder_paths.get_filename_list(folder)]


def model_path(folder: str, name: str) -> Path:
    """The file behind a name of ``model_names``. Raises ValueError where it is missing."""
    if name.endswith("(bundled)"):
        path = bundled_files(folder).get(name)
        if path is None or not path.is_file():
            raise ValueError(
                f"The bundled model {name} is missing. The avatars come with every installation (install this node "
                f"pack again), the latent ones with its repository only. Or choose a file in models/{folder}."
            )
        return path
    found = folder_paths.get_full_path(folder, name)
    if found is None:
        raise ValueError(f"There is no file {name} in models/{folder}. Put it there, or choose another.")
    return Path(found)


def latent_world_file(name: str) -> Path:
    """A file of the bundled latent models. Raises ValueError where this installation came without them."""
    path = BUNDLED / "latent" / f"{name}.safetensors"
    if not path.is_file():
        raise ValueError(
            f"{path.name} of the bundled latent models is missing: they come with this pack's repository, not with the "
            "registry's package. Install from the repository, or use models of your own."
        )
    return path


def download_folder(folder: str) -> Path:
    """Where downloads of a kind of model go."""
    return Path(folder_paths.get_folder_paths(folder)[0])


def fingerprint(folder: str, name: str) -> str:
    """Changes when the file does, so that the host's cache of the loaded model does too."""
    path = model_path(folder, name)
    stat = path.stat()
    return f"{path}:{stat.st_mtime_ns}:{stat.st_size}"


class NodeText:
    """Words on a running node, as the host's own API nodes show them. ``hidden`` is the node's, with its unique_id."""

    def __init__(self, hidden: object) -> None:
        self.node_id = getattr(hidden, "unique_id", None)

    def say(self, text: str) -> None:
        """Shows the text; nothing where there is no server (the host's code can be used without)."""
        server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
        if server is not None and self.node_id is not None:
            server.send_progress_text(text, self.node_id)


# Encoders


@dataclass(frozen=True, eq=False)
class EncoderPair:
    """Two encoders in one NOISY_CLIP socket: one reads at high noise, the other at low, and they cross over."""

    parts: tuple[tuple[comfy.model_patcher.ModelPatcher, Fade], ...]


NoisyCLIPValue = comfy.model_patcher.ModelPatcher | EncoderPair
"""What the NOISY_CLIP socket carries."""


def encoder_parts(value: NoisyCLIPValue) -> tuple[tuple[comfy.model_patcher.ModelPatcher, Fade | None], ...]:
    """The encoders of a socket, each with where it reads."""
    return value.parts if isinstance(value, EncoderPair) else ((value, None),)


def single_encoder(value: NoisyCLIPValue, name: str) -> comfy.model_patcher.ModelPatcher:
    """The one encoder of a socket. Raises ValueError for a pair."""
    if isinstance(value, EncoderPair):
        raise ValueError(f"The input {name} is a crossfade of two encoders already. Connect a single one.")
    return value


def load_encoder(patcher: comfy.model_patcher.ModelPatcher) -> CleanCLIP:
    """The encoder, whole, on its device, for use outside a sampling run."""
    mm.load_models_gpu([patcher])
    make_resident(patcher.model, patcher.load_device)
    return patcher.model


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


@dataclass(frozen=True, eq=False)
class Sights:
    """How every encoder of a guidance looks at one model, and what the host must load for that."""

    views: Mapping[int, View]
    patchers: tuple[comfy.model_patcher.ModelPatcher, ...]

    def view_of(self, encoder: CleanCLIP) -> View:
        return self.views[id(encoder)]


def see(model: comfy.model_patcher.ModelPatcher, guidance: HostGuidance, choice: ViewChoice) -> Sights:
    """The views of all encoders. Raises ValueError for models that can't be guided, or not by these encoders."""
    scaling_of(model)
    if getattr(model.get_model_object("latent_format"), "latent_dimensions", 2) == 1:
        raise ValueError(
            "This model makes sound or solid shapes, and guidance reads pictures. Use it without guidance."
        )
    chosen = {id(p.model): choose_view(model, p.model, choice) for p in guidance.patchers}
    decoders = [c.patcher for c in chosen.values() if c.patcher is not None]
    return Sights({key: c.view for key, c in chosen.items()}, (*guidance.patchers, *decoders))


def open_run(
    model: comfy.model_patcher.ModelPatcher, terms: tuple[Term, ...], strength: Strength, sights: Sights
) -> GuidanceRun:
    """The state of one sampling run of ``model``, with start and end in the model's own noise range."""
    scaling, sampling = scaling_of(model), model.get_model_object("model_sampling")

    def percent_to_sigma(percent: float) -> float:
        sigma = torch.tensor(float(sampling.percent_to_sigma(percent)), dtype=torch.float64)
        return float(scaling.noise_scale * sigma / scaling.norm(sigma))

    return GuidanceRun(terms, scaling.convention, percent_to_sigma, strength, sights.view_of, data_variance(model))


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
    model: comfy.model_patcher.ModelPatcher,
    guidance: HostGuidance,
    strength: Strength,
    choice: ViewChoice | None = None,
) -> comfy.model_patcher.ModelPatcher:
    """A clone of ``model`` that every sampler node samples guided. Without any scale it is a plain clone.

    Three wrappers, all plain functions (a host before 0.14 deep-copies callable objects and bound methods):
    PREDICT_NOISE sees each model evaluation once, after all CFG; OUTER_SAMPLE opens and drops the run, since the clone
    stays in the host's cache between runs; PREPARE_SAMPLING asks for the memory of the gradient.
    """
    scaling_of(model)
    guided = model.clone()
    terms = tuple(term for term in guidance.terms if term.scale != 0)
    if not terms:
        return guided
    sights = see(model, guidance, choice or ViewChoice())
    runs: list[GuidanceRun] = []  # a stack: a sampler may sample inside a run
    guided.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _run_keeper(runs, terms, strength, sights))
    guided.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, _corrector(runs, sights.patchers))
    guided.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, _memory_reserver(sights))
    loaded = guided.get_additional_models_with_key(KEY)
    guided.set_additional_models(KEY, [*loaded, *sights.patchers])
    return guided


def _run_keeper(runs: list[GuidanceRun], terms: tuple[Term, ...], strength: Strength, sights: Sights) -> Callable:
    def outer_sample(executor, *args, **kwargs):
        runs.append(open_run(executor.class_obj.model_patcher, terms, strength, sights))
        try:
            return executor(*args, **kwargs)
        finally:  # also when interrupted
            report(runs.pop())

    return outer_sample


def _corrector(runs: list[GuidanceRun], patchers: Sequence[comfy.model_patcher.ModelPatcher]) -> Callable:
    def predict_noise(executor, x, sigma, model_options, seed):
        mm.throw_exception_if_processing_interrupted()
        guider, run = executor.class_obj, runs[-1]
        check_latent(guider.model_patcher, x)
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


def _memory_reserver(sights: Sights) -> Callable:
    """The host plans memory by the batch it is told of, so it is told of a larger one."""
    encoders = [p.model for p in sights.patchers if isinstance(p.model, CleanCLIP)]
    for_encoders = sum(map(activation_bytes, encoders))
    decoded = {id(v.modules[0]): v for v in sights.views.values() if isinstance(v, DecodedView)}.values()

    def prepare_sampling(executor, model, noise_shape, conds, *args, **kwargs):
        size, *rest = noise_shape
        one = model.memory_required([1, *rest])
        frames = rest[1] if len(rest) == 4 else 1
        per_frame = for_encoders + sum(decoder_bytes(m, noise_shape, v.upscale) for v in decoded for m in v.modules)
        more = math.ceil(per_frame * frames * size / (2 * one))  # the host doubles its batch, for positive and negative
        return executor(model, torch.Size([size + more, *rest]), conds, *args, **kwargs)

    return prepare_sampling


def check_latent(model: comfy.model_patcher.ModelPatcher, x: Tensor) -> None:
    """Raises ValueError for nested latents (which arrive flattened), for sound, and where channels don't fit."""
    channels = model.get_model_object("latent_format").latent_channels
    if x.ndim not in (4, 5) or x.shape[1] != channels:
        raise ValueError(
            f"Got a latent of shape {tuple(x.shape)}; guidance reads pictures (batch, {channels}, height, width) and "
            f"videos (batch, {channels}, frames, height, width). Nested latents of video with audio, and audio alone, "
            "can't be guided: take Apply Guidance (SDG) out of this model's path."
        )


def report(run: GuidanceRun) -> None:
    """One line in the log about a finished run."""
    capped = sum(int(step.capped.sum()) for step in run.trace)
    pictures = sum(len(step.capped) for step in run.trace)
    log.info("Guided %d model evaluations; the cap bound %d of %d shifts.", len(run.trace), capped, pictures)
