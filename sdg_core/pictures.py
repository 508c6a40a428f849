"""Picture files and tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

INK, PAPER, QUIET = "#1d1d1f", "#ffffff", "#6e6e73"


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
    to_picture(image).save(path)


def to_picture(image: torch.Tensor) -> Image.Image:
    """(3, H, W) in -1..1 as a picture of 8 bits a channel."""
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(pixels.cpu().numpy())


def draw_table(pictures: torch.Tensor, rows: Sequence[str], columns: Sequence[str]) -> Image.Image:
    """A table of pictures (R, C, 3, H, W) in -1..1, a name above each row and each column.

    Names are of ASCII: Pillow's own font has no other letters. One that is wider than its place ends in dots.
    """
    height, width = pictures.shape[-2:]
    text = max(12, min(height, width) // 12)
    bold, plain, gap = ImageFont.load_default(size=text * 1.2), ImageFont.load_default(size=text), text // 2
    line, across = 2 * text, len(columns) * (width + gap) + gap
    table = Image.new("RGB", (across, line + len(rows) * (line + height + gap)), PAPER)
    draw = ImageDraw.Draw(table)
    for x, name in enumerate(columns):
        draw.text((gap + x * (width + gap), gap), shortened(name, plain, width), QUIET, plain)
    for y, (name, cells) in enumerate(zip(rows, pictures, strict=True)):
        top = line + y * (line + height + gap)
        draw.text((gap, top + gap // 2), shortened(name, bold, across - 2 * gap), INK, bold)
        for x, cell in enumerate(cells):
            table.paste(to_picture(cell), (gap + x * (width + gap), top + line))
    return table


def shortened(name: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """The name, or as much of it as fits ``width`` pixels, with dots for the rest."""
    if font.getlength(name) <= width:
        return name
    while name and font.getlength(f"{name}...") > width:
        name = name[:-1]
    return f"{name}..."
