"""What a guided run did, guidance by guidance: scores, sizes, angles, where the cap bound, and what it cost."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from .guidance import Term
from .run import GuidanceRun, StepTrace

VERSION = 1
"""Of the JSON's layout."""

DIGITS = 6
"""Significant digits of the JSON's numbers."""

LONGEST_NAME = 40
"""Characters of a guidance's texts in its name."""

Number = float | None
"""None where a guidance doesn't act, or its gradient isn't known by itself."""


@dataclass(frozen=True)
class Series:
    """One quantity at every guided evaluation of the model: of each picture (frames of videos count as pictures)."""

    each: tuple[tuple[Number, ...], ...]

    @property
    def mean(self) -> tuple[Number, ...]:
        """Over the pictures for which it is known."""
        return tuple(_mean(row) for row in self.each)

    @property
    def known(self) -> bool:
        return any(value is not None for row in self.each for value in row)


@dataclass(frozen=True)
class Guided:
    """One guidance in a run: its score, its RMS in the shift over that of the model's own step, seconds of its pass."""

    name: str
    scale: float
    score: Series
    size: Series
    seconds: tuple[float, ...]


@dataclass(frozen=True)
class Angle:
    """The cosine between the gradients of two guidances, by their numbers from 0: below 0 they work against each
    other."""

    between: tuple[int, int]
    cosine: Series


@dataclass(frozen=True)
class GuidanceReport:
    """A run in numbers. ``percent``: the part of the run (0 noise, 1 finished) of each guided evaluation.

    ``pull``: the whole shift's RMS over that of the model's own step; ``capped``: 1 where the cap bound it.
    ``model_seconds``: what the model took before each evaluation's guidance, None where that wasn't seen.
    """

    guidances: tuple[Guided, ...] = ()
    angles: tuple[Angle, ...] = ()
    strength: str = "absolute"
    cap: float | None = None
    sigma: tuple[float, ...] = ()
    percent: tuple[float, ...] = ()
    pull: Series = Series(())
    capped: Series = Series(())
    model_seconds: tuple[Number, ...] = ()

    @classmethod
    def of(cls, run: GuidanceRun) -> GuidanceReport:
        """Of a finished run."""
        trace, terms = run.trace, run.terms
        if not trace:
            return cls(strength=run.strength.mode, cap=run.strength.cap)
        sigma = tuple(step.sigma for step in trace)
        percent = run.percent(torch.tensor(sigma, dtype=torch.float64)).tolist()
        pairs = itertools.combinations(range(len(terms)), 2)
        return cls(
            tuple(_guided(k, term, trace) for k, term in enumerate(terms)),
            tuple(Angle(pair, _series([step.cosines[pair] for step in trace])) for pair in pairs),
            run.strength.mode,
            run.strength.cap,
            sigma,
            tuple(percent),
            _series([step.pull for step in trace]),
            _series([step.capped for step in trace]),
            tuple(step.model_seconds for step in trace),
        )

    @property
    def pictures(self) -> int:
        return max((len(row) for row in self.pull.each), default=0)

    @property
    def capped_share(self) -> float:
        """Of all shifts of all pictures."""
        return _mean([value for row in self.capped.each for value in row]) or 0.0

    def to_json(self) -> str:
        """All of it: each quantity by evaluation, as the mean over pictures and for each picture. Unknown is null."""
        said = {"version": VERSION, "pictures": self.pictures, **asdict(self)}
        return json.dumps(_plain(said), allow_nan=False)

    def lines(self) -> list[str]:
        """The run in words."""
        if not self.sigma:
            return ["No guidance acted in this run."]
        pictures = f"{self.pictures} picture{'s' if self.pictures > 1 else ''}"
        bound = "no cap" if self.cap is None else f"the cap ({self.cap:g}) bound {self.capped_share:.0%} of the shifts"
        bound = bound if self.strength == "absolute" else f"relative strength {self.cap:g}"
        lines = [f"{len(self.sigma)} guided evaluations of {pictures}; {bound}."]
        lines.append(f"The model took {_milliseconds(self.model_seconds)} each, beside guidance.")
        lines += [_guided_line(number, part) for number, part in enumerate(self.guidances, 1)]
        lines += [_angle_line(angle) for angle in self.angles if angle.cosine.known]
        if any(part.score.known and not part.size.known for part in self.guidances):
            lines.append("Guidances that share a pass have no size and angle by themselves: turn on measure for them.")
        return lines


