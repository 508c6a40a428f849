"""Curves of running nodes: sent to the browser that queued the prompt, and kept for a page that opens later.

Events go out by the host's own socket, to its client alone, about ten a second; without a client nothing is sent, and
without a server nothing is even computed. What is kept is bounded, in curves and in points of each.
"""

from __future__ import annotations

import math
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ...sdg_core.method import Early, GuidanceRun, StepTrace, name_of
from .text import prompt_server

EVENT = "sdg.curve"
SECONDS_BETWEEN = 0.1
CURVES_KEPT = 64
POINTS_KEPT = 1024
DIGITS = 6
"""Significant digits of what is sent, those of the report."""

Number = float | None
Point = tuple[Number, ...]
"""Step, pull, share of pictures in which the cap bound, then the value of each line."""


@dataclass(frozen=True)
class Heading:
    """What a curve is about. ``kind``: "guidance" or "loss"; ``lines``: a name for each; ``steps``: the run's length.

    ``cap``: the bound of the pull, None where there is none; ``relative``: the pull is set to it, not bound by it.
    """

    kind: str
    lines: tuple[str, ...] = ()
    steps: float = 0
    cap: float | None = None
    relative: bool = False


class Remark(NamedTuple):
    """What is said of a whole run: a name, a value, and more words for who points at it."""

    name: str
    value: str
    title: str


@dataclass
class Curve:
    """The latest run of one node. One of ``every`` points is kept, so that there are at most ``POINTS_KEPT``.

    ``workflow``: the id of the graph that the prompt was made of, None for prompts without one.
    """

    heading: Heading
    node: str
    workflow: str | None
    run: str = field(default_factory=lambda: uuid.uuid4().hex)
    points: list[Point] = field(default_factory=list)
    every: int = 1
    count: int = 0
    done: bool = False
    remark: Remark | None = None

    def add(self, point: Point) -> bool:
        """Keeps a point, if one is due; whether older ones had to go for it."""
        self.count += 1
        if (self.count - 1) % self.every:
            return False
        self.points.append(point)
        if len(self.points) <= POINTS_KEPT:
            return False
        self.points, self.every = self.points[::2], 2 * self.every
        return True

    def end(self, last: Point | None, remark: Remark | None = None) -> None:
        """The run is over. Its last point stays, whether or not it was due."""
        self.remark = remark
        if last is not None and (not self.points or self.points[-1] != last):
            self.points.append(last)
        self.done = True

    def message(self, start: int = 0) -> dict:
        """What the browser is told: all about the curve, and its points from ``start``."""
        about = {"node": self.node, "workflow": self.workflow, "run": self.run, "done": self.done}
        about["remark"] = None if self.remark is None else self.remark._asdict()
        return {**asdict(self.heading), **about, "start": start, "points": self.points[start:]}


class Curves:
    """The latest curves, by workflow and node. Written by the thread that runs nodes, read by the server's."""

    def __init__(self) -> None:
        self.kept: OrderedDict[tuple[str | None, str], Curve] = OrderedDict()
        self.lock = threading.Lock()

    def keep(self, curve: Curve) -> None:
        """Puts a new run in the place of its node's last one, and forgets the oldest where there are too many."""
        key = (curve.workflow, curve.node)
        with self.lock:
            self.kept[key] = curve
            self.kept.move_to_end(key)
            while len(self.kept) > CURVES_KEPT:
                self.kept.popitem(last=False)

    def of(self, workflow: str | None) -> list[dict]:
        """All curves of one workflow, whole."""
        with self.lock:
            return [curve.message() for (of, _), curve in self.kept.items() if of == workflow]


curves = Curves()


class NodeCurve:
    """The curve on a node. ``hidden`` is the node's, with its unique_id."""

    def __init__(self, hidden: object) -> None:
        self.node_id = getattr(hidden, "unique_id", None)

    def begin(self, heading: Heading) -> Drawing:
        """A new curve, in the place of the node's last one."""
        server = prompt_server()
        if server is None or self.node_id is None:
            return Drawing(None, None)
        drawing = Drawing(Curve(heading, str(self.node_id), workflow_of_running_prompt(server)), server)
        curves.keep(drawing.curve)
        drawing.flush()
        return drawing

    def clear(self) -> None:
        """An empty curve: of a run that no guidance acts in."""
        self.begin(Heading("guidance")).end()


