"""Runs example workflows of the bundled models in a real ComfyUI and saves their pictures as the .jpg beside them.

`python tests/host/render_examples.py [COMFYUI_FOLDER [NAME ...]]`; all of them where no name is given. The help pages
show the same pictures, smaller: `python tests/host/render_examples.py --help-pictures` makes those anew.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
from pathlib import Path

from PIL import Image
from server import ROOT, install, needs_download, serve, to_prompt


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
    else:
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path.home() / "comfy/ComfyUI", sys.argv[2:])
