"""What fulfils which contract. Nothing here runs: mypy reads it (see ``test_types.py``)."""

from __future__ import annotations

from sdg_core import (
    ADMDenoiser,
    CleanCLIP,
    ContentGuidance,
    DecodedView,
    DirectionGuidance,
    GuidanceRun,
    LinearView,
    NoisyCLIP,
    PixelView,
    StructureGuidance,
    StyleGuidance,
    TextGuidance,
    guided,
)
from sdg_core.method import ClassGuidance, Encoder, Guidance, NoisyEncoder, View
from sdg_core.models import Classifier
from sdg_core.models.samplers import Denoise, Predict


def encoders(noisy: NoisyCLIP, clean: CleanCLIP) -> tuple[Encoder, Encoder]:
    return noisy, clean


def noisy_encoders(noisy: NoisyCLIP, classifier: Classifier) -> tuple[NoisyEncoder, NoisyEncoder]:
    return noisy, classifier


def guidances(
    text: TextGuidance,
    content: ContentGuidance,
    structure: StructureGuidance,
    style: StyleGuidance,
    direction: DirectionGuidance,
    one_class: ClassGuidance,
) -> tuple[Guidance, ...]:
    return text, content, structure, style, direction, one_class


def views(pixels: PixelView, linear: LinearView, decoded: DecodedView) -> tuple[View, View, View]:
    return pixels, linear, decoded


def denoisers(adm: ADMDenoiser, run: GuidanceRun) -> tuple[Denoise, Denoise, Predict]:
    return adm, guided(adm, run), adm.predict
