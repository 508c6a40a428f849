"""What comes in through sockets and widgets, checked and converted once, where it enters."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

MOST_LINES = 32
SHOWN = 60
"""Characters of a value that an error message shows."""


def shown(value: object) -> str:
    """A value in an error message: short values as they are, tensors by their shape, others by their class."""
    if value is None:
        return "nothing"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if not isinstance(value, str | int | float):
        return f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def check_finite(**numbers: float) -> None:
    """Raises ValueError for NaN, which passes the host's min and max, and for infinity."""
    for name, number in numbers.items():
        if not isinstance(number, int | float) or not math.isfinite(number):
            raise ValueError(
                f"Got {name} {shown(number)}; wanted a finite number. Set {name} again, for example to its default."
            )


def to_references(image: Tensor) -> Tensor:
    """IMAGE (B, H, W, 3) in 0..1 -> references (B, 3, H, W) in -1..1, float32. Raises ValueError for other shapes."""
    return (check_image(image).to(torch.float32) * 2 - 1).clamp(-1, 1).movedim(-1, 1).contiguous()


def check_image(image: Tensor) -> Tensor:
    """The image, if it is an IMAGE (B, H, W, 3) of finite numbers. Raises ValueError otherwise."""
    if not isinstance(image, Tensor):
        raise ValueError(
            f"Got {shown(image)} for a picture; wanted (batch, height, width, 3). Connect an IMAGE, as Load Image "
            "gives it."
        )
    shape = tuple(image.shape)
    if len(shape) == 4 and shape[3] == 4:
        raise ValueError(
            f"Got a picture with an alpha channel, shape {shape}; wanted red, green and blue only, (batch, height, "
            "width, 3). Take the alpha channel off first, for example with Split Image with Alpha."
        )
    if len(shape) != 4 or shape[3] != 3 or 0 in shape:
        raise ValueError(
            f"Got a picture of shape {shape}; wanted (batch, height, width, 3). Connect an IMAGE, as "
            "Load Image gives it."
        )
    if image.is_complex() or not bool(torch.isfinite(image).all()):
        raise ValueError(
            f"Got a picture of shape {shape} with numbers that are not finite (NaN or infinite) or not real; wanted "
            "0..1. Check the node that makes it, or connect another IMAGE."
        )
    return image


def to_mask(mask: Tensor | None, name: str) -> Tensor | None:
    """MASK (N, H, W) or (H, W) in 0..1 -> (N, 1, H, W), float32; None where nothing is connected. Raises ValueError for
    other shapes."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 3) or 0 in mask.shape or not bool(mask.isfinite().all()):
        raise ValueError(
            f"The input {name} got {shown(mask)}; wanted a MASK of finite numbers, (batch, height, width). Connect "
            "one, for example from Load Image or Load Image (as Mask)."
        )
    return mask.to(torch.float32).clamp(0, 1).reshape(-1, 1, *mask.shape[-2:]).contiguous()


def to_prompt(text: str) -> str:
    """The text without blank ends. Raises ValueError where nothing is left."""
    if not text.strip():
        raise ValueError("Got an empty text; wanted a description of the picture. Write one, or take this node out.")
    return text.strip()


def to_lines(text: str) -> tuple[str, ...]:
    """The lines of a text that hold something, without blank ends. Raises ValueError for none, and for very many."""
    lines = tuple(line.strip() for line in to_prompt(text).splitlines() if line.strip())
    if len(lines) > MOST_LINES:
        raise ValueError(
            f"Got a text of {len(lines)} lines; wanted {MOST_LINES} at most, since each is a text by itself. Join some."
        )
    return lines


def to_layers(layers: str) -> tuple[int, ...]:
    """ "3, 4" -> (3, 4), each layer once, in order. Raises ValueError for anything but numbers and commas."""
    try:
        numbers = sorted({int(part) for part in layers.split(",") if part.strip()})
    except ValueError:
        numbers = []
    if not numbers:
        raise ValueError(
            f"Got the layers {shown(layers)}; wanted whole numbers from 1 up, separated by commas. Write "
            "for example 4 or 3,4."
        )
    return tuple(numbers)


def to_weights(weights: str) -> tuple[float, ...]:
    """ "1, 0.5" -> (1.0, 0.5), and "" -> (). Raises ValueError for anything but numbers and commas."""
    try:
        return tuple(float(part) for part in weights.split(",") if part.strip())
    except ValueError as error:
        raise ValueError(
            f"Got the weights {shown(weights)}; wanted numbers separated by commas, one for each reference. Write for "
            "example 1, 0.5, or leave it empty."
        ) from error


def to_factors(factors: str, most: int) -> tuple[float, ...]:
    """ "0, 0.5, 1" -> (0.0, 0.5, 1.0). Raises ValueError for anything but 1 to ``most`` finite numbers and commas."""
    try:
        numbers = tuple(float(part) for part in factors.split(",") if part.strip())
    except ValueError:
        numbers = ()
    if not 0 < len(numbers) <= most or not all(map(math.isfinite, numbers)):
        raise ValueError(
            f"Got the factors {shown(factors)}; wanted 1 to {most} finite numbers, separated by commas. Write for "
            "example 0, 0.5, 1, 2."
        )
    return numbers


def to_points(points: str) -> tuple[tuple[float, float], ...]:
    """ "0:0, 0.3:1" -> ((0.0, 0.0), (0.3, 1.0)). Raises ValueError for anything but pairs of numbers and commas."""
    pairs = [tuple(part.split(":")) for part in points.split(",") if part.strip()]
    try:
        return tuple((float(at), float(value)) for at, value in pairs)
    except ValueError as error:
        raise ValueError(
            f"Got the points {shown(points)}; wanted pairs of numbers, part of the run : factor, separated by commas. "
            "Write for example 0:0, 0.3:1, 1:0.2."
        ) from error


def to_frames(frames: str) -> tuple[int, ...]:
    """ "0, 2-4, -1" -> (0, 2, 3, 4, -1). Raises ValueError for anything but numbers, ranges and commas."""
    chosen: list[int] = []
    for part in (part.strip() for part in frames.split(",")):
        found = re.fullmatch(r"(-?\d{1,5})(?:\s*-\s*(\d{1,5}))?", part)
        if found is None or (found[2] is not None and int(found[2]) < int(found[1])):
            raise ValueError(
                f"Got the frames {shown(frames)}; wanted whole numbers and ranges, separated by commas, with five "
                "digits at most. Write for example 0, or 0-4, or 0,-1 for the first and the last."
            )
        chosen += range(int(found[1]), int(found[2] or found[1]) + 1)
    return tuple(dict.fromkeys(chosen))
