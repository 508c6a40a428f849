"""What encoders look at in this host's models: read off the latent format, with decoders found or connected."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import comfy.model_patcher
import comfy.utils
import folder_paths
import torch
from torch import Tensor, nn
from torch.func import functional_call

from ...sdg_core.encoders import CleanCLIP
from ...sdg_core.method import PIXEL_VIEW, DecodedView, LinearView, View, as_normal
from ...sdg_core.models import decoder_from_state
from .encoders import HostGuidance
from .memory import patch_module
from .scaling import scaling_of

VIEWS = ["auto", "pixels", "linear", "decoded"]
COVARIANCE_TOLERANCE = 0.05
"""How far, relative to its size, the noise that an encoder was made for may be from the model's."""


@dataclass(frozen=True, eq=False)
class ViewChoice:
    """The widgets: a name of ``VIEWS``, and a VAE for "decoded" (None: TAESD)."""

    name: str = "auto"
    vae: object | None = None


@dataclass(frozen=True, eq=False)
class ChosenView:
    """A view, and the patcher through which the host loads its decoder, if it has one."""

    view: View
    patcher: comfy.model_patcher.ModelPatcher | None = None


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


def choose_view(model: comfy.model_patcher.ModelPatcher, encoder: CleanCLIP, choice: ViewChoice) -> ChosenView:
    """The view through which ``encoder`` looks at ``model``. Raises ValueError where they don't fit."""
    latent = model.get_model_object("latent_format")
    pixels = latent.latent_channels == 3
    name = choice.name
    if name == "auto":
        name = "pixels" if pixels else "linear"
        if encoder.reads == "denoised" and (choice.vae is not None or (not pixels and not _has_factors(latent))):
            name = "decoded"
    if name == "pixels" and not pixels:
        raise ValueError(
            f"The view is pixels, but this model's latents ({_name(latent)}) have {latent.latent_channels} channels. "
            "Choose the view linear or decoded, or auto."
        )
    if name == "linear" and pixels:
        raise ValueError("The view is linear, but this model draws pixels directly. Choose the view pixels, or auto.")
    if name == "decoded" and encoder.reads == "noisy":
        raise ValueError(
            "The view is decoded, but a noisy CLIP reads noisy pictures, and a decoder is made for clean latents. "
            "Use Load CLIP (SDG) with this view, or choose the view auto."
        )
    if name == "decoded":
        return _decoded(latent, choice.vae)
    view = PIXEL_VIEW if name == "pixels" else linear_view(latent)
    if encoder.reads == "noisy":
        _check_made_for(encoder, view)
    return ChosenView(view)


def linear_view(latent) -> LinearView:
    """The linear view by a latent format's own RGB factors. Raises ValueError where it has none."""
    if not _has_factors(latent):
        raise ValueError(
            f"ComfyUI knows no linear picture of this model's latents ({_name(latent)}). "
            "Choose the view decoded and connect a VAE, with a clean CLIP from Load CLIP (SDG)."
        )
    unpack = getattr(latent, "latent_rgb_factors_reshape", None)
    patch = 1
    if unpack is not None:
        patch = unpack(torch.zeros(1, latent.latent_channels, 1, 1)).shape[-1]
    with torch.inference_mode(False):
        factors = torch.tensor(latent.latent_rgb_factors, dtype=torch.float32).T.contiguous()
        bias = torch.tensor(getattr(latent, "latent_rgb_factors_bias", None) or [0.0, 0.0, 0.0], dtype=torch.float32)
    if unpack is None and factors.shape[1] != latent.latent_channels:
        raise ValueError(
            f"ComfyUI's linear picture of this model's latents ({_name(latent)}) reads {factors.shape[1]} channels of "
            f"{latent.latent_channels}. Choose the view decoded and connect a VAE, with a clean CLIP from Load CLIP "
            "(SDG)."
        )
    return LinearView(_name(latent), factors, bias, unpack, patch)


def data_variance(model: comfy.model_patcher.ModelPatcher) -> float:
    """Variance of the model's data, per element: pixels in -1..1 have about 0.25, latents are scaled to about 1."""
    return 0.25 if model.get_model_object("latent_format").latent_channels == 3 else 1.0


def _has_factors(latent) -> bool:
    return getattr(latent, "latent_rgb_factors", None) is not None


def _name(latent) -> str:
    return getattr(latent, "sdg_name", None) or type(latent).__name__


def downscale_of(latent) -> int:
    """Picture pixels to a latent pixel; ComfyUI before 0.11 does not say, and has 8 everywhere."""
    return getattr(latent, "spacial_downscale_ratio", 8)


