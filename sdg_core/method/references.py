"""What a step works on, and what its guidances compare with: references looked at once per noise level."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .controls import Crop
from .device import Rows, beside, brought, version_of
from .features import Encoder, Features, reads_noise
from .gradient import Target, Window
from .guidance import Guidance, Term, fit
from .precision import precise
from .schedule import expand
from .targets import cache_of, content
from .views import View

REFERENCE_SEED = 0
"""Seed of the noise that references get: one noise for all references, steps, samples and runs, so reproducible."""


@dataclass(frozen=True)
class Batch:
    """What one model evaluation gave, as pictures: x_t and denoised (B, C, H, W) at sigma (B,), at least float32.

    Frames of videos are samples like others; ``frame`` (B,) then counts them from 0 to ``frames`` - 1. ``item`` (B,)
    counts the pictures, or videos, of the batch. Numbers (B,) are on the CPU.
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
        sigma = precise(sigma).cpu().expand(len(x_t))
        if x_t.ndim == 4:
            return cls(x, d, sigma, torch.arange(len(x)))
        if x_t.ndim != 5:
            raise ValueError(
                f"Got a latent of shape {tuple(x_t.shape)}; guidance reads pictures (batch, channels, height, width) "
                "and videos (batch, channels, frames, height, width)."
            )
        B, T = x_t.shape[0], x_t.shape[2]
        x, d = (v.transpose(1, 2).flatten(0, 1) for v in (x, d))
        item, frame = torch.arange(B), torch.arange(T)
        return cls(x, d, sigma.repeat_interleave(T), item.repeat_interleave(T), frame.repeat(B), T)

    def take(self, rows: Rows) -> Batch:
        """Some of its samples."""
        frame, there = None if self.frame is None else self.frame[rows], beside(rows, self.x_t)
        return Batch(self.x_t[there], self.denoised[there], self.sigma[rows], self.item[rows], frame, self.frames)

    def mask(self, term: Term, size: tuple[int, int]) -> Tensor | None:
        """Where a term acts, (B, 1, h, w) at a size; None is everywhere. Several masks are spread over the frames of a
        video, from first to last."""
        region = term.region
        if region is None:
            return None
        number = self.item
        if self.frame is not None:
            number = self.frame if region.picture is None else _spread(self.frame, self.frames, len(region.picture))
        return region.of_picture(number, size, self.x_t)

    def unfold(self, shift: Tensor) -> Tensor:
        """(B T, C, H, W) back to the shape that came in."""
        return shift if self.frame is None else torch.unflatten(shift, 0, (-1, self.frames)).transpose(1, 2)


