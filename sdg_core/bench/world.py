"""Which way to guide gets more of what was asked for per second: this package and its peers on the bundled world.

All draw for the same one-attribute prompts from the same seeds with the same model and sampler; the peers guide by the
bundled clean CLIP, through the bundled decoder, as ``clean_decoded`` does by this package, and ``clean_linear`` by the
linear view. The figures are of block 2 of the seeds; ours was tuned on blocks 0 and 1.

- `<method>/accuracy`: share of pictures that show what was asked for, by the judge, in the usual number of steps;
- `<method>/seconds`: of a picture, on this machine, by turns;
- `<method>/accuracy_equal_time`: in as many steps as fit into the time that `noisy_clip` takes for the usual number.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..avatars import Pull, World, WorldName, load_bundled_clip, open_world, seeded_noise
from ..avatars.jobs import ATTRIBUTES, BLOCK_SEEDS, CHUNK, hits, prompt, scored_values
from ..avatars.world import STEPS, Route
from ..method import TextGuidance
from ..models import euler_ancestral, guided
from .peers import METHODS, Peer
from .rows import Row, by_turns

SCALES = {"through_unet": 1800.0, "universal": 1800.0, "freedom": 1.0, "mpgd": 900.0}
"""Of the peers: the most accurate in 20 steps of three each, three to ten times apart, on block 0 (81 pictures)."""

OURS = "noisy_clip"

ROUTES: dict[str, Route] = {OURS: "noisy linear", "clean_linear": "clean linear", "clean_decoded": "clean decoded"}
"""Of this package: by its encoder and view."""

Drawer = Callable[[str, Tensor, int, int], Tensor]
"""(text, noise (B, C, H, W), steps, seed) -> pictures (B, 3, S, S)."""


def drawers(world: World) -> dict[str, Drawer]:
    """Every way to guide, and none of them."""
    clip = load_bundled_clip()
    assert world.decoded is not None
    decode, modules = world.decoded.decode, (*world.decoded.modules, clip, world.denoiser.unet)

    def by_route(seen: World, text: str, noise: Tensor, steps: int, seed: int) -> Tensor:
        run = seen.open_run((seen.term(Pull("text", text)),))
        return _drawn(seen, guided(seen.denoiser, run), noise, steps, seed)

    def other(method: str, text: str, noise: Tensor, steps: int, seed: int) -> Tensor:
        with torch.no_grad():
            wanted = TextGuidance(clip.encode_text([text]), spherical=method == "through_unet")
        peer = Peer(method, world.denoiser, decode, clip, wanted, SCALES[method], modules)  # type: ignore[arg-type]
        return _drawn(world, peer, noise, steps, seed)

    def none(text: str, noise: Tensor, steps: int, seed: int) -> Tensor:
        return _drawn(world, world.denoiser, noise, steps, seed)

    routes = {name: open_world(WorldName(model="v", route=route)) for name, route in ROUTES.items()}
    ways: dict[str, Drawer] = {"unguided": none}
    ways |= {name: functools.partial(by_route, seen) for name, seen in routes.items()}
    return ways | {name: functools.partial(other, name) for name in METHODS}


def _drawn(world: World, denoise: Callable[[Tensor, Tensor], Tensor], noise: Tensor, steps: int, seed: int) -> Tensor:
    sigmas = world.denoiser.sigmas(steps)
    generator = torch.Generator().manual_seed(seed + 1)
    *_, last = euler_ancestral(denoise, world.denoiser.initial(noise, sigmas), sigmas, generator)
    with torch.no_grad():
        return world.decode(last.x).clamp(-1, 1)


def world_rows(
    samples: int, rounds: int, block: int = 2, only: Sequence[str] = (), progress: Callable[[str], object] = print
) -> list[Row]:
    """The rows that the module names, over at least ``samples`` pictures each."""
    world = open_world(WorldName(model="v", route=ROUTES[OURS]))
    wishes = [{name: value} for name in ATTRIBUTES for value in scored_values(world, name)]
    ways = {name: way for name, way in drawers(world).items() if not only or name in only or name == OURS}
    usual, (channels, side, _) = STEPS["latents"], world.denoiser.shape
    noise = seeded_noise(range(CHUNK), side, channels)
    few = 3
    took = by_turns({n: functools.partial(way, "a person", noise, few, 0) for n, way in ways.items()}, rounds)
    seconds = {name: t / CHUNK / few * usual for name, t in took.items()}
    rows = []
    for name, way in ways.items():
        equal = max(1, round(usual * seconds[OURS] / seconds[name]))
        for row, steps in ((f"{name}/accuracy", usual), (f"{name}/accuracy_equal_time", equal)):
            progress(f"{name}, {steps} steps")
            rows.append(Row(row, _accuracy(world, way, wishes, samples, steps, block), "share", samples))
        rows += [Row(f"{name}/steps_equal_time", equal, "steps", 1), Row(f"{name}/seconds", seconds[name], "s", rounds)]
    return rows


def _accuracy(
    world: World, way: Drawer, wishes: Sequence[dict[str, int]], samples: int, steps: int, block: int
) -> float:
    channels, side, _ = world.denoiser.shape
    each, seed, found = -(-samples // len(wishes)), block * BLOCK_SEEDS, []
    for wish in wishes:
        words = {name: world.judge.attributes[name][value] for name, value in wish.items()}
        for start in range(0, each, CHUNK):
            count = min(CHUNK, each - start)
            noise = seeded_noise(range(seed, seed + count), side, channels)
            found.append(hits(world, way(prompt(words), noise, steps, seed), [wish] * count))
            seed += count
    return float(torch.cat(found).mean())
