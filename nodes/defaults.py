"""Default scales of the guidance nodes, and their range. The scores are dimensionless, see ``sdg_core.guidance``."""

TEXT_SCALE = 150.0
CONTENT_SCALE = 200.0
STRUCTURE_SCALE = 1000.0
STYLE_SCALE = 3000.0

STRUCTURE_LAYERS = "4"
STYLE_LAYERS = "4,5"

SCALE_MIN, SCALE_MAX, SCALE_STEP = -10_000.0, 100_000.0, 10.0

CAP = 1.0
