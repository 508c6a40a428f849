"""The demo grid: one row per guidance, one column per seed, unguided on top, references beside their rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .world import Pull, World, sample, seeded_noise

SEEDS = tuple(range(8))
TILE, GAP, LABEL, REFERENCE = 96, 8, 250, 112
INK, PAPER, QUIET = "#1d1d1f", "#ffffff", "#6e6e73"


@dataclass(frozen=True)
class DemoRow:
    """A row of the grid: what it says, and what pulls."""

    title: str
    detail: str
    pulls: tuple[Pull, ...]


def demo_rows(world: World) -> list[DemoRow]:
    """Unguided, text, two texts, each image guidance, and text and image combined."""
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
            "Text + content",
            "a person with green hair",
            (Pull("text", "a person with green hair", 300.0), Pull("content", face, 75.0)),
        ),
    ]


def find_render(world: World, **wanted: object) -> Tensor:
    """The first held-out render (3, S, S) with these attributes. Raises LookupError where there is none."""
    names = list(world.judge.attributes)
    for picture, labels in zip(world.renders.unbind(), world.labels, strict=True):
        shown = {n: world.judge.attributes[n][v] for n, v in zip(names, labels.tolist(), strict=True) if v >= 0}
        if all(shown.get(k) == v for k, v in wanted.items()):
            return picture
    raise LookupError(f"No held-out render has {wanted}.")


def draw_demo(world: World, steps: int, progress: Callable[[int, int], None]) -> Image.Image:
    """Samples every row from the same seeds and draws the grid. ``progress(done, total)`` counts sampler steps."""
    rows = demo_rows(world)
    channels, size, _ = world.denoiser.shape
    noise = seeded_noise(SEEDS, size, channels)
    pictures, total = [], steps * len(rows)
    for i, row in enumerate(rows):
        count = lambda step, i=i: progress(i * steps + step.index + 1, total)  # noqa: E731
        pictures.append(sample(world, row.pulls, noise, steps=steps, progress=count))
    return draw_grid(rows, pictures)


def draw_grid(rows: Sequence[DemoRow], pictures: Sequence[Tensor]) -> Image.Image:
    """The rows with their labels and references; pictures (len(SEEDS), 3, S, S) per row."""
    head = 34
    width = LABEL + REFERENCE + len(SEEDS) * (TILE + GAP) + GAP
    grid = Image.new("RGB", (width, head + len(rows) * (TILE + GAP) + GAP), PAPER)
    draw = ImageDraw.Draw(grid)
    bold, plain = ImageFont.load_default(size=18), ImageFont.load_default(size=14)
    draw.text((LABEL, 10), "reference", QUIET, plain)
    for column, seed in enumerate(SEEDS):
        draw.text((LABEL + REFERENCE + column * (TILE + GAP), 10), f"seed {seed}", QUIET, plain)
    for y, (row, images) in enumerate(zip(rows, pictures, strict=True)):
        top = head + y * (TILE + GAP)
        draw.text((14, top + 18), row.title, INK, bold)
        draw.multiline_text((14, top + 44), row.detail, QUIET, plain, spacing=4)
        references = [pull.target for pull in row.pulls if not isinstance(pull.target, str)]
        for reference in references[:1]:
            grid.paste(tile(reference), (LABEL, top))
        for x, image in enumerate(images):
            grid.paste(tile(image), (LABEL + REFERENCE + x * (TILE + GAP), top))
    return grid


def tile(image: Tensor) -> Image.Image:
    """(3, S, S) in -1..1 as a TILE x TILE picture, its pixels kept square."""
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.NEAREST)
