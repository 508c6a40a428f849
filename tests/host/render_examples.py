"""Runs example workflows of the bundled models in a real ComfyUI and saves their pictures as the .jpg beside them.

`python tests/host/render_examples.py [COMFYUI_FOLDER [NAME ...]]`; all of them where no name is given. The help pages
show the same pictures, smaller: `python tests/host/render_examples.py --help-pictures` makes those anew. Examples of
models that have to be downloaded show what their guidance does to the bundled one: `... --counterparts`. The icon and
the banner of the registry: `... --registry-pictures`.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from server import ROOT, install, needs_download, serve, to_prompt

sys.path.insert(0, str(ROOT))

from sdg_core.avatars import Pull, World, WorldName, open_world, sample, seeded_noise
from sdg_core.avatars.demo import find_render
from sdg_core.pictures import draw_table, write_image

SEEDS = (2, 3)
"""Of the counterparts' pictures."""


def grid(pictures: list[Image.Image], gap: int = 8) -> Image.Image:
    """Two columns on white, each picture 256 px wide; one picture alone as it is, as wide as two."""
    if len(pictures) == 1:
        (alone,) = pictures
        return alone.resize((2 * 256, round(2 * 256 * alone.height / alone.width)), Image.Resampling.LANCZOS)
    pictures = [picture.resize((256, 256), Image.Resampling.LANCZOS) for picture in pictures]
    w, h = pictures[0].size
    rows = (len(pictures) + 1) // 2
    sheet = Image.new("RGB", (2 * w + 3 * gap, rows * h + (rows + 1) * gap), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (gap + (i % 2) * (w + gap), gap + (i // 2) * (h + gap)))
    return sheet


def help_pictures() -> None:
    """web/docs/<example>.jpg for the help pages, of the pictures beside the examples."""
    for path in sorted((ROOT / "example_workflows").glob("*.jpg")):
        if any(path.name in page.read_text(encoding="utf-8") for page in (ROOT / "web/docs").glob("*.md")):
            picture = Image.open(path)
            picture.thumbnail((400, 400), Image.Resampling.LANCZOS)
            picture.save(ROOT / "web/docs" / path.name, quality=85)


def counterparts() -> None:
    """The .jpg of every example whose models have to be downloaded."""
    world = open_world(WorldName(model="v", route="noisy linear"))
    for name, (needed, rows, draw) in COUNTERPARTS.items():
        pictures = torch.nn.functional.interpolate(draw(world), scale_factor=2, mode="bicubic").clamp(-1, 1)
        card = draw_table(pictures.unflatten(0, (2, 2)), rows, [f"needs {needed}", "here: bundled avatars"])
        card.save(ROOT / f"example_workflows/{name}.jpg", quality=85)


BANNER = (
    "a person with glasses",
    "a person with green hair\na person with yellow background",
    "a drawing in the style of pixel art",
    "a person with a hat\na person with purple background",
    "a person with pink hair",
    "a person with a beard\na person with blue background",
    "a line drawing",
)
"""The wishes of its columns, each line one."""


def registry_pictures() -> None:
    """docs/icon.png, 256 px, and docs/banner.png, 21:9: a column for each wish, a row for each seed."""
    world = open_world(WorldName(model="v", route="noisy linear"))
    columns = []
    for wish in BANNER:
        lines = wish.split("\n")
        pulls = tuple(world.text(line, among=len(lines)) for line in lines)
        columns.append(torch.cat([drawn(world, pulls, seed) for seed in range(3)], dim=2))
    banner = torch.nn.functional.interpolate(torch.cat(columns, dim=3), size=(540, 1260), mode="bicubic").clamp(-1, 1)
    write_image(ROOT / "docs/banner.png", banner[0])
    side = columns[1].shape[3]
    icon = torch.nn.functional.interpolate(columns[1][:, :, :side], scale_factor=2, mode="bicubic").clamp(-1, 1)
    write_image(ROOT / "docs/icon.png", icon[0])


Wanted = Callable[[World, torch.Tensor], tuple[Pull, ...]]
"""What a picture follows, given a reference (3, H, W)."""


def beside_reference(wanted: Wanted, world: World, **look: object) -> torch.Tensor:
    """A reference, an unguided picture, that one guided, and another (4, 3, H, W)."""
    reference = find_render(world, **look)
    return torch.cat(
        [reference[None], drawn(world, ()), *(drawn(world, wanted(world, reference), seed) for seed in SEEDS)]
    )


def frames(world: World) -> torch.Tensor:
    """The same two pictures under one text, and under another (4, 3, H, W)."""
    texts = [(world.text(f"a person with {colour} background"),) for colour in ("blue", "yellow")]
    return torch.cat([drawn(world, text, seed) for text in texts for seed in SEEDS])


def drawn(world: World, pulls: tuple[Pull, ...], seed: int = SEEDS[0]) -> torch.Tensor:
    """One picture (1, 3, H, W)."""
    channels, size, _ = world.denoiser.shape
    return sample(world, pulls, seeded_noise([seed], size, channels), steps=30, seed=seed).clamp(-1, 1)


def text_and_style(world: World, reference: torch.Tensor) -> tuple[Pull, ...]:
    return world.text("a person with glasses", among=2), Pull("style", reference, 2000.0)


COUNTERPARTS: dict[str, tuple[str, list[str], Callable[[World], torch.Tensor]]] = {
    "sd15_text_and_style": (
        "SD1.5",
        ["style, and a picture without guidance", 'by that style and "glasses"'],
        partial(beside_reference, text_and_style, style="ink", background="pink"),
    ),
    "sdxl_style": (
        "SDXL",
        ["reference, and a picture without guidance", "by the reference's style"],
        partial(beside_reference, lambda world, picture: (Pull("style", picture),), style="ink", background="yellow"),
    ),
    "sd3_content": (
        "SD3",
        ["reference, and a picture without guidance", "by what the reference shows"],
        partial(beside_reference, lambda world, picture: (Pull("content", picture),), style="toon"),
    ),
    "flux_structure": (
        "Flux",
        ["reference, and a picture without guidance", "by the reference's structure"],
        partial(beside_reference, lambda world, picture: (Pull("structure", picture),), style="flat", hat=True),
    ),
    "wan_frames": ("Wan", ['some frames: "blue background"', 'others: "yellow background"'], frames),
}
"""Of each example the model that it needs, the names of two rows, and what draws their four pictures."""


def main(host: Path, names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        install(Path(folder))
        with serve(host, Path(folder)) as server:
            info = server.get("/object_info")
            for path in sorted((ROOT / "example_workflows").glob("*.json")):
                workflow = json.loads(path.read_text())
                if needs_download(workflow) or (names and path.stem not in names):
                    continue
                entry = server.run(to_prompt(workflow, info))
                files = server.pictures(entry)
                if not files:
                    raise RuntimeError(f"{path.name} gave no picture: {json.dumps(entry['status'])}")
                grid([Image.open(io.BytesIO(f)).convert("RGB") for f in files]).save(
                    path.with_suffix(".jpg"), quality=90
                )
                print(path.with_suffix(".jpg").name)


if __name__ == "__main__":
    if "--help-pictures" in sys.argv:
        help_pictures()
    elif "--counterparts" in sys.argv:
        counterparts()
    elif "--registry-pictures" in sys.argv:
        registry_pictures()
    else:
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path.home() / "comfy/ComfyUI", sys.argv[2:])
