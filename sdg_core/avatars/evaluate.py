"""The measured quality of guidance on the bundled world, judged by a classifier that shares no weights with the CLIP.

Every guided picture has an unguided twin from the same seed. Each suite is a list of jobs (pulls, seeds) and a function
from the pictures to rows, so that jobs can run in several processes.
"""

from __future__ import annotations

import functools
import itertools
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from multiprocessing import get_context
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..method import DEFAULT_SCALE, Convention, Kind, Strength, guide
from . import relative
from .comparison import table_rows
from .controls import control_rows
from .editing import composition_rows, edit_rows
from .files import bundled_latent_encoder
from .jobs import (
    ATTRIBUTES,
    BLOCK_SEEDS,
    CHUNK,
    JUDGE_BAR,
    REFERENCES,
    Job,
    Progress,
    Row,
    Settings,
    farther,
    hits,
    judge_accuracy,
    mean_of,
    pictures,
    possible,
    prompt,
    rarity,
    scored_values,
    spread_over,
    spreads,
    start_worker,
    with_twins,
    worker_world,
)
from .metrics import (
    frechet_distance,
    grain,
    gram_distance,
    gram_distances,
    histogram_overlap,
    layout_correlation,
    nearest,
    psnr,
)
from .world import (
    CONTENT_STEPS,
    LATENT_MODELS,
    RELATIVE_INTERVAL,
    ROUTES,
    STEPS,
    Pull,
    World,
    WorldName,
    open_world,
    sample,
    seeded_noise,
)

SMALL = ("expression", "length")  # attributes of few pixels: scored beside the others, not in their mean
NEGATIVE_SEEDS = range(10**9, 10**9 + 16)
LATENT_REFERENCES = 16  # fewer and larger batches


# --- sampling, in one process or several -------------------------------------------------------------------------


# --- suites ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Suite:
    """Jobs, and the rows that their pictures and their unguided twins (both (N, 3, S, S), in job order) give."""

    jobs: list[Job]
    rows: Callable[[Tensor, Tensor], list[Row]]


TextRows = Callable[[Tensor, Tensor, Tensor, Tensor, list[Job]], list[Row]]


def text_suite(
    world: World, wishes: list[dict[str, int]], settings: Settings, rows: TextRows, sentence: bool = False
) -> Suite:
    """Texts that name the wished attributes, one a line or all in one sentence.

    ``rows(hits, twin hits, pictures, twins, jobs)`` reads the outcome.
    """

    def texts(wish: dict[str, int]) -> tuple[Pull, ...]:
        named = {k: world.judge.attributes[k][v] for k, v in wish.items()}
        if sentence:
            return (world.text(prompt(named), among=len(named)),)
        return tuple(world.text(prompt({k: v}), k, len(named)) for k, v in named.items())

    pulls = [texts(wish) for wish in wishes]
    jobs = spread_over(pulls, settings)
    wish_of = dict(zip(pulls, wishes, strict=True))
    asked = [wish_of[job.pulls] for job in jobs for _ in job.seeds]

    def read(images: Tensor, twins: Tensor) -> list[Row]:
        images, twins = images.clamp(-1, 1), twins.clamp(-1, 1)
        return rows(hits(world, images, asked), hits(world, twins, asked), images, twins, jobs)

    return Suite(jobs, read)


def one_attribute(world: World, settings: Settings) -> list[Suite]:
    """`text/<attribute>` where the judge can judge, their mean, and what over-guidance would cost."""
    fit = judge_accuracy(world)
    names = [name for name in ATTRIBUTES if fit[name] >= JUDGE_BAR]
    small = [name for name in SMALL if settings.world.route and fit[name] >= JUDGE_BAR]
    found: dict[str, Outcome] = {}

    def collect(name: str) -> TextRows:
        def rows(hit: Tensor, twin_hit: Tensor, images: Tensor, twins: Tensor, jobs: list[Job]) -> list[Row]:
            row = Row(
                f"text/{name}", len(hit), float(hit.mean()), float(twin_hit.mean()), 0.75 if name in small else 0.9
            )
            if name in names:
                near = farther(world, images, twins)
                found[name] = Outcome(row, spreads(world, images, twins, jobs), near, rarity(world, name))
            return [row] + (overall(list(found.values())) if name == names[-1] else [])

        return rows

    wishes = {name: [{name: v} for v in scored_values(world, name)] for name in small + names}
    most = max(map(len, wishes.values()))
    if settings.samples <= most:
        raise ValueError(
            f"Got {settings.samples} samples for {most} prompts; the spread within a prompt needs two of each. Give "
            f"{2 * most} samples or more."
        )
    return [text_suite(world, wishes[name], settings, collect(name)) for name in wishes]


