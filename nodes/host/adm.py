"""An ADM as a MODEL of ComfyUI, so that the host's own samplers, previews and memory management serve it.

Of pixels, or of the latents of a small autoencoder.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path

import comfy.latent_formats
import comfy.model_base
import comfy.model_management as mm
import comfy.model_patcher
import comfy.model_sampling as ms
import comfy.ops
import comfy.supported_models_base
import torch
from torch import Tensor

from ...sdg_core.method import LatentFormat, TimestepTable
from ...sdg_core.models import ADMConfig, ADMUNet, read_adm
from .memory import Patcher, explained

log = logging.getLogger(__name__)

VARIANCE_SINK = "sdg_variance_sink"
"""Name in transformer_options of a function that takes the learned-sigma half of each model output, (B, 3, H, W)."""


class PixelRGB(comfy.latent_formats.LatentFormat):
    """Latents that are pictures in -1..1."""

    latent_channels = 3
    spacial_downscale_ratio = 1
    latent_rgb_factors = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]


def latent_class(space: LatentFormat | None) -> type[comfy.latent_formats.LatentFormat]:
    """The host's kind of latent format for a model's space; None is pixels."""
    if space is None:
        return PixelRGB

    class Latents(comfy.latent_formats.LatentFormat):
        latent_channels = space.channels
        spacial_downscale_ratio = space.downscale
        latent_rgb_factors = [list(row) for row in zip(*space.factors, strict=True)]
        latent_rgb_factors_bias = list(space.bias)
        sdg_name = space.name

        def process_in(self, latent: Tensor) -> Tensor:
            return (latent - space.shift) * space.scale

        def process_out(self, latent: Tensor) -> Tensor:
            return latent / space.scale + space.shift

    return Latents


class ADMModelConfig(comfy.supported_models_base.BASE):
    """What BaseModel asks of a model config. The UNet is built by ADM itself."""

    unet_config = {"disable_unet_model_creation": True}
    unet_extra_config = {}
    latent_format = PixelRGB
    memory_usage_factor = 1.0
    supported_inference_dtypes = [torch.float16, torch.float32]


class Clamped:
    """Pictures lie in -1..1, so the estimate of one does too: the paper's clip_denoised."""

    def calculate_denoised(self, sigma: Tensor, model_output: Tensor, model_input: Tensor) -> Tensor:
        return super().calculate_denoised(sigma, model_output, model_input).clamp(-1, 1)


class EPSSampling(Clamped, ms.ModelSamplingDiscrete, ms.EPS):
    """For models that predict eps."""


class VSampling(Clamped, ms.ModelSamplingDiscrete, ms.V_PREDICTION):
    """For models that predict v."""


class LatentEPSSampling(ms.ModelSamplingDiscrete, ms.EPS):
    """For latent models that predict eps: latents have no bounds."""


class LatentVSampling(ms.ModelSamplingDiscrete, ms.V_PREDICTION):
    """For latent models that predict v."""


class FlowSampling(ms.ModelSamplingDiscreteFlow, ms.CONST):
    """For models that predict the flow."""


