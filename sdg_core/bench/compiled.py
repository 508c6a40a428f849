"""What torch.compile makes of the image tower: a guided step's correction by an RN50, compiled over not compiled.

On a GPU the gain is in launches saved, on a CPU in norms and activations that come together.
"""

from __future__ import annotations

import copy
import time

from ..method import StyleGuidance
from .rows import Row, by_turns
from .steps import SHALLOW, Bed, noisy_clip, picture, text


def compiled_rows(rounds: int, architecture: str = "RN50") -> list[Row]:
    """`text_compiled_over_text`, `style_compiled_over_style`, and `compile_seconds` of the first pass."""
    encoder = noisy_clip(architecture)
    other = copy.deepcopy(encoder)
    other.compile_tower()
    plain, compiled = Bed.of(encoder), Bed.of(other)
    words, style = text(encoder), StyleGuidance(picture(4), SHALLOW)
    start = time.perf_counter()
    compiled.step(words)()
    first = time.perf_counter() - start
    tasks = {
        f"{name}{suffix}": bed.step(guidance)
        for name, guidance in (("text", words), ("style", style))
        for suffix, bed in (("", plain), (", compiled", compiled))
    }
    took = by_turns(tasks, rounds)
    return [
        *(Row(f"{name}_compiled_over_{name}", took[f"{name}, compiled"] / took[name], "x", rounds)
          for name in ("text", "style")),
        Row("compile_seconds", first, "s", 1),
    ]  # fmt: skip
