"""Picture files and tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image


def read_image(path: Path) -> torch.Tensor:
    """A picture file as (3, H, W) in -1..1. Raises ValueError where Pillow can't read it."""
    try:
        with Image.open(path) as file:
            pixels = np.asarray(file.convert("RGB"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"There is no picture {path}. Give the path of a PNG or JPEG file.") from error
    except OSError as error:
        raise ValueError(f"{path} is not a picture that Pillow can read. Give a PNG or JPEG file.") from error
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1


def write_image(path: Path | str, image: torch.Tensor) -> None:
    """(3, H, W) in -1..1 to a picture file."""
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0)
    Image.fromarray(pixels.numpy()).save(path)
