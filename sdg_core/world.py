"""The bundled avatars world, ready to sample: model, noisy CLIP, judge and held-out renders."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .checkpoint import BUNDLED, load_adm, load_judge, load_noisy_clip
from .guidance import (
    DEFAULT_INTERVAL,
    DEFAULT_SCALE,
    ContentGuidance,
    Guidance,
    StructureGuidance,
    StyleGuidance,
    Term,
    TextGuidance,
)
from .guide import GuidanceRun, Strength
from .judge import Judge
from .noisy_clip import NoisyCLIP
from .sampling import ADMDenoiser, Step, euler, euler_ancestral, guided, initial, normal_sigmas, paper, percent_to_sigma
from .schedule import Convention

Sampler = Literal["euler", "euler_ancestral", "paper"]
SAMPLERS: tuple[Sampler, ...] = ("euler", "euler_ancestral", "paper")
Kind = Literal["text", "content", "structure", "style"]


@dataclass(frozen=True)
class Pull:
    """One wish in plain words: a kind, a prompt or a reference picture (3, h, w) in -1..1, and a scale."""

    kind: Kind
    target: str | Tensor
    scale: float | None = None


@dataclass(frozen=True)
class World:
    """Model, encoder and what measures them. ``renders`` (N, 3, 32, 32) in -1..1, ``labels`` (N, A), -1 unknown."""

    denoiser: ADMDenoiser
    encoder: NoisyCLIP
    judge: Judge
    renders: Tensor
    labels: Tensor

    def term(self, pull: Pull) -> Term:
        """The pull as a term, at the default scale and interval of its kind unless it has its own scale."""
        scale = DEFAULT_SCALE[pull.kind] if pull.scale is None else pull.scale
        return Term(self._guidance(pull), self.encoder, scale, *DEFAULT_INTERVAL[pull.kind])

    def _guidance(self, pull: Pull) -> Guidance:
        if isinstance(pull.target, str):
            with torch.no_grad():
                return TextGuidance(self.encoder.encode_text([pull.target]))
        kinds = {"content": ContentGuidance, "structure": StructureGuidance, "style": StyleGuidance}
        return kinds[pull.kind](pull.target[None])


def load_world(folder: Path = BUNDLED) -> World:
    """The world of the bundled files. Raises FileNotFoundError, naming the file, where one is missing."""
    renders, labels = load_renders(folder / "renders.png")
    return World(
        ADMDenoiser(load_adm(folder / "adm.safetensors")),
        load_noisy_clip(folder / "noisy_clip.safetensors"),
        load_judge(folder / "judge.safetensors"),
        renders,
        labels,
    )


def save_renders(path: Path, images: np.ndarray, labels: np.ndarray, columns: int = 64) -> None:
    """Renders (N, S, S, 3) uint8 as one sheet, their labels (N, A) in its text chunk. N is a multiple of columns."""
    from PIL.PngImagePlugin import PngInfo

    N, S = images.shape[:2]
    sheet = images.reshape(N // columns, columns, S, S, 3).transpose(0, 2, 1, 3, 4).reshape(-1, columns * S, 3)
    info = PngInfo()
    info.add_text("labels", json.dumps({"size": S, "labels": labels.tolist()}), zip=True)
    Image.fromarray(sheet).save(path, pnginfo=info, optimize=True)


def load_renders(path: Path) -> tuple[Tensor, Tensor]:
    """The sheet of ``save_renders``: pictures (N, 3, S, S) in -1..1 and labels (N, A)."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}. Wanted: the sheet of renders that comes with the models.")
    with Image.open(path) as file:
        note = json.loads(file.text["labels"])
        sheet = torch.from_numpy(np.asarray(file.convert("RGB")).copy())
    S = note["size"]
    tiles = sheet.unflatten(0, (-1, S)).unflatten(2, (-1, S)).permute(0, 2, 4, 1, 3).flatten(0, 1)
    return tiles.float() / 127.5 - 1, torch.tensor(note["labels"])


def batch_noise(seed: int, count: int, size: int) -> Tensor:
    """The noise that ComfyUI draws for a batch of this seed: (count, 3, size, size)."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def seeded_noise(seeds: Sequence[int], size: int) -> Tensor:
    """Noise of single pictures, each from its own seed, so that a batch equals single runs."""
    return torch.cat([batch_noise(seed, 1, size) for seed in seeds])


def sample(
    world: World,
    pulls: Sequence[Pull],
    noise: Tensor,
    *,
    steps: int = 50,
    sampler: Sampler = "euler_ancestral",
    strength: Strength | None = None,
    seed: int = 0,
    progress: Callable[[Step], None] = lambda step: None,
) -> Tensor:
    """Guided pictures (B, 3, S, S), about -1..1, from unit noise of the same shape.

    ``seed`` drives the noise that ancestral samplers add (the first noise is given). ``strength`` does not apply to
    the paper's sampler.
    """
    table = world.denoiser.table
    terms = tuple(world.term(pull) for pull in pulls)
    run = GuidanceRun(terms, Convention.VE, percent_to_sigma(table), strength or Strength())
    sigmas = normal_sigmas(table, steps)
    x = initial(noise, sigmas[0])
    generator = torch.Generator().manual_seed(seed + 1)  # ComfyUI's step noise on the CPU starts one seed further
    if sampler == "paper":
        process = paper(world.denoiser.predict, x, sigmas, generator, run)
    elif sampler == "euler_ancestral":
        process = euler_ancestral(guided(world.denoiser, run), x, sigmas, generator)
    else:
        process = euler(guided(world.denoiser, run), x, sigmas)
    for step in process:
        progress(step)
        x = step.x
    return x
