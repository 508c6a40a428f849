"""The demo grid: one row per guidance, one column per seed, unguided on top, references beside their rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..pictures import INK, PAPER, QUIET, to_picture
from .world import Pull, World, sample, seeded_noise

SEEDS = tuple(range(8))
STRIP_SEED = 1
TILE, GAP, LABEL, REFERENCE = 128, 8, 250, 144


@dataclass(frozen=True)
class DemoRow:
    """A row of the grid: what it says, and what pulls."""

    title: str
    detail: str
    pulls: tuple[Pull, ...]


def demo_rows(world: World) -> list[DemoRow]:
    """Unguided, text, two attributes, each image guidance, and text and image combined."""
    face, brush = find_render(world, style="flat", background="yellow"), find_render(world, style="pixel", hat=True)
    glasses, blue = (world.text(f"a person with {what}", among=2) for what in ("glasses", "blue background"))
    return [
        DemoRow("Unguided", "the model alone", ()),
        DemoRow("Text", "a person with pink hair", (Pull("text", "a person with pink hair"),)),
        DemoRow("Two lines of text", "a person with glasses\na person with blue background", (glasses, blue)),
        DemoRow("Content", "what is in the picture", (Pull("content", face),)),
        DemoRow("Structure", "its layout as well", (Pull("structure", face),)),
        DemoRow("Style", "its strokes and palette", (Pull("style", brush, world.scales["style"] / 4),)),
        DemoRow(
            "Text + structure",
            "a person with green hair\nin the picture's layout",
            (world.text("a person with green hair", among=2), Pull("structure", face, world.scales["structure"] / 2)),
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


def strip_rows(world: World) -> list[DemoRow]:
    """One guidance each, and all of them together: what one picture becomes."""
    face, brush = find_render(world, style="flat", background="yellow"), find_render(world, style="pixel", hat=False)
    text = Pull("text", "a person with pink hair")
    return [
        DemoRow("Unguided", "the model alone", ()),
        DemoRow("Text", "a person with pink hair", (text,)),
        DemoRow("Content", "what is in the picture", (Pull("content", face),)),
        DemoRow("Structure", "its layout as well", (Pull("structure", face),)),
        DemoRow("Style", "its strokes and palette", (Pull("style", brush, world.scales["style"] / 4),)),
        DemoRow(
            "All at once",
            "the text, the picture, the style",
            (
                replace(text, scale=5.4 * world.scales["text"]),
                Pull("content", face, world.scales["content"] / 2),
                Pull("structure", face, world.scales["structure"] / 4),
                Pull("style", brush, world.scales["style"] / 10),
            ),
        ),
    ]


Chosen = Literal["grid", "gallery", "row"]
"""What the demo draws: every guidance for eight seeds, prompts in many words, or one seed in large."""


def draw_demo(world: World, steps: int, progress: Callable[[int, int], None], chosen: Chosen = "grid") -> Image.Image:
    """Samples every row from the same seeds and draws them. ``progress(done, total)`` counts sampler steps."""
    make, seeds = {
        "grid": (demo_rows, SEEDS), "gallery": (gallery_rows, GALLERY_SEEDS), "row": (strip_rows, (STRIP_SEED,)),
    }[chosen]  # fmt: skip
    rows = make(world)
    channels, size, _ = world.denoiser.shape
    noise = seeded_noise(seeds, size, channels)
    pictures, total = [], steps * len(rows)
    for i, row in enumerate(rows):
        count = lambda step, i=i: progress(i * steps + step.index + 1, total)  # noqa: E731
        pictures.append(sample(world, row.pulls, noise, steps=steps, progress=count))
    return draw_strip(rows, pictures) if chosen == "row" else draw_grid(rows, pictures, seeds)


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


def draw_strip(rows: Sequence[DemoRow], pictures: Sequence[Tensor]) -> Image.Image:
    """One picture (1, 3, S, S) a row, side by side, a label below each and its references in its corner."""
    side, inset = 2 * TILE, TILE // 2 + GAP
    strip = Image.new("RGB", (len(rows) * (side + GAP) - GAP, side + 56), PAPER)
    draw = ImageDraw.Draw(strip)
    bold, plain = ImageFont.load_default(size=20), ImageFont.load_default(size=15)
    for x, (row, images) in enumerate(zip(rows, pictures, strict=True)):
        left = x * (side + GAP)
        strip.paste(tile(images[0], side), (left, 0))
        references = list({id(p.target): p.target for p in row.pulls if isinstance(p.target, Tensor)}.values())
        for y, reference in enumerate(references):
            corner = (left + side - (len(references) - y) * inset, side - inset)
            draw.rectangle((*corner, corner[0] + inset - 1, corner[1] + inset - 1), PAPER)
            strip.paste(tile(reference, inset - 4), (corner[0] + 2, corner[1] + 2))
        draw.text((left, side + 6), row.title, INK, bold)
        draw.text((left, side + 32), row.detail, QUIET, plain)
    return strip


def tile(image: Tensor, side: int = TILE) -> Image.Image:
    """(3, S, S) in -1..1 as a side x side picture, its pixels kept square where it grows."""
    smaller = side < image.shape[-1]
    return to_picture(image).resize((side, side), Image.Resampling.BOX if smaller else Image.Resampling.NEAREST)
