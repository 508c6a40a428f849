"""The linear picture of a latent format by its name, for commands that have no model at hand."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch

from ..avatars import NAME, latent_space
from ..method import PIXEL_VIEW, LinearView, PixelView


def named_view(name: str, comfyui: Path | None = None) -> PixelView | LinearView:
    """ "pixels", "linear:avatars" (the bundled latents), or "linear:" and a class of ComfyUI's comfy/latent_formats.py.

    ``comfyui`` is the folder of a ComfyUI; default: COMFYUI_PATH, else ~/comfy/ComfyUI. Its own factors are read, so an
    encoder fits the ComfyUI that runs it. Raises ValueError for unknown names, FileNotFoundError without a ComfyUI.
    """
    kind, _, format_name = name.partition(":")
    if name in ("pixel", "pixels"):
        return PIXEL_VIEW
    if kind != "linear" or not format_name:
        raise ValueError(f'Got the view "{name}"; wanted "pixels" or "linear:" and a latent format, as in linear:SD15.')
    if format_name == NAME:
        return latent_space().linear_view()
    return _comfyui_view(format_name, comfyui or Path(os.environ.get("COMFYUI_PATH") or Path.home() / "comfy/ComfyUI"))


def _comfyui_view(format_name: str, comfyui: Path) -> LinearView:
    file = comfyui / "comfy" / "latent_formats.py"
    if not file.is_file():
        raise FileNotFoundError(
            f"The factors of {format_name} are read from ComfyUI, and there is none at {comfyui}. Give its folder with "
            "--comfyui, or set COMFYUI_PATH."
        )
    formats = _latent_formats(file)
    if format_name not in formats:
        known = ", ".join(sorted(formats))
        raise ValueError(f'ComfyUI knows no linear picture of a latent format "{format_name}". Known: {known}.')
    latent = formats[format_name]
    bias = torch.tensor(getattr(latent, "latent_rgb_factors_bias", None) or [0.0, 0.0, 0.0])
    return LinearView(format_name, torch.tensor(latent.latent_rgb_factors).T.contiguous(), bias)


def _latent_formats(file: Path) -> dict[str, Any]:
    """The formats of the host's file that have factors for every channel, run with the host importable meanwhile."""
    sys.path.insert(0, str(file.parents[1]))
    try:
        kinds = [kind for kind in runpy.run_path(str(file)).values() if hasattr(kind, "latent_rgb_factors")]
    finally:
        sys.path.remove(str(file.parents[1]))
    formats = {kind.__name__: kind() for kind in kinds}
    return {n: f for n, f in formats.items() if len(f.latent_rgb_factors or ()) == f.latent_channels}
