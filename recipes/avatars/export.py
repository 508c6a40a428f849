"""Exports the pixel world's judge to sdg_core/avatars, as fp16 safetensors, and a sheet of held-out renders.

`python export.py --data DIR --out DIR [--to DIR]` reads the checkpoints in --out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from data import LABELS, load

from sdg_core.avatars import BUNDLED, save_renders
from sdg_core.files import save

RENDERS = 2048  # held-out renders on the sheet: references, and the judge's measure of what is real


def average(out: Path, name: str) -> dict[str, torch.Tensor]:
    """The EMA weights of a training."""
    return torch.load(out / f"{name}.pt", weights_only=True)["ema"]


def export(data: Path, out: Path, to: Path) -> None:
    to.mkdir(parents=True, exist_ok=True)
    save(to / "judge.safetensors", "judge", {"attributes": LABELS}, average(out, "judge"))
    images, labels = load(data, "test")
    save_renders(to / "renders.png", images[:RENDERS], labels[:RENDERS])
    for file in sorted(to.iterdir()):
        print(f"{file.stat().st_size / 2**20:6.2f} MiB  {file.name}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--to", type=Path, default=BUNDLED)
    args = parser.parse_args()
    export(args.data, args.out, args.to)