@dataclass
class References:
    """Targets of one run's guidances: found in the encoder's cache, or looked at once per noise level.

    Terms that share a picture share the pass that looks at it. On a GPU, which is asked for work faster than it does
    it, all pictures of a level go through the encoder together. References of encoders that read denoised are clean:
    one level is all. ``levels`` are all noise levels seen so far: references take turns by them. ``contents`` are those
    of guidances, masks and pictures, read once a run, and ``noises`` what encoders see of the one noise.
    """

    levels: set[float] = field(default_factory=set)
    contents: dict[int, Hashable] = field(default_factory=dict)
    noises: dict[tuple[object, ...], tuple[Tensor, Hashable]] = field(default_factory=dict)

    def targets(
        self,
        members: Sequence[int],
        terms: Sequence[Term],
        view: View,
        batch: Batch,
        ratio: Tensor | None,
        crop: Crop | None = None,
    ) -> list[Target]:
        """The targets of terms of one encoder, by their numbers, at the noise ``ratio`` (1,), None where references are
        looked at clean."""
        encoder = terms[members[0]].encoder
        noise, noise_said = (None, None) if ratio is None else self._noise(view, batch.x_t)
        own = {k: (self.content_of(terms[k].guidance), self.content_of(terms[k].region)) for k in members}
        level = (
            None if ratio is None else float(ratio[0]), noise_said, view.size(*batch.x_t.shape[-2:]),
            batch.x_t.dtype, str(batch.x_t.device), version_of(encoder),
            frozenset(own.values()) if together(batch.x_t) else None,  # in one pass the last bit depends on all
        )  # fmt: skip
        keys = {k: (own[k], level) for k in members}
        cache, found = cache_of(encoder), dict[int, Features]()
        # what is compared place by place is cropped alike, each time anew
        crops = {k: crop if crop is not None and terms[k].guidance.aligned else None for k in members}
        for k in members:
            known = cache.find(keys[k]) if crops[k] is None else None
            if known is not None:
                found[k] = known
        missing = [k for k in members if k not in found]
        if missing:
            missing = list(members) if together(batch.x_t) else missing
            seen = Seen(encoder, view, batch.x_t, ratio, noise, self.content_of)
            seen.look_at([(terms[k], crops[k]) for k in missing])
            for k in missing:
                target = terms[k].guidance.target(functools.partial(seen.features, terms[k], crops[k]))
                found[k] = target.to(batch.x_t.device)
                if crops[k] is None:
                    cache.keep(keys[k], found[k])
        return [self._chosen(found[k], terms[k], batch) for k in members]

    def window(self, term: Term, view: View, batch: Batch, ratio: Tensor | None) -> Window | None:
        """What the encoder sees of a batch at the noise ratio (1,), if any: outside the term's mask grey, as noisy."""
        mask = batch.mask(term, view.size(*batch.x_t.shape[-2:]))
        if mask is None:
            return None
        grey = batch.x_t.new_zeros(1, 3, *mask.shape[-2:])
        noise = None if ratio is None else self._noise(view, batch.x_t)[0]
        return Window(mask, noised(term.encoder, ratio, grey, noise))

    def content_of(self, value: object) -> Hashable:
        """What a guidance, a mask or a picture of the run's terms says; read once."""
        if id(value) not in self.contents:
            self.contents[id(value)] = content(value, self.content_of)
        return self.contents[id(value)]

    def _noise(self, view: View, x_t: Tensor) -> tuple[Tensor, Hashable]:
        """The one noise of all references, as the view shows it (1, 3, h, w), and its content."""
        key = id(view), x_t.shape[1:], x_t.dtype, x_t.device
        if key not in self.noises:
            generator = torch.Generator().manual_seed(REFERENCE_SEED)
            noise = view.noise(torch.randn(1, *x_t.shape[1:], generator=generator).to(x_t.dtype))
            self.noises[key] = noise.to(x_t.device), content(noise)
        return self.noises[key]

    def _chosen(self, features: Features, term: Term, batch: Batch) -> Target:
        """Which references (R of them) each sample follows, and how."""
        if term.several is None or features.count == 0:
            return Target(features, _of_frames(term.guidance, batch))
        count, choice, now = features.count, term.several.choice, float(batch.sigma.max())
        if choice in ("mean", "nearest"):
            return Target(features, None, term.several)
        if choice == "one each":
            return Target(features, batch.item % count)
        self.levels.add(now)
        turn = term.several.turn(count, sum(level > now for level in self.levels))
        return Target(features, torch.full_like(batch.item, turn))


