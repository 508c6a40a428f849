"""Everything about guidance that only a card can show, in one go: `make gpu-check`. Prints one table.

    python benchmarks/gpu_check.py [--json FILE] [--only CHECK ...]
    python benchmarks/gpu_check.py --cpu        # a rehearsal on tiny models, for machines without a card

It finds ComfyUI as the tests do: COMFYUI_PATH, else ~/comfy/ComfyUI. The host's options hold for a whole process, so
every check runs in one of its own, in which the host's main.py starts it. Models have random weights: nothing is
downloaded, and speed and memory don't depend on them.

- precision: five families, small, in fp32, bf16, fp16 and with fp8 weights (the table of docs/precision.md, here).
- device: the shift that the card computes beside the CPU's.
- memory: SD1.5 in bf16 under each of the host's memory managements, with little memory left; and through a VAE.
- out of memory: the card is filled until the gradient of a batch does not fit. It must be taken in parts.
- time: an unguided and a guided step of SD1.5, SDXL and Flux at full size, noisy RN50 through the linear view.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import importlib
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # at run time torch must not be imported before the host has chosen its allocator
    from torch import Tensor

ROOT = Path(__file__).parents[1]
HOST = Path(os.environ.get("COMFYUI_PATH") or Path.home() / "comfy/ComfyUI")
MANAGEMENTS = {
    "default": [],
    "dynamic VRAM off": ["--disable-dynamic-vram"],
    "--lowvram": ["--disable-dynamic-vram", "--lowvram"],
    "--novram": ["--novram"],
    "--highvram": ["--highvram"],
}
CHECKS: dict[str, dict[str, list[str]]] = {
    "precision": {"": []},
    "device": {"": []},
    "memory": MANAGEMENTS,
    "out of memory": {"": ["--disable-dynamic-vram"]},
    "time": {"SD15": ["--highvram"], "SDXL": ["--highvram"], "Flux": ["--highvram"]},
}
"""Checks, their settings, and the host's options for each: one process per setting."""

MARK = "GPU-CHECK ROWS "
GB = 2**30

Task = tuple[str, str]
"""A check and its setting."""


@dataclass(frozen=True)
class Row:
    """A line of the table. ``ok`` None: not to be judged, or skipped."""

    check: str
    setting: str
    result: str
    ok: bool | None = None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="rehearse on the CPU, on tiny models")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS), metavar="CHECK", help=str([*CHECKS]))
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--run", type=json.loads, help=argparse.SUPPRESS)  # tasks, in a process of their own
    parser.add_argument("--share", type=Path, help=argparse.SUPPRESS)  # a folder for what one process leaves another
    args = parser.parse_args()
    if args.run:
        return run_here([tuple(task) for task in args.run], args.cpu, args.share)
    if not (HOST / "main.py").is_file():
        print(f"skipped: no ComfyUI at {HOST}. Install one there, or set COMFYUI_PATH to its folder.")
        return 0
    if not args.cpu and not has_card():
        print(
            "skipped: no CUDA device here. Run this on a machine with an NVIDIA card; --cpu rehearses it on this one."
        )
        return 0
    with tempfile.TemporaryDirectory() as share:
        rows = [row for tasks in processes(args.only, args.cpu) for row in run_apart(tasks, args.cpu, share)]
    print_table(rows)
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=2))
    return int(any(row.ok is False for row in rows))


def has_card() -> bool:
    import torch

    return torch.cuda.is_available()


def processes(checks: list[str], cpu: bool) -> list[list[Task]]:
    """Which tasks share a process: none on a card. The rehearsal needs no options, so one starts the host once."""
    tasks = [(check, setting) for check in checks for setting in CHECKS[check]]
    return [[task for task in tasks if task[0] != "memory" or task[1] == "default"]] if cpu else [[t] for t in tasks]


