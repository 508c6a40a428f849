"""Edits of given pictures, and several wishes at once, by the judge.

- edit: held-out renders that show hair, each to another hair colour: direction guidance, structure guidance to keep the
  rest, a denoise below 1. `edit/reached`: share with the new colour. `edit/kept`: share of the other attributes that
  are as the render's labels say.
- composition: `two regions` (blue hair left, green hair right, by two masks, euler: the judge reads each half with its
  mirror image), `with and without` (red background, without glasses), `four at once` (three texts and a style).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import replace

import torch
from torch import Tensor

from .demo import find_render
from .files import bundled_latent_encoder
from .jobs import (
    BLOCK_SEEDS,
    REFERENCES,
    Job,
    Progress,
    Row,
    Settings,
    pictures,
    prompt,
    spread_over,
    with_twins,
    worker_world,
)
from .world import Change, Pull, World

DENOISE, DIRECTION, KEEP = 0.8, 600.0, 100.0
"""Of the edit: denoise, and the scales of direction and structure guidance."""
REGIONS, LONGER, HAIR = 3000.0, (0.0, 0.95), 0.65
"""Of two regions: the scale, since half a picture shows an encoder less; the interval; and how far down hair may reach,
as a part of the height: farther tells the halves apart better and smears faces. Each has the other's colour as its
negative text, and the sampler adds no noise, under which the model would make both alike again."""
WITHOUT = 275.0
MANY = {"background": 412.0, "glasses": 825.0, "hat": 825.0, "style": 400.0}
"""Scales where several act at once."""


def edit_rows(pool: Executor, settings: Settings, progress: Progress) -> list[Row]:
    """`edit/reached`, `edit/kept`: over settings.samples pictures; unguided: the same runs without guidance."""
    here = _world_of(settings)
    world = worker_world(here.world)
    jobs, labels, wanted = _edits(world, here)
    step = functools.partial(progress, "edit")
    guided, plain = (
        torch.cat(pictures(pool, part, here, step)).clamp(-1, 1)
        for part in (jobs, [replace(job, pulls=()) for job in jobs])
    )
    rows = []
    for name, measure in (("reached", _reached), ("kept", _kept)):
        value, unguided = (measure(world, images, labels, wanted) for images in (guided, plain))
        rows.append(Row(f"edit/{name}", len(jobs), value, unguided, {"reached": 0.7, "kept": 0.8}[name]))
    return rows


def _world_of(settings: Settings) -> Settings:
    return replace(settings, world=replace(settings.world, model="v", route="noisy linear"))


def _edits(world: World, settings: Settings) -> tuple[list[Job], Tensor, Tensor]:
    """A job for each picture, what the pictures show (N, A), and the hair colour that each should get (N,)."""
    names, (encode, _) = list(world.judge.attributes), bundled_latent_encoder()
    column, colours = names.index("hair"), world.judge.attributes["hair"]
    usable = torch.nonzero(world.labels[:, column] >= 0).flatten()[settings.block * REFERENCES :]
    usable = usable[torch.arange(settings.samples) % len(usable)]  # again from the first, to another colour
    labels = world.labels[usable]
    wanted = (labels[:, column] + 1 + torch.arange(len(usable)) % (len(colours) - 1)) % len(colours)
    jobs = []
    for n, (i, old, new) in enumerate(zip(usable.tolist(), labels[:, column].tolist(), wanted.tolist(), strict=True)):
        render = world.renders[i]
        change = Change(render, prompt({"hair": colours[old]}), prompt({"hair": colours[new]}))
        pulls = (Pull("direction", change, DIRECTION), Pull("structure", render, KEEP))
        seed = settings.block * BLOCK_SEEDS + n
        jobs.append(Job(pulls, (seed,), picture=encode(render[None]), denoise=DENOISE))
    return jobs, labels, wanted


def _reached(world: World, images: Tensor, labels: Tensor, wanted: Tensor) -> float:
    return float((world.judge.verdict(images)["hair"] == wanted).float().mean())


def _kept(world: World, images: Tensor, labels: Tensor, wanted: Tensor) -> float:
    verdict, same, known = world.judge.verdict(images), 0.0, 0.0
    for column, name in enumerate(world.judge.attributes):
        if name != "hair":
            shown = labels[:, column] >= 0
            same += float((verdict[name] == labels[:, column])[shown].sum())
            known += float(shown.sum())
    return same / known


# --- several wishes at once ----------------------------------------------------------------------------------------


def composition_rows(pool: Executor, settings: Settings, progress: Progress) -> list[Row]:
    """`composition/<two regions|with and without|four at once>`: share of pictures with all that was asked for."""
    here = _world_of(settings)
    world, result, twins = worker_world(here.world), [], dict[tuple[int, ...], Tensor]()
    for name, (make, found) in COMPOSITIONS.items():
        steady = replace(here, sampler="euler") if make is _two_regions else here
        jobs = spread_over([make(world)], steady)
        step = functools.partial(progress, f"composition/{name}")
        kept = twins if steady is here else {}
        guided, plain = (x.clamp(-1, 1) for x in with_twins(pool, jobs, kept, steady, step))
        value, unguided = (float(found(world, images).float().mean()) for images in (guided, plain))
        result.append(Row(f"composition/{name}", len(guided), value, unguided, 0.7))
    return result


def _two_regions(world: World) -> tuple[Pull, ...]:
    hair = torch.zeros(world.renders.shape[-2:])
    hair[: round(len(hair) * HAIR)] = 1
    left, right = hair.clone(), hair.clone()
    left[:, left.shape[1] // 2 :] = right[:, : right.shape[1] // 2] = 0
    blue, green = (prompt({"hair": colour}) for colour in ("blue", "green"))
    return (
        Pull("text", blue, REGIONS, LONGER, region=left, negative=green),
        Pull("text", green, REGIONS, LONGER, region=right, negative=blue),
    )


def _halves_found(world: World, images: Tensor) -> Tensor:
    """Whether the left half, made whole by its mirror image, has blue hair, and the right half green."""
    left, right = images.tensor_split(2, dim=-1)
    wholes = {"blue": torch.cat([left, left.flip(-1)], -1), "green": torch.cat([right.flip(-1), right], -1)}
    return _all(world, wholes["blue"], {"hair": "blue"}) & _all(world, wholes["green"], {"hair": "green"})


def _with_and_without(world: World) -> tuple[Pull, ...]:
    away = Pull("text", prompt({"glasses": True}), WITHOUT, away=True)
    return (world.text(prompt({"background": "red"}), among=2), away)


def _four_at_once(world: World) -> tuple[Pull, ...]:
    wishes: tuple[Mapping[str, object], ...] = ({"background": "blue"}, {"glasses": True}, {"hat": True})
    scales = [MANY[name] for wish in wishes for name in wish]
    texts = [Pull("text", prompt(wish), scale) for wish, scale in zip(wishes, scales, strict=True)]
    reference = find_render(world, style="pixel", background="blue")  # its palette is not against the texts
    return (*texts, Pull("style", reference, MANY["style"]))


def _all(world: World, images: Tensor, wanted: Mapping[str, object]) -> Tensor:
    """Whether the judge finds all of it: (N,)."""
    verdict = world.judge.verdict(images)
    found = [verdict[name] == world.judge.attributes[name].index(value) for name, value in wanted.items()]
    return torch.stack(found).all(dim=0)


COMPOSITIONS: dict[
    str, tuple[Callable[[World], tuple[Pull, ...]], Callable[[World, Tensor], Tensor]]
] = {
    "two regions": (_two_regions, _halves_found),
    "with and without": (
        _with_and_without, functools.partial(_all, wanted={"background": "red", "glasses": False}),
    ),
    "four at once": (
        _four_at_once,
        functools.partial(_all, wanted={"background": "blue", "glasses": True, "hat": True, "style": "pixel"}),
    ),
}  # fmt: skip
