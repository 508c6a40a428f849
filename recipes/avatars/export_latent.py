"""Exports the latent test world to sdg_core/avatars/latent: fp16 safetensors, 20 MB at most.

`python export_latent.py --out DIR [--to DIR]` reads the checkpoints in --out; models that are not there are left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import train_autoencoder
import train_latent
import train_noisy_clip_linear
from export import average

from sdg_core.avatars import BUNDLED
from sdg_core.encoders import TOKEN_IDS, save_noisy_clip
from sdg_core.files import load, save
from sdg_core.method import LatentFormat

LIMIT = 20_000_000  # bytes


def latent_format(out: Path) -> LatentFormat:
    """The trained autoencoder's latent space."""
    kept = torch.load(out / "latent_format.pt", weights_only=True)
    return LatentFormat(
        "avatars",
        train_autoencoder.LATENT_CHANNELS,
        tuple(map(tuple, kept["factors"].tolist())),
        tuple(kept["bias"].tolist()),
        float(kept["scale"]),
        float(kept["shift"]),
        downscale=2,
    )


def export_noisy_clip(out: Path, to: Path) -> None:
    """The NoisyCLIP with its measured retrieval, its token table as small as the pixel one's."""
    model = train_noisy_clip_linear.student(train_noisy_clip_linear.view_of(out))
    model.load_state_dict(average(out, "noisy_clip_linear"))
    rows = torch.load(out / "noisy_clip_linear_retrieval.pt", weights_only=True)
    model.config = dataclasses.replace(model.config, retrieval=tuple(rows))
    _, pixel = load(BUNDLED / "noisy_clip.safetensors", "noisy_clip")
    ids = pixel[TOKEN_IDS]
    table = model.text.token_embedding
    table.weight = torch.nn.Parameter(pixel["text.token_embedding.weight"], requires_grad=False)
    save_noisy_clip(to / "noisy_clip.safetensors", model, ids)


def export(out: Path, to: Path) -> None:
    to.mkdir(parents=True, exist_ok=True)
    space = latent_format(out)
    for prediction in train_latent.IMAGES:
        if (out / f"latent_{prediction}.pt").exists():
            config = dataclasses.replace(train_latent.CONFIG, prediction=prediction, latent_format=space)
            save(to / f"{prediction}.safetensors", "adm", asdict(config), average(out, f"latent_{prediction}"))
    halves = {"width": train_autoencoder.WIDTH, "encoder_blocks": (1, 2), "decoder_blocks": (2, 1), "channels": 4}
    save(to / "autoencoder.safetensors", "autoencoder", halves, average(out, "autoencoder"))
    export_noisy_clip(out, to)
    total = 0
    for file in sorted(to.glob("*.safetensors")):
        total += file.stat().st_size
        print(f"{file.stat().st_size:10d} bytes  {file.name}")
    print(f"{total:10d} bytes in all")
    if total > LIMIT:
        raise SystemExit(f"The latent world takes {total} bytes; wanted at most {LIMIT}.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--to", type=Path, default=BUNDLED / "latent")
    args = parser.parse_args()
    export(args.out, args.to)
