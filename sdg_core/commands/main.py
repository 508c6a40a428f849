"""`sdg`: one command, and how its errors end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..training import MissingExtra
from . import bench, convert, draw, evaluate, finetune


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; user errors end with one line on stderr and exit code 2."""
    args = parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, FileNotFoundError, MissingExtra) as error:
        print(f"sdg: {error}", file=sys.stderr)
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    """Commands and options."""
    top = argparse.ArgumentParser(prog="sdg", description="Semantic Diffusion Guidance without ComfyUI.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for room in (draw, evaluate, bench, finetune, convert):
        room.add(commands)
    return top
