"""What all suites of measurements share: rows, settings, jobs for several processes, prompts, the judge's verdicts.

Every guided picture has an unguided twin from the same seed.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..method import Kind, LowFrequencies, Strength
from .metrics import nearest, spread
from .world import RELATIVE_CAP, STEPS, Pull, Sampler, World, WorldName, open_world, sample, seeded_noise

STYLE_WORDS = {
    "ink": "ink drawing",
    "pixel": "pixel art",
    "sketch": "sketch",
    "blob": "blob",
    "flat": "flat cartoon",
    "grin": "grinning cartoon",
    "toon": "toon",
    "icon": "icon",
}


ATTRIBUTES = ("background", "hair", "glasses", "hat", "style")


PHRASES = {"glasses": "glasses", "hat": "a hat", "beard": "a beard", "expression": "a {} face", "length": "{} hair"}


JUDGE_BAR = 0.9  # an attribute is scored only where the judge is right this often on held-out renders


BANK = 4_096  # held-out renders that say what is real


BLOCK_SEEDS = 100_000  # seeds of a block


CHUNK = 16  # pictures sampled together


REFERENCES = 64


@dataclass(frozen=True)
class Row:
    """One measurement: over n samples, guided and unguided from the same seeds, and the value it should reach.

    ``cost_ms``: what guidance adds to a step, a picture, where that was measured.
    """

    name: str
    n: int
    value: float
    unguided: float
    bar: float | None
    cost_ms: float | None = None


@dataclass(frozen=True)
class Job:
    """Pictures to sample: the same pulls for every seed, and, for ILVR, low frequencies to hold (of latents).

    ``picture`` is what is edited, where ``denoise`` is below 1.
    """

    pulls: tuple[Pull, ...]
    seeds: tuple[int, ...]
    low: LowFrequencies | None = None
    picture: Tensor | None = None  # (1, C, H, W) of latents
    denoise: float = 1.0


@dataclass(frozen=True)
class Settings:
    """How the suite samples. ``samples`` is n of a row.

    ``block`` picks seeds, references and joined prompts. The default scales were chosen on blocks 0 and 1, so their
    figures flatter them; report block 2.
    """

    samples: int = 256
    steps: int = 0  # 0: as the README's measurements, ``world.STEPS``
    sampler: Sampler = "euler_ancestral"
    strength: Strength = field(default_factory=Strength)
    cap: float = RELATIVE_CAP  # of the suite relative
    block: int = 2
    processes: int = 0  # 0: one per core
    world: WorldName = field(default_factory=WorldName)
    references: int = REFERENCES
    only: str = "*"  # which rows of the suites latent and relative, as a pattern of their names
    intervals: Mapping[Kind, tuple[float, float]] | None = None  # None: the world's, with its curves


def prompt(wish: Mapping[str, object]) -> str:
    """The shortest prompt for some attributes: {"hair": "pink", "hat": True} -> "a person with pink hair and a hat"."""
    subject = STYLE_WORDS[str(wish["style"])] if "style" in wish else "a person"
    parts = [PHRASES.get(name, f"{{}} {name}").format(value) for name, value in wish.items() if name != "style"]
    return subject + (" with " + " and ".join(parts) if parts else "")


def class_name(name: str, value: object) -> str:
    """The bundled classifier's class of an attribute's value: ("background", "blue") -> "blue background"."""
    if name == "style":
        return STYLE_WORDS[str(value)]
    words = PHRASES.get(name, f"{{}} {name}").format(value).removeprefix("a ")
    return words if value is not False else f"no {words}"


def scored_values(world: World, name: str) -> list[int]:
    """Indices of an attribute's values that a prompt can ask for: all, or only True for what is there or not."""
    values = world.judge.attributes[name]
    return [1] if values == (False, True) else list(range(len(values)))


def judge_accuracy(world: World) -> dict[str, float]:
    """Share of held-out renders showing an attribute where the judge is right."""
    seen, result = world.held_out, {}
    for column, name in enumerate(world.judge.attributes):
        truth = seen.labels[:, column]
        guess = world.judge.heads[name](seen.features).argmax(dim=1)
        result[name] = float((guess == truth)[truth >= 0].float().mean())
    return result


worker_world = functools.lru_cache(maxsize=1)(open_world)


def start_worker() -> None:
    torch.set_num_threads(1)


