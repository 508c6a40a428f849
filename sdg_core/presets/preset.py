"""What a guidance is made of, without its encoder: to JSON and back.

Terms that an encoder pair shares are one guidance here: which encoder reads where is the pair's affair.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from ..method import (
    CHOICES,
    EASES,
    Augment,
    Blend,
    Choice,
    ClassGuidance,
    ContentGuidance,
    Curve,
    DirectionGuidance,
    Ease,
    Encoder,
    Fade,
    Goal,
    Guidance,
    Region,
    Several,
    StructureGuidance,
    StyleGuidance,
    Term,
    TextGuidance,
    check_layers,
)
from .fields import Fields, number, parse, refuse, valid, whole, whole_object
from .pixels import MASK, PICTURE, Range, read_pixels, written

FORMAT, VERSION = "SDG guidance preset", 1

LARGEST, MANY, LONGEST_TEXT = 1e9, 10_000, 100_000
"""The largest scale or factor, the longest list, and the longest text of a preset."""

Speak = Callable[[list[str]], Tensor]
"""Texts -> their embeddings (N, D) by the encoder of a guidance."""

Make = Callable[[Encoder, Speak], Guidance]


@dataclass(frozen=True, eq=False)
class Controls:
    """The fields of a ``Term`` that don't depend on its encoder."""

    scale: float
    start: float
    end: float
    frames: tuple[int, ...] | None
    curves: tuple[Curve, ...]
    every: int
    lead: float
    region: Region | None
    goal: Goal | None
    several: Several | None
    blend: Blend | None
    share: float
    augment: Augment | None
    budget: float | None


@dataclass(frozen=True, eq=False)
class Recipe:
    """One guidance of a preset, to be made for an encoder: a classifier for the ``kind`` class, else a CLIP."""

    kind: str
    controls: Controls
    make: Make

    def terms(self, encoders: Sequence[tuple[Encoder, Fade | None]], speak: Callable[[int], Speak]) -> tuple[Term, ...]:
        """A term for each encoder; ``speak(i)`` gives what encoder i makes of texts.

        Raises ValueError for layers that an encoder doesn't have, and for crops where no encoder reads denoised.
        """
        clean = [encoder.reads == "denoised" for encoder, _ in encoders]
        if self.controls.augment is not None and not any(clean):
            raise ValueError(
                "This preset looks by random crops, which are for clean encoders; the one that came reads noise. "
                "Connect Load CLIP (SDG) or an Encoder Crossfade."
            )
        found = []
        for i, (encoder, fade) in enumerate(encoders):
            controls = self.controls if clean[i] else replace(self.controls, augment=None)
            found.append(Term(self.make(encoder, speak(i)), encoder, fade=fade, **vars(controls)))
        return tuple(found)


# Writing


def preset_text(terms: Sequence[Term]) -> str:
    """A guidance as the JSON that ``read_preset`` reads, which is tried before it is given.

    Raises ValueError for a guidance that is none of this pack's, and for embeddings whose texts aren't known.
    """
    blends: list[Blend] = []
    guidances: list[dict[str, object]] = []
    for i, term in enumerate(terms):
        said = _guidance_fields(term, blends)
        if i and _one_guidance(terms[i - 1], term) and _but_augment(guidances[-1]) == _but_augment(said):
            guidances[-1]["augment"] = guidances[-1]["augment"] or said["augment"]
        else:
            guidances.append(said)
    shared = [{"balance": blend.balance, "project": blend.project} for blend in blends]
    text = json.dumps({"format": FORMAT, "version": VERSION, "blends": shared, "guidances": guidances}, indent=1)
    read_preset(text)
    return text


def _one_guidance(first: Term, second: Term) -> bool:
    """Whether two terms, one after the other, are one guidance through the two encoders of a pair."""
    a, b = first.fade, second.fade
    return a is not None and b is not None and replace(a, rising=b.rising) == b and a.rising and not b.rising


def _but_augment(said: dict[str, object]) -> dict[str, object]:
    return {**said, "augment": None}


def _guidance_fields(term: Term, blends: list[Blend]) -> dict[str, object]:
    """One term as JSON; its blend, the very object, as its number in ``blends``."""
    if term.blend is not None and not any(known is term.blend for known in blends):
        blends.append(term.blend)
    goal, several, augment = term.goal, term.several, term.augment
    return {
        **_kind_fields(term.guidance),
        "scale": term.scale,
        "start": term.start,
        "end": term.end,
        "frames": None if term.frames is None else list(term.frames),
        "curves": [{"points": [list(point) for point in c.points], "ease": c.ease} for c in term.curves],
        "every": term.every,
        "lead": term.lead,
        "region": None if term.region is None else _region_fields(term.region),
        "goal": None if goal is None else {"similarity": goal.similarity, "adapted": goal.adapted},
        "several": None if several is None else {"choice": several.choice, "weights": list(several.weights)},
        "blend": None if term.blend is None else [known is term.blend for known in blends].index(True),
        "share": term.share,
        "augment": None if augment is None else {"count": augment.count, "least": augment.least},
        "budget": term.budget,
    }


