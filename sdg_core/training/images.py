"""Pictures to train and measure on: a folder of any pictures that Pillow reads, or WebDataset shards.

Every sample is a function of its number in the run (``draw``) alone: which picture, which crop, whether mirrored. So a
resumed run sees what an uninterrupted one sees, and two processes see what one with the doubled batch sees.
"""

from __future__ import annotations

import functools
import io
import itertools
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from ..files import printable
from .extras import extra

UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises for damaged files


@dataclass(frozen=True)
class Augment:
    """``crop``: the least part of the area that a random square crop keeps, 1 for the whole centre square.
    ``flip``: mirror half of the pictures."""

    crop: float = 0.7
    flip: bool = True

    @property
    def variants(self) -> int:
        """How many versions of a picture there are, 0 for endlessly many."""
        return 0 if self.crop < 1 else 1 + self.flip


PLAIN = Augment(1.0, False)


class Sample(NamedTuple):
    """picture (3, S, S) uint8; ``which`` of the set; ``mirrored``; ``draw``, its number in the run; names of unreadable
    files that it stands in for."""

    picture: Tensor
    which: int
    mirrored: bool
    draw: int
    skipped: tuple[str, ...]


class Batch(NamedTuple):
    """Samples stacked: picture (B, 3, S, S) uint8, which, mirrored and draw (B,), all unreadable names."""

    picture: Tensor
    which: Tensor
    mirrored: Tensor
    draw: Tensor
    skipped: tuple[str, ...]


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples -> batch."""
    return Batch(
        torch.stack([sample.picture for sample in samples]),
        torch.tensor([sample.which for sample in samples]),
        torch.tensor([sample.mirrored for sample in samples]),
        torch.tensor([sample.draw for sample in samples]),
        tuple(name for sample in samples for name in sample.skipped),
    )


def mixed(*numbers: int) -> int:
    """One well-mixed seed (63 bits) from several integers, the same on every machine."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


class ImageSet(Dataset[Sample]):
    """Pictures by number of the run: ``[index, draw]`` is a Sample of side ``size``.

    ``sources``: files, or pictures (H, W, 3) uint8 in memory.
    """

    def __init__(self, sources: Sequence[Path | Tensor], size: int, augment: Augment, seed: int = 0) -> None:
        self.sources, self.size, self.augment, self.seed = list(sources), size, augment, seed

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """Raises ValueError where no picture of the set can be read. An unreadable one gives way to the next."""
        wanted, draw = key
        skipped = []
        for index in ((wanted + i) % len(self) for i in range(len(self))):
            source = self.sources[index]
            try:
                image = Image.fromarray(source.numpy()) if isinstance(source, Tensor) else read_picture(source)
            except UNREADABLE:
                skipped.append(str(source))
                continue
            picture, mirrored = cut(image, self.size, self.augment, mixed(self.seed, draw))
            return Sample(picture, index, mirrored, draw, tuple(skipped))
        raise ValueError(f"None of the {len(self)} pictures can be read, {skipped[0]} among them.")

    def first(self, count: int) -> ImageSet:
        """Only the first pictures."""
        return ImageSet(self.sources[:count], self.size, self.augment, self.seed)


class ImageShards(IterableDataset[Sample]):
    """A stream of Samples from WebDataset shards (tar files), split over processes and workers, shuffled by seed.

    ``names`` of single shards, as ``shard_names`` gives them. Passes over them without end. There must be at least one
    for every process and worker.
    """

    def __init__(self, names: Sequence[str], size: int, augment: Augment, seed: int = 0, shuffle: bool = True):
        self.names, self.size, self.augment, self.seed, self.shuffle = list(names), size, augment, seed, shuffle

    def __iter__(self) -> Iterator[Sample]:
        webdataset = extra("webdataset")
        for passed in itertools.count():
            stream = webdataset.WebDataset(
                self.names, shardshuffle=1000 if self.shuffle else False, seed=self.seed + passed, empty_check=False,
                nodesplitter=webdataset.split_by_node, handler=webdataset.warn_and_continue,
            )  # fmt: skip
            if self.shuffle:
                stream = stream.shuffle(1000, seed=self.seed + passed)
            drawn = 0
            for sample in self._samples(stream, passed):
                drawn += 1
                yield sample
            if not drawn:
                raise ValueError(
                    f"{self.names[0]} and its kin hold no picture that can be read. Wanted: tars of pictures."
                )

    def _samples(self, stream: Iterable[Mapping[str, Any]], passed: int) -> Iterator[Sample]:
        skipped: tuple[str, ...] = ()
        for fields in stream:
            data = next((v for k, v in fields.items() if f".{k.rsplit('.', 1)[-1]}".lower() in extensions()), None)
            if data is None:
                continue
            draw = mixed(self.seed, passed, *fields["__key__"].encode()) >> 8
            try:
                image = read_picture(io.BytesIO(data))
            except UNREADABLE:
                skipped += (fields["__key__"],)
                continue
            picture, mirrored = cut(image, self.size, self.augment, draw)
            yield Sample(picture, -1, mirrored, draw, skipped)
            skipped = ()


