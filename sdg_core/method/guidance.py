"""What guidance pulls towards: text, an image's content, its structure, its style (SDG, section 3.2).

Every score is per sample, (B,), in the encoder's precision, dimensionless, and higher is better. Structure and style
distances are divided by the reference's own size, layer by layer, and averaged over layers: a scale then means about
the same pull for every layer, encoder and resolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .blend import Blend
from .controls import Augment, Curve, Goal, Region, Several, check_every
from .features import Encoder, Features, counts, gram, reads_noise, squared_distance, squared_size, unit
from .precision import precise

Kind = Literal["text", "content", "structure", "style"]

DEFAULT_SCALE: dict[Kind, float] = {"text": 200.0, "content": 300.0, "structure": 300.0, "style": 1000.0}
"""Scales that the bundled pixel model was measured at, by kind of guidance."""

DEFAULT_INTERVAL: dict[Kind, tuple[float, float]] = {
    "text": (0.2, 0.6), "content": (0.0, 1.0), "structure": (0.0, 1.0), "style": (0.0, 1.0),
}  # fmt: skip
"""Where a guidance acts by default, as fractions of the run.

Text decides little in the noisiest steps and harms the finest ones (Kynkaanniemi et al. 2024, arXiv 2404.07724).
"""


NEGATIVE_PART = 0.5
"""How much a negative text or picture counts. With all of it pictures show less of a text that names several things."""


Look = Callable[[Tensor, "int | None"], Features]
"""(clean references (R, 3, h, w) in -1..1, depth or None for all) -> their features at the current step's noise."""


class Guidance(Protocol):
    """One pull. ``target`` is computed once per noise level, ``score`` at every gradient.

    A target's ``maps`` are what ``score`` compares, one per layer that the guidance reads. ``best`` is the score of the
    reference itself. ``aligned``: whether the same places of picture and reference are compared.
    """

    @property
    def best(self) -> float: ...

    @property
    def aligned(self) -> bool: ...

    def depth(self, encoder: Encoder) -> int: ...

    def target(self, look: Look) -> Features: ...

    def score(self, features: Features, target: Features) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class TextGuidance:
    """F = E'(x_t, t) . E_L(l) - NEGATIVE_PART E'(x_t, t) . E_L(n), n a negative text if there is one.

    ``embed``: normalised text embeddings (N, D); several are averaged in score. ``spherical``: 1 - theta^2 / 2 of the
    angle theta instead of cos(theta), see ``_cosine``. ``texts``: the words that ``embed`` is of, where they are known.
    ``negative`` (1, D), ``negative_texts``: likewise of n. Where n is what l shares with all other pictures ("a
    person"), the pull is towards what sets l apart.
    """

    embed: Tensor
    spherical: bool = False
    texts: tuple[str, ...] = ()
    negative: Tensor | None = None
    negative_texts: tuple[str, ...] = ()
    best, aligned = 1.0, False

    def depth(self, encoder: Encoder) -> int:
        return encoder.full_depth

    def target(self, look: Look) -> Features:
        negative = () if self.negative is None else (self.negative.expand(len(self.embed), -1),)
        return Features(negative, self.embed)

    def score(self, features: Features, target: Features) -> Tensor:
        score = _cosine(features, target, self.spherical)
        for negative in target.maps:
            score = score - NEGATIVE_PART * _cosine(features, Features((), negative[:1]), self.spherical)
        return score


