"""Exports the 128 px world to sdg_core/avatars/latent: fp16 safetensors, and a sheet of held-out renders. The pixel
world's ADM and NoisyCLIP, trained on the same renders, go to the folder above.

`python export_world.py --data DIR --out DIR [--to DIR]` reads the checkpoints in --out; what is not there is left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import small_clip
import train_adm
import train_classifier
import train_world_autoencoder
import train_world_judge
import train_world_latent
import train_world_noisy_clip
from data import LABELS
from export import average
from train_world_clip import vocabulary
from world_data import in_memory, load

from sdg_core.avatars import LATENT, Judge, save_held_out, save_renders
from sdg_core.encoders import save_noisy_clip
from sdg_core.files import save
from sdg_core.method import LatentFormat

RENDERS = 256  # held-out renders on the sheet, at 128 px: references


def part(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The entries under a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def latent_format(out: Path) -> LatentFormat:
    """The trained autoencoder's latent space."""
    kept = torch.load(out / "world_format.pt", weights_only=True)
    return LatentFormat(
        train_world_noisy_clip.NAME,
        train_world_autoencoder.CHANNELS,
        tuple(map(tuple, kept["factors"].tolist())),
        tuple(kept["bias"].tolist()),
        float(kept["scale"]),
        float(kept["shift"]),
        downscale=train_world_autoencoder.DOWNSCALE,
    )


def export_autoencoder(data: Path, out: Path, to: Path) -> None:
    """The autoencoder, and in its config how models see its latents."""
    state = part(average(out, "world_autoencoder"), "autoencoder.")
    config = {**train_world_autoencoder.CONFIG, "latent_format": asdict(latent_format(out))}
    save(to / "autoencoder.safetensors", "autoencoder", config, state)


def export_latent(data: Path, out: Path, to: Path) -> None:
    config = dataclasses.replace(train_world_latent.CONFIG, time="angle", latent_format=latent_format(out))
    save(to / "model.safetensors", "adm", asdict(config), average(out, "world_latent"))


def export_adm(data: Path, out: Path, to: Path) -> None:
    save(to.parent / "adm.safetensors", "adm", asdict(train_adm.CONFIG), average(out, "adm"))


def export_clip(data: Path, out: Path, to: Path) -> None:
    used = vocabulary(load(data, "train", 64)[1])
    state = {**train_world_noisy_clip.trained_clip(out, len(used)).state_dict(), "token_ids": used}
    save(to / "clip.safetensors", "clip", {"clip": small_clip.CONFIG, "noise_size": 64}, state)


def export_noisy_clip(world: str, file: str, data: Path, out: Path, to: Path) -> None:
    """A NoisyCLIP with its measured retrieval."""
    used = vocabulary(load(data, "train", 64)[1])
    model = train_world_noisy_clip.student(out, len(used), train_world_noisy_clip.view_of(out, world))
    model.load_state_dict(average(out, f"noisy_clip_{world}"))
    rows = torch.load(out / f"noisy_clip_{world}_retrieval.pt", weights_only=True)
    model.config = dataclasses.replace(model.config, retrieval=tuple(rows))
    save_noisy_clip(to / file, model, used)


@torch.no_grad()
def export_judge(data: Path, out: Path, to: Path) -> None:
    """The judge, and what it sees in all held-out renders."""
    config = {"attributes": LABELS, **train_world_judge.CONFIG}
    judge, state = Judge(LABELS, **train_world_judge.CONFIG), average(out, "world_judge")
    save(to / "judge.safetensors", "judge", config, state)
    judge.load_state_dict({k: v.half().float() for k, v in state.items()})
    pictures, labels = load(data, "test", 64)
    features = [judge.features(x.float() / 127.5 - 1) for x in in_memory(pictures).split(250)]
    save_held_out(to / "held_out.safetensors", torch.cat(features), torch.from_numpy(labels))


def export_classifier(data: Path, out: Path, to: Path) -> None:
    config = train_classifier.config(train_world_noisy_clip.view_of(out, "latents"))
    save(to / "classifier.safetensors", "classifier", asdict(config), average(out, "classifier"))


def export_renders(data: Path, out: Path, to: Path) -> None:
    images, labels = load(data, "test", 128)
    save_renders(to / "renders.png", np.asarray(images[:RENDERS]), labels[:RENDERS], columns=16)


PARTS = {
    "world_autoencoder": export_autoencoder,
    "world_latent": export_latent,
    "world_clip": export_clip,
    "noisy_clip_latents": functools.partial(export_noisy_clip, "latents", "noisy_clip.safetensors"),
    "noisy_clip_pixels": functools.partial(export_noisy_clip, "pixels", "../noisy_clip.safetensors"),
    "adm": export_adm,
    "world_judge": export_judge,
    "classifier": export_classifier,
}


def export(data: Path, out: Path, to: Path) -> None:
    to.mkdir(parents=True, exist_ok=True)
    export_renders(data, out, to)
    for name, write in PARTS.items():
        if (out / f"{name}.pt").exists():
            write(data, out, to)
    for file in sorted(to.iterdir()):
        print(f"{file.stat().st_size / 2**20:6.2f} MiB  {file.name}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--to", type=Path, default=LATENT)
    args = parser.parse_args()
    export(args.data, args.out, args.to)
