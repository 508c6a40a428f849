"""One sampling run under guidance: what it pulls towards, what it remembers between steps, what it did."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .controls import Crop
from .device import Moment, Rows, Span, brought, now
from .features import Encoder
from .gradient import Chunks
from .guidance import Term
from .precision import precise
from .references import REFERENCE_SEED, Batch, References
from .schedule import MIN_ALPHA, Convention, expand
from .strength import Strength
from .views import PIXEL_VIEW, View

log = logging.getLogger(__name__)

FIRST_REALISED = 0.5
"""What part of a shift is taken to stay at the first step, before there is a ratio of noise levels."""

LEVELS_REMEMBERED = 256
"""Noise levels that a term's memory counts by: the lowest, which are the latest."""

GRADIENTS_KEPT = 2
"""Gradients of a term that stay in memory for reuse: a sampler of higher order comes back to the one before."""

BISECTIONS, DECIMALS = 30, 5
"""Halvings of the run that find the part of it where a noise level is, to 1e-9, and the decimals that are kept: fewer
than float32 noise levels are sure of, because guidance amplifies the last bit, and every host should give the same."""


@dataclass(frozen=True)
class StepTrace:
    """What one guided step did: scores (K, B), RMS of the shift over the model's own step (B,), where the cap bound.

    ``sigma`` is the first sample's. ``broken`` (B,): where the shift was not finite. ``acts`` (K, B): where terms had a
    weight. ``sizes`` (K, B): the RMS that each term has in the shift, over the model's step. ``cosines`` (K, K, B):
    those of the angles between the terms' gradients, as their encoders give them. Both are NaN where a gradient is not
    known by itself: of terms that share a pass, unless the run is ``measured``. ``spans`` (K): when each term's passes
    ran, shared ones divided among their terms; None for the model where its start wasn't seen. Tensors but ``acts`` are
    on the pictures' device.
    """

    sigma: float
    scores: Tensor
    pull: Tensor
    capped: Tensor
    broken: Tensor
    acts: Tensor
    sizes: Tensor
    cosines: Tensor
    spans: tuple[tuple[Span, ...], ...]
    model: Span | None

    @property
    def seconds(self) -> tuple[float, ...]:
        """What each term's passes took."""
        return tuple(sum(span.seconds for span in spans) for spans in self.spans)

    @property
    def model_seconds(self) -> float | None:
        """What the model's call before them took."""
        return None if self.model is None else self.model.seconds


@dataclass(frozen=True)
class Kept:
    """A gradient to reuse: of one term's score, as the encoder's pass gave it (B, C, H, W), its scores (B,), of which
    samples they are known (B,), the scores that the term's goal goes by (B,), and where an encoder of noise read the
    model's estimate instead of x_t (B,)."""

    grad: Tensor
    score: Tensor
    known: Tensor
    present: Tensor
    finished: Tensor