class ADMNet(ADMUNet):
    """The UNet with the host's call. Gives the mean half of the output; the variance half goes to a sink, if any."""

    def __init__(self, config: ADMConfig, dtype: torch.dtype, **kw) -> None:
        super().__init__(config, dtype=dtype, **kw)
        self.dtype = dtype
        self.sizes_warned: set[tuple[int, ...]] = set()

    def forward(self, x: Tensor, timesteps: Tensor, transformer_options: dict | None = None, **unused) -> Tensor:
        self.check_shape(x.shape)
        self.warn_of_size(*x.shape[-2:])
        with explained(f"a step of this ADM, a batch of shape {tuple(x.shape)},"):
            out = super().forward(x, timesteps)
        sink = (transformer_options or {}).get(VARIANCE_SINK)
        if sink is not None and self.config.learn_sigma:
            sink(out[:, self.config.channels :])
        return out[:, : self.config.channels]

    def check_shape(self, shape: torch.Size) -> None:
        """Raises ValueError for video, for other channels, and where the UNet's halvings don't come out even."""
        channels, multiple = self.config.channels, self.config.multiple
        if len(shape) != 4 or shape[1] != channels:
            raise ValueError(
                f"Got a latent of shape {tuple(shape)}; this ADM draws pictures, (batch, {channels}, height, width). "
                "Start from another latent, for example Empty Pixel Latent, with the model's VAE for latents."
            )
        height, width = shape[-2:]
        if height % multiple or width % multiple:
            width_wanted, height_wanted = (max(1, round(side / multiple)) * multiple for side in (width, height))
            space = self.config.latent_format
            if space is not None:
                raise ValueError(
                    f"Got a latent of {width} x {height}; this ADM wants multiples of {multiple}. Start from "
                    f"{width_wanted} x {height_wanted}, a picture of {width_wanted * space.downscale} x "
                    f"{height_wanted * space.downscale} pixels."
                )
            raise ValueError(
                f"Got a picture of {width} x {height} pixels; this ADM wants multiples of {multiple}. "
                f"Set Empty Pixel Latent to {width_wanted} x {height_wanted}."
            )

    def warn_of_size(self, height: int, width: int) -> None:
        """Says in the log, once for each size, that a picture is more than twice as large as the model learned."""
        known = self.config.image_size
        if max(height, width) <= 2 * known or (height, width) in self.sizes_warned:
            return
        self.sizes_warned.add((height, width))
        scale = 1 if self.config.latent_format is None else self.config.latent_format.downscale
        log.warning(
            "This ADM learned pictures of %d x %d; at %d x %d it draws little but noise. Set Empty Pixel Latent to "
            "%d x %d.",
            *(side * scale for side in (known, known, width, height, known, known)),
        )


class ADM(comfy.model_base.BaseModel):
    """The host's model around an unconditional ADM: a model without conditioning."""

    unconditional = True

    def __init__(self, config: ADMConfig, host_config: ADMModelConfig, device: torch.device) -> None:
        types, latent = comfy.model_base.ModelType, config.latent_format is not None
        model_type, sampling = {
            "eps": (types.EPS, LatentEPSSampling if latent else EPSSampling),
            "v": (types.V_PREDICTION, LatentVSampling if latent else VSampling),
            "flow": (types.FLOW, FlowSampling),
        }[config.prediction]
        host_config.latent_format = latent_class(config.latent_format)()
        super().__init__(host_config, model_type, device=device)
        dtype = host_config.unet_config["dtype"]
        ops = comfy.ops.pick_operations(dtype, host_config.manual_cast_dtype)
        self.diffusion_model = ADMNet(config, dtype, ops=ops, device=device).requires_grad_(False).eval()
        # The host's "linear" is another schedule (betas linear in their root), so the sigmas are set directly.
        host_config.sampling_settings = {"shift": config.flow_shift} if config.prediction == "flow" else {}
        self.model_sampling = sampling(host_config)
        if config.prediction != "flow":
            self.model_sampling.set_sigmas(TimestepTable.from_name(config.beta_schedule).ratio)

    def extra_conds(self, **unused) -> dict:
        return {}


def load_adm_model(path: Path, face: str | None = None) -> comfy.model_patcher.ModelPatcher:
    """A MODEL from an ADM file, in the dtype that suits the device. ``face`` as in ``read_adm``.

    Raises ValueError for files of other kinds.
    """
    config, state = read_adm(path, face)
    device, offload = mm.get_torch_device(), mm.unet_offload_device()
    host_config = ADMModelConfig(ADMModelConfig.unet_config)
    supported = host_config.supported_inference_dtypes
    parameters = sum(math.prod(t.shape) for t in state.values())
    dtype = mm.unet_dtype(model_params=parameters, supported_dtypes=supported)
    host_config.set_inference_dtype(dtype, mm.unet_manual_cast(dtype, device, supported))
    model = ADM(config, host_config, offload)
    model.diffusion_model.load_state_dict(state)
    return Patcher(model, load_device=device, offload_device=offload)
