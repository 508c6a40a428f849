"""The demo grid: one row per guidance, one column per seed, unguided on top, references beside their rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .world import Pull, World, sample, seeded_noise

SEEDS = tuple(range(8))
TILE, GAP, LABEL, REFERENCE = 128, 8, 250, 144
INK, PAPER, QUIET = "#1d1d1f", "#ffffff", "#6e6e73"


@dataclass(frozen=True)
class DemoRow:
    """A row of the grid: what it says, and what pulls."""

    title: str
    detail: str
    pulls: tuple[Pull, ...]


def demo_rows(world: World) -> list[DemoRow]:
    """Unguided, text, two attributes, each image guidance, and text and image combined."""
    face, brush = find_render(world, style="flat", background="yellow"), find_render(world, style="pixel", hat=True)
    text = Pull("text", "a person with glasses and blue background")
    return [
        DemoRow("Unguided", "the model alone", ()),
        DemoRow("Text", "a person with pink hair", (Pull("text", "a person with pink hair"),)),
        DemoRow("Text", "a person with glasses\nand blue background", (text,)),
        DemoRow("Content", "what is in the picture", (Pull("content", face),)),
        DemoRow("Structure", "its layout as well", (Pull("structure", face),)),
        DemoRow("Style", "its strokes and palette", (Pull("style", brush),)),
        DemoRow(
            "Text + structure",
            "a person with green hair\nin the picture's layout",
            (Pull("text", "a person with green hair"), Pull("structure", face, world.scales["structure"] / 2)),
        ),
    ]


GALLERY = (
    "someone with violet hair and spectacles",
    "doodle with a green backdrop",
    "comic portrait with a smile",
    "profile icon with headgear, orange background",
    "8-bit picture with facial hair",
    "line drawing with a short haircut, pink behind",
    "caricature with grey hair and a frown",
    "flat illustration with blonde hair",
)
"""Prompts in words that no scale was chosen on."""
GALLERY_SEEDS = tuple(range(1000, 1008))


def gallery_rows(world: World) -> list[DemoRow]:
    """A row for each prompt of the gallery."""
    return [
        DemoRow(text.split(" with ")[0], f"with {text.split(' with ')[1]}", (Pull("text", text),)) for text in GALLERY
    ]


def find_render(world: World, **wanted: object) -> Tensor:
    """The first held-out render (3, S, S) with these attributes. Raises LookupError where there is none."""
    names = list(world.judge.attributes)
    for picture, labels in zip(world.renders.unbind(), world.labels, strict=True):
        shown = {n: world.judge.attributes[n][v] for n, v in zip(names, labels.tolist(), strict=True) if v >= 0}
        if all(shown.get(k) == v for k, v in wanted.items()):
            return picture
    raise LookupError(f"No held-out render has {wanted}.")


def draw_demo(world: World, steps: int, progress: Callable[[int, int], None], gallery: bool = False) -> Image.Image:
    """Samples every row from the same seeds and draws the grid. ``progress(done, total)`` counts sampler steps."""
    rows, seeds = (gallery_rows(world), GALLERY_SEEDS) if gallery else (demo_rows(world), SEEDS)
    channels, size, _ = world.denoiser.shape
    noise = seeded_noise(seeds, size, channels)
    pictures, total = [], steps * len(rows)
    for i, row in enumerate(rows):
        count = lambda step, i=i: progress(i * steps + step.index + 1, total)  # noqa: E731
        pictures.append(sample(world, row.pulls, noise, steps=steps, progress=count))
    return draw_grid(rows, pictures, seeds)


def draw_grid(rows: Sequence[DemoRow], pictures: Sequence[Tensor], seeds: Sequence[int] = SEEDS) -> Image.Image:
    """The rows with their labels, and their references where any has one; pictures (len(seeds), 3, S, S) per row."""
    references = [[pull.target for pull in row.pulls if isinstance(pull.target, Tensor)] for row in rows]
    head, left = 34, LABEL + (REFERENCE if any(references) else 0)
    width = left + len(seeds) * (TILE + GAP) + GAP
    grid = Image.new("RGB", (width, head + len(rows) * (TILE + GAP) + GAP), PAPER)
    draw = ImageDraw.Draw(grid)
    bold, plain = ImageFont.load_default(size=18), ImageFont.load_default(size=14)
    if any(references):
        draw.text((LABEL, 10), "reference", QUIET, plain)
    for column, seed in enumerate(seeds):
        draw.text((left + column * (TILE + GAP), 10), f"seed {seed}", QUIET, plain)
    for y, (row, targets, images) in enumerate(zip(rows, references, pictures, strict=True)):
        top = head + y * (TILE + GAP)
        draw.text((14, top + TILE // 2 - 30), row.title, INK, bold)
        draw.multiline_text((14, top + TILE // 2 - 4), row.detail, QUIET, plain, spacing=4)
        for reference in targets[:1]:
            grid.paste(tile(reference), (LABEL, top))
        for x, image in enumerate(images):
            grid.paste(tile(image), (left + x * (TILE + GAP), top))
    return grid


def tile(image: Tensor) -> Image.Image:
    """(3, S, S) in -1..1 as a TILE x TILE picture, its pixels kept square."""
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.NEAREST)
