"""Where guidance enters a sampling run of the host: three wrappers on a clone of the MODEL."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import comfy.model_management as mm
import comfy.model_patcher
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...sdg_core.encoders import CleanCLIP
from ...sdg_core.method import DecodedView, Early, GuidanceRun, Strength, Term, added, guidance_shift
from ...sdg_core.models import Classifier
from .encoders import HostGuidance
from .live import Drawing, NodeCurve, guided_point, heading_of, remark_of
from .memory import activation_bytes, decoder_bytes, explained, make_resident
from .scaling import scaling_of
from .text import report
from .views import Sights, ViewChoice, data_variance, see

KEY = "sdg"


@dataclass
class Watch:
    """Who wants to know what runs did, in the order in which they end. ``measured``: guidance by guidance."""

    measured: bool = False
    finished: list[GuidanceRun] = field(default_factory=list)


class Sampled(NamedTuple):
    """A sampling run that is going on, its n + 1 noise levels, and what is drawn of it."""

    run: GuidanceRun
    sigmas: list[float]
    drawing: Drawing


def open_run(
    model: comfy.model_patcher.ModelPatcher, terms: tuple[Term, ...], strength: Strength, sights: Sights
) -> GuidanceRun:
    """The state of one sampling run of ``model``, with start and end in the model's own noise range."""
    percents, variance = percent_to_sigma(model), data_variance(model)
    return GuidanceRun(terms, scaling_of(model).convention, percents, strength, sights.view_of, variance)


def percent_to_sigma(model: comfy.model_patcher.ModelPatcher) -> Callable[[float], float]:
    """Fraction of the run -> sigma in the core's convention, as the model's own sampling counts it."""
    scaling, sampling = scaling_of(model), model.get_model_object("model_sampling")

    def sigma_at(percent: float) -> float:
        sigma = torch.tensor(float(sampling.percent_to_sigma(percent)), dtype=torch.float64)
        return float(scaling.noise_scale * sigma / scaling.norm(sigma))

    return sigma_at


def attach(
    model: comfy.model_patcher.ModelPatcher,
    guidance: HostGuidance,
    strength: Strength,
    choice: ViewChoice | None = None,
    watch: Watch | None = None,
    curve: NodeCurve | None = None,
) -> comfy.model_patcher.ModelPatcher:
    """A clone of ``model`` that every sampler node samples guided. Without any scale it is a plain clone.

    Three wrappers, all plain functions (a host before 0.14 deep-copies callable objects and bound methods):
    PREDICT_NOISE sees each model evaluation once, after all CFG; OUTER_SAMPLE opens and drops the run, since the clone
    stays in the host's cache between runs; PREPARE_SAMPLING asks for the memory of the gradient. ``watch`` is told of
    finished runs, and ``curve`` shows them on a node.
    """
    scaling_of(model)
    guided, curve = model.clone(), curve or NodeCurve(None)
    terms = tuple(term for term in guidance.terms if term.scale != 0)
    if not terms:
        curve.clear()
        return guided
    sights = see(model, guidance, choice or ViewChoice())
    runs: list[Sampled] = []  # a stack: a sampler may sample inside a run
    guided.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _run_keeper(runs, terms, strength, sights, watch, curve))
    guided.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, _corrector(runs, sights.patchers))
    guided.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, _memory_reserver(sights))
    loaded = guided.get_additional_models_with_key(KEY)
    guided.set_additional_models(KEY, [*loaded, *sights.patchers])
    return guided


def _run_keeper(
    runs: list[Sampled],
    terms: tuple[Term, ...],
    strength: Strength,
    sights: Sights,
    watch: Watch | None,
    curve: NodeCurve,
) -> Callable:
    def outer_sample(executor, noise, latent, sampler, sigmas, *args, **kwargs):
        run = open_run(executor.class_obj.model_patcher, terms, strength, sights)
        run.measured = watch is not None and watch.measured
        levels = sigmas.tolist()
        runs.append(Sampled(run, levels, curve.begin(heading_of(run, levels))))
        try:
            return executor(noise, latent, sampler, sigmas, *args, **kwargs)
        finally:  # also when interrupted
            drawing = runs.pop().drawing
            report(run)
            if watch is not None:
                watch.finished.append(run)
            drawing.end(remark_of(run))

    return outer_sample


def _corrector(runs: list[Sampled], patchers: Sequence[comfy.model_patcher.ModelPatcher]) -> Callable:
    def predict_noise(executor, x, sigma, model_options, seed):
        mm.throw_exception_if_processing_interrupted()
        guider, (run, sigmas, drawing) = executor.class_obj, runs[-1]
        check_latent(guider.model_patcher, x)
        for patcher in patchers:  # the original patchers, kept by this closure: a clone's death would unload them
            make_resident(patcher.model, x.device)
        model_options, caught = catch_uncond(guider.model_options, model_options)
        early = Early(sigma)
        denoised = executor(x, sigma, model_options, seed)
        with explained(f"the guidance of a batch of shape {tuple(x.shape)}"):
            level = early.read()
            shift = guidance_shift(denoised, *scaling_of(guider.model_patcher).core(x, level), run)
        if shift is None:
            return denoised
        drawing.add(guided_point(run.trace[-1], float(level.flatten()[0]), sigmas), x.device.type == "cpu")
        for uncond in caught:
            uncond.copy_(added(uncond, shift))
        return added(denoised, shift)

    return predict_noise


def catch_uncond(guider_options: dict, model_options: dict) -> tuple[dict, list[Tensor]]:
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
    encoders = [p.model for p in sights.patchers if isinstance(p.model, CleanCLIP | Classifier)]
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
            f"videos (batch, {channels}, frames, height, width) here. Start from one of these. Nested latents "
            "of video with audio, and audio alone, can't be guided: take Apply Guidance (SDG) out of this model's path."
        )
