"""Measured retrieval and losses as words and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from .retrieval import Retrieval

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def retrieval_lines(rows: Sequence[Sequence[float]]) -> list[str]:
    """``NoisyCLIPConfig.retrieval`` in a few words; nothing where nothing was measured."""
    few = [row for row in rows if row[0] in (300, 500, 700)]
    if not few:
        return []
    return ["found again, noisy (clean) CLIP:", ", ".join(f"t {t:.0f}: {a:.0%} ({b:.0%})" for t, a, b, *_ in few)]


def draw_chart(curve: Sequence[Retrieval], title: str, losses: Sequence[float] = ()) -> Image.Image:
    """Retrieval@1 and @5 over t, noisy beside clean, and the loss over the steps where given."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes seconds, so at first use
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9 if curve and losses else 6, 4), dpi=100, layout="constrained")
    figure.suptitle(title)
    plots = iter(figure.subplots(1, bool(curve) + bool(losses) or 1, squeeze=False)[0])
    if curve:
        _plot_curve(next(plots), curve)
    if losses:
        plot = next(plots)
        plot.plot(range(1, len(losses) + 1), losses, color="tab:orange", linewidth=1)
        plot.set(xlabel="step", ylabel="loss")
        plot.grid(alpha=0.3)
    canvas: Any = FigureCanvasAgg(figure)  # its methods come without types
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _plot_curve(plot: Axes, curve: Sequence[Retrieval]) -> None:
    t = [row.t for row in curve]
    for name, colour in (("noisy", "tab:blue"), ("clean", "tab:gray")):
        for k, line in ((1, "-"), (5, "--")):
            values = [getattr(row, f"{name}_at_{k}") for row in curve]
            plot.plot(t, values, line, color=colour, label=f"{name} CLIP @{k}")
    plot.set(xlabel="t", ylabel="retrieval", ylim=(0, 1.02), xlim=(0, 1000))
    plot.legend()
    plot.grid(alpha=0.3)
