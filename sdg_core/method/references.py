"""What a step works on, and what its guidances compare with: references looked at once per noise level."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .controls import Crop
from .features import Encoder, Features, reads_noise
from .gradient import Target, Window
from .guidance import Guidance, Term, fit
from .precision import precise
from .views import View

REFERENCE_SEED = 0
"""Seed of the noise that references get: one noise for all references, steps, samples and runs, so reproducible."""

LEVELS_KEPT = 4
"""Noise levels whose reference features stay in memory."""

CLEAN = -1.0
"""The noise level under which features of clean references are kept."""


@dataclass(frozen=True)
class Batch:
    """What one model evaluation gave, as pictures: x_t and denoised (B, C, H, W) at sigma (B,), at least float32.

    Frames of videos are samples like others; ``frame`` (B,) then counts them from 0 to ``frames`` - 1. ``item`` (B,)
    counts the pictures, or videos, of the batch.
    """

    x_t: Tensor
    denoised: Tensor
    sigma: Tensor
    item: Tensor
    frame: Tensor | None = None
    frames: int = 1

    @classmethod
    def of(cls, denoised: Tensor, x_t: Tensor, sigma: Tensor) -> Batch:
        """From pictures (B, C, H, W) or videos (B, C, T, H, W) of any precision, sigma (B,) or (1,).

        Raises ValueError for other shapes.
        """
        x, d = precise(x_t.detach()), precise(denoised.detach())
        sigma = precise(sigma).expand(len(x_t))
        if x_t.ndim == 4:
            return cls(x, d, sigma, torch.arange(len(x), device=sigma.device))
        if x_t.ndim != 5:
            raise ValueError(
                f"Got a latent of shape {tuple(x_t.shape)}; guidance reads pictures (batch, channels, height, width) "
                "and videos (batch, channels, frames, height, width)."
            )
        B, T = x_t.shape[0], x_t.shape[2]
        x, d = (v.transpose(1, 2).flatten(0, 1) for v in (x, d))
        item, frame = torch.arange(B, device=sigma.device), torch.arange(T, device=sigma.device)
        return cls(x, d, sigma.repeat_interleave(T), item.repeat_interleave(T), frame.repeat(B), T)

    def take(self, rows: Tensor) -> Batch:
        """Some of its samples."""
        frame = None if self.frame is None else self.frame[rows]
        return Batch(self.x_t[rows], self.denoised[rows], self.sigma[rows], self.item[rows], frame, self.frames)

    def mask(self, term: Term, size: tuple[int, int]) -> Tensor | None:
        """Where a term acts, (B, 1, h, w) at a size; None is everywhere. Of several masks each frame has its own."""
        number = self.item if self.frame is None else self.frame
        mask = None if term.region is None else term.region.of_picture(number, size)
        return None if mask is None else mask.to(self.x_t)

    def unfold(self, shift: Tensor) -> Tensor:
        """(B T, C, H, W) back to the shape that came in."""
        return shift if self.frame is None else torch.unflatten(shift, 0, (-1, self.frames)).transpose(1, 2)


@dataclass
class References:
    """Targets of one run's guidances, by noise level and number of the term.

    Only the latest noise levels are kept; a sampler of higher order comes back to those. References of encoders that
    read denoised are clean and stay. ``levels`` are all noise levels seen so far: references take turns by them.
    """

    known: dict[float, dict[int, Features]] = field(default_factory=dict)
    levels: set[float] = field(default_factory=set)

    def target(
        self, k: int, term: Term, view: View, batch: Batch, ratio: Tensor | None, crop: Crop | None = None
    ) -> Target:
        """The target of a term, number k, at the noise ``ratio`` (1,), None where references are looked at clean."""
        if crop is not None and term.guidance.aligned:  # what is compared place by place is cropped alike
            seen = functools.partial(look, term, view, batch.x_t, ratio, crop=crop)
            return self._chosen(term.guidance.target(seen).to(batch.x_t.device), term, batch)
        level = self.known.setdefault(CLEAN if ratio is None else float(ratio[0]), {})
        if k not in level:
            see = functools.partial(look, term, view, batch.x_t, ratio)
            level[k] = term.guidance.target(see).to(batch.x_t.device)
        noisy = [key for key in self.known if key != CLEAN]
        for key in noisy[:-LEVELS_KEPT]:
            del self.known[key]
        return self._chosen(level[k], term, batch)

    def _chosen(self, features: Features, term: Term, batch: Batch) -> Target:
        """Which references (R of them) each sample follows, and how."""
        if term.several is None:
            return Target(features, _of_frames(term.guidance, batch))
        count, choice, now = features.count, term.several.choice, float(batch.sigma.max())
        if choice in ("mean", "nearest"):
            return Target(features, None, term.several)
        if choice == "one each":
            return Target(features, batch.item % count)
        self.levels.add(now)
        turn = term.several.turn(count, sum(level > now for level in self.levels))
        return Target(features, torch.full_like(batch.item, turn))


def look(
    term: Term,
    view: View,
    x_t: Tensor,
    ratio: Tensor | None,
    image: Tensor,
    depth: int | None,
    crop: Crop | None = None,
) -> Features:
    """Features of references (R, 3, h, w) at the size of the view, with the fixed noise at ratio (1,), if any."""
    encoder = term.encoder
    x_0 = fit(image.to(x_t), *view.size(*x_t.shape[-2:]))
    mask = _reference_mask(term, image, x_0)
    for part in (mask, _place(term, x_0)):
        x_0 = x_0 if part is None else part * x_0
    if crop is not None:
        mask, x_0 = None if mask is None else crop(mask), crop(x_0)
    depth = depth or encoder.full_depth
    with torch.no_grad():
        t = torch.zeros(1, device=x_t.device)
        if ratio is not None:
            assert reads_noise(encoder)
            t = encoder.table.timestep(ratio)
        return replace(encoder(noised(encoder, view, x_t, ratio, x_0), t, depth), where=mask)


def noised(encoder: Encoder, view: View, x_t: Tensor, ratio: Tensor | None, x_0: Tensor) -> Tensor:
    """Pictures x_0 (R, 3, h, w) with the fixed noise at ratio (1,), if any.

    In VP scaling, through the view: (x_0 + ratio * eps) / sqrt(1 + ratio^2).
    """
    if ratio is None:
        return x_0
    generator = torch.Generator().manual_seed(REFERENCE_SEED)
    noise = view.noise(torch.randn(1, *x_t.shape[1:], generator=generator).to(x_t))
    return (x_0 + noise * ratio / encoder.noise_gain(*x_0.shape[-2:])) / (1 + ratio.square()).sqrt()


def window(term: Term, view: View, batch: Batch, ratio: Tensor | None) -> Window | None:
    """What the encoder sees of a batch at the noise ratio (1,), if any: outside the term's mask grey, as noisy."""
    mask = batch.mask(term, view.size(*batch.x_t.shape[-2:]))
    if mask is None:
        return None
    grey = torch.zeros(1, 3, *mask.shape[-2:]).to(batch.x_t)
    return Window(mask, noised(term.encoder, view, batch.x_t, ratio, grey))