class Drawing:
    """One curve while its run goes on. Points are computed when they are sent: on a GPU with the next step's, because
    reading a step's numbers at once would wait for it."""

    def __init__(self, curve: Curve | None, server: Any) -> None:
        self.curve, self.server = curve, server
        self.waiting: list[Callable[[], Point]] = []
        self.last: Point | None = None
        self.sent, self.next = 0, 0.0

    def add(self, point: Callable[[], Point], ready: bool = True) -> None:
        """After a step: sent at once if it is ``ready``, or with later ones where the last were sent just now."""
        if self.curve is None:
            return
        due = time.monotonic() >= self.next
        if due and not ready:
            self.flush()
        self.waiting.append(point)
        if due and ready:
            self.flush()

    def end(self, remark: Remark | None = None) -> None:
        """The run is over, also where it was cancelled: what waits is sent."""
        if self.curve is not None:
            self._keep()
            self.curve.end(self.last, remark)
            self.flush()

    def flush(self) -> None:
        """Keeps and sends what is new."""
        self._keep()
        if self.server.client_id is not None:
            self.server.send_sync(EVENT, self.curve.message(self.sent), self.server.client_id)
        self.sent, self.next = len(self.curve.points), time.monotonic() + SECONDS_BETWEEN

    def _keep(self) -> None:
        """Computes what waits. A curve that was thinned is sent anew, from its first point."""
        for point in self.waiting:
            self.last = tuple(rounded(value) for value in point())
            self.sent = 0 if self.curve.add(self.last) else self.sent
        self.waiting.clear()


def heading_of(run: GuidanceRun, sigmas: Sequence[float]) -> Heading:
    """Of a run of guidance over the host's n + 1 noise levels."""
    lines = tuple(name_of(term) for term in run.terms)
    return Heading("guidance", lines, len(sigmas) - 1, run.strength.cap, run.strength.mode == "relative")


def remark_of(run: GuidanceRun) -> Remark | None:
    """What a budget chose, if there is one."""
    budget = run.budget
    return None if budget is None else Remark(f"budget {budget.percent:g} %", budget.short, str(budget).capitalize())


def guided_point(step: StepTrace, sigma: float, sigmas: Sequence[float]) -> Callable[[], Point]:
    """A guided evaluation at the host's noise level sigma, as means over the pictures for which it is known.

    ``sigmas`` are the run's n + 1: between two of them the step is a fraction. The numbers are on their way from the
    device when this returns; what it returns reads them.
    """
    scores, pull, capped = Early(step.scores), Early(step.pull), Early(step.capped)

    def read() -> Point:
        at = float(np.interp(-sigma, [-level for level in sigmas], range(len(sigmas))))
        each = [mean(*row) for row in zip(scores.read().tolist(), step.acts.tolist(), strict=True)]
        return at, mean(pull.read().tolist()), mean(capped.read().tolist()), *each

    return read


def mean(values: Sequence[float], there: Sequence[bool] | None = None) -> Number:
    """Of the finite values that are there; None where there are none."""
    known = [v for v, on in zip(values, there or [True] * len(values), strict=True) if on and math.isfinite(v)]
    return sum(known) / len(known) if known else None


def workflow_of_running_prompt(server: Any) -> str | None:
    """The id of the graph that the running prompt was made of, as its browser sent it along.

    Asked for when a run begins: a MODEL of Apply Guidance may come from the cache, made by an earlier prompt.
    """
    for _, _, _, extra, *_ in server.prompt_queue.get_current_queue_volatile()[0]:
        workflow = (extra.get("extra_pnginfo") or {}).get("workflow") or {}
        return workflow.get("id")
    return None


def rounded(value: Number) -> Number:
    """As many digits as are shown; None for what is not finite."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.{DIGITS}g}")