@dataclass
class Memory:
    """Gradients of one term by noise level, for every k-th level to serve those after it.

    Model calls are taken in the order of their noise, not of time: samplers of higher order look ahead and come back.
    ``levels`` are the noise levels seen. ``short`` (B,): which samples were short of the term's goal; ``missed`` (B,):
    what its former steps left of it.
    """

    kept: dict[float, Kept] = field(default_factory=dict)
    levels: set[float] = field(default_factory=set)
    short: Tensor | None = None
    missed: Tensor | None = None

    def find(self, level: float, wanted: Tensor, shape: torch.Size, every: int) -> Kept | None:
        """The gradient to reuse at a noise level for the samples ``wanted`` (B,), None where a new one is due."""
        self.levels.add(level)
        if every == 1:
            return None
        above = [s for s in self.kept if s >= level]
        if not above:
            return None
        kept = self.kept[min(above)]
        steps = sum(level <= s < min(above) for s in self.levels)
        fits = kept.grad.shape == shape and not bool((wanted & ~kept.known).any())
        return kept if fits and steps < every else None

    def pulled(self, gap: Tensor, acts: Tensor) -> Tensor:
        """A goal's gap and what was missed of it before (B,), in samples that were short of it once where it acts (B,);
        0 in those that never were. What was missed on one side doesn't count on the other."""
        short, missed = (gap > 0) & brought(acts, gap), torch.zeros_like(gap)
        if self.short is not None and self.missed is not None and self.short.shape == gap.shape:
            short, missed = short | self.short, self.missed
        gap = torch.where(short, gap, torch.zeros_like(gap))
        missed = torch.where(missed * gap > 0, missed, torch.zeros_like(gap))
        self.short, self.missed = short, (gap + missed) / 2
        return gap + missed

    def realised(self, level: float) -> float:
        """What part of a shift of denoised is in x after a step, by the last noise level above; a half at first."""
        above = [s for s in self.levels if s > level]
        return 1 - level / min(above) if above else FIRST_REALISED

    def keep(self, level: float, kept: Kept) -> Kept:
        """Keeps a gradient, and forgets all but the latest two."""
        self.kept.pop(level, None)
        self.kept[level] = kept
        for old in list(self.kept)[:-GRADIENTS_KEPT]:
            del self.kept[old]
        self.levels = set(sorted(self.levels)[:LEVELS_REMEMBERED])
        return kept


@dataclass
class Budget:
    """Chooses every how many steps a gradient is taken, so that guidance costs at most ``percent`` more time.

    The first gradient warms up, the second is measured: it took c, and the model's call before it m. Then

        every = ceil(c / (m * percent / 100))

    from the next call on. Only there the times are read, so that a GPU is not waited for.
    """

    percent: float
    every: int = 1
    taken: int = 0
    guidance: float = 0.0
    model: float = 0.0
    measured: tuple[Span, Span] | None = None

    def took(self, guidance: Span, model: Span | None) -> None:
        """Notes when a call in which gradients were taken ran, and the model's call before it, where that is known."""
        self.taken += 1
        if self.taken > 1 and self.model == 0 and model is not None:
            self.measured = guidance, model

    def settle(self) -> None:
        """Reads what was measured, and chooses."""
        if self.measured is None:
            return
        guidance, model = (span.seconds for span in self.measured)
        self.measured = None
        if model > 0:
            self.guidance, self.model = guidance, model
            self.every = max(1, math.ceil(guidance / (model * self.percent / 100) - 1e-9))

    @property
    def short(self) -> str:
        """What it chose, in a few words."""
        self.settle()
        if self.model == 0:
            return "too few steps"
        return "every step" if self.every == 1 else f"one every {self.every} steps"

    def __str__(self) -> str:
        """What it chose, in words."""
        self.settle()
        if self.model == 0:
            return f"too few steps to hold guidance to {self.percent:g} % more time"
        cost = 100 * self.guidance / self.model
        often = f"for at most {self.percent:g} % more, one every {self.every} steps"
        return f"a gradient costs {cost:.0f} % of a step; {often}"


