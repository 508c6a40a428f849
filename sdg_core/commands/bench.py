"""`sdg bench`: how fast guidance is, as ratios that were taken by turns in one run."""

from __future__ import annotations

import argparse
import json
import sys

import torch

from ..bench import SUITES, Row, as_json, as_markdown, machine, measure


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The parser."""
    bench = commands.add_parser(
        "bench", help="measure what guidance costs, beside a plain step and other ways to guide"
    )
    bench.add_argument(
        "--suite", action="append", choices=[*SUITES, "all"],
        help="default: all; repeatable. " + ". ".join(f"{name}: {what}" for name, (what, _) in SUITES.items()),
    )  # fmt: skip
    bench.add_argument("--rounds", type=int, default=5, help="how often each step is timed; medians are compared")
    bench.add_argument("--samples", type=int, default=256, help="pictures of each row of the suite world")
    bench.add_argument("--threads", type=int, default=0, help="of the CPU; 0: as torch chooses")
    form = bench.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    form.add_argument("--markdown", action="store_true", help="print a table in Markdown that says what each row is")
    bench.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """`sdg bench`: a table, plain or in Markdown, or one JSON object; with the machine."""
    if args.threads:
        torch.set_num_threads(args.threads)
    where = machine()
    chosen = list(SUITES) if not args.suite or "all" in args.suite else args.suite
    rows = measure(chosen, args.rounds, args.samples, lambda what: print(what, file=sys.stderr, flush=True))
    if args.json:
        print(json.dumps(as_json(rows, where), indent=2))
    else:
        print((as_markdown if args.markdown else table)(rows, where))


def table(rows: list[Row], where: dict[str, object]) -> str:
    """Machine and rows as aligned text."""
    head = ", ".join(f"{name} {value}" for name, value in where.items())
    return "\n".join([head, *(f"{r.name:36} {r.value:10.3f} {r.unit:6} n {r.n}" for r in rows)])