class Outcome(NamedTuple):
    """What texts about one attribute gave: the row, spreads within each prompt, how far from renders, and how far those
    renders are themselves that show what was asked for."""

    row: Row
    pairs: list[tuple[float, float]]
    near: float
    rare: float | None


def overall(found: Sequence[Outcome]) -> list[Row]:
    """Means over the attributes: accuracy, spread within a prompt over unguided, distance to the nearest render."""
    n = sum(each.row.n for each in found)
    value, unguided = (mean_of([getattr(each.row, key) for each in found]) for key in ("value", "unguided"))
    ratios = [mean_of([a / b for a, b in each.pairs]) for each in found]
    rare = [each.rare for each in found if each.rare is not None]
    name = "diversity/nearest render"
    return [
        Row("text/one attribute", n, value, unguided, 0.9),
        Row("diversity", n, mean_of(ratios), 1.0, 0.75),
        Row(name, n, mean_of([each.near for each in found]), 1.0, 1.12),
        *([Row(f"{name}/of renders alike", n, mean_of(rare), 1.0, None)] if rare else []),
    ]


def two_attributes(world: World, settings: Settings) -> list[Suite]:
    return joined(world, settings, "two", 0.75)


def three_attributes(world: World, settings: Settings) -> list[Suite]:
    return joined(world, settings, "three", 0.7)


def joined(world: World, settings: Settings, count: Literal["two", "three"], bar: float) -> list[Suite]:
    """`text/<count> attributes`, a line of text for each, and `.../one sentence`, all of them joined: 32 sets, drawn by
    the block, from all those of different attributes that some held-out render shows."""
    names = [name for name in ATTRIBUTES if judge_accuracy(world)[name] >= JUDGE_BAR]
    sets = itertools.combinations(names, {"two": 2, "three": 3}[count])
    wishes = [
        dict(zip(chosen, values, strict=True))
        for chosen in sets
        for values in itertools.product(*(scored_values(world, name) for name in chosen))
    ]
    wishes = [wish for wish in wishes if possible(world, wish)]
    order = torch.randperm(len(wishes), generator=torch.Generator().manual_seed(settings.block))[:32]

    def rows(sentence: bool, hit: Tensor, twin_hit: Tensor, *_: object) -> list[Row]:
        name = f"text/{count} attributes" + ("/one sentence" if sentence else "")
        return [Row(name, len(hit), float(hit.mean()), float(twin_hit.mean()), None if sentence else bar)]

    drawn = [wishes[i] for i in order.tolist()]
    return [
        text_suite(world, drawn, settings, functools.partial(rows, sentence), sentence) for sentence in (False, True)
    ]


def reference_suite(
    world: World,
    kind: Kind,
    settings: Settings,
    rows: Callable[[Tensor, Tensor, Tensor], list[Row]],
    negative: Tensor | None = None,
) -> Suite:
    """Pictures guided by held-out renders that show hair; ``rows(pictures, twins, references)``."""
    hair = list(world.judge.attributes).index("hair")
    usable = torch.nonzero(world.labels[:, hair] >= 0).flatten()[settings.block * REFERENCES :][: settings.references]
    prompts = [(Pull(kind, world.renders[i], negative=negative),) for i in usable.tolist()]
    jobs = spread_over(prompts, settings)
    references = torch.cat([_reference(job)[None].expand(len(job.seeds), -1, -1, -1) for job in jobs])
    return Suite(jobs, lambda images, twins: rows(images.clamp(-1, 1), twins.clamp(-1, 1), references))


