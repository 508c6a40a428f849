"""One sampling run under guidance: what it pulls towards, what it remembers between steps, what it did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .features import Encoder
from .gradient import Chunks
from .guidance import Term
from .precision import precise
from .references import Batch, References
from .schedule import MIN_ALPHA, Convention
from .strength import Strength
from .views import PIXEL_VIEW, View


@dataclass(frozen=True)
class StepTrace:
    """What one guided step did: scores (K, B), RMS of the shift over the model's own step (B,), where the cap bound.

    ``sigma`` is the first sample's.
    """

    sigma: float
    scores: Tensor
    pull: Tensor
    capped: Tensor


@dataclass
class GuidanceRun:
    """State of one sampling run: born with it, dropped with it.

    ``percent_to_sigma`` maps a fraction of the run to the model's sigma (0 -> above every sigma, 1 -> 0). ``view_of``
    says through which view an encoder looks at this model. ``variance`` is that of the model's data, per element: 0.25
    for pixels in -1..1, about 1 for scaled latents; encoders of denoised need it.
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

    def weights(self, sigma: Tensor, frame: Tensor | None = None, frames: int = 1) -> Tensor:
        """Scale of every term at sigma (B,): (K, B), 0 outside its interval and where x_t holds no signal.

        ``frame`` (B,) counts 0..frames - 1 where the samples are frames of videos.
        """
        sigma = precise(sigma)
        alpha = self.convention.alpha(sigma)
        weights = sigma.new_zeros(len(self.terms), len(sigma))
        for row, term in zip(weights, self.terms, strict=True):
            start, end = self.percent_to_sigma(term.start), self.percent_to_sigma(term.end)
            row.copy_(term.scale * ((alpha > MIN_ALPHA) & (sigma <= start) & (sigma > end)))
            if term.fade is not None:
                row.mul_(term.fade(sigma / alpha.clamp(min=MIN_ALPHA)))
            if term.frames is not None and frame is not None:
                chosen = torch.tensor([f % frames for f in check_frames(term.frames, frames)], device=frame.device)
                row.mul_(torch.isin(frame, chosen))
        return weights

    def active(self, weights: Tensor, batch: Batch) -> list[tuple[Encoder, list[int], Tensor]]:
        """What to do for weights (K, B): (encoder, numbers of its terms, samples (b,)), one pass each.

        Terms that share an encoder share its pass. A batch at several noise levels is taken level by level, because
        references are looked at at one level at a time. Samples without any weight are left out.
        """
        passes = []
        for level in torch.unique(batch.sigma):
            for encoder, members in _by_encoder(self.terms, weights):
                rows = torch.nonzero((batch.sigma == level) & (weights[members] != 0).any(dim=0)).flatten()
                if len(rows):
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
