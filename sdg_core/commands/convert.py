"""`sdg convert`: a noisy CLIP of another layout, or without text tower, as our kind of file."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..encoders import load_noisy_clip, open_clip_models, save_noisy_clip, with_text


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
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
