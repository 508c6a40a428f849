"""Pictures for training: every sample by its number, folders, shards, and who is held out."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from sdg_core.training import PLAIN, Augment, ImageSet, ImageShards, find_images, held_out, is_shards, shard_names
from sdg_core.training.images import Draws, collate, mixed, read_picture


def colour(value: int, size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.new("RGB", size, (value, value, value))


@pytest.fixture
def shards(tmp_path) -> Path:
    """Three shards of ten pictures, gray by their number, one in each broken, with captions beside."""
    for shard in range(3):
        with tarfile.open(tmp_path / f"data-{shard}.tar", "w") as tar:
            for i in range(10):
                number, file = shard * 10 + i, io.BytesIO()
                colour(number * 8).save(file, "PNG")
                for ending, data in (("png", b"broken" if i == 5 else file.getvalue()), ("txt", b"words")):
                    info = tarfile.TarInfo(f"{number:03d}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return tmp_path


def test_every_pass_draws_every_picture_once_in_an_order_of_its_own():
    batches = list(Draws(10, 4, range(5), seed=3))
    order = [index for batch in batches for index, _ in batch]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]
    assert [draw for batch in batches for _, draw in batch] == list(range(20))
    assert list(Draws(10, 4, range(2, 5), seed=3)) == batches[2:]


def test_a_sample_depends_on_its_number_alone():
    pictures = [torch.randint(0, 256, (20, 30, 3), dtype=torch.uint8) for _ in range(3)]
    images = ImageSet(pictures, 16, Augment(0.5), seed=1)
    first, again, other = images[1, 7], images[1, 7], images[1, 8]
    assert torch.equal(first.picture, again.picture)
    assert not torch.equal(first.picture, other.picture)
    assert first.picture.shape == (3, 16, 16)


def test_crops_keep_their_share_and_half_is_mirrored():
    ramp = torch.arange(100, dtype=torch.uint8).view(1, 100, 1).expand(100, 100, 3).contiguous()
    images = ImageSet([ramp], 100, Augment(0.25))
    samples = [images[0, draw] for draw in range(200)]
    spans = [int(s.picture.max()) - int(s.picture.min()) for s in samples]
    assert 45 < min(spans) < 60
    assert max(spans) > 90
    assert 70 < sum(s.mirrored for s in samples) < 130
    for sample in samples[:20]:
        row = sample.picture[0, 50].float()
        assert (row[-1] < row[0]) == sample.mirrored


def test_the_plain_picture_is_the_centre_square():
    picture = torch.zeros(4, 8, 3, dtype=torch.uint8)
    picture[:, 2:6] = 200
    sample = ImageSet([picture], 4, PLAIN)[0, 0]
    assert (sample.picture == 200).all()
    assert not sample.mirrored


def test_pictures_are_upright_and_on_white(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert np.asarray(read_picture(tmp_path / "clear.png")).min() == 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    colour(9, (4, 8)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_picture(tmp_path / "turned.jpg").size == (8, 4)


def test_folders_are_searched_to_the_bottom(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    colour(1).save(tmp_path / "a" / "b" / "x.WEBP", "WEBP")
    colour(1).save(tmp_path / "y.bmp")
    (tmp_path / "notes.txt").write_text("words")
    assert [p.name for p in find_images(tmp_path)] == ["x.WEBP", "y.bmp"]


def test_a_folder_whose_name_is_too_long_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        find_images(tmp_path / ("n" * 5000))
    with pytest.raises(FileNotFoundError, match="There is no shard"):
        shard_names("n" * 5000 + ".tar")


def test_held_out_pictures_are_never_trained_on():
    kept, measured = held_out(100, 1000, seed=1)
    assert len(measured) == 20
    assert sorted(kept + measured) == list(range(100))
    assert held_out(100, 5, seed=1)[1] == held_out(100, 5, seed=1)[1]
    assert held_out(100, 0, seed=1)[1] == []


def test_seeds_are_mixed():
    assert len({mixed(a, b) for a in range(30) for b in range(30)}) == 900
    assert mixed(1, 2) == mixed(1, 2) < 2**63


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_give_every_readable_picture_once_a_pass(shards, workers):
    names = shard_names(str(shards / "data-{0..2}.tar"))
    stream = ImageShards(names, 8, PLAIN, shuffle=False)
    loader = iter(DataLoader(stream, batch_size=1, num_workers=workers, collate_fn=collate))
    grays = [int(next(loader).picture[0, 0, 0, 0]) // 8 for _ in range(54)]
    assert set(grays) == {n for n in range(30) if n % 10 != 5}
    if workers == 0:
        assert set(Counter(grays).values()) == {2}


def test_shards_are_shuffled_by_the_seed_and_name_what_is_broken(shards):
    names = shard_names(str(shards / "data-{0..2}.tar"))

    def first(seed: int) -> tuple[list[int], set[str]]:
        stream = iter(ImageShards(names, 8, PLAIN, seed))
        samples = [next(stream) for _ in range(27)]
        return [int(s.picture[0, 0, 0]) // 8 for s in samples], {name for s in samples for name in s.skipped}

    order, broken = first(1)
    assert order == first(1)[0] != first(2)[0]
    assert broken <= {"005", "015", "025"}
    assert len(broken) >= 2


def test_missing_shards_are_named(shards):
    with pytest.raises(FileNotFoundError, match=r"data-3\.tar \(1 of 2 are missing\)"):
        shard_names(str(shards / "data-{2..3}.tar"))
    assert is_shards("data-{0..2}.tar")
    assert not is_shards(str(shards))