def _reference_mask(term: Term, image: Tensor, x_0: Tensor) -> Tensor | None:
    """What is read of references ``image`` that became x_0: their masks, (R, 1, H, W). None is all."""
    own = None if term.region is None else term.region.of_references(len(image), (image.shape[-2], image.shape[-1]))
    return None if own is None else fit(own.to(x_0), *x_0.shape[-2:]).clamp(0, 1).expand(len(x_0), -1, -1, -1)


def _place(term: Term, x_0: Tensor) -> Tensor | None:
    """The picture's mask (1, 1, H, W), where references x_0 are compared with it place by place: then they are shown as
    it is, grey outside."""
    region = term.region
    if region is None or region.picture is None or len(region.picture) > 1 or not term.guidance.aligned:
        return None
    mask = region.of_picture(torch.zeros(1, dtype=torch.long), (x_0.shape[-2], x_0.shape[-1]))
    return None if mask is None else mask.to(x_0)


def _of_frames(guidance: Guidance, batch: Batch) -> Tensor | None:
    """Which reference each frame follows: several are spread evenly over the frames of a video, from first to last."""
    count = len(getattr(guidance, "image", ()))
    if batch.frame is None or count < 2:
        return None
    return (batch.frame * (count - 1) / max(batch.frames - 1, 1)).round().long()
