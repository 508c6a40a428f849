"""The paper's comparison (SDG section 4) on the bundled world: guidance beside the systems it was measured against.

Every method draws for the same ``PAIRS`` of a wish and a reference, from the same seeds:

- unguided; classifier guidance (ADM) and text guidance, by the wish, one attribute;
- ILVR at four down factors, content, structure and style guidance, by the reference;
- text and content guidance together, by both.

Columns, all by the judge, which shares no weights with what guides:

- accuracy: share of what was asked for: the wish; the reference's background and hair (of style its drawing style);
  of both together all three, where the wish overrules the reference;
- frechet: Frechet distance in the judge's features to held-out renders, of as many pictures each;
- diversity: mean distance in the judge's features within a pair, over that of the unguided ones;
- retrieval: how often a picture finds its own pair: by the reference nearest in the judge's features, or by the wish
  whose attribute gained most, log p(value | picture) - log p(value);
- seconds: of one picture, on one thread.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..method import Kind, LowFrequencies
from .files import bundled_latent_encoder
from .jobs import (
    ATTRIBUTES,
    BLOCK_SEEDS,
    CHUNK,
    Job,
    Progress,
    Row,
    Settings,
    class_name,
    mean_of,
    prompt,
    scored_values,
    timed_job,
    worker_world,
)
from .metrics import frechet_distance, spread
from .world import Pull, World

PAIRS = 16
FACTORS = (4, 2, 8, 16)
"""Down factors of ILVR, in latent pixels. The first goes by "ilvr" alone."""
TOGETHER: dict[Kind, float] = {"content": 250.0, "text": 275.0}
"""Scales that they have together."""
Wish = Mapping[str, int]
"""What is asked for: the judge's attributes, and the index of a value of each."""


class Pair(NamedTuple):
    """What one group of pictures is drawn for: ``wish``, and ``reference`` (3, S, S) with what it shows."""

    wish: Wish
    reference: Tensor
    shows: Wish


@dataclass(frozen=True)
class Method:
    """A system: its jobs' pulls and held frequencies for a pair, what it is asked, and how its pictures are found."""

    name: str
    pulls: Callable[[World, Pair], tuple[Pull, ...]]
    asked: Callable[[Pair], Wish]
    by_reference: bool = False
    factor: int = 0


def pairs(world: World, settings: Settings) -> list[Pair]:
    """The block's wishes and references: held-out renders that show hair, no two with the same colours."""
    generator = torch.Generator().manual_seed(settings.block)
    wishes = [{name: value} for name in ATTRIBUTES for value in scored_values(world, name)]
    order = torch.randperm(len(wishes), generator=generator)[:PAIRS].tolist()
    names = list(world.judge.attributes)
    chosen: dict[tuple[int, int], tuple[Tensor, Wish]] = {}
    for i in torch.randperm(len(world.labels), generator=generator).tolist():
        shows = {name: int(world.labels[i, names.index(name)]) for name in ("background", "hair", "style")}
        if min(shows.values()) >= 0:
            chosen.setdefault((shows["background"], shows["hair"]), (world.renders[i], shows))
    references = list(chosen.values())[:PAIRS]
    return [Pair(wishes[w], *reference) for w, reference in zip(order, references, strict=True)]


def _words(world: World, wish: Wish) -> dict[str, object]:
    return {name: world.judge.attributes[name][value] for name, value in wish.items()}


def _text(world: World, pair: Pair) -> tuple[Pull, ...]:
    return (world.text(prompt(_words(world, pair.wish))),)


def _class(world: World, pair: Pair) -> tuple[Pull, ...]:
    ((name, value),) = _words(world, pair.wish).items()
    return (Pull("class", class_name(name, value)),)


def _image(kind: Kind, world: World, pair: Pair) -> tuple[Pull, ...]:
    return (Pull(kind, pair.reference),)


def _both(world: World, pair: Pair) -> tuple[Pull, ...]:
    text = prompt(_words(world, pair.wish))
    return (Pull("content", pair.reference, TOGETHER["content"]), Pull("text", text, TOGETHER["text"]))


def _colours(pair: Pair) -> Wish:
    return {name: pair.shows[name] for name in ("background", "hair")}


METHODS = (
    Method("unguided", lambda world, pair: (), lambda pair: pair.wish),
    Method("classifier", _class, lambda pair: pair.wish),
    *(
        Method("ilvr" if n == 0 else f"ilvr {factor}", lambda world, pair: (), _colours, True, factor)
        for n, factor in enumerate(FACTORS)
    ),
    Method("text", _text, lambda pair: pair.wish),
    Method("content", functools.partial(_image, "content"), _colours, True),
    Method("structure", functools.partial(_image, "structure"), _colours, True),
    Method("style", functools.partial(_image, "style"), lambda pair: {"style": pair.shows["style"]}, True),
    Method("text and image", _both, lambda pair: {**_colours(pair), **pair.wish}, True),
)


