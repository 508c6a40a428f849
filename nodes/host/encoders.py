"""What the pack's two sockets carry: encoders under the host's memory management, and guidance with its encoders."""

from __future__ import annotations

from dataclasses import dataclass

import comfy.model_management as mm
import comfy.model_patcher

from ...sdg_core.encoders import CleanCLIP
from ...sdg_core.method import Fade, Term
from ...sdg_core.models import Classifier
from ..inputs import shown
from .memory import make_resident


@dataclass(frozen=True, eq=False)
class HostGuidance:
    """What the SDG_GUIDANCE socket carries: terms, and the patchers through which the host loads their encoders."""

    terms: tuple[Term, ...]
    patchers: tuple[comfy.model_patcher.ModelPatcher, ...]


@dataclass(frozen=True, eq=False)
class EncoderPair:
    """Two encoders in one NOISY_CLIP socket: one reads at high noise, the other at low, and they cross over."""

    parts: tuple[tuple[comfy.model_patcher.ModelPatcher, Fade], ...]


NoisyCLIPValue = comfy.model_patcher.ModelPatcher | EncoderPair
"""What the NOISY_CLIP socket carries."""


def encoder_parts(value: NoisyCLIPValue) -> tuple[tuple[comfy.model_patcher.ModelPatcher, Fade | None], ...]:
    """The encoders of a socket, each with where it reads. Raises ValueError for anything else."""
    return value.parts if isinstance(value, EncoderPair) else ((single_encoder(value, "noisy_clip"), None),)


def single_encoder(value: NoisyCLIPValue, name: str) -> comfy.model_patcher.ModelPatcher:
    """The one encoder of a socket. Raises ValueError for a pair, and for what is no encoder."""
    if isinstance(value, EncoderPair):
        raise ValueError(f"The input {name} is a crossfade of two encoders already. Connect a single one.")
    if not isinstance(value, comfy.model_patcher.ModelPatcher) or not isinstance(value.model, CleanCLIP):
        raise ValueError(
            f"The input {name} got {shown(value)}; wanted a NOISY_CLIP. Connect Load Noisy CLIP or Load CLIP (SDG)."
        )
    return value


def to_classifier(value: object) -> comfy.model_patcher.ModelPatcher:
    """The classifier of a socket. Raises ValueError for anything else."""
    if not isinstance(value, comfy.model_patcher.ModelPatcher) or not isinstance(value.model, Classifier):
        raise ValueError(
            f"The input classifier got {shown(value)}; wanted an SDG_CLASSIFIER. Connect Load Classifier (SDG)."
        )
    return value


def to_guidance(value: object, name: str = "guidance") -> HostGuidance:
    """What a guidance socket carries. Raises ValueError for anything else."""
    if not isinstance(value, HostGuidance):
        raise ValueError(
            f"The input {name} got {shown(value)}; wanted an SDG_GUIDANCE. Connect one, such as Text Guidance (SDG)."
        )
    return value


def load_encoder(patcher: comfy.model_patcher.ModelPatcher) -> CleanCLIP:
    """The encoder, whole, on its device, for use outside a sampling run."""
    mm.load_models_gpu([patcher])
    make_resident(patcher.model, patcher.load_device)
    return patcher.model
