"""The avatars as arrays: rendered once from SVG, with exact labels and captions.

`python data.py --out DIR` draws the three splits with two processes (about four minutes). With --png, every picture
becomes a file as well, in a folder for each split, as `sdg finetune` reads them.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import subprocess
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
SPLITS = {"train": 64_000, "judge": 32_000, "test": 6_000}  # each with its own salt: no seed is shared
LABELS = {
    "style": ("ink", "pixel", "sketch", "blob", "flat", "grin", "toon", "icon"),
    "background": ("white", "gray", "red", "orange", "yellow", "green", "blue", "purple", "pink"),
    "hair": ("black", "brown", "blond", "red", "gray", "blue", "green", "pink"),
    "length": ("short", "long"),
    "expression": ("sad", "happy"),
    "glasses": (False, True),
    "beard": (False, True),
    "hat": (False, True),
}
HATS = 0.35


def draw(job: tuple[str, int, int, int, float]) -> tuple[np.ndarray, np.ndarray]:
    """Avatars start .. start + count of a split: images (N, size, size, 3) uint8, labels (N, 8) int8, -1 unknown.

    The last of ``job`` is the share of hats on the drawings that can wear one.
    """
    salt, start, count, size, hats = job
    import resvg_py

    command = ["node", "avatars.mjs", salt, str(start), str(count), str(hats)]
    lines = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True).stdout.splitlines()
    images = np.empty((count, size, size, 3), np.uint8)
    labels = np.full((count, len(LABELS)), -1, np.int8)
    for i, line in enumerate(lines):
        row = json.loads(line)
        png = bytes(resvg_py.svg_to_bytes(svg_string=row["svg"], width=128, height=128))
        picture = Image.open(io.BytesIO(png)).convert("RGB")
        images[i] = np.asarray(picture if size == 128 else picture.resize((size, size), Image.Resampling.BOX))
        for j, (name, values) in enumerate(LABELS.items()):
            if row[name] is not None:
                labels[i, j] = values.index(row[name])
    return images, labels


def render(out: Path, size: int, processes: int = 2) -> None:
    """Every split to `<out>/<split>.npz`, without an image that an earlier split (or the same one) has."""
    seen: set[bytes] = set()
    out.mkdir(parents=True, exist_ok=True)
    for split in ("test", "judge", "train"):
        jobs = [(f"avatars-{split}", start, 1000, size, HATS) for start in range(0, SPLITS[split], 1000)]
        with ProcessPoolExecutor(processes) as pool:
            parts = list(pool.map(draw, jobs))
        images, labels = (np.concatenate(column) for column in zip(*parts, strict=True))
        digests = [hashlib.sha256(image.tobytes()).digest() for image in images]
        fresh = [not (d in seen or seen.add(d)) for d in digests]
        np.savez(out / f"{split}.npz", images=images[fresh], labels=labels[fresh])
        print(f"{split}: {sum(fresh)} images, {len(fresh) - sum(fresh)} duplicates left out", flush=True)


def write_pictures(out: Path) -> None:
    """Every picture of the rendered splits as `<out>/<split>/<number>.png`."""
    for split in SPLITS:
        (out / split).mkdir(exist_ok=True)
        for i, image in enumerate(load(out, split)[0]):
            Image.fromarray(image).save(out / split / f"{i:05d}.png")


def load(out: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, size, size, 3) uint8 and labels (N, 8) int8 of a rendered split."""
    with np.load(out / f"{split}.npz") as file:
        return file["images"], file["labels"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--png", action="store_true")
    args = parser.parse_args()
    render(args.out, args.size)
    if args.png:
        write_pictures(args.out)
