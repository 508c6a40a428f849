"""Pictures and masks in JSON, bit for bit: as PNG where eight bits hold them exactly, else as their float32 numbers."""

from __future__ import annotations

import base64
import binascii
import io
import zlib
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .fields import Fields, refuse

LONGEST_SIDE = 16384
MOST_PIXELS = 2**26


class Range(NamedTuple):
    """What values mean: channels, and the two ends."""

    channels: int
    low: float
    high: float


PICTURE = Range(3, -1.0, 1.0)
MASK = Range(1, 0.0, 1.0)


def written(images: Tensor, kind: Range) -> list[dict[str, object]]:
    """Images (N, C, h, w) as JSON objects."""
    return [_written(image, kind) for image in images.detach().cpu().to(torch.float32)]


def _written(image: Tensor, kind: Range) -> dict[str, object]:
    bits = ((image - kind.low) / (kind.high - kind.low) * 255).round().clamp(0, 255).byte()
    if torch.equal(_of_bits(bits, kind), image):
        file = io.BytesIO()
        pixels = bits.permute(1, 2, 0).numpy()
        Image.fromarray(pixels if kind.channels == 3 else pixels[..., 0]).save(file, "PNG")
        return {"png": base64.b64encode(file.getvalue()).decode("ascii")}
    numbers = image.contiguous().numpy().astype("<f4").tobytes()
    height, width = image.shape[-2:]
    return {"float32": base64.b64encode(numbers).decode("ascii"), "height": height, "width": width}


def _of_bits(bits: Tensor, kind: Range) -> Tensor:
    """Eight bits as numbers, by the arithmetic of a picture that is loaded from a file: v / 255, then 2 v - 1."""
    part = bits.float() / 255
    return part if kind.low == 0 else (part * 2 - 1).clamp(-1, 1)


def read_pixels(fields: Fields, kind: Range) -> Tensor:
    """One image (C, h, w) of a JSON object. Raises ValueError for anything else."""
    return _of_png(fields, kind) if "png" in fields.values else _of_numbers(fields, kind)


def _decoded(fields: Fields, name: str) -> bytes:
    value = fields.take(name)
    if not isinstance(value, str):
        refuse(fields.at(name), value, "base64")
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        refuse(fields.at(name), value, "base64")


def _of_png(fields: Fields, kind: Range) -> Tensor:
    mode = "RGB" if kind.channels == 3 else "L"
    wanted = f"a PNG ({mode}) of {LONGEST_SIDE} pixels a side and {MOST_PIXELS} in all at most, in base64"
    data = _decoded(fields, "png")
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as file:
            width, height = file.size
            if file.mode != mode or not _fits(height, width):
                refuse(fields.at("png"), f"{file.mode}, {width} x {height}", wanted)
            pixels = np.asarray(file).reshape(height, width, kind.channels)
    except (OSError, SyntaxError, EOFError, zlib.error, Image.DecompressionBombError):
        refuse(fields.at("png"), fields.values["png"], wanted)
    return _of_bits(torch.from_numpy(pixels.copy()).permute(2, 0, 1), kind).contiguous()


def _of_numbers(fields: Fields, kind: Range) -> Tensor:
    height, width = (fields.whole(name, 1, LONGEST_SIDE) for name in ("height", "width"))
    data, count = _decoded(fields, "float32"), kind.channels * height * width
    if not _fits(height, width) or len(data) != 4 * count:
        refuse(fields.at("float32"), f"{len(data)} bytes", f"4 bytes for each of {count} numbers, in base64")
    numbers = torch.from_numpy(np.frombuffer(data, "<f4").astype(np.float32))
    if not bool(((numbers >= kind.low) & (numbers <= kind.high)).all()):
        refuse(fields.at("float32"), "other numbers", f"numbers from {kind.low:g} to {kind.high:g}")
    return numbers.view(kind.channels, height, width)


def _fits(height: int, width: int) -> bool:
    return max(height, width) <= LONGEST_SIDE and height * width <= MOST_PIXELS
