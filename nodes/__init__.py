"""ComfyUI adapters. Each node converts, calls one function of ``sdg_core`` and converts back."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .classifier import SDGClassifierGuidance, SDGLoadClassifier
from .compare import SDGGuidanceXY, SDGXYGrid
from .controls import (
    SDGGuidanceAugment,
    SDGGuidanceAway,
    SDGGuidanceBudget,
    SDGGuidanceFrames,
    SDGGuidanceMask,
    SDGGuidanceReferences,
    SDGGuidanceSchedule,
    SDGGuidanceSpeed,
    SDGGuidanceTarget,
)
from .finetune import SDGFinetuneNoisyCLIP, SDGSaveNoisyCLIP
from .guidance import (
    SDGCombineGuidance,
    SDGContentGuidance,
    SDGDirectionGuidance,
    SDGStructureGuidance,
    SDGStyleGuidance,
    SDGTextGuidance,
)
from .host import register_folders, register_routes
from .ilvr import SDGILVRReference
from .loaders import (
    SDGEmptyPixelLatent,
    SDGEncoderCrossfade,
    SDGLoadADM,
    SDGLoadAutoencoder,
    SDGLoadCLIP,
    SDGLoadNoisyCLIP,
)
from .presets import SDGLoadPreset, SDGSavePreset
from .report import SDGGuidanceReport
from .sampling import SDGApplyGuidance, SDGGuidedKSampler, SDGPaperSampler

NODES: list[type[io.ComfyNode]] = [
    SDGLoadNoisyCLIP,
    SDGLoadCLIP,
    SDGEncoderCrossfade,
    SDGLoadADM,
    SDGLoadAutoencoder,
    SDGEmptyPixelLatent,
    SDGTextGuidance,
    SDGContentGuidance,
    SDGStructureGuidance,
    SDGStyleGuidance,
    SDGDirectionGuidance,
    SDGCombineGuidance,
    SDGGuidanceFrames,
    SDGGuidanceSchedule,
    SDGGuidanceSpeed,
    SDGGuidanceMask,
    SDGGuidanceTarget,
    SDGGuidanceAway,
    SDGGuidanceReferences,
    SDGGuidanceAugment,
    SDGGuidanceBudget,
    SDGGuidedKSampler,
    SDGApplyGuidance,
    SDGPaperSampler,
    SDGGuidanceReport,
    SDGGuidanceXY,
    SDGXYGrid,
    SDGFinetuneNoisyCLIP,
    SDGSaveNoisyCLIP,
    SDGLoadClassifier,
    SDGClassifierGuidance,
    SDGILVRReference,
    SDGSavePreset,
    SDGLoadPreset,
]


class SemanticDiffusionGuidance(ComfyExtension):
    """What ComfyUI asks for: the list of nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


def extension() -> SemanticDiffusionGuidance:
    """The extension, with its model folders and routes made known to ComfyUI."""
    register_folders()
    register_routes()
    return SemanticDiffusionGuidance()