def table_rows(pool: Executor, settings: Settings, progress: Progress) -> list[Row]:
    """`<method>/<accuracy|frechet|diversity|retrieval|seconds>` of ``METHODS``, as the module says."""
    here = replace(settings, world=replace(settings.world, model="v", route="noisy linear"))
    world, found, result = worker_world(here.world), {}, []
    chosen = pairs(world, settings)
    for method in METHODS:
        drawn, seconds = _draw(pool, world, method, chosen, here, functools.partial(progress, method.name))
        found[method.name] = drawn
        result += _rows(world, method, chosen, drawn, found["unguided"], seconds)
    return result


def _draw(
    pool: Executor, world: World, method: Method, chosen: Sequence[Pair], settings: Settings,
    progress: Callable[[int, int], None],
) -> tuple[Tensor, float]:  # fmt: skip
    """Pictures in the order of pairs and seeds, as many of each, and the mean seconds of one."""
    each = -(-settings.samples // PAIRS)
    starts = [(n, start) for n in range(PAIRS) for start in range(0, each, CHUNK)]
    jobs = []
    for n, start in starts:
        first = settings.block * BLOCK_SEEDS + n * each
        seeds = tuple(range(first + start, first + min(start + CHUNK, each)))
        jobs.append(Job(method.pulls(world, chosen[n]), seeds, _held(method, chosen[n])))
    done, spent = [], 0.0
    for images, seconds in pool.map(timed_job, jobs, [settings] * len(jobs)):
        done.append(images)
        spent += seconds
        progress(len(done), len(jobs))
    return torch.cat(done).clamp(-1, 1), spent / (each * PAIRS)


def _held(method: Method, pair: Pair) -> LowFrequencies | None:
    if not method.factor:
        return None
    encode, _ = bundled_latent_encoder()
    return LowFrequencies(encode(pair.reference[None]), method.factor)


def _rows(
    world: World, method: Method, chosen: Sequence[Pair], images: Tensor, twins: Tensor, seconds: float
) -> list[Row]:
    asked = [method.asked(pair) for pair in chosen]
    features, plain = world.judge.features(images), world.judge.features(twins)
    held_out = world.held_out.features[: len(images)]
    find = functools.partial(found_reference, world, chosen) if method.by_reference else functools.partial(
        found_wish, world, asked
    )  # fmt: skip
    columns = {
        "accuracy": (accuracy(world, asked, images), accuracy(world, asked, twins)),
        "frechet": (frechet_distance(features, held_out), frechet_distance(plain, held_out)),
        "diversity": (_within(features) / _within(plain), 1.0),
        "retrieval": (find(images), find(twins)),
        "seconds": (seconds, 0.0),
    }
    return [Row(f"{method.name}/{name}", len(images), *values, None) for name, values in columns.items()]


def _grouped(values: Tensor) -> list[Tensor]:
    """What belongs to each pair."""
    return list(values.tensor_split(PAIRS))


def _within(features: Tensor) -> float:
    return mean_of([spread(group) for group in _grouped(features)])


def accuracy(world: World, asked: Sequence[Wish], images: Tensor) -> float:
    """Share of asked attributes that the judge finds, of pictures (N, 3, S, S) in pair order."""
    verdict = world.judge.verdict(images)
    parts = [
        float((_grouped(verdict[name])[n] == value).float().mean())
        for n, wish in enumerate(asked)
        for name, value in wish.items()
    ]
    return mean_of(parts)


def found_reference(world: World, chosen: Sequence[Pair], images: Tensor) -> float:
    """Share of pictures (N, 3, S, S) in pair order whose nearest reference, in the judge's features, is their own."""
    references = world.judge.features(torch.stack([pair.reference for pair in chosen]))
    return _own(torch.cdist(world.judge.features(images), references).argmin(dim=1))


def found_wish(world: World, asked: Sequence[Wish], images: Tensor) -> float:
    """Share of pictures (N, 3, S, S) in pair order that gained most of their own wish."""
    logits, _ = world.judge(images)
    labels, names = world.held_out.labels, list(world.judge.attributes)
    gains = []
    for wish in asked:
        ((name, value),) = wish.items()
        known = labels[:, names.index(name)]
        usual = (known == value).float().sum() / (known >= 0).float().sum()
        gains.append(logits[name].log_softmax(dim=1)[:, value] - usual.log())
    return _own(torch.stack(gains, dim=1).argmax(dim=1))


def _own(found: Tensor) -> float:
    return mean_of([float((group == n).float().mean()) for n, group in enumerate(_grouped(found))])
