"""The renders of the 128 px world, and the captions that its CLIP learns from. Labels are those of data.py.

`python world_data.py --out DIR` draws the three splits with two processes. Salts of their own: no drawing's seed is one
of the pixel world's. Files of a split: ``<split>_128.npy`` and ``<split>_64.npy``, (N, S, S, 3) uint8, and
``<split>_labels.npy`` (N, 8) int8, -1 where the drawing does not show an attribute.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import random
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from data import LABELS, draw
from torch import Tensor

SPLITS = {"test": 8_000, "judge": 20_000, "train": 90_000}
SIZE, HATS, PART = 128, 0.5, 500
STYLE_WORDS = {
    "ink": ("ink drawing", "line drawing", "drawing in ink"),
    "pixel": ("pixel art", "8-bit picture", "picture of big pixels"),
    "sketch": ("sketch", "hand-drawn sketch", "doodle"),
    "blob": ("blob", "blob creature", "faceless blob"),
    "flat": ("flat cartoon", "flat illustration", "plain cartoon"),
    "grin": ("grinning cartoon", "big head cartoon", "caricature"),
    "toon": ("toon", "comic character", "comic portrait"),
    "icon": ("icon", "simple icon", "profile icon"),
}
COLOUR_WORDS = {"gray": ("gray", "grey"), "purple": ("purple", "violet"), "blond": ("blond", "blonde")}
PHRASES = {
    "background": ("{} background", "a {} backdrop", "{} behind"),
    "hair": ("{} hair", "{} coloured hair"),
    ("length", "short"): ("short hair", "a short haircut", "cropped hair"),
    ("length", "long"): ("long hair", "a long mane", "flowing hair"),
    ("expression", "happy"): ("a happy face", "a smile", "a cheerful look"),
    ("expression", "sad"): ("a sad face", "a frown", "an unhappy look"),
    ("glasses", True): ("glasses", "spectacles", "eyeglasses"),
    ("glasses", False): ("no glasses", "bare eyes"),
    ("beard", True): ("a beard", "facial hair", "whiskers"),
    ("beard", False): ("no beard", "a shaven chin"),
    ("hat", True): ("a hat", "headgear", "a covered head"),
    ("hat", False): ("no hat", "a bare head"),
}
FLAGS = ("glasses", "beard", "hat")


def render(out: Path, processes: int = 2) -> None:
    """Every split, without a drawing that an earlier split (or the same one) has."""
    seen: set[bytes] = set()
    out.mkdir(parents=True, exist_ok=True)
    for split, count in SPLITS.items():
        jobs = [(f"world-{split}", start, PART, SIZE, HATS) for start in range(0, count, PART)]
        pictures = np.lib.format.open_memmap(out / "part.npy", "w+", np.uint8, (count, SIZE, SIZE, 3))
        labels, kept = [], 0
        with ProcessPoolExecutor(processes) as pool:
            for images, rows in pool.map(draw, jobs):
                digests = [hashlib.sha256(image.tobytes()).digest() for image in images]
                fresh = [not (d in seen or seen.add(d)) for d in digests]
                pictures[kept : kept + sum(fresh)] = images[fresh]
                labels.append(rows[fresh])
                kept += sum(fresh)
        whole = np.lib.format.open_memmap(out / f"{split}_128.npy", "w+", np.uint8, (kept, SIZE, SIZE, 3))
        small = np.empty((kept, SIZE // 2, SIZE // 2, 3), np.uint8)
        for start in range(0, kept, PART):
            part = pictures[start : min(start + PART, kept)]
            whole[start : start + len(part)] = part
            small[start : start + len(part)] = halved(part)
        np.save(out / f"{split}_64.npy", small)
        np.save(out / f"{split}_labels.npy", np.concatenate(labels))
        (out / "part.npy").unlink()
        print(f"{split}: {kept} images, {count - kept} duplicates left out", flush=True)


def halved(images: np.ndarray) -> np.ndarray:
    """Pictures (N, S, S, 3) averaged to half their size, as uint8."""
    N, S = images.shape[:2]
    return np.rint(images.reshape(N, S // 2, 2, S // 2, 2, 3).mean(axis=(2, 4), dtype=np.float32)).astype(np.uint8)


def load(data: Path, split: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, size, size, 3) uint8, read from disk as they are used, and labels (N, 8) of a split."""
    return np.load(data / f"{split}_{size}.npy", mmap_mode="r"), np.load(data / f"{split}_labels.npy")


def in_memory(pictures: np.ndarray) -> Tensor:
    """(N, 3, S, S) uint8."""
    return torch.from_numpy(np.asarray(pictures).transpose(0, 3, 1, 2).copy())


def caption(labels: np.ndarray, rng: random.Random, keep: float = 0.4) -> str:
    """One random caption of an avatar: a subset of its attributes, in random order and in random words for each."""
    row = {name: values[v] for (name, values), v in zip(LABELS.items(), labels, strict=True) if v >= 0}
    said = [name for name in row if rng.random() < keep]
    said = [name for name in said if name not in FLAGS or row[name] or rng.random() < 0.3]
    if not said:
        said = [rng.choice([name for name in row if name not in FLAGS or row[name]])]
    subject = rng.choice(("a person", "someone", "a face", "an avatar"))
    if "style" in said:
        subject = rng.choice(("", "a ", "an avatar, ", "a picture, ")) + rng.choice(STYLE_WORDS[row["style"]])
    parts = [rng.choice(phrases(name, row[name])) for name in said if name != "style"]
    rng.shuffle(parts)
    if parts and "style" not in said and rng.random() < 0.4:
        return " and ".join(parts)
    joined = (", " if rng.random() < 0.5 else " and ").join(parts)
    return f"{subject}{' with ' + joined if joined else ''}"


@functools.cache
def phrases(name: str, value: object) -> tuple[str, ...]:
    """All that a caption may say of one attribute: ('background', 'gray') -> ('gray background', ...)."""
    if name == "style":
        return STYLE_WORDS[str(value)]
    if name in PHRASES:
        words = COLOUR_WORDS.get(str(value), (str(value),))
        return tuple(form.format(word) for form in PHRASES[name] for word in words)
    return PHRASES[name, value]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    render(parser.parse_args().out)
