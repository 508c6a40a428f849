"""`sdg evaluate`: how good guidance is on the bundled worlds; `sdg evaluate noisy-clip`: how good an encoder is."""

from __future__ import annotations

import argparse
import functools
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from ..avatars import (
    LATENT,
    MODEL_SUITES,
    NAME,
    RELATIVE_CAP,
    SAMPLERS,
    SUITES,
    Row,
    Settings,
    WorldName,
    as_json,
    evaluate,
    load_renders,
)
from ..encoders import CleanCLIP, NoisyCLIP, load_noisy_clip, write_retrieval
from ..training import (
    PLAIN,
    ImageSet,
    Retrieval,
    StudentSight,
    accelerator,
    as_rows,
    draw_chart,
    find_images,
    measure_retrieval,
)
from .named_views import named_view
from .options import add_models, load_clean
from .progress import advance

HELD_OUT_SEED = 17


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The parsers of both."""
    check = commands.add_parser("evaluate", help="measure guided quality with the separate judge")
    check.add_argument(
        "--suite",
        action="append",
        choices=[*SUITES, *MODEL_SUITES, "all"],
        help="default: all of the pixel world; repeatable. latent: the latent models, every route. relative: how far "
        "relative strength pulls them, and what that does",
    )
    check.add_argument(
        "--only",
        default="*",
        metavar="PATTERN",
        help='rows of the suites latent and relative, as "v/*/text" and "relative/*/pull"',
    )
    check.add_argument("--cap", type=float, default=RELATIVE_CAP, help="of the suite relative")
    check.add_argument("--samples", type=int, default=256, help="samples a row")
    check.add_argument("--steps", type=int, default=0, help="0: 50, 20 for the latent models, 30 of their content")
    check.add_argument("--sampler", choices=SAMPLERS, default="euler_ancestral")
    check.add_argument("--processes", type=int, default=0, help="0: one per core")
    check.add_argument("--block", type=int, default=2, help="of seeds and references; scales were chosen on 0 and 1")
    check.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    check.set_defaults(run=run_evaluate)
    add_models(check)
    _add_noisy_clip(check)


def _add_noisy_clip(evaluate: argparse.ArgumentParser) -> None:
    """The parser of `sdg evaluate noisy-clip`."""
    kinds = evaluate.add_subparsers(metavar="noisy-clip")
    proof = kinds.add_parser("noisy-clip", help="retrieval under noise of a noisy CLIP, beside the clean one")
    proof.add_argument("file", type=Path)
    proof.add_argument(
        "--images", required=True, metavar="FOLDER",
        help=f'pictures that it was not trained on; "{NAME}": the held-out renders that come with the pack',
    )  # fmt: skip
    proof.add_argument("--arch", help="of the clean CLIP; default: what the file says")
    proof.add_argument("--pretrained", metavar="TAG|FILE", help="of the clean CLIP; default: what the file says")
    proof.add_argument("--comfyui", type=Path, help="where the factors of linear views are read")
    proof.add_argument("--samples", type=int, default=1000, help="at most so many pictures")
    proof.add_argument("--seed", type=int, default=0)
    proof.add_argument("--chart", type=Path, help="default: FILE with .png; none with --no-write")
    proof.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    proof.add_argument("--no-write", action="store_true", help="leave the file's metadata and its folder as they are")
    proof.set_defaults(run=run_evaluate_noisy_clip)


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
        cap=args.cap,
    )
    with tqdm(unit="batch", file=sys.stderr) as bar:
        rows = evaluate(names, settings, lambda name, done, total: advance(bar, done, total, name))
    print(json.dumps(as_json(rows), indent=2) if args.json else row_table(rows))


def row_table(rows: Sequence[Row]) -> str:
    """Rows as aligned text."""
    head = f"{'measurement':28} {'n':>6} {'guided':>8} {'unguided':>8} {'bar':>6}"
    lines = [
        f"{r.name:28} {r.n:6d} {r.value:8.3f} {r.unguided:8.3f} {'' if r.bar is None else f'{r.bar:.3g}':>6}"
        for r in rows
    ]
    return "\n".join([head, *lines])


def run_evaluate_noisy_clip(args: argparse.Namespace) -> None:
    """`sdg evaluate noisy-clip`: a table or JSON, a chart, and the numbers in the file's metadata."""
    model = load_noisy_clip(args.file)
    notes = dict(model.config.notes)
    arch, pretrained = args.arch or notes.get("arch"), args.pretrained or notes.get("pretrained", "")
    if not arch:
        raise ValueError(
            f"{args.file.name} does not say which clean CLIP it was made from. Name it with --arch and --pretrained."
        )
    clean = load_clean(arch, pretrained)
    view = named_view(model.config.view, args.comfyui)
    sight = StudentSight(model.noise_size, view)
    found: Sequence[Path | Tensor] = bundled_renders() if args.images == NAME else find_images(Path(args.images))
    chosen = random.Random(HELD_OUT_SEED).sample(found, min(args.samples, len(found)))
    images = ImageSet(chosen, max(sight.picture_size, clean.noise_size), PLAIN)
    device = accelerator().device
    curve = measured(model.to(device), clean.to(device), sight, images, args.seed)
    if chart := args.chart or (None if args.no_write else args.file.with_suffix(".png")):
        draw_chart(curve, args.file.stem).save(chart)
    if not args.no_write and args.file.suffix == ".safetensors":
        write_retrieval(args.file, as_rows(curve))
    rows = [asdict(row) for row in curve]
    print(json.dumps({"n": len(images), "rows": rows}, indent=2) if args.json else curve_table(curve))


def bundled_renders() -> list[Tensor]:
    """The held-out renders that come with the pack, (128, 128, 3) uint8."""
    renders, _ = load_renders(LATENT / "renders.png")
    return list(((renders + 1) * 127.5).round().byte().permute(0, 2, 3, 1).contiguous())


def measured(model: NoisyCLIP, clean: CleanCLIP, sight: StudentSight, images: ImageSet, seed: int) -> list[Retrieval]:
    """The curve, with a bar."""
    with tqdm(desc=f"Retrieval of {len(images)} pictures", unit="t", file=sys.stderr) as bar:
        tell = functools.partial(advance, bar)
        return measure_retrieval(model, clean, sight, images, seed=seed, progress=tell)


def curve_table(curve: list[Retrieval]) -> str:
    """The curve as aligned text."""
    head = f"{'t':>5} {'noisy @1':>9} {'@5':>6} {'cosine':>7} {'clean @1':>9} {'@5':>6} {'cosine':>7}"
    return "\n".join([head] + [
        f"{r.t:5.0f} {r.noisy_at_1:9.3f} {r.noisy_at_5:6.3f} {r.noisy_cosine:7.3f} "
        f"{r.clean_at_1:9.3f} {r.clean_at_5:6.3f} {r.clean_cosine:7.3f}" for r in curve
    ])  # fmt: skip