def _region_fields(region: Region) -> dict[str, object]:
    masks = {"picture": region.picture, "reference": region.reference}
    said: dict[str, object] = {name: None if m is None else written(m, MASK) for name, m in masks.items()}
    return {**said, "feather": region.feather}


def _kind_fields(guidance: Guidance) -> dict[str, object]:
    said: dict[str, object]
    if isinstance(guidance, TextGuidance):
        said = {"kind": "text", "texts": _known(guidance.texts), "spherical": guidance.spherical}
        said["negative"] = [] if guidance.negative is None else _known(guidance.negative_texts)
    elif isinstance(guidance, ContentGuidance):
        said = {"kind": "content", "images": written(guidance.image, PICTURE), "spherical": guidance.spherical}
        said["negative"] = None if guidance.negative is None else written(guidance.negative, PICTURE)
    elif isinstance(guidance, StructureGuidance):
        layers = list(guidance.layers)
        said = {"kind": "structure", "images": written(guidance.image, PICTURE), "layers": layers}
    elif isinstance(guidance, StyleGuidance):
        images, layers = written(guidance.image, PICTURE), list(guidance.layers)
        said = {"kind": "style", "images": images, "layers": layers, "centred": guidance.centred}
    elif isinstance(guidance, DirectionGuidance):
        said = {"kind": "direction", "images": written(guidance.image, PICTURE), "texts": _known(guidance.texts)}
    elif isinstance(guidance, ClassGuidance):
        said = {"kind": "class", "number": guidance.number}
    else:
        raise ValueError(f"Got a {type(guidance).__name__}, which presets don't know. Take it out of what you save.")
    return said


def _known(texts: tuple[str, ...]) -> list[str]:
    if not texts:
        raise ValueError("Got a guidance by a text whose words are not known; presets keep words. Give it its texts.")
    return list(texts)


# Reading


def read_preset(text: str) -> tuple[Recipe, ...]:
    """The guidances of a preset. Raises ValueError for anything but what ``preset_text`` writes, naming the field."""
    fields = parse(text)
    fields.word("format", [FORMAT])
    version = fields.take("version")
    if not isinstance(version, int) or isinstance(version, bool) or version != VERSION:
        refuse("version", version, f"{VERSION}, which this version of the pack reads")
    blends = fields.items("blends", MANY, lambda value, path: whole_object(value, path, _read_blend))
    recipes = fields.items(
        "guidances", MANY, lambda value, path: whole_object(value, path, lambda part: _read_recipe(part, blends)), 1
    )
    fields.end()
    return recipes


def _read_blend(fields: Fields) -> Blend:
    return Blend(fields.number("balance", 0, 1), fields.flag("project"))


def _read_recipe(fields: Fields, blends: Sequence[Blend]) -> Recipe:
    kind = fields.word("kind", list(_KINDS))
    make = _KINDS[kind](fields)
    start, end = fields.number("start", 0, 1), fields.number("end", 0, 1)
    if start >= end:
        refuse(fields.at("start"), start, f"less than the end, {end}")
    controls = Controls(
        scale=fields.number("scale", -LARGEST, LARGEST),
        start=start,
        end=end,
        frames=fields.optional("frames", lambda name: fields.items(name, 10 * MANY, _read_frame, 1)),
        curves=fields.items("curves", MANY, lambda value, path: whole_object(value, path, _read_curve)),
        every=fields.whole("every", 1, MANY),
        lead=fields.number("lead", 0, 1),
        region=fields.part("region", _read_region),
        goal=fields.part("goal", lambda part: Goal(part.number("similarity", -1, 1), part.flag("adapted"))),
        several=fields.part("several", _read_several),
        blend=fields.optional("blend", lambda name: blends[_read_number(fields, name, len(blends))]),
        share=fields.number("share", 0, LARGEST),
        augment=fields.part("augment", _read_augment),
        budget=fields.optional("budget", lambda name: fields.number(name, 1e-6, LARGEST)),
    )
    return Recipe(kind, controls, make)


