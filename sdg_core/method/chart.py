"""A report as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from .report import GuidanceReport, Number, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_report(report: GuidanceReport) -> Image.Image:
    """Scores, sizes with the cap, angles and times over the run; means, with the range over pictures shaded."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes seconds, so at first use
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), dpi=100, layout="constrained")
    figure.suptitle(report.lines()[0])
    scores, sizes, angles, times = figure.subplots(2, 2).flat
    _plot_scores(scores, report)
    _plot_sizes(sizes, report)
    _plot_angles(angles, report)
    _plot_times(times, report)
    for plot in (scores, sizes, angles, times):
        plot.set(xlabel="part of the run", xlim=(0, 1))
        plot.grid(alpha=0.3)
        if plot.get_legend_handles_labels()[0]:
            plot.legend(fontsize="small")
    canvas: Any = FigureCanvasAgg(figure)  # its methods come without types
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _plot_scores(plot: Axes, report: GuidanceReport) -> None:
    for number, part in enumerate(report.guidances):
        _line(plot, report.percent, part.score, f"{number + 1}. {part.name}", f"C{number}")
    plot.set(ylabel="score")


def _plot_sizes(plot: Axes, report: GuidanceReport) -> None:
    for number, part in enumerate(report.guidances):
        if part.size.known:
            _line(plot, report.percent, part.size, f"{number + 1}. {part.name}", f"C{number}")
    if report.sigma:
        _line(plot, report.percent, report.pull, "all", "black")
    if report.cap is not None:
        plot.axhline(report.cap, color="tab:gray", linestyle="--", label="cap")
    bound = [(p, v) for p, v, c in zip(report.percent, report.pull.mean, report.capped.mean, strict=True) if c]
    if bound:
        plot.plot(*zip(*bound, strict=True), "v", color="tab:red", label="the cap bound")
    plot.set(ylabel="shift / model's own step", ylim=(0, None))


def _plot_angles(plot: Axes, report: GuidanceReport) -> None:
    for number, angle in enumerate(report.angles):
        if angle.cosine.known:
            first, second = (k + 1 for k in angle.between)
            _line(plot, report.percent, angle.cosine, f"{first} and {second}", f"C{number}")
    plot.axhline(0, color="tab:gray", linewidth=1)
    plot.set(ylabel="cosine of gradients", ylim=(-1.05, 1.05))


def _plot_times(plot: Axes, report: GuidanceReport) -> None:
    for number, part in enumerate(report.guidances):
        took = Series(tuple((1000 * value,) for value in part.seconds))
        _line(plot, report.percent, took, f"{number + 1}. {part.name}", f"C{number}")
    model = Series(tuple((None if value is None else 1000 * value,) for value in report.model_seconds))
    if model.known:
        _line(plot, report.percent, model, "the model", "black")
    plot.set(ylabel="ms", ylim=(0, None))


def _line(plot: Axes, percent: Sequence[float], series: Series, label: str, colour: str) -> None:
    """The mean over the run; evaluations at the same part of it stand in the order of time."""
    plot.plot(percent, _gaps(series.mean), ".-", label=label, color=colour, linewidth=1, markersize=4)
    known = [[value for value in row if value is not None] for row in series.each]
    low, high = ([pick(row) if row else None for row in known] for pick in (min, max))
    plot.fill_between(percent, _gaps(low), _gaps(high), color=colour, alpha=0.15, linewidth=0)


def _gaps(values: Sequence[Number]) -> list[float]:
    """NaN for None: matplotlib leaves it out."""
    return [float("nan") if value is None else value for value in values]
