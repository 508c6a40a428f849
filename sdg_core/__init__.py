"""Semantic Diffusion Guidance without a host: what a Python user, the nodes and the commands import.

Rooms, each importing only from those after it: ``commands``; ``avatars`` and ``training``; ``models``, ``encoders`` and
``presets``; ``files``, ``pictures`` and ``method``, where the formulas are. Heavy packages (open_clip, Accelerate,
matplotlib) are imported at first use.
"""

from .avatars import BUNDLED, Pull, World, load_world, sample, seeded_noise
from .encoders import CleanCLIP, NoisyCLIP, load_noisy_clip, open_clip_models, save_noisy_clip
from .method import (
    ContentGuidance,
    Convention,
    DecodedView,
    DirectionGuidance,
    Features,
    GuidanceRun,
    LinearView,
    PixelView,
    Strength,
    StructureGuidance,
    StyleGuidance,
    Term,
    TextGuidance,
    combine,
    guide,
)
from .models import ADMDenoiser, euler, euler_ancestral, guided, load_adm
from .pictures import draw_table, read_image, write_image

__all__ = [
    "BUNDLED",
    "ADMDenoiser",
    "CleanCLIP",
    "ContentGuidance",
    "Convention",
    "DecodedView",
    "DirectionGuidance",
    "Features",
    "GuidanceRun",
    "LinearView",
    "NoisyCLIP",
    "PixelView",
    "Pull",
    "Strength",
    "StructureGuidance",
    "StyleGuidance",
    "Term",
    "TextGuidance",
    "World",
    "combine",
    "draw_table",
    "euler",
    "euler_ancestral",
    "guide",
    "guided",
    "load_adm",
    "load_noisy_clip",
    "load_world",
    "open_clip_models",
    "read_image",
    "sample",
    "save_noisy_clip",
    "seeded_noise",
    "write_image",
]
