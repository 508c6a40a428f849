"""Where the bundled models are, and the sheet of held-out renders that comes with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo
from torch import Tensor

from ..encoders import CleanCLIP, load_clip
from ..files import load, save
from ..method import LatentFormat
from ..models import latent_encoder, load_tiny_autoencoder, read_adm

BUNDLED = Path(__file__).parent
"""The folder of the small models that come with the pack: those of the 128 px world in ``latent``, and a pixel world of
32 px, adm, noisy_clip and judge, beside it."""

LATENT = BUNDLED / "latent"

NAME = "avatars"
"""What the bundled CLIP and latents are called, as weights and as a latent format."""


def load_bundled_clip(path: Path = LATENT / "clip.safetensors") -> CleanCLIP:
    """The clean CLIP of the avatars, frozen, in eval mode."""
    return load_clip(path, NAME)


def latent_model_file(prediction: str, folder: Path = BUNDLED) -> tuple[Path, str | None]:
    """File and face (see ``read_adm``) of the bundled latent model that predicts "eps", "v" or "flow": one network."""
    return folder / "latent" / "model.safetensors", prediction


def latent_space(folder: Path = BUNDLED) -> LatentFormat:
    """The latent space of the bundled latent models."""
    space = read_adm(*latent_model_file("v", folder))[0].latent_format
    assert space is not None
    return space


def bundled_latent_encoder(folder: Path = BUNDLED) -> tuple[Callable[[Tensor], Tensor], int]:
    """``latent_encoder`` of the bundled autoencoder: its latents are those of the bundled latent models."""
    space, autoencoder = latent_space(folder), load_tiny_autoencoder(folder / "latent" / "autoencoder.safetensors")
    return latent_encoder(autoencoder.encoder, space.scale, space.shift)


@dataclass(frozen=True)
class HeldOut:
    """Renders that no model was trained on, as a judge sees them: ``features`` (M, D) and ``labels`` (M, A), -1 where
    a drawing does not show an attribute."""

    features: Tensor
    labels: Tensor


def save_held_out(path: Path, features: Tensor, labels: Tensor) -> None:
    """A judge's features (M, D) of held-out renders, and their labels (M, A)."""
    save(path, "held_out", {}, {"features": features, "labels": labels.to(torch.int8)})


def load_held_out(path: Path) -> HeldOut:
    """The file of ``save_held_out``. Raises FileNotFoundError and ValueError as ``files.load`` does."""
    _, state = load(path, "held_out")
    return HeldOut(state["features"].float(), state["labels"].long())


def save_renders(path: Path, images: NDArray[np.uint8], labels: NDArray[np.int8], columns: int = 64) -> None:
    """Renders (N, S, S, 3) uint8 as one sheet, their labels (N, A) in its text chunk. N is a multiple of columns."""
    N, S = images.shape[:2]
    sheet = images.reshape(N // columns, columns, S, S, 3).transpose(0, 2, 1, 3, 4).reshape(-1, columns * S, 3)
    info = PngInfo()
    info.add_text("labels", json.dumps({"size": S, "labels": labels.tolist()}), zip=True)
    Image.fromarray(sheet).save(path, pnginfo=info, optimize=True)


def load_renders(path: Path) -> tuple[Tensor, Tensor]:
    """The sheet of ``save_renders``: pictures (N, 3, S, S) in -1..1 and labels (N, A)."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}. Wanted: the sheet of renders that comes with the models.")
    with Image.open(path) as file:
        assert isinstance(file, PngImageFile)
        note = json.loads(file.text["labels"])
        sheet = torch.from_numpy(np.asarray(file.convert("RGB")).copy())
    S = note["size"]
    tiles = torch.unflatten(torch.unflatten(sheet, 0, (-1, S)), 2, (-1, S)).permute(0, 2, 4, 1, 3).flatten(0, 1)
    return tiles.float() / 127.5 - 1, torch.tensor(note["labels"])
