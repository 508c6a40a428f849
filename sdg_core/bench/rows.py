"""Measured rows, the machine they were measured on, and timing by turns."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch

MB = 2**20

Task = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One figure over n repetitions. ``unit`` "x" is a ratio of times that were taken by turns."""

    name: str
    value: float
    unit: str
    n: int


def machine() -> dict[str, object]:
    """What ran: processor, threads, card, versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "processor": model or platform.processor() or platform.machine(),
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def as_json(rows: Sequence[Row], where: Mapping[str, object]) -> dict[str, object]:
    """{"machine": ..., "rows": [{"name", "value", "unit", "n"}]}."""
    return {"machine": dict(where), "rows": [asdict(row) for row in rows]}


MEANINGS = {
    "text_ms": "text guidance of one picture, one step, without the model",
    "four_over_one": "text, content, structure and style of one picture, over text alone; references cached",
    "four_over_one_first_run": "the same in the first run, which looks at the references",
    "style_over_text": "style of layers 1 to 3, over text",
    "bf16_over_fp32": "text with the image tower in bf16, over float32",
    "bf16_degrees": "by how much that turns the correction",
    "*_compiled_over_*": "through torch.compile, over without",
    "*_over_text_first_run": "in the first run, over text",
    "*_over_text": "over text; references cached",
    "references_*": "content with so many references, over one; cached",
    "batch_*_per_picture": "text, a picture of such a batch over one alone",
    "side_*": "text on pictures of such a side",
    "compile_seconds": "the first pass of a compiled image tower",
    "unguided_step_s*": "a step of a UNet of SD1.5's size at 512 px with classifier-free guidance",
    "step_ratio*": "the same step guided by text through the linear view, over that",
    "extra_memory_mb*": "peak memory that guidance adds",
    "speedup_over_*": "a guided step of the other way, over ours",
    "*/accuracy": "one-attribute wishes that came true, in 20 steps",
    "*/accuracy_equal_time": "one-attribute wishes that came true in the time of our 20 steps",
    "*/steps_equal_time": "the steps that fit into that time",
    "*/seconds": "a picture in 20 steps",
    "finetune_over_*": "pictures a second of fine-tuning with random crops, over those of a bare training step",
    "finetune_remembered_over_*": "the same where pictures repeat, and the teacher's answers are remembered",
    "finetune_pictures_per_second": "of fine-tuning with random crops",
}
"""What rows say, by the pattern that their names fit first."""


def as_markdown(rows: Sequence[Row], where: Mapping[str, object]) -> str:
    """The machine, and a table of the rows and what they say."""
    lines = [", ".join(f"{name} {value}" for name, value in where.items() if value is not None), ""]
    lines += ["| row | | what |", "|---|---|---|"]
    for row in rows:
        words = next((said for pattern, said in MEANINGS.items() if fnmatch(row.name, pattern)), "")
        lines.append(f"| `{row.name}` | {row.value:.3g} {row.unit} | {words} |")
    return "\n".join(lines)


def by_turns(tasks: Mapping[str, Task], rounds: int, before: Task = lambda: None) -> dict[str, float]:
    """Median seconds of every task. They take turns, so that whatever else the machine does falls on all of them; the
    first round warms up. ``before`` runs before each, untimed."""
    spans: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(rounds + 1):
        for name, task in tasks.items():
            before()
            start = time.perf_counter()
            task()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                spans[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in spans.items()}


class Peak:
    """The most memory that was taken beyond what there was, in bytes; known once the block is left."""

    taken = 0


@contextmanager
def peak_memory(interval: float = 0.002) -> Iterator[Peak]:
    """On a GPU what torch allocates; on a CPU the process's resident size, looked at every ``interval`` seconds."""
    found = Peak()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        yield found
        found.taken = torch.cuda.max_memory_allocated() - start
        return
    done, start = threading.Event(), resident()
    most = [start]

    def watch() -> None:
        while not done.wait(interval):
            most[0] = max(most[0], resident())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
        found.taken = most[0] - start


def resident() -> int:
    """Bytes of memory that this process holds; 0 where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.is_file() else 0