def run_apart(tasks: list[Task], cpu: bool, share: str) -> list[Row]:
    """Tasks in a process of their own. Those that fail are a row too."""
    name = ", ".join(f"{check} {setting}".strip() for check, setting in tasks)
    print(f"{name} ...", file=sys.stderr, flush=True)
    command = [sys.executable, __file__, "--run", json.dumps(tasks), "--share", share, *(["--cpu"] if cpu else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    rows = [Row(**json.loads(line.removeprefix(MARK))) for line in found]
    if done.returncode == 0:
        return rows
    lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
    print("\n".join(lines[-20:]), file=sys.stderr)
    return [*rows, Row(name, "", f"failed: {lines[-1]}", False)]


def run_here(tasks: list[Task], cpu: bool, share: Path) -> int:
    (check, setting), *_ = tasks
    bench = Bench(start_host(["--cpu"] if cpu else CHECKS[check][setting]), cpu, share)
    functions = {
        "precision": precision, "device": device, "memory": memory, "out of memory": out_of_memory, "time": speed,
    }  # fmt: skip
    for check, setting in tasks:
        for row in functions[check](bench, setting):
            print(MARK + json.dumps(asdict(row)), flush=True)
    return 0


def print_table(rows: list[Row]) -> None:
    print("| check | setting | result | |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row.check} | {row.setting} | {row.result} | {({True: 'ok', False: '**no**'}).get(row.ok, '')} |")


# The host, the pack in it, and what to sample


def start_host(options: list[str]) -> SimpleNamespace:
    """ComfyUI in this process, started by its own main.py without a server, and the pack by its node loader.

    Gives the host's ``nodes`` by id, and those modules of the pack that the checks look into.
    """
    known = (HOST / "comfy/cli_args.py").read_text()  # older hosts have no dynamic VRAM, and no option against it
    sys.argv[1:] = ["--disable-all-custom-nodes", *(option for option in options if f'"{option}"' in known)]
    sys.path[:0] = [str(HOST), str(ROOT / "tests/host")]
    import comfy.options

    comfy.options.enable_args_parsing()
    importlib.import_module("cuda_malloc")  # chooses the allocator, before torch is there
    importlib.import_module("main")  # switches dynamic VRAM on, where it is
    import nodes

    importlib.import_module("comfy.utils").PROGRESS_BAR_ENABLED = False
    if not asyncio.run(nodes.load_custom_node(str(ROOT))):
        raise SystemExit("ComfyUI did not load the pack; its log says why.")
    name = str(ROOT).replace(".", "_x_")
    parts = ["nodes.host", "nodes.host.seam", "nodes.host.views", "nodes.host.memory"]
    parts += ["sdg_core.encoders", "sdg_core.method", "sdg_core.method.gradient"]
    modules = {part.split(".")[-1]: importlib.import_module(f"{name}.{part}") for part in parts}
    return SimpleNamespace(nodes=nodes.NODE_CLASS_MAPPINGS, ksampler=nodes.KSampler, **modules)


class Bench:
    """What the checks share: models, an encoder, guided and unguided runs. Tiny ones where ``cpu``."""

    def __init__(self, pack: SimpleNamespace, cpu: bool, share: Path) -> None:
        import comfy.model_management as mm
        import precision
        import small_models

        self.pack, self.cpu, self.share = pack, cpu, share
        small_models.build = whole()(small_models.build)
        self.precision, self.small_models, self.device = precision, small_models, mm.get_torch_device()

    def model(self, family: str, direct: bool = False) -> tuple[object, object]:
        """(MODEL in bf16, its architecture), at full size on a card; ``direct``: made there, and staying there."""
        import comfy.model_management as mm
        import comfy.model_patcher
        import comfy.supported_models
        import torch

        architecture = self.small_models.small(family) if self.cpu else full(family)
        if self.cpu:
            return self.small_models.build(architecture, torch.bfloat16, torch.float32), architecture
        config = getattr(comfy.supported_models, family)(dict(architecture.unet))
        config.set_inference_dtype(torch.bfloat16, None)
        place = self.device if direct else mm.unet_offload_device()
        with whole():
            model = config.get_model({}, device=place).eval()
        # Drawn on the card wherever they stay, so that they are the same in all settings.
        generator = torch.Generator(self.device).manual_seed(0)
        for name, tensor in model.diffusion_model.requires_grad_(False).state_dict().items():
            if tensor.ndim > 1:
                drawn = torch.randn(tensor.shape, generator=generator, device=self.device, dtype=tensor.dtype)
                tensor.copy_(drawn * math.prod(tensor.shape[1:]) ** -0.5)
            else:
                tensor.fill_(float(name.endswith((".weight", ".scale"))))
        patcher = comfy.model_patcher.ModelPatcher if direct else self.pack.memory.Patcher
        return patcher(model, load_device=self.device, offload_device=place), architecture

    def guidance(self, model: object) -> object:
        """Text, by a noisy RN50 with random weights, made for the linear picture of the model's latents."""
        clip = self.small_models.CLIP
        if not self.cpu:
            import open_clip

            clip = open_clip.get_model_config("RN50")
        encoder = self.precision.noisy_encoder(self.pack, model.get_model_object("latent_format"), clip)
        return self.text(encoder)

    def text(self, encoder: object, scale: float = 100.0) -> object:
        whole = {"start_percent": 0.0, "end_percent": 1.0}
        return self.run("SDGTextGuidance", noisy_clip=encoder, text="a red hat", scale=scale, **whole)

    def run(self, node_id: str, **inputs: object) -> object:
        """A node's first output, in inference mode as the host runs nodes."""
        import torch

        with torch.inference_mode():
            return self.pack.nodes[node_id].execute(**inputs).args[0]

    def sample(self, model: object, architecture: object, batch: int = 1, steps: int = 3, **changes: object) -> Tensor:
        """The Guided KSampler's latent: relative strength, a tenth of the model's own step."""
        from architectures import conditionings

        positive, negative = conditionings(architecture)
        latent = architecture.latent()["samples"].repeat(batch, 1, 1, 1)
        inputs = {
            "model": model, "seed": 7, "steps": steps, "cfg": architecture.cfg, "sampler_name": "euler",
            "scheduler": "simple", "positive": positive, "negative": negative, "denoise": 1.0,
            "latent_image": {"samples": latent}, "strength": "relative", "cap": 0.1,
        }  # fmt: skip
        return self.run("SDGGuidedKSampler", **(inputs | changes))["samples"]

    def free(self) -> int:
        """Bytes of the card that nothing holds."""
        import torch

        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    @contextmanager
    def filled(self, keep: float) -> Iterator[None]:
        """All of the card's free memory but ``keep`` bytes is taken, while open."""
        import torch

        taken = (
            None if self.cpu else torch.empty(int(max(0, self.free() - keep)), dtype=torch.uint8, device=self.device)
        )
        try:
            yield
        finally:
            del taken


@contextmanager
def whole() -> Iterator[None]:
    """Networks built here have all their weights: under dynamic VRAM the host leaves some to the file that it loads."""
    memory = sys.modules.get("comfy.memory_management")  # absent from older hosts
    dynamic = getattr(memory, "aimdo_enabled", False)
    if dynamic:
        memory.aimdo_enabled = False
    try:
        yield
    finally:
        if dynamic:
            memory.aimdo_enabled = True


def full(family: str) -> object:
    """The architecture as it was released, at its usual size: 512 pixels for SD1.5, 1024 for the others."""
    import torch
    from architectures import ARCHITECTURES

    released = {
        "SD15": {}, "SDXL": {"channel_mult": [1, 2, 4]}, "Flux": {"depth": 19, "depth_single_blocks": 38},
    }  # fmt: skip
    whole = ARCHITECTURES[family]
    side, channels = 64 if family == "SD15" else 128, whole.unet["in_channels"]
    width = 768 if family == "SD15" else whole.width
    latent = {"samples": torch.zeros(1, channels, side, side)}
    return replace(whole, unet=whole.unet | released[family], latent=lambda: latent, width=width, tokens=77)


# The checks


def precision(bench: Bench, setting: str) -> list[Row]:
    rows = []
    for name in ["SD15"] if bench.cpu else ["SD15", "SDXL", "SD3", "Flux", "WAN21_T2V"]:
        family = bench.precision.Family(bench.pack, name)
        for kind in ["bf16"] if bench.cpu else list(bench.precision.PRECISIONS):
            row = family.row(kind)
            result = (
                f"denoised {row.model:.1e} from fp32, shift {row.noisy:.1e} (noisy), {row.times:.1f} times that "
                f"(clean); picture {row.plain:.1e}, guided {row.run_noisy:.2f} and {row.run_clean:.2f} times that"
            )
            ok = row.finite and row.zero and row.noisy < 1e-3 and row.times < 4 and row.run_noisy < 2
            ok = ok and row.run_clean < 2
            broken = "" if row.finite and row.zero else f"finite {row.finite}, scale 0 the same bits {row.zero}; "
            rows.append(Row("precision", f"{name} {kind}", broken + result, ok))
    return rows


def device(bench: Bench, setting: str) -> list[Row]:
    """From the same x_t and denoised. A card multiplies float32 convolutions in TF32, unless told otherwise, and a
    ResNet of random weights makes much of that, so only the ViT is judged."""
    import torch

    model, architecture = bench.model("SD15")
    latent, generator = model.get_model_object("latent_format"), torch.Generator().manual_seed(0)
    vit = bench.text(bench.precision.noisy_encoder(bench.pack, latent, bench.precision.VIT))
    shape = (2, *architecture.latent()["samples"].shape[1:])
    x_t, denoised = (torch.randn(shape, generator=generator) for _ in range(2))
    rows = []
    for name, guidance in (("ViT", vit), ("RN50", bench.guidance(model))):
        sights, shifts = bench.pack.views.see(model, guidance, bench.pack.views.ViewChoice()), []
        for place in (torch.device("cpu"), bench.device):
            guidance.patchers[0].model.to(place)
            run = bench.pack.seam.open_run(model, guidance.terms, bench.pack.method.Strength(cap=None), sights)
            with torch.inference_mode():
                tensors = (t.to(place) for t in (denoised, 3 * x_t, torch.full((2,), 3.0)))
                shifts.append(bench.pack.method.guidance_shift(*tensors, run).cpu())
        apart = bench.precision.distance(shifts[1], shifts[0])
        ok = apart < 0.02 if name == "ViT" else None
        rows.append(Row("device", f"float32 shift, noisy {name}", f"{apart:.1e} from the CPU's", ok))
    return rows


def memory(bench: Bench, setting: str) -> list[Row]:
    """Half of the model, and what a step takes, is all that is left of the card, but for --highvram."""
    import torch

    model, architecture = bench.model("SD15")
    guidance = bench.guidance(model)
    keep = math.inf if setting == "--highvram" else model.model_size() / 2 + 2 * GB
    with bench.filled(keep):
        plain, guided = (bench.sample(model, architecture, guidance=g) for g in (None, guidance))
        off = bench.sample(model, architecture, guidance=replace_scales(guidance, 0.0))
        clean = bench.text(bench.precision.vit(bench.pack))
        decoded = bench.sample(model, architecture, guidance=clean, view="decoded", vae=small_vae(bench))
    zero, finite = torch.equal(off, plain), all(bool(x.isfinite().all()) for x in (plain, guided, decoded))
    moved = [bench.precision.distance(x, plain) for x in (guided, decoded)]
    first = bench.share / "memory.pt"
    if not first.exists():
        torch.save(guided, first)
    apart = bench.precision.distance(guided, torch.load(first))
    dynamic = getattr(sys.modules.get("comfy.memory_management"), "aimdo_enabled", False)  # absent from older hosts
    result = (
        f"dynamic VRAM {'on' if dynamic else 'off'}; finite {finite}; scale 0 the same bits {zero}; guided "
        f"{moved[0]:.1e} from unguided, through a VAE {moved[1]:.1e}; {apart:.1e} from the first setting"
    )
    return [Row("memory", setting, result, finite and zero and min(moved) > 1e-3 and apart < 0.05)]


def replace_scales(guidance: object, scale: float) -> object:
    return replace(guidance, terms=tuple(replace(term, scale=scale) for term in guidance.terms))


def small_vae(bench: Bench) -> object:
    """A VAE object of the host around its own AutoencoderKL, small, with random weights, in the host's dtype."""
    import comfy.sd
    import torch
    from comfy.ldm.models.autoencoder import AutoencoderKL

    size = {"ch": 32, "ch_mult": [1, 1, 1, 2], "num_res_blocks": 1, "attn_resolutions": [], "resolution": 32}
    config = size | {"double_z": True, "z_channels": 4, "in_channels": 3, "out_ch": 3, "dropout": 0.0}
    with torch.inference_mode():
        model = AutoencoderKL(ddconfig=config, embed_dim=4)
        bench.small_models.draw(model)
        return comfy.sd.VAE(sd=model.state_dict(), config={"params": {"ddconfig": config, "embed_dim": 4}})


def out_of_memory(bench: Bench, setting: str, batch: int = 8) -> list[Row]:
    """While the gradient is taken, a little more is left than the host is asked for one picture (which is generous)."""
    import torch

    model, architecture = bench.model("SD15")
    guidance, seam = bench.guidance(model), bench.pack.seam
    whole = bench.sample(model, architecture, batch, guidance=guidance)
    one = bench.pack.memory.activation_bytes(guidance.patchers[0].model)
    original, sizes = seam.guidance_shift, []

    def short_of_memory(denoised: Tensor, x_t: Tensor, sigma: Tensor, run: object) -> Tensor | None:
        with bench.filled(1.2 * one), no_more_than(bench, 2):
            shift = original(denoised, x_t, sigma, run)
        sizes.append(run.chunks.size)
        return shift

    seam.guidance_shift = short_of_memory
    try:
        parts = bench.sample(model, architecture, batch, guidance=guidance)
    finally:
        seam.guidance_shift = original
    apart, finite = bench.precision.distance(parts, whole), bool(torch.isfinite(parts).all())
    result = f"{batch} pictures in parts of {sizes[-1]}; the run ended, finite {finite}, {apart:.1e} from the whole"
    taken = sizes[-1] is not None and sizes[-1] < batch
    return [
        Row("out of memory", "SD1.5, batch 8" if not bench.cpu else "tiny", result, taken and finite and apart < 0.05)
    ]


@contextmanager
def no_more_than(bench: Bench, most: int) -> Iterator[None]:
    """A CPU can't be filled, so the rehearsal says that it is."""
    import torch

    gradient = bench.pack.gradient
    original = gradient.score_gradient

    def score_gradient(encoder, terms, weights, targets, x, sight):
        if len(x) > most:
            raise torch.OutOfMemoryError("rehearsed")
        return original(encoder, terms, weights, targets, x, sight)

    if bench.cpu:
        gradient.score_gradient = score_gradient
    try:
        yield
    finally:
        gradient.score_gradient = original


def speed(bench: Bench, family: str, steps: int = 8) -> list[Row]:
    """Median step of a run, the first two left out, and the most memory that torch held."""
    import torch

    needed = {"SD15": 4, "SDXL": 10, "Flux": 32}[family]
    total = math.inf if bench.cpu else torch.cuda.get_device_properties(bench.device).total_memory / GB
    if needed > total:
        return [Row("time", family, f"skipped: needs about {needed} GB, this card has {total:.0f}")]
    model, architecture = bench.model(family, direct=True)
    guided = bench.run("SDGApplyGuidance", model=model, guidance=bench.guidance(model), strength="absolute", cap=1.0)
    timed(bench, model, architecture, 3)  # a card's first steps choose its kernels
    (plain, plain_peak), (pulled, peak) = (timed(bench, m, architecture, steps) for m in (model, guided))
    name = "CPU" if bench.cpu else torch.cuda.get_device_name(bench.device)
    result = f"{1000 * plain:.1f} ms, guided {1000 * pulled:.1f} ms, {pulled / plain:.2f} times; {name}"
    memory = "" if bench.cpu else f"; at most {plain_peak / GB:.1f} GB, guided {peak / GB:.1f} GB"
    side = architecture.latent()["samples"].shape[-1]
    return [Row("time", f"{family}, latent {side} x {side}, cfg {architecture.cfg:g}", result + memory)]


def timed(bench: Bench, model: object, architecture: object, steps: int) -> tuple[float, int]:
    """(seconds a step, bytes at most)."""
    import comfy.sample
    import torch
    from architectures import conditionings

    marks: list[float] = []
    wait: Callable[[], None] = (lambda: None) if bench.cpu else torch.cuda.synchronize

    def mark(*unused: object) -> None:
        wait()
        marks.append(time.perf_counter())

    if not bench.cpu:
        torch.cuda.reset_peak_memory_stats(bench.device)
    positive, negative = conditionings(architecture)
    latent = architecture.latent()["samples"]
    noise = comfy.sample.prepare_noise(latent, 7)
    with torch.inference_mode():
        comfy.sample.sample(
            model, noise, steps, architecture.cfg, "euler", "simple", positive, negative, latent, callback=mark,
            disable_pbar=True, seed=7,
        )  # fmt: skip
    spans = [b - a for a, b in itertools.pairwise(marks[1:])]
    return statistics.median(spans), 0 if bench.cpu else torch.cuda.max_memory_allocated(bench.device)


if __name__ == "__main__":
    sys.exit(main())