def sizes_of(sizes: dict[int, Tensor], count: int, batch: int) -> Tensor:
    """Numbers (B,) of terms k as rows (K, B), NaN for terms without."""
    like = next(iter(sizes.values()), torch.empty(0))
    unknown = torch.full((batch,), math.nan, dtype=like.dtype, device=like.device)
    return torch.stack([sizes.get(k, unknown) for k in range(count)])


def cosines_of(grads: dict[int, Tensor], count: int, batch: int) -> Tensor:
    """Cosines (K, K, B) between the gradients (B, C, H, W) of terms k; NaN for terms without one, and where it is 0."""
    if len(grads) < 2:
        return torch.full((count, count, batch), math.nan)
    flat = torch.stack([grad.flatten(1) for grad in grads.values()])
    unit = flat / flat.norm(dim=2, keepdim=True)  # 0 / 0 is NaN: no gradient, no angle
    cosines = torch.einsum("kbn,lbn->klb", unit, unit).clamp(-1, 1)
    found = torch.full_like(cosines[:1, :1], math.nan).repeat(count, count, 1)
    for i, row in zip(grads, cosines, strict=True):
        for j, cosine in zip(grads, row, strict=True):
            found[i, j] = cosine
    return found


def _guided(k: int, term: Term, trace: Sequence[StepTrace]) -> Guided:
    return Guided(
        name_of(term),
        term.scale,
        _series([step.scores[k] for step in trace], [step.acts[k] for step in trace]),
        _series([step.sizes[k] for step in trace], [step.acts[k] for step in trace]),
        tuple(step.seconds[k] for step in trace),
    )


def name_of(term: Term) -> str:
    """What a guidance is, in a few words: its kind, its texts, and of two encoders that share the work which one."""
    kind = type(term.guidance).__name__.removesuffix("Guidance").lower()
    texts = " to ".join(f'"{text}"' for text in getattr(term.guidance, "texts", ()))
    texts = texts if len(texts) <= LONGEST_NAME else f"{texts[: LONGEST_NAME - 3]}..."
    noise = "" if term.fade is None else f"({'high' if term.fade.rising else 'low'} noise)"
    return " ".join(filter(None, (kind, texts, noise)))


def _series(rows: Sequence[Tensor], acts: Sequence[Tensor] | None = None) -> Series:
    """Rows (B,) by evaluation; None for what is not finite, and where a guidance doesn't act."""
    there = [torch.ones_like(row, dtype=torch.bool) for row in rows] if acts is None else acts
    return Series(
        tuple(
            tuple(value if on and math.isfinite(value) else None for value, on in zip(row, row_acts, strict=True))
            for row, row_acts in ((r.double().tolist(), a.tolist()) for r, a in zip(rows, there, strict=True))
        )
    )


def _mean(values: Sequence[Number]) -> Number:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _plain(value: object) -> object:
    """What JSON holds: numbers of few digits, and beside what each picture has the mean."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        mean = {"mean": Series(value["each"]).mean} if set(value) == {"each"} else {}
        return {key: _plain(part) for key, part in {**mean, **value}.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _milliseconds(seconds: Sequence[Number]) -> str:
    mean = _mean(seconds)
    return "an unknown time" if mean is None else f"{1000 * mean:.3g} ms"


def _guided_line(number: int, part: Guided) -> str:
    scores = [score for score in part.score.mean if score is not None]
    if not scores:
        return f"{number}. {part.name}, scale {part.scale:g}: did not act."
    size = _mean(part.size.mean)
    share = "" if size is None else f", {size:.3g} of the model's step"
    return (
        f"{number}. {part.name}, scale {part.scale:g}: score {scores[0]:.3f} to {scores[-1]:.3f}{share}, "
        f"{_milliseconds(part.seconds)} an evaluation."
    )


def _angle_line(angle: Angle) -> str:
    values = [value for row in angle.cosine.each for value in row if value is not None]
    first, second = (number + 1 for number in angle.between)
    against = sum(value < 0 for value in values) / len(values)
    return f"{first} and {second}: cosine {_mean(values):.2f}, against each other in {against:.0%}."
