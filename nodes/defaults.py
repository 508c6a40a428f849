"""Defaults of the guidance nodes, and the range of their scales. The measured values are ``sdg_core.method``'s."""

from ..sdg_core.method import DEFAULT_INTERVAL, DEFAULT_SCALE, StructureGuidance, StyleGuidance

TEXT_SCALE = DEFAULT_SCALE["text"]
CONTENT_SCALE = DEFAULT_SCALE["content"]
STRUCTURE_SCALE = DEFAULT_SCALE["structure"]
STYLE_SCALE = DEFAULT_SCALE["style"]
DIRECTION_SCALE = DEFAULT_SCALE["text"]  # the edits of the bundled world take 600

TEXT_INTERVAL = DEFAULT_INTERVAL["text"]
CONTENT_INTERVAL = DEFAULT_INTERVAL["content"]
STRUCTURE_INTERVAL = DEFAULT_INTERVAL["structure"]
STYLE_INTERVAL = DEFAULT_INTERVAL["style"]
DIRECTION_INTERVAL = (0.0, 1.0)

CLASS_SCALE = 10.0
"""What guided-diffusion recommends for its unconditional 256 px model."""

STRUCTURE_LAYERS = ",".join(map(str, StructureGuidance.layers))
STYLE_LAYERS = ",".join(map(str, StyleGuidance.layers))
STYLE_CENTRED = StyleGuidance.centred

SCALE_MIN, SCALE_MAX, SCALE_STEP = -10_000.0, 100_000.0, 10.0

CAP = 1.0