@dataclass(frozen=True, eq=False)
class ContentGuidance:
    """F = E'(x_t, t) . (E'(x'_t, t) - NEGATIVE_PART mean_n E'(x^n_t, t)): what is in the picture; pose and layout stay
    free.

    ``image``: references (R, 3, h, w) in -1..1; several are averaged in score. ``spherical``: see ``TextGuidance``.
    ``negative``: pictures x^n (N, 3, h, w), if there are any. Where they are what the model draws anyway, the pull is
    towards what sets x' apart: embeddings of pictures have most of their length in common.
    """

    image: Tensor
    spherical: bool = False
    negative: Tensor | None = None
    best, aligned = 1.0, False

    def depth(self, encoder: Encoder) -> int:
        return encoder.full_depth

    def target(self, look: Look) -> Features:
        embed = look(self.image, None).embed
        assert embed is not None
        if self.negative is None:
            return Features((), unit(embed))
        others = look(self.negative, None).embed
        assert others is not None
        return Features((unit(others).mean(dim=0, keepdim=True).expand(len(embed), -1),), unit(embed))

    def score(self, features: Features, target: Features) -> Tensor:
        score = _cosine(features, target, self.spherical)
        for shared in target.maps:
            score = score - NEGATIVE_PART * _cosine(features, Features((), shared[:1]), False)
        return score


@dataclass(frozen=True, eq=False)
class StructureGuidance:
    """F = -mean_j |E'(x_t)_j - E'(x'_t)_j|^2 / |E'(x'_t)_j|^2 over feature maps j: layout as well as content.

    ``layers`` count maps from 1 (the stem, or the patch embedding).
    """

    image: Tensor
    layers: tuple[int, ...] = (3,)
    best, aligned = 0.0, True

    def depth(self, encoder: Encoder) -> int:
        return max(check_layers(self.layers, encoder))

    def target(self, look: Look) -> Features:
        seen = look(self.image, max(self.layers))
        maps = seen.maps
        return Features(tuple(maps[layer - 1] for layer in self.layers), where=seen.where)

    def score(self, features: Features, target: Features) -> Tensor:
        seen = [features.maps[layer - 1] for layer in self.layers]
        return _closeness(seen, target, features.where)


@dataclass(frozen=True, eq=False)
class StyleGuidance:
    """F = -mean_j |G'(x_t)_j - G'(x'_t)_j|_F^2 / |G'(x'_t)_j|_F^2, G the Gram matrix of map j.

    ``centred`` takes each channel's mean out of G first: less of the reference's layout comes along.
    """

    image: Tensor
    layers: tuple[int, ...] = (5,)
    centred: bool = False
    best, aligned = 0.0, False

    def depth(self, encoder: Encoder) -> int:
        return max(check_layers(self.layers, encoder))

    def target(self, look: Look) -> Features:
        """Of each layer its Gram matrix, or its map where that is smaller: of a deep layer's 2048 channels at 7 x 7
        places the one takes 16 MB, the other 0.4."""
        seen = look(self.image, max(self.layers))
        maps = [seen.maps[layer - 1] for layer in self.layers]
        small = [seen.where is None and m.shape[2] * m.shape[3] < m.shape[1] for m in maps]
        return Features(tuple(m if s else self._gram(m, seen.where) for m, s in zip(maps, small, strict=True)))

    def score(self, features: Features, target: Features) -> Tensor:
        seen = [self._gram(features.maps[layer - 1], features.where) for layer in self.layers]
        return _closeness(seen, Features(tuple(self._gram(t, None) if t.ndim == 4 else t for t in target.maps)))

    def _gram(self, feature_map: Tensor, where: Tensor | None) -> Tensor:
        """(B, C, H, W) -> (B, C, C)."""
        return gram(feature_map, self.centred, where)


@dataclass(frozen=True, eq=False)
class DirectionGuidance:
    """F = cos(E'(x_t, t) - E'(x'_t, t), E_L(to) - E_L(from)), all on the unit sphere: the picture changes as the text
    does (the directional loss of StyleGAN-NADA, Gal et al. 2021, arXiv 2108.00946).

    ``image``: the picture(s) to edit (R, 3, h, w) in -1..1. ``direction``: E_L(to) - E_L(from), (1, D). ``texts``: from
    and to in words, where they are known.
    """

    image: Tensor
    direction: Tensor
    texts: tuple[str, ...] = ()
    best, aligned = 1.0, False

    def __post_init__(self) -> None:
        if not bool((self.direction.norm(dim=-1) > 1e-6).all()):
            raise ValueError("Got two texts that say the same to this encoder; wanted a change. Write another text.")

    def depth(self, encoder: Encoder) -> int:
        return encoder.full_depth

    def target(self, look: Look) -> Features:
        embed = look(self.image, None).embed
        assert embed is not None
        return Features((self.direction.expand(len(embed), -1),), unit(embed))

    def score(self, features: Features, target: Features) -> Tensor:
        assert features.embed is not None
        assert target.embed is not None
        seen = unit(features.embed)
        change = unit(seen[:, None] - target.embed.to(seen.dtype))
        return (change * unit(target.maps[0].to(seen.dtype))).sum(dim=2).mean(dim=1)


