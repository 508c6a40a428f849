"""The command line: `sdg demo | sample | evaluate | finetune | convert`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from . import open_clip_models
from .checkpoint import BUNDLED, load_noisy_clip, save_noisy_clip
from .demo import draw_demo
from .evaluate import SUITES, Row, Settings, as_json, evaluate
from .finetune_cli import add_evaluate, add_finetune
from .guide import Strength
from .noisy_clip import with_text
from .world import SAMPLERS, Pull, WorldName, batch_noise, load_world, sample


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; user errors end with one line on stderr and exit code 2."""
    args = parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, FileNotFoundError) as error:
        print(f"sdg: {error}", file=sys.stderr)
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    """Commands and options."""
    top = argparse.ArgumentParser(prog="sdg", description="Semantic Diffusion Guidance without ComfyUI.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="draw a labelled grid of every guidance with the bundled models")
    demo.add_argument("--out", type=Path, default=Path("demo.png"))
    demo.add_argument("--steps", type=int, default=50)
    demo.set_defaults(run=run_demo)
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
    check = commands.add_parser("evaluate", help="measure guided quality with the separate judge")
    check.add_argument(
        "--suite",
        action="append",
        choices=[*SUITES, "latent", "all"],
        help="default: all of the pixel world; repeatable. latent: the latent models, every route",
    )
    check.add_argument("--only", default="*", metavar="PATTERN", help='rows of the suite latent, as "v/*/text"')
    check.add_argument("--samples", type=int, default=256, help="samples a row")
    check.add_argument("--steps", type=int, default=0, help="0: 50, and 20 for the latent models")
    check.add_argument("--sampler", choices=SAMPLERS, default="euler_ancestral")
    check.add_argument("--processes", type=int, default=0, help="0: one per core")
    check.add_argument("--block", type=int, default=1, help="of seeds and references; the scales were chosen on 0")
    check.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    check.set_defaults(run=run_evaluate)
    add_evaluate(check)
    add_finetune(commands)
    add_convert(commands)
    for command in (demo, one, check):
        command.add_argument(
            "--models", type=Path, default=BUNDLED, help="folder of the models; default: the bundled ones"
        )
    return top


def add_convert(commands: argparse._SubParsersAction) -> None:
    """The parser of `sdg convert`."""
    convert = commands.add_parser("convert", help="a published noisy CLIP, or one of ours, as our kind of file")
    convert.add_argument("source", type=Path, metavar="IN", help="a published .pt, or .safetensors of this pack")
    convert.add_argument("--out", type=Path, required=True, metavar="OUT.safetensors")
    convert.add_argument("--half", action="store_true", help="write fp16: half the size")
    convert.add_argument(
        "--text-from", metavar="TAG_OR_FILE", help='add a text tower: a file of weights, or a tag as "openai"'
    )
    convert.add_argument("--force", action="store_true", help="overwrite OUT")
    convert.set_defaults(run=run_convert)


def run_demo(args: argparse.Namespace) -> None:
    """`sdg demo`: the grid, with progress, and where it is."""
    world = load_world(args.models)
    with tqdm(desc="Drawing", unit="step") as bar:
        picture = draw_demo(world, args.steps, lambda done, total: _advance(bar, done, total))
    picture.save(args.out)
    print(f"Wrote {args.out.resolve()}")


def run_sample(args: argparse.Namespace) -> None:
    """`sdg sample`: a row of pictures, as large as the model draws them."""
    world = load_world(args.models)
    pulls = [Pull("text", text, args.text_scale) for text in args.text]
    for kind in ("content", "structure", "style"):
        scale = getattr(args, f"{kind}_scale")
        pulls += [Pull(kind, read_image(Path(path)), scale) for path in getattr(args, kind)]
    noise = batch_noise(args.seed, args.count, world.denoiser.unet.config.image_size)
    with tqdm(total=args.steps, desc="Sampling", unit="step") as bar:
        images = sample(
            world, pulls, noise, steps=args.steps, sampler=args.sampler, seed=args.seed,
            strength=Strength(args.strength, args.cap or None), progress=lambda step: bar.update(),
        )  # fmt: skip
    write_image(args.out, torch.cat(list(images), dim=2))
    print(f"Wrote {args.out.resolve()}")


def run_evaluate(args: argparse.Namespace) -> None:
    """`sdg evaluate`: a table, or one JSON object."""
    chosen = args.suite or ["all"]
    names = list(SUITES) if "all" in chosen else chosen
    settings = Settings(
        args.samples,
        args.steps,
        args.sampler,
        block=args.block,
        processes=args.processes,
        world=WorldName(args.models),
        only=args.only,
    )
    with tqdm(unit="batch", file=sys.stderr) as bar:
        rows = evaluate(names, settings, lambda name, done, total: _advance(bar, done, total, name))
    print(json.dumps(as_json(rows), indent=2) if args.json else table(rows))


def run_convert(args: argparse.Namespace) -> None:
    """`sdg convert`: the same encoder in a file of our kind."""
    if args.out.suffix != ".safetensors":
        raise ValueError(f"Got --out {args.out}; wanted a name that ends in .safetensors.")
    if args.out.exists() and not args.force:
        raise ValueError(f"There is a file {args.out} already. Choose another name, or overwrite it with --force.")
    encoder = load_noisy_clip(args.source)
    if args.text_from:
        encoder = with_text(encoder, open_clip_models.load_any(encoder.config.clip, args.text_from))
    save_noisy_clip(args.out, encoder, half=args.half)
    print(f"Wrote {args.out.resolve()}")


def table(rows: Sequence[Row]) -> str:
    """Rows as aligned text."""
    head = f"{'measurement':28} {'n':>6} {'guided':>8} {'unguided':>8} {'bar':>6}"
    lines = [
        f"{r.name:28} {r.n:6d} {r.value:8.3f} {r.unguided:8.3f} {'' if r.bar is None else f'{r.bar:.3g}':>6}"
        for r in rows
    ]
    return "\n".join([head, *lines])


def read_image(path: Path) -> torch.Tensor:
    """A picture file as (3, H, W) in -1..1. Raises ValueError where Pillow can't read it."""
    try:
        with Image.open(path) as file:
            pixels = np.asarray(file.convert("RGB"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"There is no picture {path}. Give the path of a PNG or JPEG file.") from error
    except OSError as error:
        raise ValueError(f"{path} is not a picture that Pillow can read. Give a PNG or JPEG file.") from error
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1


def write_image(path: Path, image: torch.Tensor) -> None:
    """(3, H, W) in -1..1 to a picture file."""
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0)
    Image.fromarray(pixels.numpy()).save(path)


def _advance(bar: tqdm, done: int, total: int, name: str = "") -> None:
    if name:
        bar.set_description(name)
    bar.total, bar.n = total, done
    bar.refresh()


if __name__ == "__main__":
    sys.exit(main())