def _reference(job: Job) -> Tensor:
    reference = job.pulls[0].target
    assert isinstance(reference, Tensor)
    return reference


def content(world: World, settings: Settings) -> list[Suite]:
    """`content/...`; and of the latent world `content/negative`, against what the model draws by itself."""
    drawn = None if world.decoded is None else unguided_pictures(world)

    def less(images: Tensor, twins: Tensor, references: Tensor) -> list[Row]:
        return [
            Row("content/negative", len(images), *_agreement(world, "background", images, twins, references), None),
            Row("content/negative/hair", len(images), *_agreement(world, "hair", images, twins, references), None),
        ]

    def rows(images: Tensor, twins: Tensor, references: Tensor) -> list[Row]:
        n = len(images)
        return [
            Row("content", n, *_agreement(world, "background", images, twins, references), 0.9),
            Row("content/hair", n, *_agreement(world, "hair", images, twins, references), 0.8),
            Row("content/layout", n, *_means(layout_correlation, images, twins, references), None),
            Row("content/nearest render", n, farther(world, images, twins), 1.0, 1.12),
        ]

    plain = reference_suite(world, "content", settings, rows)
    return [plain] if drawn is None else [plain, reference_suite(world, "content", settings, less, drawn)]


def unguided_pictures(world: World) -> Tensor:
    """Pictures (N, 3, S, S) that the model draws by itself, from seeds that nothing else here has."""
    channels, size, _ = world.denoiser.shape
    return sample(world, (), seeded_noise(NEGATIVE_SEEDS, size, channels), steps=STEPS["latents"], seed=-1)


def structure(world: World, settings: Settings) -> list[Suite]:
    def rows(images: Tensor, twins: Tensor, references: Tensor) -> list[Row]:
        return [
            Row("structure", len(images), *_means(layout_correlation, images, twins, references), 0.8),
            Row("structure/nearest render", len(images), farther(world, images, twins), 1.0, 1.12),
        ]

    return [reference_suite(world, "structure", settings, rows)]


def style(world: World, settings: Settings) -> list[Suite]:
    def rows(images: Tensor, twins: Tensor, references: Tensor) -> list[Row]:
        n = len(images)
        guided, plain = _means(lambda a, b: gram_distance(world.judge, a, b), images, twins, references)
        return [
            Row("style", n, guided / plain, 1.0, 1 / 3),
            Row("style/histogram", n, *_means(histogram_overlap, images, twins, references), 0.55),
            Row("style/drawing style", n, *_agreement(world, "style", images, twins, references), 0.55),
            Row("style/layout", n, *_means(layout_correlation, images, twins, references), 0.4),
            Row("style/nearest render", n, farther(world, images, twins), 1.0, 1.12),
        ]

    return [reference_suite(world, "style", settings, rows)]


def finite(world: World, settings: Settings) -> list[Suite]:
    """`finite`: share of finite pictures with every kind of guidance at 1, 10 and 100 times its default scale."""
    prompts = [
        (Pull(kind, "a person with glasses" if kind == "text" else world.renders[0], scale * factor),)
        for kind, scale in DEFAULT_SCALE.items()
        for factor in (1, 10, 100)
    ]

    def rows(images: Tensor, twins: Tensor) -> list[Row]:
        share, plain = (float(torch.isfinite(x).flatten(1).all(dim=1).float().mean()) for x in (images, twins))
        return [Row("finite", len(images), share, plain, 1.0)]

    return [Suite(spread_over(prompts, settings), rows)]


SuiteMaker = Callable[[World, Settings], list[Suite]]

SUITES: dict[str, SuiteMaker] = {
    "text": one_attribute,
    "pairs": two_attributes,
    "content": content,
    "structure": structure,
    "style": style,
    "finite": finite,
}


