"""CONDITIONING, for models that take a prompt and for those that don't."""

from __future__ import annotations

from dataclasses import dataclass

import comfy.model_patcher
import torch


@dataclass(frozen=True)
class Conds:
    """What the host's sampler wants, whatever was connected."""

    positive: list
    negative: list
    cfg: float


def blank_conditioning() -> list:
    """CONDITIONING for models that read none, where a sampler node asks for it all the same."""
    return [[torch.zeros(1, 1, 1), {}]]


def conditioning(
    model: comfy.model_patcher.ModelPatcher, positive: list | None, negative: list | None, cfg: float
) -> Conds:
    """Conditioning with blanks where an unconditional model has none; cfg is then off (1), which halves the work.

    Raises ValueError where a model that takes a prompt has none.
    """
    missing = [name for name, cond in (("positive", positive), ("negative", negative)) if cond is None]
    if missing and not getattr(model.model, "unconditional", False):
        raise ValueError(
            f"This model takes prompts, but {' and '.join(missing)} is not connected. "
            "Connect CONDITIONING, for example from CLIP Text Encode."
        )
    blank = blank_conditioning()
    return Conds(
        blank if positive is None else positive,
        blank if negative is None else negative,
        1.0 if negative is None else cfg,
    )
