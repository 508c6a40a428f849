"""`sdg finetune`: a noisy CLIP from a folder of pictures."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..avatars import NAME
from ..encoders import CleanCLIP, NoisyCLIP, save_noisy_clip
from ..training import (
    LAYERS,
    PLAIN,
    TIMESTEPS,
    Augment,
    Finetuning,
    ImageSet,
    ImageShards,
    Settings,
    StudentSight,
    accelerator,
    as_rows,
    draw_chart,
    find_images,
    held_out,
    is_shards,
    kept_states,
    shard_names,
)
from .evaluate import HELD_OUT_SEED, curve_table, measured
from .options import add_encoder_options, load_clean, sight_of


@dataclass(frozen=True)
class Pictures:
    """What is trained on, what is kept back for measuring (None: nothing), and how many there are of both."""

    training: ImageSet | ImageShards
    measured: ImageSet | None
    said: str


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The parser of `sdg finetune`."""
    usual = Settings()
    tune = commands.add_parser("finetune", help="make a noisy CLIP from any CLIP and a folder of pictures, no captions")
    add_encoder_options(tune)
    tune.add_argument("--images", required=True, metavar="FOLDER|SHARDS", help="a folder, or WebDataset .tar shards")
    tune.add_argument("--out", type=Path, required=True, metavar="FILE.safetensors")
    tune.add_argument("--steps", type=int, default=usual.steps)
    tune.add_argument("--batch-size", type=int, default=usual.batch_size, help="of all processes together")
    tune.add_argument("--micro-batch", type=int, default=0, help="pictures that go forward together; 0: all")
    tune.add_argument("--learning-rate", type=float, default=usual.learning_rate)
    tune.add_argument("--weight-decay", type=float, default=usual.weight_decay)
    tune.add_argument("--warmup", type=float, default=usual.warmup, help="part of the steps")
    tune.add_argument(
        "--ema", type=float, default=usual.ema, help="decay of the averaged weights, which are the result"
    )
    tune.add_argument("--cosine-weight", type=float, default=usual.cosine_weight, help="of 1 - cosine beside InfoNCE")
    tune.add_argument("--layers", choices=LAYERS, default=usual.layers, help="what learns")
    tune.add_argument("--timesteps", choices=TIMESTEPS, default=usual.timesteps, help="how t is drawn")
    tune.add_argument("--crop", type=float, default=0.7, help="least part of the area that a crop keeps; 1: no crops")
    tune.add_argument("--no-flip", action="store_true", help="never mirror pictures")
    tune.add_argument(
        "--vae", type=Path, help="with a linear view: a TAESD encoder for half of the pictures; or avatars"
    )
    tune.add_argument(
        "--precision", choices=("no", "bf16", "fp16", "fp64"), default="no",
        help="of the forward pass; fp64: of everything, for comparisons",
    )  # fmt: skip
    tune.add_argument("--workers", type=int, default=2, help="processes that read pictures")
    tune.add_argument("--held-out", type=int, default=1000, help="pictures kept back to measure retrieval on")
    tune.add_argument("--save-every", type=int, default=500, help="steps between the states that --resume finds")
    tune.add_argument("--resume", action="store_true", help="continue an interrupted run")
    tune.add_argument("--force", action="store_true", help="replace an existing file")
    tune.add_argument("--half", action="store_true", help="write float16 weights")
    tune.add_argument("--seed", type=int, default=0)
    tune.add_argument("--dataset-name", default="", help="kept in the file; default: the folder's name")
    tune.add_argument("--licence", default="", help="kept in the file")
    tune.set_defaults(run=run_finetune)


def run_finetune(args: argparse.Namespace) -> None:
    """`sdg finetune`: trains, saves the file, and a chart of its retrieval beside it."""
    fields = ("steps", "batch_size", "micro_batch", "learning_rate", "weight_decay", "warmup", "ema", "cosine_weight",
              "layers", "timesteps", "seed")  # fmt: skip
    settings = Settings(**{name: getattr(args, name) for name in fields})
    states = args.out.with_suffix(".training")
    check_output(args.out, args.force or args.resume)
    if kept_states(states) and not (args.resume or args.force):
        raise ValueError(
            f"An interrupted run is kept in {states}. Continue it with --resume, or start anew with --force."
        )
    clean = load_clean(args.arch, args.pretrained)
    sight = sight_of(args, clean)
    pictures = open_pictures(args, max(sight.picture_size, clean.noise_size))
    clean = clean.double() if args.precision == "fp64" else clean
    device = accelerator(precision="no" if args.precision == "fp64" else args.precision)
    run = Finetuning(clean, sight, pictures.training, settings, device, args.workers)
    if args.resume:
        run.resume(states)
    if not train(run, states, args.save_every, pictures.said):
        message = (
            f"Stopped after step {run.step} of {settings.steps}, and saved. To go on: the same command with --resume"
        )
        print(message, file=sys.stderr)
        raise SystemExit(130)
    if run.accelerator.is_main_process:
        said = {"processes": run.accelerator.num_processes, "losses": run.losses}
        finish(run.result(notes=notes(args, clean, settings.steps)), clean, sight, pictures, args, said)
        shutil.rmtree(states, ignore_errors=True)
    run.accelerator.wait_for_everyone()