def _read_number(fields: Fields, name: str, count: int) -> int:
    """A number in the list of blends."""
    return (
        fields.whole(name, 0, count - 1)
        if count
        else refuse(fields.at(name), fields.values[name], "null: the list blends is empty")
    )


def _read_frame(value: object, path: str) -> int:
    return whole(value, path, -99_999, 99_999)


def _read_curve(fields: Fields) -> Curve:
    points = fields.items("points", MANY, _read_point, 1)
    ease = cast(Ease, fields.word("ease", EASES))
    return valid(lambda: Curve(points, ease))


def _read_point(value: object, path: str) -> tuple[float, float]:
    if not isinstance(value, list) or len(value) != 2:
        refuse(path, value, "a pair of numbers")
    return number(value[0], f"{path}[0]", 0, 1), number(value[1], f"{path}[1]", 0, LARGEST)


def _read_region(fields: Fields) -> Region:
    picture, reference = (fields.optional(name, lambda n: _read_images(fields, n, MASK)) for name in _MASKS)
    feather = fields.number("feather", 0, 0.5)
    return valid(lambda: Region(picture, reference, feather))


_MASKS = ("picture", "reference")


def _read_several(fields: Fields) -> Several:
    choice = cast(Choice, fields.word("choice", CHOICES))
    weights = fields.items("weights", MANY, lambda value, path: number(value, path, 1e-30, LARGEST))
    return Several(choice, weights)


def _read_augment(fields: Fields) -> Augment:
    return Augment(fields.whole("count", 1, 64), fields.number("least", 0.01, 1))


def _read_images(fields: Fields, name: str, kind: Range) -> Tensor:
    """Images (N, C, h, w), all of one size."""
    images = fields.items(
        name, MANY, lambda value, path: whole_object(value, path, lambda part: read_pixels(part, kind)), 1
    )
    if len({image.shape for image in images}) > 1:
        refuse(fields.at(name), fields.values[name], "images of one size")
    return torch.stack(images)


def _read_texts(fields: Fields, least: int, most: int, name: str = "texts") -> tuple[str, ...]:
    def read(value: object, path: str) -> str:
        if not isinstance(value, str) or not value.strip() or len(value) > LONGEST_TEXT:
            refuse(path, value, f"a text of 1 to {LONGEST_TEXT} characters")
        return value

    return fields.items(name, most, read, least)


def _read_layers(fields: Fields) -> tuple[int, ...]:
    return fields.items("layers", MANY, lambda value, path: whole(value, path, 1, MANY), 1)


def _read_text(fields: Fields) -> Make:
    texts, spherical = _read_texts(fields, 1, MANY), fields.flag("spherical")
    negative = _read_texts(fields, 0, 1, "negative")

    def make(encoder: Encoder, speak: Speak) -> TextGuidance:
        against = _said(speak, negative) if negative else None
        return TextGuidance(_said(speak, texts), spherical, texts, against, negative)

    return make


def _read_content(fields: Fields) -> Make:
    images, spherical = _read_images(fields, "images", PICTURE), fields.flag("spherical")
    negative = fields.optional("negative", lambda name: _read_images(fields, name, PICTURE))
    guidance = ContentGuidance(images, spherical, negative)
    return lambda encoder, speak: guidance


def _read_structure(fields: Fields) -> Make:
    images, layers = _read_images(fields, "images", PICTURE), _read_layers(fields)
    return lambda encoder, speak: StructureGuidance(images, check_layers(layers, encoder))


def _read_style(fields: Fields) -> Make:
    images, layers, centred = _read_images(fields, "images", PICTURE), _read_layers(fields), fields.flag("centred")
    return lambda encoder, speak: StyleGuidance(images, check_layers(layers, encoder), centred)


def _read_direction(fields: Fields) -> Make:
    images, texts = _read_images(fields, "images", PICTURE), _read_texts(fields, 2, 2)

    def make(encoder: Encoder, speak: Speak) -> DirectionGuidance:
        said = _said(speak, texts)
        return DirectionGuidance(images, said[1:] - said[:1], texts)

    return make


def _read_class(fields: Fields) -> Make:
    guidance = ClassGuidance(fields.whole("number", 0, 10_000_000))
    return lambda encoder, speak: guidance


@torch.no_grad()
def _said(speak: Speak, texts: tuple[str, ...]) -> Tensor:
    return speak(list(texts))


_KINDS: dict[str, Callable[[Fields], Make]] = {
    "text": _read_text,
    "content": _read_content,
    "structure": _read_structure,
    "style": _read_style,
    "direction": _read_direction,
    "class": _read_class,
}
