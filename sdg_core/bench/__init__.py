"""How fast guidance is: beside the model's own step, beside other ways to guide, and what it gets per second.

``steps`` times guidance by itself, ``compiled`` the same through torch.compile, ``unet`` a guided step of a UNet of
SD1.5's size, ``world`` what each way to guide reaches in the same time on the bundled world, ``training`` a fine-tuning
step; ``peers`` are the other ways, ``rows`` how all of it is measured.
"""

from collections.abc import Callable, Sequence

from .rows import Row, as_json, as_markdown, machine

__all__ = ["SUITES", "Row", "as_json", "as_markdown", "machine", "measure"]

Measure = Callable[[int, int, Callable[[str], object]], list[Row]]
"""(rounds, samples, progress) -> rows. What they need is imported at their first use."""


def _steps(rounds: int, samples: int, progress: Callable[[str], object]) -> list[Row]:
    from .steps import step_rows

    progress("guidance by itself")
    return step_rows(rounds)


def _unet(rounds: int, samples: int, progress: Callable[[str], object]) -> list[Row]:
    import torch

    from .unet import unet_rows

    batches = (1, 4) if torch.cuda.is_available() else (1,)
    return [row for batch in batches for row in unet_rows(rounds, batch, progress=progress)]


def _world(rounds: int, samples: int, progress: Callable[[str], object]) -> list[Row]:
    from .world import world_rows

    return world_rows(samples, rounds, progress=progress)


def _training(rounds: int, samples: int, progress: Callable[[str], object]) -> list[Row]:
    from .training import training_rows

    progress("fine-tuning")
    return training_rows(rounds)


def _compiled(rounds: int, samples: int, progress: Callable[[str], object]) -> list[Row]:
    from .compiled import compiled_rows

    progress("guidance by itself, compiled")
    return compiled_rows(rounds)


SUITES: dict[str, tuple[str, Measure]] = {
    "steps": ("guidance by itself", _steps),
    "unet": ("a guided step of SD1.5's size beside an unguided one and peers (ComfyUI's UNet)", _unet),
    "world": ("accuracy of this package and its peers at equal time", _world),
    "compiled": ("guidance by itself, with the image tower compiled (torch.compile)", _compiled),
    "training": ("a fine-tuning step beside open_clip's own", _training),
}
"""What is measured, in words, and by what."""


def measure(
    names: Sequence[str], rounds: int, samples: int, progress: Callable[[str], object] = lambda what: None
) -> list[Row]:
    """The rows of some suites. ``progress`` is told what is being measured."""
    return [row for name in names for row in SUITES[name][1](rounds, samples, progress)]
