"""What controls do to finished pictures of the bundled world.

- `controls/every second/accuracy`: of one-attribute prompts, with the gradient taken at every second noise level, over
  that of every one; `.../cost`: the time that guidance adds, likewise. `controls/fast/...`: the same at the pace "fast"
  ("balanced" is every second).
- `controls/away/lower`: share of pictures whose clean CLIP's score of the text is below their unguided twin's, pushed
  away without an end.
- `controls/mask/outside`: how much pictures change outside the mask, over how much inside, RMS, against their unguided
  twins; `.../reached`: share with the named attribute, which is inside.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import replace

import torch
from torch import Tensor

from ..method import unit
from .files import load_bundled_clip
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
from .world import Pull, World

AWAY = ({"glasses": True}, {"hat": True}, {"background": "blue"}, {"hair": "black"})
"""What pictures are pushed away from: what unguided ones show now and then."""
TOP = 0.5
"""The part of the picture, from its top, inside the mask: where hair is."""
LATE, STRONG = (0.3, 1.0), 9.0
"""Inside the mask: the interval, and the part of the default scale. What is decided in the noisiest steps the model
carries over to all of the picture; guided later, it changes less outside, and takes more."""


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
    for pace in ("quality", "balanced", "fast", None):
        pulls = [() if pace is None else (replace(_text(world, wish), pace=pace),) for wish in wishes]
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
    for name, reached, spent, bar in zip(("every second", "fast"), fewer, less, (0.6, None), strict=True):
        cost = (spent - plain) / (whole - plain)
        rows += [
            Row(f"controls/{name}/accuracy", len(asked), reached / full, none / full, 0.9),
            Row(f"controls/{name}/cost", len(asked), cost, 0.0, bar),
        ]
    return rows


def _text(world: World, wish: dict[str, int]) -> Pull:
    return Pull("text", prompt({name: world.judge.attributes[name][value] for name, value in wish.items()}))


def _away(pool: Executor, world: World, settings: Settings, progress: Callable[[int, int], None]) -> list[Row]:
    texts = [prompt(wish) for wish in AWAY]
    jobs = spread_over([(Pull("text", text, away=True, until=-1.0),) for text in texts], settings)
    guided, plain = with_twins(pool, jobs, {}, settings, progress)
    asked = [texts.index(str(job.pulls[0].target)) for job in jobs for _ in job.seeds]
    lower = _scores(texts, guided)[range(len(asked)), asked] < _scores(texts, plain)[range(len(asked)), asked]
    return [Row("controls/away/lower", len(asked), float(lower.float().mean()), 0.0, 0.9)]


@torch.no_grad()
def _scores(texts: Sequence[str], images: Tensor) -> Tensor:
    """Cosines of pictures (N, 3, S, S) and texts by the clean CLIP: (N, T)."""
    clip = load_bundled_clip()
    embeds = [clip(part.clamp(-1, 1), torch.zeros(1), clip.full_depth).embed for part in torch.split(images, 64)]
    return unit(torch.cat([embed for embed in embeds if embed is not None])) @ unit(clip.encode_text(list(texts))).T


def _mask(pool: Executor, world: World, settings: Settings, progress: Callable[[int, int], None]) -> list[Row]:
    side = world.renders.shape[-1]
    inside = (torch.arange(side) < TOP * side).float()[:, None].expand(side, side)
    wishes = [{"hair": value} for value in scored_values(world, "hair")]
    scale = STRONG * world.scales["text"]
    pulls = [(replace(_text(world, wish), region=inside, interval=LATE, scale=scale),) for wish in wishes]
    jobs = spread_over(pulls, settings)
    guided, plain = (x.clamp(-1, 1) for x in with_twins(pool, jobs, {}, settings, progress))
    change = (guided - plain).square().mean(dim=(0, 1))
    outside = float((change[inside == 0].mean() / change[inside == 1].mean()).sqrt())
    each = len(guided) // len(wishes)
    asked = [wish for wish in wishes for _ in range(each)]
    reached, unguided = (float(hits(world, images, asked).mean()) for images in (guided, plain))
    return [
        Row("controls/mask/outside", len(asked), outside, 1.0, 0.25),
        Row("controls/mask/reached", len(asked), reached, unguided, 0.7),
    ]
