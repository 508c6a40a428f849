"""Encoders: what reads pictures. CLIPs of open_clip with their towers opened up, clean or aware of noise; their files.

``towers`` opens an image tower (a new kind of tower goes there), ``clip`` makes an encoder of it, ``conditioning``
and ``noisy_clip`` let it know the noise, ``open_clip_models`` and ``published`` say where weights come from.
"""

from ..method import resize
from . import open_clip_models
from .clip import CleanCLIP, Unfilled, build_clip
from .conditioning import TimeConditioning
from .files import TOKEN_IDS, load_clip, load_noisy_clip, save_noisy_clip, write_retrieval
from .noisy_clip import NoisyCLIP, NoisyCLIPConfig, from_clean, noisy, with_text
from .towers import ResNetTower, TimmTower, Tower, ViTTower

__all__ = [
    "TOKEN_IDS",
    "CleanCLIP",
    "NoisyCLIP",
    "NoisyCLIPConfig",
    "ResNetTower",
    "TimeConditioning",
    "TimmTower",
    "Tower",
    "Unfilled",
    "ViTTower",
    "build_clip",
    "from_clean",
    "load_clip",
    "load_noisy_clip",
    "noisy",
    "open_clip_models",
    "resize",
    "save_noisy_clip",
    "with_text",
    "write_retrieval",
]