def shard_names(urls: str) -> list[str]:
    """The single shards of a pattern such as "data-{000..012}.tar". Raises FileNotFoundError for missing files."""
    names = list(extra("webdataset").shardlists.expand_urls(urls))
    missing = [
        name for name in names if "://" not in name and not name.startswith("pipe:") and not os.path.isfile(name)
    ]
    if missing:
        raise FileNotFoundError(f"There is no shard {missing[0]} ({len(missing)} of {len(names)} are missing).")
    return names


class Draws(torch.utils.data.Sampler[list[tuple[int, int]]]):
    """Batches of (index, draw): every pass over ``count`` pictures in its own seeded order, from step to step.

    ``batch_size`` is that of all processes together.
    """

    def __init__(self, count: int, batch_size: int, steps: range, seed: int) -> None:
        self.count, self.batch_size, self.steps, self.seed = count, batch_size, steps, seed
        self.drop_last = True

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        at, order = -1, torch.empty(0)
        for step in self.steps:
            batch = []
            for draw in range(step * self.batch_size, (step + 1) * self.batch_size):
                if draw // self.count != at:
                    at = draw // self.count
                    order = torch.randperm(self.count, generator=torch.Generator().manual_seed(mixed(self.seed, at)))
                batch.append((int(order[draw % self.count]), draw))
            yield batch


@functools.cache
def extensions() -> set[str]:
    """File name endings (".png") of everything that Pillow reads."""
    known = Image.registered_extensions()
    return {ending for ending, kind in known.items() if kind in Image.OPEN and kind not in ("PDF", "MPEG", "HDF5")}


def find_images(folder: Path) -> list[Path]:
    """All picture files under a folder, sorted. Raises FileNotFoundError or ValueError where there is none."""
    if not os.path.isdir(folder):  # Path.is_dir raises for names that are too long
        raise FileNotFoundError(
            f"There is no folder {printable(folder)}. Give a folder of pictures, or WebDataset shards (.tar)."
        )
    known = extensions()
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in known and p.is_file())
    if not files:
        others = sum(p.is_file() for p in folder.rglob("*"))
        what = f"{others} files, but none is a picture" if others else "no files"
        raise ValueError(f"The folder {folder} holds {what}. Wanted: pictures, such as .png, .jpg or .webp.")
    return files


def is_shards(source: str) -> bool:
    """Whether a source of pictures names WebDataset shards and not a folder."""
    return ".tar" in source and not os.path.isdir(source)


def held_out(count: int, wanted: int, seed: int) -> tuple[list[int], list[int]]:
    """Numbers 0..count-1 split at random into (training, held out); at most a fifth is held out."""
    order = list(range(count))
    random.Random(mixed(seed)).shuffle(order)
    kept = min(wanted, count // 5)
    return sorted(order[kept:]), sorted(order[:kept])


def read_picture(source: Path | io.BytesIO) -> Image.Image:
    """A picture as RGB, upright, on white where it is transparent. Raises what Pillow raises for damaged files."""
    with Image.open(source) as file:
        image = ImageOps.exif_transpose(file)
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def cut(image: Image.Image, size: int, augment: Augment, seed: int) -> tuple[Tensor, bool]:
    """A square part of a picture as (3, size, size) uint8, and whether it is mirrored."""
    chance = random.Random(seed)
    side = min(image.size)
    if augment.crop < 1:
        side = max(1, round(side * chance.uniform(augment.crop, 1) ** 0.5))
        left, top = (chance.randint(0, whole - side) for whole in image.size)
    else:
        left, top = ((whole - side) // 2 for whole in image.size)
    if (side, side) != (size, size) or image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    mirrored = augment.flip and chance.random() < 0.5
    pixels = np.asarray(ImageOps.mirror(image) if mirrored else image)
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1), mirrored