def train(run: Finetuning, states: Path, save_every: int, said: str) -> bool:
    """Runs to the end, with a bar: True. Where it is interrupted it saves and gives False."""
    main = run.accelerator.is_main_process
    with (
        interruptions() as interrupted,
        tqdm(total=run.settings.steps, initial=run.step, unit="step", disable=not main, desc=said) as bar,
    ):
        for progress in run.steps():
            bar.set_postfix_str(f"loss {progress.loss:.3f}, {progress.images_per_second:.0f} images/s", refresh=False)
            bar.update()
            stop = run.agreed(interrupted())
            if stop or (progress.step % save_every == 0 and progress.step < progress.steps):
                run.save(states)
            if stop:
                return False
    if main and run.skipped:
        print(f"{len(run.skipped)} pictures could not be read and were skipped.", file=sys.stderr)
    return True


@contextmanager
def interruptions() -> Iterator[Callable[[], bool]]:
    """While open, Ctrl-C only raises a flag, which the given function reads; a second one ends at once."""
    asked: list[bool] = []

    def note(*unused: object) -> None:
        asked.append(True)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)


def finish(
    model: NoisyCLIP,
    clean: CleanCLIP,
    sight: StudentSight,
    pictures: Pictures,
    args: argparse.Namespace,
    said: dict[str, Any],
) -> None:
    """Measures on what was held out; writes the file, and a chart and the numbers beside it."""
    curve = []
    if pictures.measured is not None:
        curve = measured(model, clean, sight, pictures.measured, args.seed)
        model.config = replace(model.config, retrieval=as_rows(curve))
        print(curve_table(curve))
    draw_chart(curve, args.out.stem, said["losses"]).save(args.out.with_suffix(".png"))
    numbers = {**said, "retrieval": [asdict(row) for row in curve]}
    args.out.with_suffix(".json").write_text(json.dumps(numbers, indent=1))
    save_noisy_clip(args.out, model, half=args.half)
    print(f"Wrote {args.out.resolve()}")


def open_pictures(args: argparse.Namespace, size: int) -> Pictures:
    """Training and held-out pictures of the size that the encoders want."""
    augment = Augment(args.crop, not args.no_flip)
    if is_shards(args.images):
        names = shard_names(args.images)
        return Pictures(ImageShards(names, size, augment, args.seed), None, f"{len(names)} shards")
    files = find_images(Path(args.images))
    kept, measured_on = held_out(len(files), args.held_out, HELD_OUT_SEED)
    training = ImageSet([files[i] for i in kept], size, augment, args.seed)
    proof = ImageSet([files[i] for i in measured_on], size, PLAIN) if len(measured_on) > 1 else None
    return Pictures(training, proof, f"{len(kept)} pictures, {len(measured_on)} held out")


def notes(args: argparse.Namespace, clean: CleanCLIP, steps: int) -> dict[str, str]:
    """What the file says about itself."""
    weights = "" if args.arch == NAME else Path(args.pretrained).name
    return {
        "base": clean.source, "arch": args.arch, "pretrained": weights, "licence": args.licence,
        "dataset": args.dataset_name or Path(args.images).name, "steps": str(steps), "batch_size": str(args.batch_size),
        "seed": str(args.seed),
    }  # fmt: skip


def check_output(path: Path, replace_it: bool) -> None:
    """Before hours of training: raises ValueError where the result could not be written."""
    if path.suffix != ".safetensors":
        raise ValueError(f"Got the output {path}; wanted a name that ends in .safetensors.")
    if path.exists() and not replace_it:
        raise ValueError(f"{path} exists. Choose another name, or replace it with --force.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(
            f"{path.parent} can't be written ({os.strerror(error.errno or 0)}). Choose another --out."
        ) from error