def evaluate(names: Sequence[str], settings: Settings, progress: Progress = lambda *_: None) -> list[Row]:
    """Rows of the named suites, in their order."""
    processes = settings.processes or os.cpu_count() or 1
    result: list[Row] = []
    with ProcessPoolExecutor(processes, get_context("spawn"), start_worker) as pool, torch.no_grad():
        for name in names:
            if name in MODEL_SUITES:
                result += MODEL_SUITES[name](pool, settings, progress)
            else:
                result += suite_rows(pool, SUITES[name], settings, functools.partial(progress, name))
    return result


def suite_rows(
    pool: Executor,
    make: SuiteMaker,
    settings: Settings,
    progress: Callable[[int, int], None],
    twins: dict[tuple[int, ...], Tensor] | None = None,
) -> list[Row]:
    """The rows of one suite in the world of the settings. ``twins`` keeps unguided pictures for suites that follow."""
    world, result = worker_world(settings.world), []
    for suite in make(world, settings):
        guided, plain = with_twins(pool, suite.jobs, {} if twins is None else twins, settings, progress)
        result += suite.rows(guided, plain)
    return result


def latent_rows(pool: Executor, settings: Settings, progress: Progress) -> list[Row]:
    """`<eps|v|flow>/<route>/<text|content|style|structure>`: the latent model's three faces through every route.

    And of the noisy encoder the rows of ``DETAILS``: `<eps|v|flow>/noisy linear/<name>`. Content has ``CONTENT_STEPS``.
    """
    result: list[Row] = []
    unguided: dict[tuple[str, int], dict[tuple[int, ...], Tensor]] = {}  # by model and steps: on all routes the same
    for model, route in itertools.product(LATENT_MODELS, ROUTES):
        suites = LATENT_SUITES | (DETAILS if route == "noisy linear" else {})
        chosen = [name for name in suites if fnmatch(f"{model}/{route}/{name}", settings.only)]
        if not chosen:
            continue
        here = replace(settings, world=replace(settings.world, model=model, route=route))
        cost = step_cost(worker_world(here.world))
        for name in chosen:
            steps = settings.steps or (CONTENT_STEPS if name.startswith("content") else STEPS["latents"])
            suited = replace(here, steps=steps)
            if name in LATENT_SUITES:
                suited = replace(suited, references=LATENT_REFERENCES)
            twins = unguided.setdefault((model, steps), {}) if name in LATENT_SUITES else {}
            step = functools.partial(progress, f"{model}/{route}/{name}")
            rows = suite_rows(pool, suites[name], suited, step, twins)
            for row in rows:
                if name in DETAILS and row.name in LATENT_SUITES:
                    row = replace(row, name=f"{row.name}/{here.references} references")  # of fewer on all routes
                bar = LATENT_BARS.get(row.name, 0.92 if row.name.startswith("text/") else None)
                bar = bar if route == "noisy linear" else None
                result.append(replace(row, name=f"{model}/{route}/{row.name}", bar=bar, cost_ms=cost.get(row.name)))
    return result


def step_cost(world: World, count: int = 8, times: int = 5) -> dict[str, float]:
    """Milliseconds that guidance adds to a step, a picture, by kind: the fastest of some, on this process's threads."""
    channels, size, _ = world.denoiser.shape
    sigma = torch.full((count,), 0.6 if world.denoiser.convention is Convention.FLOW else 2.0)
    x = seeded_noise(range(count), size, channels) * sigma[0]
    denoised, result = world.denoiser(x, sigma), dict[str, float]()
    for kind in KIND_SUITES:
        pull = Pull(kind, "a person with glasses" if kind == "text" else world.renders[0])
        run = world.open_run((replace(world.term(pull), start=0.0, end=1.0),))
        guide(denoised, x, sigma, run)  # the first looks at references
        spans = []
        for _ in range(times):
            start = time.perf_counter()
            guide(denoised, x, sigma, run)
            spans.append(time.perf_counter() - start)
        result[kind] = min(spans) / count * 1000
    return result


