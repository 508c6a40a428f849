"""The paper's sampler (``sdg_core.models.paper``) as a sampler function of ComfyUI."""

from __future__ import annotations

from collections.abc import Callable

import comfy.model_management as mm
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...sdg_core.method import Convention, GuidanceRun, Strength
from ...sdg_core.models import Prediction, paper
from .adm import VARIANCE_SINK
from .encoders import HostGuidance
from .memory import make_resident
from .scaling import scaling_of
from .seam import check_latent, open_run
from .views import ViewChoice, see


def paper_sampler(guidance: HostGuidance | None) -> Callable:
    """A sampler function for the host's KSAMPLER: (model, x, sigmas, extra_args, callback, disable) -> x."""

    def sample_paper(model, x: Tensor, sigmas: Tensor, extra_args=None, callback=None, disable=None) -> Tensor:
        extra_args = extra_args or {}
        guider = model.inner_model
        _check_noise(guider.model_patcher)
        run = None if guidance is None else _open_run(guider.model_patcher, guidance, x)
        generator = torch.Generator().manual_seed((extra_args.get("seed", 0) + 1) % 2**64)  # the seed itself made x
        for step in paper(_predictor(model, extra_args), x, sigmas, generator, run):
            if callback is not None:
                sigma = sigmas[step.index]
                callback({"x": step.x, "i": step.index, "sigma": sigma, "sigma_hat": sigma, "denoised": step.denoised})
            x = step.x
        return x

    return sample_paper


def _check_noise(model: ModelPatcher) -> None:
    if scaling_of(model).convention is not Convention.VE:
        raise ValueError(
            "The paper's sampler is made for diffusion models such as ADM; this one is a flow model. "
            "Use Guided KSampler or Apply Guidance with it."
        )


def _open_run(model: ModelPatcher, guidance: HostGuidance, x: Tensor) -> GuidanceRun:
    """The run, with the encoders on the device beside the model: this guidance came without a MODEL to hold them."""
    sights = see(model, guidance, ViewChoice())
    check_latent(model, x)
    mm.load_models_gpu([model, *sights.patchers])
    for patcher in sights.patchers:
        make_resident(patcher.model, x.device)
    terms = tuple(term for term in guidance.terms if term.scale != 0)
    return open_run(model, terms, Strength(cap=None), sights)


def _predictor(model, extra_args: dict) -> Callable[[Tensor, Tensor], Prediction]:
    """The host's model with the variance half of its output, which is handed out through transformer_options."""

    def predict(x: Tensor, sigma: Tensor) -> Prediction:
        mm.throw_exception_if_processing_interrupted()
        seen: list[Tensor] = []
        options = extra_args["model_options"]
        transformer = {**options.get("transformer_options", {}), VARIANCE_SINK: seen.append}
        args = {**extra_args, "model_options": {**options, "transformer_options": transformer}}
        denoised = model(x, sigma, **args)
        # Positive and negative run as one batch, or one after the other; ADM has no conditioning, so all are the same.
        fraction = (seen[0][: len(x)].float() + 1) / 2 if seen else None
        return Prediction(denoised, fraction)

    return predict
