"""The method: what a noisy picture is, what guidance reads in it, and the correction of a step. The paper's formulas.

Read in this order: ``schedule`` (x_t = alpha x_0 + sigma eps), ``views`` (what an encoder looks at), ``features``
(what it gives), ``controls`` and ``blend`` (when and how a score counts), ``guidance`` and ``classes`` (the scores F),
``gradient`` (grad F), ``strength`` (how large a shift), ``run``, ``references`` and ``targets`` (what is remembered),
``guide`` (denoised + sigma^2 / alpha grad F). ``report`` and ``chart`` say what a run did. Beside it stand ``ilvr``
(the low frequencies of a reference, without a gradient) and ``device`` (how nothing in a step waits for a GPU).
It knows encoders by their contract only, and no host.
"""

from .blend import Blend
from .chart import draw_report
from .classes import ClassGuidance
from .controls import CHOICES, EASES, Augment, Choice, Crop, Curve, Ease, Goal, Region, Several, feathered
from .device import Early, Placed, brought, is_out_of_memory, version_of
from .features import Encoder, Features, NoisyEncoder, embedding, gram, joined, squared_distance, squared_size, unit
from .gradient import Sight, Target, as_normal, gradient_scope, score_gradient
from .guidance import (
    DEFAULT_INTERVAL,
    DEFAULT_SCALE,
    PACES,
    ContentGuidance,
    DirectionGuidance,
    Fade,
    Guidance,
    Kind,
    Pace,
    StructureGuidance,
    StyleGuidance,
    Term,
    TextGuidance,
    check_layers,
    combine,
    fit,
)
from .guide import encoder_noise, guidance_gradient, guidance_shift, guide
from .ilvr import LowFrequencies, check_range, low_pass
from .precision import added, precise
from .references import REFERENCE_SEED, Batch
from .report import GuidanceReport, name_of
from .run import Budget, GuidanceRun, StepTrace
from .schedule import Convention, TimestepTable, betas, expand, timestep_embedding
from .strength import Strength, rms
from .targets import cache_of
from .views import PIXEL_VIEW, DecodedView, LatentFormat, LinearView, PixelView, View, averaging_gain, resize

__all__ = [
    "CHOICES",
    "DEFAULT_INTERVAL",
    "DEFAULT_SCALE",
    "EASES",
    "PACES",
    "PIXEL_VIEW",
    "REFERENCE_SEED",
    "Augment",
    "Batch",
    "Blend",
    "Budget",
    "Choice",
    "ClassGuidance",
    "ContentGuidance",
    "Convention",
    "Crop",
    "Curve",
    "DecodedView",
    "DirectionGuidance",
    "Early",
    "Ease",
    "Encoder",
    "Fade",
    "Features",
    "Goal",
    "Guidance",
    "GuidanceReport",
    "GuidanceRun",
    "Kind",
    "LatentFormat",
    "LinearView",
    "LowFrequencies",
    "NoisyEncoder",
    "Pace",
    "PixelView",
    "Placed",
    "Region",
    "Several",
    "Sight",
    "StepTrace",
    "Strength",
    "StructureGuidance",
    "StyleGuidance",
    "Target",
    "Term",
    "TextGuidance",
    "TimestepTable",
    "View",
    "added",
    "as_normal",
    "averaging_gain",
    "betas",
    "brought",
    "cache_of",
    "check_layers",
    "check_range",
    "combine",
    "draw_report",
    "embedding",
    "encoder_noise",
    "expand",
    "feathered",
    "fit",
    "gradient_scope",
    "gram",
    "guidance_gradient",
    "guidance_shift",
    "guide",
    "is_out_of_memory",
    "joined",
    "low_pass",
    "name_of",
    "precise",
    "resize",
    "rms",
    "score_gradient",
    "squared_distance",
    "squared_size",
    "timestep_embedding",
    "unit",
    "version_of",
]
