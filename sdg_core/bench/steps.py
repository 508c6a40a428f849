"""What guidance costs by itself, of an RN50 at 224 px that is aware of noise. Its weights are random: speed does not
depend on them.

Ratios to text guidance, whose one pass there and back through the whole encoder is the floor: of several guidances, of
shallow layers, of batches, of references, of the image tower in bf16, with the angle by which that turns the
correction. References are cached unless a row says "first run".
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import open_clip
import torch
from torch import Tensor

from ..encoders import CleanCLIP, NoisyCLIP, from_clean
from ..method import (
    ContentGuidance,
    Convention,
    Guidance,
    GuidanceRun,
    StructureGuidance,
    StyleGuidance,
    Term,
    TextGuidance,
    guidance_shift,
    unit,
)
from ..method.targets import cache_of
from .rows import Row, by_turns

SIDE = 224
SIGMA = 2.0
SHALLOW = (1, 2, 3)
"""Layers of style guidance that need no deeper ones."""


def noisy_clip(architecture: str = "RN50") -> NoisyCLIP:
    """A noisy CLIP of an open_clip architecture with random weights, on the device that there is."""
    torch.manual_seed(0)
    model, config = open_clip.create_model(architecture), open_clip.get_model_config(architecture)
    size = model.visual.image_size
    side = size if isinstance(size, int) else size[0]
    clean = CleanCLIP(model, side, build={**config, "architecture": architecture})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return from_clean(clean).requires_grad_(False).to(device)


@dataclass(frozen=True)
class Bed:
    """An encoder, and pictures of a size (B, 3, side, side) that are guided by it."""

    encoder: NoisyCLIP
    x: Tensor
    denoised: Tensor

    @classmethod
    def of(cls, encoder: NoisyCLIP, batch: int = 1, side: int = SIDE) -> Bed:
        generator = torch.Generator().manual_seed(1)
        device = next(encoder.parameters()).device
        x, denoised = (torch.randn(batch, 3, side, side, generator=generator).to(device) for _ in range(2))
        return cls(encoder, x, denoised)

    def step(self, *guidances: Guidance, first: bool = False) -> Callable[[], Tensor | None]:
        """One guided step of these, without the model: its correction; ``first``: as in the first run, with no
        reference cached."""
        terms = tuple(Term(guidance, self.encoder, 100.0) for guidance in guidances)
        run = GuidanceRun(terms, Convention.VE, lambda p: 10 * (1 - p))
        sigma = torch.full((len(self.x),), SIGMA)

        def once() -> Tensor | None:
            if first:
                cache_of(self.encoder).clear()
            return guidance_shift(self.denoised, self.x, sigma, run)

        return once


def picture(seed: int, count: int = 1) -> Tensor:
    return torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def text(encoder: NoisyCLIP, count: int = 1) -> TextGuidance:
    width = encoder.config.clip["embed_dim"]
    return TextGuidance(unit(torch.randn(count, width, generator=torch.Generator().manual_seed(2))))


def four(encoder: NoisyCLIP) -> tuple[Guidance, ...]:
    """Text, and content, structure and style of one picture."""
    image = picture(3)
    return text(encoder), ContentGuidance(image), StructureGuidance(image, (3,)), StyleGuidance(image, (2,))


def step_rows(rounds: int, architecture: str = "RN50", batches: Sequence[int] = (1, 2, 4)) -> list[Row]:
    """The rows that the module names."""
    encoder = noisy_clip(architecture)
    bed, new = Bed.of(encoder), Bed.of(copy.deepcopy(encoder))  # a cache for each
    rounded = copy.deepcopy(encoder)
    rounded.compute_in(torch.bfloat16)
    coarse = Bed.of(rounded)
    whole, parts = four(encoder), {"content": 1, "structure": 2, "style": 3}
    tasks = {
        "text": bed.step(whole[0]),
        "text, bf16": coarse.step(whole[0]),
        "four": bed.step(*whole),
        "four, first run": new.step(*whole, first=True),
        "style, layers 1 to 3": bed.step(StyleGuidance(picture(4), SHALLOW)),
        **{name: bed.step(whole[k]) for name, k in parts.items()},
        **{f"{name}, first run": new.step(whole[k], first=True) for name, k in parts.items()},
        **{f"content, {n} references": bed.step(ContentGuidance(picture(5, n))) for n in (1, 4, 16)},
    }
    took = by_turns(tasks, rounds)
    sizes = {f"batch {n}": Bed.of(encoder, n).step(whole[0]) for n in batches}
    sides = {f"{side} px": Bed.of(encoder, 1, side).step(whole[0]) for side in (SIDE, 2 * SIDE, 4 * SIDE)}
    grown = by_turns({**sizes, **sides}, rounds)
    base = took["text"]

    def ratio(name: str, value: float) -> Row:
        return Row(name, value, "x", rounds)

    names = {
        "four_over_one": "four",
        "four_over_one_first_run": "four, first run",
        "style_over_text": "style, layers 1 to 3",
    }
    return [
        Row("text_ms", 1000 * base, "ms", rounds),
        *(ratio(name, took[task] / base) for name, task in names.items()),
        ratio("bf16_over_fp32", took["text, bf16"] / base),
        Row("bf16_degrees", degrees(bed.step(whole[0])(), coarse.step(whole[0])()), "degrees", 1),
        *(ratio(f"{name}_over_text", took[name] / base) for name in ("content", "structure")),
        *(ratio(f"{name}_over_text_first_run", took[f"{name}, first run"] / base) for name in parts),
        *(ratio(f"references_{n}_over_1", took[f"content, {n} references"] / took["content, 1 references"])
          for n in (4, 16)),
        *(ratio(f"batch_{n}_per_picture", grown[f"batch {n}"] / n / grown["batch 1"]) for n in batches[1:]),
        *(ratio(f"side_{side}_over_{SIDE}", grown[f"{side} px"] / grown[f"{SIDE} px"])
          for side in (2 * SIDE, 4 * SIDE)),
    ]  # fmt: skip


def degrees(a: Tensor | None, b: Tensor | None) -> float:
    """The angle between two corrections."""
    assert a is not None
    assert b is not None
    return math.degrees(math.acos(min(1.0, float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0)))))