def _check_made_for(encoder: CleanCLIP, view: View) -> None:
    """Raises ValueError where a noisy CLIP was trained on another view, or on other noise, than it would see."""
    made_for = encoder.view
    right = (made_for == "pixels") == (view.name == "pixels")
    if right and isinstance(view, LinearView):
        if encoder.config.covariance is None:
            raise ValueError(
                f'This noisy CLIP says that it was made for "{made_for}", but not for which noise: its file has no '
                "covariance. Export it again, or use a clean one with Load CLIP (SDG)."
            )
        wanted = torch.tensor(encoder.config.covariance)
        right = bool((wanted - view.covariance).norm() <= COVARIANCE_TOLERANCE * view.covariance.norm())
    if not right:
        raise ValueError(
            f'This noisy CLIP was made for "{made_for}", but this model is seen as "{view.name}", with other noise. '
            f'Load a noisy CLIP made for "{view.name}", or any clean one with Load CLIP (SDG).'
        )


# Decoders


def _decoded(latent, vae) -> ChosenView:
    if vae is not None:
        return _through_vae(latent, vae)
    decoder = patch_module(_find_taesd(latent))
    unpack = getattr(latent, "latent_rgb_factors_reshape", None)
    channels = decoder.model[1].weight.shape[1]

    def decode(x: Tensor) -> Tensor:
        if unpack is not None and x.shape[1] != channels:
            x = unpack(x)
        return decoder.model(x) * 2 - 1  # the host's previews read model latents like this

    view = DecodedView(decode, downscale_of(latent), (decoder.model,))
    return ChosenView(view, decoder)


def _find_taesd(latent) -> nn.Module:
    """The TAESD of a latent format, from models/vae_approx, as the host's previews find it."""
    name = latent.taesd_decoder_name
    if name is None or latent.latent_dimensions != 2:
        other = ", or choose the view linear" if _has_factors(latent) else ""
        raise ValueError(f"There is no TAESD for this model's latents ({_name(latent)}). Connect a VAE{other}.")
    files = [f for f in folder_paths.get_filename_list("vae_approx") if f.startswith(name)]
    if not files:
        raise ValueError(
            f"The view decoded needs {name}.safetensors (or .pth) in models/vae_approx; it is not there. "
            "Put it there, connect a VAE, or choose the view linear."
        )
    state = comfy.utils.load_torch_file(folder_paths.get_full_path_or_raise("vae_approx", files[0]), safe_load=True)
    with torch.inference_mode(False):
        return decoder_from_state({k: as_normal(v).clone() for k, v in state.items()}).requires_grad_(False).eval()


def _through_vae(latent, vae) -> ChosenView:
    """Through a VAE object's own model: its decode() is not made for gradients (it writes in place, and tiles)."""
    module, patcher = vae.first_stage_model, vae.patcher
    from_0_to_1 = float(vae.process_output(torch.zeros(1))) == 0  # most models give -1..1, those of TAEHV don't
    latent = copy.copy(latent)
    with torch.inference_mode(False):
        for name, value in vars(latent).items():
            if isinstance(value, Tensor):
                setattr(latent, name, as_normal(value).clone())

    def decode(x: Tensor) -> Tensor:
        three = vae.latent_dim == 3
        z = latent.process_out(x[:, :, None] if three and x.ndim == 4 else x)
        z = z[:, :, 0] if z.ndim == 5 and not three else z
        out = _call_decode(module, z.to(vae.vae_dtype), patcher).float()
        out = out[:, :, 0] if out.ndim == 5 else out
        return out * 2 - 1 if from_0_to_1 else out

    ratio = vae.upscale_ratio[-1] if isinstance(vae.upscale_ratio, tuple) else vae.upscale_ratio
    scale = ratio if isinstance(ratio, int) else downscale_of(latent)
    return ChosenView(DecodedView(decode, scale, (module,)), patcher)


def _call_decode(module: nn.Module, z: Tensor, patcher: comfy.model_patcher.ModelPatcher) -> Tensor:
    """``module.decode(z)``. Under the host's dynamic memory weights may be evicted between forward and backward, so
    copies are used that stay: more memory, for as long as the gradient takes."""
    if not getattr(patcher, "is_dynamic", lambda: False)():
        return module.decode(z)
    weights = {name: as_normal(p).to(z.device, copy=True) for name, p in module.named_parameters()}
    return functional_call(_Decode(module), {f"module.{name}": w for name, w in weights.items()}, (z,))


class _Decode(nn.Module):
    """A module whose call is another's decode."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, z: Tensor) -> Tensor:
        return self.module.decode(z)