def latent_text(world: World, settings: Settings) -> list[Suite]:
    """One-attribute prompts, as many pictures of every attribute that the judge can judge."""
    fit = judge_accuracy(world)
    names = [name for name in ATTRIBUTES if fit[name] >= JUDGE_BAR]
    each = replace(settings, samples=-(-settings.samples // len(names)))
    jobs, asked, seed = [], [], settings.block * BLOCK_SEEDS
    for name in names:
        for value in scored_values(world, name):
            count = -(-each.samples // len(scored_values(world, name)))
            pull = world.text(prompt({name: world.judge.attributes[name][value]}))
            for start in range(0, count, CHUNK):
                jobs.append(Job((pull,), tuple(range(seed + start, seed + min(start + CHUNK, count)))))
            asked += [{name: value}] * count
            seed += count

    def rows(images: Tensor, twins: Tensor) -> list[Row]:
        hit, plain = (float(hits(world, x, asked).mean()) for x in (images, twins))
        near = farther(world, images.clamp(-1, 1), twins.clamp(-1, 1))
        return [
            Row("text", len(asked), hit, plain, None),
            Row("text/nearest render", len(asked), near, 1.0, None),
        ]

    return [Suite(jobs, rows)]


def only_rows(make: SuiteMaker, *wanted: str) -> SuiteMaker:
    """A suite that gives only the rows of these names."""

    def some(world: World, settings: Settings) -> list[Suite]:
        return [Suite(suite.jobs, functools.partial(_rows_of, suite, wanted)) for suite in make(world, settings)]

    return some


def _rows_of(suite: Suite, wanted: Sequence[str], images: Tensor, twins: Tensor) -> list[Row]:
    return [row for row in suite.rows(images, twins) if row.name in wanted]


KIND_SUITES: dict[Kind, SuiteMaker] = {
    "text": latent_text,
    "content": content,
    "structure": structure,
    "style": style,
}
LATENT_SUITES: dict[str, SuiteMaker] = {kind: only_rows(make, kind) for kind, make in KIND_SUITES.items()}
DETAILS: dict[str, SuiteMaker] = {
    "attributes": one_attribute,
    "two attributes": two_attributes,
    "three attributes": three_attributes,
    "content, more references": content,
    "references": lambda world, settings: structure(world, settings) + style(world, settings),
}
"""What is measured of the noisy encoder besides, with more references."""
LATENT_BARS: dict[str, float | None] = {
    "text": 0.8,
    "text/one attribute": 0.95,
    "text/two attributes": 0.85,
    "text/three attributes": 0.7,
    "text/two attributes/one sentence": None,
    "text/three attributes/one sentence": None,
    "text/expression": 0.75,
    "text/length": 0.75,
    "diversity": 0.8,
    "diversity/nearest render": 1.08,
    "content": 0.95,
    "content/hair": 0.9,
    "structure": 0.9,
    "style": 0.25,
    "style/drawing style": 0.75,
    "style/layout": 0.35,
}
"""What the noisy encoder should reach; distances and the style's layout at most that."""
RELATIVE_SUITES = {kind: only_rows(make, kind, f"{kind}/nearest render") for kind, make in KIND_SUITES.items()}
"""The row that a kind is about, and, under relative strength, the one that shows over-guidance."""


# --- relative strength -------------------------------------------------------------------------------------------


def relative_rows(pool: Executor, settings: Settings, progress: Progress) -> list[Row]:
    """How far relative strength pulls, and what that does.

    `relative/<eps|v|flow>/<size>/<step|pull|finished>`; `relative/deviation/<pull|finished>`, the largest deviation of
    a model and size from the mean; and, as in the suite latent, `relative/<eps|v|flow>/<route>/<kind>`, each with its
    `.../nearest render`.
    """
    settings = replace(settings, strength=Strength("relative", settings.cap))
    return effect_rows(pool, settings, progress) + relative_quality(pool, settings, progress)


def effect_rows(pool: Executor, settings: Settings, progress: Progress) -> list[Row]:
    """The measures of ``relative``, of every model and size, over all kinds of guidance."""
    result: list[Row] = []
    for model, size in itertools.product(LATENT_MODELS, relative.SIZES):
        names = [f"relative/{model}/{size}/{measure}" for measure in relative.Effect._fields]
        if not any(fnmatch(name, settings.only) for name in names):
            continue
        here = replace(settings, world=replace(settings.world, model=model, route="clean linear"))
        jobs = spread_over([(pull,) for pull in relative.targets(worker_world(here.world))], here)
        parts: list[relative.Effect] = []
        for part in pool.map(_effect, jobs, itertools.repeat(here), itertools.repeat(size)):
            parts.append(part)
            progress(f"relative/{model}/{size}", len(parts), len(jobs))
        values = [torch.cat(column) for column in zip(*parts, strict=True)]
        result += [Row(name, len(v), float(v.mean()), 0.0, None) for name, v in zip(names, values, strict=True)]
    for measure, bar in (("pull", 0.1), ("finished", None)):
        cells = [row.value for row in result if row.name.endswith(f"/{measure}")]
        if len(cells) > 1:
            result.append(Row(f"relative/deviation/{measure}", len(cells), relative.deviation(cells), 0.0, bar))
    return [row for row in result if fnmatch(row.name, settings.only)]


def _effect(job: Job, settings: Settings, size: int) -> relative.Effect:
    world = worker_world(settings.world)
    noise = seeded_noise(job.seeds, size, world.denoiser.shape[0])
    steps = settings.steps or STEPS["latents"]
    return relative.measure_effect(world, job.pulls[0], noise, settings.strength, steps)


def relative_quality(pool: Executor, settings: Settings, progress: Progress) -> list[Row]:
    """The suite latent under relative strength, in its intervals."""
    result: list[Row] = []
    unguided: dict[str, dict[tuple[int, ...], Tensor]] = {}
    for model, route in itertools.product(LATENT_MODELS, ROUTES):
        world = replace(settings.world, model=model, route=route)
        here = replace(settings, references=LATENT_REFERENCES, world=world, intervals=RELATIVE_INTERVAL)
        for kind, make in RELATIVE_SUITES.items():
            name = f"relative/{model}/{route}/{kind}"
            if fnmatch(name, settings.only):
                twins = unguided.setdefault(model, {})
                rows = suite_rows(pool, make, here, functools.partial(progress, name), twins)
                result += [replace(row, name=f"relative/{model}/{route}/{row.name}", bar=None) for row in rows]
    return result


# --- the models by themselves --------------------------------------------------------------------------------------


def model_rows(pool: Executor, settings: Settings, progress: Progress) -> list[Row]:
    """The latent world's model without guidance, the autoencoder, and the pixel world's model beside them.

    `model/grain` and `model/pixels/grain` (their unguided column: of renders); `model/one step` (RMS of what one step
    at sigma .1 leaves wrong in a render, -1..1); `model/nearest render` (over that of other held-out renders);
    `model/frechet` and `model/pixels/frechet` (over settings.samples pictures, in the latent world's judge);
    `autoencoder/psnr` (dB) and `autoencoder/grain` of held-out renders; `style/layout/of renders alike`, of two
    different renders as near in style as guidance should bring pictures: n pairs.
    """
    latent = replace(settings, world=replace(settings.world, model="v", route="noisy linear"))
    pixels = replace(settings, world=WorldName(settings.world.folder))
    world, small = open_world(latent.world), open_world(pixels.world)
    bank, other = world.held_out.features.tensor_split(2)
    n = settings.samples
    drawn = {
        name: torch.cat(pictures(pool, spread_over([()], here), here, functools.partial(progress, name))).clamp(-1, 1)
        for name, here in (("model", latent), ("model/pixels", pixels))
    }
    found = {name: _features(world, images) for name, images in drawn.items()}
    near = float(nearest(found["model"], bank).mean()) / float(nearest(other, bank).mean())
    frechet = {name: frechet_distance(features, bank) for name, features in found.items()}
    plain = frechet_distance(other, bank)
    again = world.decode(_latents(world))
    grains = {name: float(grain(images).mean()) for name, images in drawn.items()}
    flat, small_flat = (float(grain(w.renders).mean()) for w in (world, small))
    return [
        Row("model/grain", n, grains["model"], flat, 0.01),
        Row("model/pixels/grain", n, grains["model/pixels"], small_flat, 0.02),
        Row("model/one step", len(world.renders), one_step_error(world, 0.1), 0.0, 0.02),
        Row("model/nearest render", n, near, 1.0, 1.1),
        Row("model/frechet", n, frechet["model"], plain, frechet["model/pixels"] / 3),
        Row("model/pixels/frechet", n, frechet["model/pixels"], plain, None),
        Row("autoencoder/psnr", len(again), float(psnr(again, world.renders).mean()), 0.0, 32.0),
        Row("autoencoder/grain", len(again), float(grain(again).mean()), flat, None),
        *_alike(world, drawn["model"][: len(world.renders)]),
    ]


def _alike(world: World, drawn: Tensor) -> list[Row]:
    """The layout correlation of renders whose Gram distance is at most ``LATENT_BARS``' part of unguided pictures'."""
    renders = world.renders
    apart = gram_distances(world.judge, renders, renders).fill_diagonal_(torch.inf)
    unguided = gram_distances(world.judge, drawn, renders).mean()
    a, b = torch.nonzero(apart <= (LATENT_BARS["style"] or 0.0) * unguided).T
    if len(a) == 0:
        return []
    plain = torch.randint(len(renders), (2, 4096), generator=torch.Generator().manual_seed(0))
    layout, usual = (
        float(layout_correlation(renders[i], renders[j])[i != j].mean()) for i, j in ((a, b), plain.unbind())
    )
    return [Row("style/layout/of renders alike", len(a), layout, usual, None)]


def _features(world: World, images: Tensor) -> Tensor:
    return torch.cat([world.judge.features(part) for part in torch.split(images, 64)])


def _latents(world: World) -> Tensor:
    """The renders as the latent model's own latents."""
    encode, _ = bundled_latent_encoder()
    return torch.cat([encode(part) for part in torch.split(world.renders, 16)])


def one_step_error(world: World, sigma: float) -> float:
    """RMS between a render's latent, seen as a picture, and what one step makes of it with noise of sigma."""
    z = _latents(world)
    eps = seeded_noise(range(len(z)), z.shape[-1], z.shape[1])
    noisy, level = torch.split(z + sigma * eps, 16), torch.full((16,), sigma)
    denoised = torch.cat([world.denoiser(x, level[: len(x)]) for x in noisy])
    errors = [
        world.decode(a) - world.decode(b) for a, b in zip(torch.split(denoised, 16), torch.split(z, 16), strict=True)
    ]
    return float(torch.cat(errors).square().mean().sqrt())


MODEL_SUITES: dict[str, Callable[[Executor, Settings, Progress], list[Row]]] = {
    "model": model_rows,
    "latent": latent_rows,
    "relative": relative_rows,
    "table": table_rows,
    "edit": edit_rows,
    "composition": composition_rows,
    "controls": control_rows,
}
"""Suites over the latent models."""


def as_json(rows: Sequence[Row]) -> dict[str, list[dict[str, object]]]:
    """{"rows": [{"name", "n", "value", "unguided", "bar", "cost_ms"}]}."""
    return {"rows": [asdict(row) for row in rows]}


def _agreement(world: World, name: str, images: Tensor, twins: Tensor, references: Tensor) -> tuple[float, float]:
    wanted = world.judge.verdict(references)[name]
    guided, plain = (float((world.judge.verdict(x)[name] == wanted).float().mean()) for x in (images, twins))
    return guided, plain


def _means(
    measure: Callable[[Tensor, Tensor], Tensor], images: Tensor, twins: Tensor, references: Tensor
) -> tuple[float, float]:
    guided, plain = (float(measure(x, references).mean()) for x in (images, twins))
    return guided, plain
