"""`sdg demo` and `sdg sample`: pictures from the bundled models."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from ..avatars import SAMPLERS, Chosen, Pull, World, WorldName, batch_noise, draw_demo, open_world, sample
from ..method import Strength
from ..pictures import read_image, write_image
from .options import add_models
from .progress import advance

WORLDS = {"latents": WorldName(model="v", route="noisy linear"), "pixels": WorldName()}


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The parsers of both."""
    demo = commands.add_parser("demo", help="draw a labelled grid of every guidance with the bundled models")
    demo.add_argument("--out", type=Path, default=Path("demo.png"))
    demo.add_argument("--steps", type=int, default=30)
    instead = demo.add_mutually_exclusive_group()
    instead.add_argument("--gallery", action="store_true", help="prompts in many words instead, a row for each")
    instead.add_argument("--row", action="store_true", help="one seed instead, in large")
    demo.set_defaults(run=run_demo)
    add_world(demo)
    add_models(demo)
    one = commands.add_parser("sample", help="guided pictures from the bundled models")
    for kind in ("text", "content", "structure", "style"):
        what = "PROMPT" if kind == "text" else "IMAGE"
        one.add_argument(f"--{kind}", action="append", default=[], metavar=what, help="pull towards this; repeatable")
        one.add_argument(f"--{kind}-scale", type=float, help="default: the scale measured for this kind")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--count", type=int, default=4, help="pictures in the batch")
    one.add_argument("--steps", type=int, default=50)
    one.add_argument("--sampler", choices=SAMPLERS, default="euler_ancestral")
    one.add_argument("--strength", choices=("absolute", "relative"), default="absolute")
    one.add_argument(
        "--cap", type=float, default=1.0, help="bound on the pull in multiples of the model's step; 0: none"
    )
    one.add_argument("--out", type=Path, default=Path("sample.png"))
    one.set_defaults(run=run_sample)
    add_world(one)
    add_models(one)


def add_world(parser: argparse.ArgumentParser) -> None:
    """Which of the bundled worlds."""
    parser.add_argument("--world", choices=WORLDS, default="latents", help="128 px by latents, or 32 px by pixels")


def world_of(args: argparse.Namespace) -> World:
    return open_world(replace(WORLDS[args.world], folder=args.models))


@contextmanager
def one_thread() -> Iterator[None]:
    """Computes on one thread: models this small gain little from more, which wait for one another on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_demo(args: argparse.Namespace) -> None:
    """`sdg demo`: the grid, with progress, and where it is."""
    world = world_of(args)
    chosen: Chosen = "gallery" if args.gallery else "row" if args.row else "grid"
    with tqdm(desc="Drawing", unit="step") as bar:
        picture = draw_demo(world, args.steps, lambda done, total: advance(bar, done, total), chosen)
    picture.save(args.out)
    print(f"Wrote {args.out.resolve()}")


def run_sample(args: argparse.Namespace) -> None:
    """`sdg sample`: a row of pictures, as large as the model draws them."""
    if args.sampler == "paper" and args.world != "pixels":
        raise ValueError("The paper's sampler needs the learned variance of the pixel model. Add --world pixels.")
    world = world_of(args)
    pulls = [Pull("text", text, args.text_scale) for text in args.text]
    for kind in ("content", "structure", "style"):
        scale = getattr(args, f"{kind}_scale")
        pulls += [Pull(kind, read_image(Path(path)), scale) for path in getattr(args, kind)]
    channels, size, _ = world.denoiser.shape
    noise = batch_noise(args.seed, args.count, size, channels)
    with tqdm(total=args.steps, desc="Sampling", unit="step") as bar, one_thread():
        images = sample(
            world, pulls, noise, steps=args.steps, sampler=args.sampler, seed=args.seed,
            strength=Strength(args.strength, args.cap or None), progress=lambda step: bar.update(),
        )  # fmt: skip
    write_image(args.out, torch.cat(list(images), dim=2))
    print(f"Wrote {args.out.resolve()}")
