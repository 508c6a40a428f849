"""Training: a clean CLIP learns to read noise, from pictures without captions; and the proof that it does.

``images`` draws pictures, ``sight`` says what the student sees of them, ``learner`` makes a step, ``finetune`` runs
them all, ``states`` keeps and resumes; ``retrieval`` measures and ``chart`` shows. ``extras`` asks for libraries that
only training needs.
"""

from .chart import draw_chart, retrieval_lines
from .extras import MissingExtra
from .finetune import Finetuning, accelerator
from .images import PLAIN, Augment, ImageSet, ImageShards, find_images, held_out, is_shards, shard_names
from .retrieval import Retrieval, as_rows, measure_retrieval
from .settings import LAYERS, TIMESTEPS, Progress, Settings
from .sight import StudentSight
from .states import kept_states

__all__ = [
    "LAYERS",
    "PLAIN",
    "TIMESTEPS",
    "Augment",
    "Finetuning",
    "ImageSet",
    "ImageShards",
    "MissingExtra",
    "Progress",
    "Retrieval",
    "Settings",
    "StudentSight",
    "accelerator",
    "as_rows",
    "draw_chart",
    "find_images",
    "held_out",
    "is_shards",
    "kept_states",
    "measure_retrieval",
    "retrieval_lines",
    "shard_names",
]