@dataclass
class GuidanceRun:
    """State of one sampling run: born with it, dropped with it.

    ``percent_to_sigma`` maps a fraction of the run to the model's sigma (0 -> above every sigma, 1 -> 0). ``view_of``
    says through which view an encoder looks at this model. ``variance`` is that of the model's data, per element: 0.25
    for pixels in -1..1, about 1 for scaled latents; encoders of denoised need it. ``measured``: terms that share a pass
    are also looked at one by one, for the trace alone. ``clock`` gives seconds; at ``left`` guidance was last done.
    """

    terms: tuple[Term, ...]
    convention: Convention
    percent_to_sigma: Callable[[float], float]
    strength: Strength = field(default_factory=Strength)
    view_of: Callable[[Encoder], View] = lambda encoder: PIXEL_VIEW
    variance: float = 0.25
    trace: list[StepTrace] = field(default_factory=list)
    references: References = field(default_factory=References)
    chunks: Chunks = field(default_factory=Chunks)
    memories: dict[int, Memory] = field(default_factory=dict)
    generators: dict[int, torch.Generator] = field(default_factory=dict)
    gradients: int = 0
    budget: Budget | None = None
    measured: bool = False
    clock: Callable[[], float] = time.perf_counter
    left: Moment | None = None
    warned: int = 0
    sigmas: dict[float, float] = field(default_factory=dict)
    percents: dict[float, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wanted = [term.budget for term in self.terms if term.budget is not None]
        if wanted and self.budget is None:
            self.budget = Budget(min(wanted))

    def crops(self, k: int, batch: Batch) -> Sequence[Crop | None]:
        """By which crops term k looks this time: one that is none, or as many as it wants."""
        augment = self.terms[k].augment
        if augment is None:
            return [None]
        generator = self.generators.setdefault(k, torch.Generator().manual_seed(REFERENCE_SEED))
        size = batch.x_t.shape[-2:]
        return augment.crops(self.view_of(self.terms[k].encoder).size(size[0], size[1]), generator)

    def is_readable(self, batch: Batch) -> bool:
        """Whether the model's estimates are good enough for an encoder of noise: alpha^2 v > sigma^2, see ``Goal``."""
        signal = self.convention.alpha(batch.sigma).square() * self.variance
        return bool((signal > batch.sigma.square()).all())

    def now(self, device: torch.device) -> Moment:
        """The moment at which a device gets here."""
        return now(device, self.clock)

    @contextmanager
    def timed(self, device: torch.device) -> Iterator[Span | None]:
        """Around all that guidance does in one call of the model, which ran in the span that it gives, if known."""
        begun, before = self.now(device), self.gradients
        model = None if self.left is None else Span(self.left, begun)
        if self.budget is not None:
            self.budget.settle()
        try:
            yield model
        finally:
            self.left = self.now(device)
            if self.budget is not None and self.gradients > before:
                self.budget.took(Span(begun, self.left), model)

    def warn(self) -> None:
        """Says in the log which steps since the last warning were not guided, as their gradient was not finite."""
        for step in self.trace[self.warned :]:
            if broken := int(step.broken.sum()):
                log.warning("The guidance gradient was not finite in %d samples; their step is not guided.", broken)
        self.warned = len(self.trace)

    def sigma_at(self, percent: float) -> float:
        """``percent_to_sigma``, asked once for each."""
        if percent not in self.sigmas:
            self.sigmas[percent] = self.percent_to_sigma(percent)
        return self.sigmas[percent]

    def memory(self, k: int) -> Memory:
        """What term k keeps between model calls."""
        return self.memories.setdefault(k, Memory())

    def every(self, k: int, level: float) -> int:
        """At every how many noise levels the gradient of term k is taken, at the noise ``level`` (sigma)."""
        term = self.terms[k]
        if term.budget is not None and self.budget is not None:
            return max(term.every, self.budget.every)
        return 1 if term.lead > 0 and level > self.sigma_at(term.lead) else term.every

    def weights(self, sigma: Tensor, frame: Tensor | None = None, frames: int = 1, curved: bool = True) -> Tensor:
        """Scale of every term at sigma (B,): (K, B) on the CPU, 0 outside its interval and where x_t holds no signal.

        ``frame`` (B,) counts 0..frames - 1 where the samples are frames of videos. ``curved``: times the terms' curves.
        """
        sigma = precise(sigma).cpu()
        alpha = self.convention.alpha(sigma)
        weights = sigma.new_zeros(len(self.terms), len(sigma))
        for row, term in zip(weights, self.terms, strict=True):
            start, end = self.sigma_at(term.start), self.sigma_at(term.end)
            row.copy_(term.scale * ((alpha > MIN_ALPHA) & (sigma <= start) & (sigma > end)))
            if term.fade is not None:
                row.mul_(term.fade(sigma / alpha.clamp(min=MIN_ALPHA)))
            if term.frames is not None and frame is not None:
                chosen = torch.tensor([f % frames for f in check_frames(term.frames, frames)])
                row.mul_(torch.isin(frame, chosen))
            for curve in term.curves if curved else ():
                row.mul_(curve(self.percent(sigma)))
        return weights

    def percent(self, sigma: Tensor) -> Tensor:
        """The part of the run (B,) where the noise is sigma (B,) on the CPU: the inverse of ``percent_to_sigma``, by
        bisection, once for each noise level."""
        for level in set(sigma.tolist()) - set(self.percents):
            low, high = 0.0, 1.0
            for _ in range(BISECTIONS):
                middle = (low + high) / 2
                low, high = (middle, high) if self.percent_to_sigma(middle) > level else (low, middle)
            self.percents[level] = round(low, DECIMALS)
        return sigma.new_tensor([self.percents[level] for level in sigma.tolist()])

    def only(self, k: int, wanted: Tensor) -> Tensor:
        """Weights (K, B) of 1 for term k where ``wanted`` (B,), 0 for all others."""
        weights = torch.zeros(len(self.terms), len(wanted))
        weights[k] = wanted.to(weights)
        return weights

    def room(self, batch: Batch, weights: Tensor) -> Tensor | None:
        """What part (B,) of the shift's bound masks m_k leave: it holds where they let terms act.

        sqrt(mean(max_k m_k)) over the terms with a weight here. None is all of it.
        """
        size = batch.x_t.shape[-2:]
        masks = [batch.mask(term, (size[0], size[1])) for term in self.terms]
        if all(mask is None for mask in masks):
            return None
        whole = torch.ones_like(batch.x_t[:, :1])
        acts = [(whole if m is None else m) * expand(w != 0, whole) for m, w in zip(masks, weights, strict=True)]
        return torch.stack(acts).amax(dim=0).flatten(1).mean(dim=1).sqrt()

    def fullness(self, batch: Batch, weights: Tensor) -> Tensor | None:
        """What part (B,) of relative strength curves c_k leave to weights w_k: sum_k |w_k c_k| / sum_k |w_k|.

        Relative strength sets the shift's size whatever the weights are. None is all of it.
        """
        free = [k for k, term in enumerate(self.terms) if not term.aims]
        if self.strength.mode == "absolute" or not any(self.terms[k].curves for k in free):
            return None
        full = self.weights(batch.sigma, batch.frame, batch.frames, curved=False)[free].abs().sum(dim=0)
        return weights[free].abs().sum(dim=0) / torch.where(full > 0, full, torch.ones_like(full))

    def active(self, weights: Tensor, batch: Batch) -> list[tuple[Encoder, list[int], Rows]]:
        """What to do for weights (K, B): (encoder, numbers of its terms, samples), one pass each.

        Terms that share an encoder share its pass. A batch at several noise levels is taken level by level, because
        references are looked at at one level at a time. Samples without any weight are left out.
        """
        passes: list[tuple[Encoder, list[int], Rows]] = []
        for level in torch.unique(batch.sigma):
            for encoder, members in _by_encoder(self.terms, weights):
                chosen = (batch.sigma == level) & (weights[members] != 0).any(dim=0)
                if bool(chosen.any()):
                    rows = slice(None) if bool(chosen.all()) else torch.nonzero(chosen).flatten()
                    passes.append((encoder, members, rows))
        return passes


def _by_encoder(terms: tuple[Term, ...], weights: Tensor) -> list[tuple[Encoder, list[int]]]:
    """Terms with a weight, grouped by the encoder they share."""
    groups: dict[int, tuple[Encoder, list[int]]] = {}
    for k, term in enumerate(terms):
        if bool((weights[k] != 0).any()):
            groups.setdefault(id(term.encoder), (term.encoder, []))[1].append(k)
    return list(groups.values())


def check_frames(chosen: tuple[int, ...], frames: int) -> tuple[int, ...]:
    """The chosen frames, if the video has them. Raises ValueError otherwise."""
    if not chosen or not all(-frames <= f < frames for f in chosen):
        raise ValueError(
            f"Got the frames {list(chosen)}; this video has {frames} latent frames, 0..{frames - 1}, or -{frames}..-1 "
            "from the end. Choose among those; a latent frame holds several of the video's."
        )
    return chosen
