"""The bundled world of avatars: small trained models, a judge that shares no weights with them, and what they measure.

``files`` says where the models are, ``world`` opens and samples them, ``judge`` and ``metrics`` measure pictures,
``jobs`` samples many, ``evaluate`` measures guidance, ``comparison`` sets it beside other systems, ``relative`` says
what relative strength does, ``demo`` draws the first picture.
"""

from .demo import Chosen, draw_demo
from .evaluate import MODEL_SUITES, SUITES, as_json, evaluate
from .files import (
    BUNDLED,
    LATENT,
    NAME,
    HeldOut,
    bundled_latent_encoder,
    latent_model_file,
    latent_space,
    load_bundled_clip,
    load_held_out,
    load_renders,
    save_held_out,
    save_renders,
)
from .jobs import Row, Settings
from .judge import Judge, load_judge
from .world import (
    CLEAN_INTERVAL,
    CLEAN_SCALE,
    NOISY_INTERVAL,
    NOISY_SCALE,
    RELATIVE_CAP,
    RELATIVE_INTERVAL,
    SAMPLERS,
    Pull,
    World,
    WorldName,
    batch_noise,
    load_world,
    open_world,
    sample,
    seeded_noise,
)

__all__ = [
    "BUNDLED",
    "CLEAN_INTERVAL",
    "CLEAN_SCALE",
    "LATENT",
    "MODEL_SUITES",
    "NAME",
    "NOISY_INTERVAL",
    "NOISY_SCALE",
    "RELATIVE_CAP",
    "RELATIVE_INTERVAL",
    "SAMPLERS",
    "SUITES",
    "Chosen",
    "HeldOut",
    "Judge",
    "Pull",
    "Row",
    "Settings",
    "World",
    "WorldName",
    "as_json",
    "batch_noise",
    "bundled_latent_encoder",
    "draw_demo",
    "evaluate",
    "latent_model_file",
    "latent_space",
    "load_bundled_clip",
    "load_held_out",
    "load_judge",
    "load_renders",
    "load_world",
    "open_world",
    "sample",
    "save_held_out",
    "save_renders",
    "seeded_noise",
]