class Seen:
    """What an encoder sees of references, at one noise level: each picture once, as deep as anyone wants it."""

    def __init__(
        self,
        encoder: Encoder,
        view: View,
        x_t: Tensor,
        ratio: Tensor | None,
        noise: Tensor | None,
        content_of: Callable[[object], Hashable],
    ) -> None:
        self.encoder, self.view, self.x_t, self.ratio, self.noise = encoder, view, x_t, ratio, noise
        self.content_of = content_of
        self._known: dict[Hashable, Features] = {}

    def look_at(self, wanted: Sequence[tuple[Term, Crop | None]]) -> None:
        """Passes for the pictures of terms: one for each, on a GPU one for all of a size."""
        pictures, depths = dict[Hashable, tuple[Tensor, Tensor | None]](), dict[Hashable, int]()
        for term, crop in wanted:
            image = getattr(term.guidance, "image", None)
            if isinstance(image, Tensor):
                key = self._name(term, crop, image)
                if key not in pictures:
                    pictures[key] = self._shown(term, crop, image)
                depths[key] = max(depths.get(key, 0), term.guidance.depth(self.encoder))
        groups: dict[Hashable, list[Hashable]] = {}
        for key, (picture, _) in pictures.items():
            groups.setdefault(picture.shape[1:] if together(picture) else key, []).append(key)
        for keys in groups.values():
            shown = [pictures[key] for key in keys]
            features = self._pass(torch.cat([picture for picture, _ in shown]), max(depths[key] for key in keys))
            start = 0
            for key, (picture, mask) in zip(keys, shown, strict=True):
                part = features
                if len(keys) > 1:  # copies: what is kept of one picture must not hold the others in memory
                    part = features.take(slice(start, start + len(picture))).map(torch.clone)
                self._known[key], start = replace(part, where=mask), start + len(picture)

    def features(self, term: Term, crop: Crop | None, image: Tensor, depth: int | None) -> Features:
        """Of references (R, 3, h, w) in -1..1, at least so deep; None is all of it."""
        key, depth = self._name(term, crop, image), depth or self.encoder.full_depth
        known = self._known.get(key)
        if known is None or len(known.maps) + (known.embed is not None) < depth:
            picture, mask = self._shown(term, crop, image)
            known = self._known[key] = replace(self._pass(picture, depth), where=mask)
        return known

    def _name(self, term: Term, crop: Crop | None, image: Tensor) -> Hashable:
        """What is shown: equal where another term shows the same."""
        region = term.region
        if region is None:
            return self.content_of(image), crop
        place = self.content_of(region.picture) if term.guidance.aligned else None
        shown = self.content_of(region.reference) if image is getattr(term.guidance, "image", None) else None
        return self.content_of(image), crop, shown, place, region.feather

    def _shown(self, term: Term, crop: Crop | None, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """References at the size of the view, with their noise, and their masks."""
        x_0 = fit(brought(image.to(self.x_t.dtype), self.x_t), *self.view.size(*self.x_t.shape[-2:]))
        own = image is getattr(term.guidance, "image", None)  # of negative pictures all is read
        mask = _reference_mask(term, image, x_0) if own else None
        for part in (mask, _place(term, x_0)):
            x_0 = x_0 if part is None else part * x_0
        if crop is not None:
            mask, x_0 = None if mask is None else crop(mask), crop(x_0)
        return noised(self.encoder, self.ratio, x_0, self.noise), mask

    @torch.no_grad()
    def _pass(self, pictures: Tensor, depth: int) -> Features:
        t = torch.zeros(1)
        if self.ratio is not None:
            assert reads_noise(self.encoder)
            t = self.encoder.table.timestep(self.ratio)
        return self.encoder(pictures, t, depth)


def together(picture: Tensor) -> bool:
    """Whether pictures go through an encoder together: not on a CPU, which gains nothing by it."""
    return picture.device.type != "cpu"


def noised(encoder: Encoder, ratio: Tensor | None, x_0: Tensor, noise: Tensor | None) -> Tensor:
    """Pictures x_0 (R, 3, h, w) with a noise (1, 3, h, w) of the view at ratio (1,), if any, in VP scaling:

    (x_0 + ratio * noise / gain) / sqrt(1 + ratio^2)
    """
    if ratio is None or noise is None:
        return x_0
    norm = (1 + ratio.square()).sqrt()
    return (x_0 + noise * expand(ratio, x_0) / encoder.noise_gain(*x_0.shape[-2:])) / expand(norm, x_0)


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
    return region.of_picture(torch.zeros(1, dtype=torch.long), (x_0.shape[-2], x_0.shape[-1]), x_0)


def _of_frames(guidance: Guidance, batch: Batch) -> Tensor | None:
    """Which reference each frame follows: several are spread evenly over the frames of a video, from first to last."""
    count = len(getattr(guidance, "image", ()))
    if batch.frame is None or count < 2:
        return None
    return _spread(batch.frame, batch.frames, count)


def _spread(frame: Tensor, frames: int, count: int) -> Tensor:
    """Which of ``count`` things each frame (B,) of 0..frames - 1 has, where they are spread from first to last."""
    return (frame * (count - 1) / max(frames - 1, 1)).round().long()