@dataclass(frozen=True)
class Fade:
    """A weight between 0 and 1 over the noise: one half at sigma / alpha = ``ratio``, linear in its logarithm, 0 and 1
    at ``width`` times less and more. ``rising``: 1 at high noise; otherwise 1 at low noise. The two add up to 1.
    """

    ratio: float
    rising: bool
    width: float = 2.0

    def __call__(self, ratio: Tensor) -> Tensor:
        """Weights at noise ratios (B,)."""
        position = (ratio.clamp(min=1e-12) / self.ratio).log() / (2 * math.log(self.width))
        weight = (0.5 + position).clamp(0, 1)
        return weight if self.rising else 1 - weight


@dataclass(frozen=True, eq=False)
class Term:
    """One guidance with the encoder that it reads by, its scale, and where in the run it acts.

    ``start`` and ``end`` are fractions of the sampling run (0 is pure noise, 1 the finished picture). A negative scale
    pushes away. A combined guidance is a tuple of terms; its score is the sum of scale * score. ``fade`` weighs by the
    noise, where two encoders share the work. ``frames``: those of a video to guide, negative ones counted from the
    end; None is all. The other fields are ``controls``: ``curves`` multiply the scale over the run; the gradient is
    taken at ``every`` k-th noise level only and reused between, but at each up to the part ``lead`` of the run;
    ``region`` bounds what is read and shifted; at its ``goal`` it stops; ``several`` says how it follows more than one
    reference; terms of one ``blend`` come together by it, at their ``share``; a clean encoder may look by ``augment``;
    guidance may cost ``budget`` percent of the model's time.
    """

    guidance: Guidance
    encoder: Encoder
    scale: float
    start: float = 0.0
    end: float = 1.0
    fade: Fade | None = None
    frames: tuple[int, ...] | None = None
    curves: tuple[Curve, ...] = ()
    every: int = 1
    lead: float = 0.0
    region: Region | None = None
    goal: Goal | None = None
    several: Several | None = None
    blend: Blend | None = None
    share: float = 1.0
    augment: Augment | None = None
    budget: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(
                f"Got a guidance that runs from {self.start} to {self.end}; wanted 0 <= start < end <= 1. "
                "Set start below end, both as fractions of the run."
            )
        check_every(self.every)
        if self.budget is not None and not (math.isfinite(self.budget) and self.budget > 0):
            raise ValueError(f"Got a budget of {self.budget} % more time; wanted above 0. Usual: 10 to 50.")
        if self.augment is not None and reads_noise(self.encoder):
            raise ValueError(
                "Got random crops for an encoder of noise; wanted a clean one. An encoder of noise needs none, and "
                "counts on the size of the picture. Take them off, or use a clean CLIP from Load CLIP (SDG)."
            )

    @property
    def apart(self) -> bool:
        """Whether a control needs this term's gradient by itself, from a pass of its own."""
        masked = self.region is not None and self.region.picture is not None
        controls = (self.goal, self.blend, self.augment, self.budget)
        return self.every > 1 or masked or any(control is not None for control in controls)

    @property
    def aims(self) -> bool:
        """Whether a goal sizes its shift, instead of the scale."""
        return self.goal is not None and self.goal.adapted


