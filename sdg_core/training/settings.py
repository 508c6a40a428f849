"""What a fine-tuning is asked for, and where it stands."""

from __future__ import annotations

import math
from dataclasses import dataclass

LAYERS = ("all", "last", "conditioning")
TIMESTEPS = ("uniform", "angle")


@dataclass(frozen=True)
class Settings:
    """One fine-tuning.

    ``batch_size``: pictures of a step over all processes, every one a negative of the others. ``micro_batch``: pictures
    of one process that go forward together, 0 for all; the contrastive batch stays whole. ``layers``: train "all",
    the "last" stage, or only the "conditioning" (which always learns). ``timesteps``: "uniform" over the schedule, as
    in the paper, or uniform in the "angle" arctan(sigma / alpha), which spends less on pure noise.
    """

    steps: int = 10_000
    batch_size: int = 256
    micro_batch: int = 0
    learning_rate: float = 3e-4
    weight_decay: float = 0.01
    warmup: float = 0.05
    ema: float = 0.999
    cosine_weight: float = 30.0
    layers: str = "all"
    timesteps: str = "uniform"
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for settings that can't work."""
        if self.batch_size < 2:
            raise ValueError(
                f"Got a batch of {self.batch_size}; wanted 2 or more: a contrastive loss tells a picture from the "
                "others of its batch. 64 and more learn better."
            )
        if self.steps < 1:
            raise ValueError(f"Got {self.steps} steps; wanted 1 or more.")
        for name, value, known in (("layers", self.layers, LAYERS), ("timesteps", self.timesteps, TIMESTEPS)):
            if value not in known:
                raise ValueError(f'Got {name} "{value}"; wanted one of: {", ".join(known)}.')


@dataclass(frozen=True)
class Progress:
    """Where a fine-tuning stands after a step. ``loss`` and its parts are means over the batch of all processes."""

    step: int
    steps: int
    loss: float
    info_nce: float
    cosine: float
    images_per_second: float
    seconds_left: float


def warm_cosine(step: int, settings: Settings) -> float:
    """Factor on the learning rate: up over the warm-up, then half a cosine to zero at the last step."""
    warm = max(1, round(settings.warmup * settings.steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, settings.steps - warm)))