def run_job(job: Job, settings: Settings) -> Tensor:
    world = worker_world(settings.world)
    if settings.intervals is not None:
        world = replace(world, intervals=settings.intervals, curves={})
    channels, size, _ = world.denoiser.shape
    noise = seeded_noise(job.seeds, size, channels)
    steps = settings.steps or STEPS["latents" if settings.world.route else "pixels"]
    return sample(
        world, job.pulls, noise, steps=steps, sampler=settings.sampler, strength=settings.strength,
        seed=job.seeds[0], low=job.low, picture=job.picture,
        denoise=job.denoise,
    )  # fmt: skip


def timed_job(job: Job, settings: Settings) -> tuple[Tensor, float]:
    """Its pictures, and the seconds of computing that they took."""
    worker_world(settings.world)
    start = time.process_time()
    return run_job(job, settings), time.process_time() - start


def pictures(
    pool: Executor, jobs: Sequence[Job], settings: Settings, progress: Callable[[int, int], None]
) -> list[Tensor]:
    """The pictures of every job, in order."""
    done: list[Tensor] = []
    for part in pool.map(run_job, jobs, itertools.repeat(settings)):
        done.append(part)
        progress(len(done), len(jobs))
    return done


def spread_over(prompts: Sequence[tuple[Pull, ...]], settings: Settings) -> list[Job]:
    """At least ``settings.samples`` pictures, shared evenly by the prompts; seeds run on through all of them."""
    each = -(-settings.samples // len(prompts))
    jobs, seed = [], settings.block * BLOCK_SEEDS
    for pulls in prompts:
        for start in range(0, each, CHUNK):
            count = min(CHUNK, each - start)
            jobs.append(Job(pulls, tuple(range(seed, seed + count))))
            seed += count
    return jobs


def hits(world: World, images: Tensor, asked: Sequence[dict[str, int]]) -> Tensor:
    """Whether the judge finds all that was asked for: (N,) of 0 and 1."""
    verdict = world.judge.verdict(images)
    return torch.tensor([float(all(verdict[k][i] == v for k, v in wish.items())) for i, wish in enumerate(asked)])


def possible(world: World, wish: dict[str, int]) -> bool:
    """Whether any held-out render shows all of it: a blob has no hair and a toon no glasses."""
    columns = {name: i for i, name in enumerate(world.judge.attributes)}
    labels = world.held_out.labels
    found = torch.ones(len(labels), dtype=torch.bool)
    for name, value in wish.items():
        found &= labels[:, columns[name]] == value
    return bool(found.any())


def farther(world: World, images: Tensor, twins: Tensor) -> float:
    """Mean distance of the judge's features to the nearest held-out render, over that of the unguided twins."""
    bank = world.held_out.features[:BANK]
    guided, plain = (float(nearest(world.judge.features(x), bank).mean()) for x in (images, twins))
    return guided / plain


def rarity(world: World, name: str) -> float | None:
    """How far held-out renders that show an attribute's values are from their nearest, over all renders: what a picture
    that shows the same may be farther. Mean over the values; None where too few renders are at hand."""
    bank, others = world.held_out.features[:BANK], world.held_out.features[BANK:]
    shown = world.held_out.labels[BANK:, list(world.judge.attributes).index(name)]
    if len(others) < BANK // 2:
        return None
    near = nearest(others, bank)
    return mean_of([float(near[shown == value].mean() / near.mean()) for value in scored_values(world, name)])


def spreads(world: World, images: Tensor, twins: Tensor, jobs: list[Job]) -> list[tuple[float, float]]:
    """Spread of the judge's features within each prompt, guided and unguided from the same seeds."""
    groups: dict[object, list[int]] = {}
    position = 0
    for job in jobs:
        groups.setdefault(job.pulls[0].target, []).extend(range(position, position + len(job.seeds)))
        position += len(job.seeds)
    guided, plain = world.judge.features(images), world.judge.features(twins)
    return [(spread(guided[rows]), spread(plain[rows])) for rows in groups.values() if len(rows) > 1]


Progress = Callable[[str, int, int], None]


def with_twins(
    pool: Executor,
    jobs: Sequence[Job],
    twins: dict[tuple[int, ...], Tensor],
    settings: Settings,
    progress: Callable[[int, int], None],
) -> tuple[Tensor, Tensor]:
    """The pictures of the jobs, and unguided ones from the same seeds, both in job order.

    ``twins`` keeps the unguided ones by their seeds, for suites that share them.
    """
    seeds = sorted({job.seeds for job in jobs} - set(twins))
    made = pictures(pool, [*jobs, *(Job((), s) for s in seeds)], settings, progress)
    twins.update(zip(seeds, made[len(jobs) :], strict=True))
    return torch.cat(made[: len(jobs)]), torch.cat([twins[job.seeds] for job in jobs])


def mean_of(values: Sequence[float]) -> float:
    return sum(values) / len(values)
