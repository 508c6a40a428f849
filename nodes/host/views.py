"""What encoders look at in this host's models: read off the latent format, with decoders found or connected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import comfy.model_patcher
import torch

from ...sdg_core.encoders import CleanCLIP
from ...sdg_core.method import PIXEL_VIEW, LinearView, View
from ...sdg_core.models import Classifier
from .decoders import format_name, has_factors, through_tiny_decoder, through_vae
from .encoders import HostGuidance
from .scaling import scaling_of

VIEWS = ["auto", "pixels", "linear", "decoded"]
COVARIANCE_TOLERANCE = 0.05
"""How far, relative to its size, the noise that an encoder was made for may be from the model's."""


@dataclass(frozen=True, eq=False)
class ViewChoice:
    """The widgets: a name of ``VIEWS``, and a VAE for "decoded" (None: the host's tiny decoder)."""

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
    if name not in VIEWS:
        raise ValueError(f"Got the view {name!r}; wanted one of: {', '.join(VIEWS)}. Choose one.")
    if name == "auto":
        name = "pixels" if pixels else "linear"
        if encoder.reads == "denoised" and (choice.vae is not None or (not pixels and not has_factors(latent))):
            name = "decoded"
    if name == "pixels" and not pixels:
        raise ValueError(
            f"The view is pixels, but this model's latents ({format_name(latent)}) have {latent.latent_channels} "
            "channels. Choose the view linear or decoded, or auto."
        )
    if name == "linear" and pixels:
        raise ValueError("The view is linear, but this model draws pixels directly. Choose the view pixels, or auto.")
    if name == "decoded" and encoder.reads == "noisy":
        raise ValueError(
            "The view is decoded, but a noisy CLIP reads noisy pictures, and a decoder is made for clean latents. "
            "Use Load CLIP (SDG) with this view, or choose the view auto."
        )
    if name == "decoded":
        return ChosenView(*(through_tiny_decoder(latent) if choice.vae is None else through_vae(latent, choice.vae)))
    view = PIXEL_VIEW if name == "pixels" else linear_view(latent)
    if encoder.reads == "noisy":
        _check_made_for(encoder, view)
    return ChosenView(view)


def linear_view(latent) -> LinearView:
    """The linear view by a latent format's own RGB factors. Raises ValueError where it has none."""
    if not has_factors(latent):
        raise ValueError(
            f"ComfyUI knows no linear picture of this model's latents ({format_name(latent)}). "
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
            f"ComfyUI's linear picture of this model's latents ({format_name(latent)}) reads {factors.shape[1]} "
            f"channels of {latent.latent_channels}. Choose the view decoded and connect a VAE, with a clean CLIP from "
            "Load CLIP (SDG)."
        )
    return LinearView(format_name(latent), factors, bias, unpack, patch)


def data_variance(model: comfy.model_patcher.ModelPatcher) -> float:
    """Variance of the model's data, per element: pixels in -1..1 have about 0.25, latents are scaled to about 1."""
    return 0.25 if model.get_model_object("latent_format").latent_channels == 3 else 1.0


def _check_made_for(encoder: CleanCLIP, view: View) -> None:
    """Raises ValueError where a noisy CLIP was trained on another view, or on other noise, than it would see."""
    made_for = encoder.view
    right = (made_for == "pixels") == (view.name == "pixels")
    if right and isinstance(view, LinearView):
        if encoder.config.covariance is None:
            raise ValueError(
                f'This encoder says that it was made for "{made_for}", but not for which noise: its file has no '
                "covariance. Export it again, or use a clean one with Load CLIP (SDG)."
            )
        wanted = torch.tensor(encoder.config.covariance)
        right = bool((wanted - view.covariance).norm() <= COVARIANCE_TOLERANCE * view.covariance.norm())
    if not right and isinstance(encoder, Classifier):
        raise ValueError(
            f'This classifier was made for "{made_for}", but this model is seen as "{view.name}". Use it with a model '
            f'that is seen as "{made_for}", such as a bundled one of Load ADM (SDG), or guide by text.'
        )
    if not right:
        raise ValueError(
            f'This noisy CLIP was made for "{made_for}", but this model is seen as "{view.name}", with other noise. '
            f'Load a noisy CLIP made for "{view.name}", or any clean one with Load CLIP (SDG).'
        )
