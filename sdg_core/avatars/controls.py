"""What controls do to finished pictures of the bundled world.

- `controls/every second/accuracy`: of one-attribute prompts, with the gradient taken at every second noise level, over
  that of every one; `.../cost`: the time that guidance adds, likewise. `controls/balanced/...` and
  `controls/fast/...`: the same at the ready-made paces.
- `controls/away/lower`: share of pictures, pushed away without an end, whose score of the text, by the guidance's own
  encoder at its least noise, is below their unguided twin's; `.../clean CLIP`: by a CLIP that guides nothing.
- `controls/mask/outside`: how much pictures change outside a band over the eyes that glasses are put on, over how much
  inside, RMS, against their unguided twins; `.../reached`: share with glasses. `controls/mask/hair/...`: likewise of
  hair colours in the picture's upper half.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..encoders import CleanCLIP, NoisyCLIP
from ..method import unit
from .files import bundled_latent_encoder, load_bundled_clip
from .jobs import (
    Progress,
    Row,
    Settings,
    hits,
    prompt,
    scored_values,
    spread_over,
    timed_job,
    with_twins,
    worker_world,
)
from .world import Pull, Sampler, World

AWAY = ({"glasses": True}, {"hat": True}, {"background": "blue"}, {"hair": "black"})
"""What pictures are pushed away from: what unguided ones show now and then."""
AWAY_INTERVAL, AWAY_SCALE = (0.1, 1.0), 1980.0
"""Where pictures are pushed away, and how much: what shows little has little to lose."""


class Spot(NamedTuple):
    """An attribute, the rows of the picture where it is, as parts of its height, and how it is pulled there: the
    interval, and the scale.

    What is decided in the noisiest steps the model carries over to all of the picture; guided later, it changes less
    outside, and takes more.
    """

    attribute: str
    rows: tuple[float, float]
    interval: tuple[float, float]
    scale: float


EYES = Spot("glasses", (0.3, 0.6), (0.4, 1.0), 3960.0)
TOP = Spot("hair", (0.0, 0.5), (0.3, 1.0), 1980.0)
MASK_SAMPLER: Sampler = "euler"
"""Adds no noise of its own, which would make differences grow everywhere."""


def control_rows(pool: Executor, settings: Settings, progress: Progress) -> list[Row]:
    """The rows that the module names, each over settings.samples pictures."""
    here = replace(settings, world=replace(settings.world, model="v", route="noisy linear"))
    return [
        row
        for name, rows in (("every second", _every_second), ("away", _away), ("mask", _mask))
        for row in rows(pool, worker_world(here.world), here, functools.partial(progress, f"controls/{name}"))
    ]


def _every_second(pool: Executor, world: World, settings: Settings, progress: Callable[[int, int], None]) -> list[Row]:
    wishes = [{name: v} for name in ("background", "hair", "glasses") for v in scored_values(world, name)]
    drawn, seconds = [], []
    for change in ({}, {"every": 2}, {"pace": "balanced"}, {"pace": "fast"}, None):
        pulls = [() if change is None else (replace(_text(world, wish), **change),) for wish in wishes]
        jobs = spread_over(pulls, settings)
        parts = list(pool.map(timed_job, jobs, [settings] * len(jobs)))
        progress(len(jobs), len(jobs))
        drawn.append(torch.cat([images for images, _ in parts]).clamp(-1, 1))
        seconds.append(sum(spent for _, spent in parts))
    each = len(drawn[0]) // len(wishes)
    asked = [wish for wish in wishes for _ in range(each)]
    full, *fewer, none = (float(hits(world, images, asked).mean()) for images in drawn)
    whole, *less, plain = seconds
    rows = []
    for name, reached, spent, bar in zip(
        ("every second", "balanced", "fast"), fewer, less, (0.6, 0.6, None), strict=True
    ):
        cost = (spent - plain) / (whole - plain)
        rows += [
            Row(f"controls/{name}/accuracy", len(asked), reached / full, none / full, 0.9),
            Row(f"controls/{name}/cost", len(asked), cost, 0.0, bar),
        ]
    return rows


def _text(world: World, wish: dict[str, int]) -> Pull:
    return world.text(prompt({name: world.judge.attributes[name][value] for name, value in wish.items()}))


def _away(pool: Executor, world: World, settings: Settings, progress: Callable[[int, int], None]) -> list[Row]:
    texts = [prompt(wish) for wish in AWAY]
    pulls = [Pull("text", text, AWAY_SCALE, AWAY_INTERVAL, away=True, until=-1.0) for text in texts]
    jobs = spread_over([(pull,) for pull in pulls], settings)
    guided, plain = with_twins(pool, jobs, {}, settings, progress)
    asked = [texts.index(str(job.pulls[0].target)) for job in jobs for _ in job.seeds]

    def row(name: str, score: Callable[[Sequence[str], Tensor], Tensor], bar: float | None) -> Row:
        mine = range(len(asked)), asked
        lower = score(texts, guided)[mine] < score(texts, plain)[mine]
        return Row(f"controls/away/{name}", len(asked), float(lower.float().mean()), 0.0, bar)

    own = functools.partial(_own_scores, world)
    return [row("lower", own, 0.9), row("lower/clean CLIP", _clean_scores, None)]


@torch.no_grad()
def _own_scores(world: World, texts: Sequence[str], images: Tensor) -> Tensor:
    """Cosines (N, T) of pictures (N, 3, S, S) and texts by the encoder that guides, which reads latents as noise-free
    as it can."""
    encode, _ = bundled_latent_encoder()
    clip, one = world.encoder, torch.ones(1)
    assert isinstance(clip, NoisyCLIP)
    t, embeds = clip.table.timestep(clip.table.ratio[:1]), []
    for part in torch.split(images.clamp(-1, 1), 64):
        embeds.append(clip(world.view.picture(encode(part), one), t, clip.full_depth).embed)
    return _cosines(clip, texts, embeds)


@torch.no_grad()
def _clean_scores(texts: Sequence[str], images: Tensor) -> Tensor:
    """Cosines (N, T) of pictures (N, 3, S, S) and texts by the clean CLIP."""
    clip = load_bundled_clip()
    embeds = [clip(part.clamp(-1, 1), torch.zeros(1), clip.full_depth).embed for part in torch.split(images, 64)]
    return _cosines(clip, texts, embeds)


def _cosines(clip: CleanCLIP, texts: Sequence[str], embeds: Sequence[Tensor | None]) -> Tensor:
    return unit(torch.cat([embed for embed in embeds if embed is not None])) @ unit(clip.encode_text(list(texts))).T


def _mask(pool: Executor, world: World, settings: Settings, progress: Callable[[int, int], None]) -> list[Row]:
    here = replace(settings, sampler=MASK_SAMPLER)
    return [
        *_inside(pool, world, here, progress, EYES, "mask", (0.25, 0.7)),
        *_inside(pool, world, here, progress, TOP, "mask/hair", (None, None)),
    ]


def _inside(
    pool: Executor,
    world: World,
    settings: Settings,
    progress: Callable[[int, int], None],
    spot: Spot,
    name: str,
    bars: tuple[float | None, float | None],
) -> list[Row]:
    """`controls/<name>/outside` and `.../reached` of a spot."""
    side = world.renders.shape[-1]
    place = (torch.arange(side) + 0.5) / side
    inside = ((place > spot.rows[0]) & (place < spot.rows[1])).float()[:, None].expand(side, side)
    values = world.judge.attributes[spot.attribute]
    wishes = [{spot.attribute: v} for v in scored_values(world, spot.attribute) if values[v] is not False]
    pulls = [(replace(_text(world, wish), region=inside, interval=spot.interval, scale=spot.scale),) for wish in wishes]
    jobs = spread_over(pulls, settings)
    guided, plain = (x.clamp(-1, 1) for x in with_twins(pool, jobs, {}, settings, progress))
    change = (guided - plain).square().mean(dim=(0, 1))
    outside = float((change[inside == 0].mean() / change[inside == 1].mean()).sqrt())
    each = len(guided) // len(wishes)
    asked = [wish for wish in wishes for _ in range(each)]
    reached, unguided = (float(hits(world, images, asked).mean()) for images in (guided, plain))
    return [
        Row(f"controls/{name}/outside", len(asked), outside, 1.0, bars[0]),
        Row(f"controls/{name}/reached", len(asked), reached, unguided, bars[1]),
    ]