@dataclass(frozen=True)
class Pace:
    """How often a guidance looks: at every noise level in the first part ``lead`` of its interval, then at every
    ``every`` k-th, up to the part ``end`` of the run. What a picture shows is decided early."""

    every: int = 1
    end: float = 1.0
    lead: float = 0.0

    def of(self, term: Term) -> Term:
        """The term at this pace; one that looks less often by itself, or ends earlier, stays so."""
        slower = term
        if self.every > 1:
            lead = term.lead if term.every > 1 else term.start + (term.end - term.start) * self.lead
            slower = replace(term, every=max(term.every, self.every), lead=lead)
        return replace(slower, end=min(term.end, max(self.end, term.start + (term.end - term.start) * self.end)))


PACES = {"quality": Pace(), "balanced": Pace(3, 1.0, 0.3), "fast": Pace(3, 0.6, 0.25)}
"""Ready-made ones; ``sdg evaluate --suite controls`` says what each costs, and how often it reaches what was asked."""


def combine(parts: Sequence[tuple[tuple[Term, ...], float]], blend: Blend | None = None) -> tuple[Term, ...]:
    """The weighted sum of guidances: F = w_1 F_1 + w_2 F_2 + ..., as one tuple of terms.

    With a ``blend`` their gradients come together by that, each with its weight as its share of the pull.
    """
    return tuple(
        replace(
            term,
            scale=weight * term.scale,
            share=abs(weight) * term.share,
            blend=term.blend if blend is None else blend,
        )
        for terms, weight in parts
        for term in terms
    )


def check_layers(layers: tuple[int, ...], encoder: Encoder) -> tuple[int, ...]:
    """The layers, if the encoder has them. Raises ValueError otherwise."""
    deepest = encoder.full_depth - 1
    if not layers or min(layers) < 1 or max(layers) > deepest:
        raise ValueError(
            f"Got the layers {list(layers)}; wanted one or more of 1..{deepest}, the feature maps of this encoder. "
            "Shallow layers carry strokes and palette, deep ones parts and layout."
        )
    return layers


def fit(image: Tensor, height: int, width: int) -> Tensor:
    """References (R, 3, h, w) at the picture's size: scaled to cover it, the middle cut out, antialiased."""
    h, w = image.shape[-2:]
    if (h, w) == (height, width):
        return image
    zoom = max(height / h, width / w)
    size = (max(height, round(h * zoom)), max(width, round(w * zoom)))
    image = F.interpolate(precise(image), size, mode="bicubic", antialias=True).clamp(-1, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return image[..., top : top + height, left : left + width]


def _cosine(features: Features, target: Features, spherical: bool) -> Tensor:
    """cos(theta), or 1 - theta^2 / 2, whose gradient does not vanish with sin(theta): the pull is theta at every angle.

    theta = 2 arcsin(|u - v| / 2) (the spherical distance of k-diffusion and disco-diffusion).
    """
    assert features.embed is not None
    assert target.embed is not None
    seen = unit(features.embed)
    if spherical:
        chord = (seen[:, None] - target.embed.to(seen.dtype)).square().sum(dim=2).clamp(min=1e-12, max=4 - 1e-6).sqrt()
        return (1 - 2 * (chord / 2).asin().square()).mean(dim=1)
    return (seen @ target.embed.to(seen.dtype).T).mean(dim=1)


def _closeness(seen: Sequence[Tensor], target: Features, where: Tensor | None = None) -> Tensor:
    """Minus the relative squared distance, averaged over layers and references: (B, ...) per layer -> (B,).

    ``target.maps`` holds the wanted values (R, ...) of the same layers. Places of maps count as ``where`` (B, 1, h, w)
    and the references' own say.
    """
    distances = []
    for layer, wanted in zip(seen, target.maps, strict=True):
        for r, reference in enumerate(wanted):
            a, b = layer, reference[None]
            for part in (where, None if target.where is None else target.where[r % len(target.where)][None]):
                if part is not None:
                    root = counts(part, layer).sqrt()
                    a, b = precise(a) * root, precise(b) * root
            distances.append(squared_distance(a, b) / squared_size(b))
    return -torch.stack(distances).mean(dim=0)
