"""The tests on other CPUs' arithmetic: every kernel set that this CPU can run, with one thread and with two.

`make matrix` prints one table. ATen (ATEN_CPU_CAPABILITY) and oneDNN (ONEDNN_MAX_CPU_ISA) are limited alike; a set that
the CPU lacks is named and left out. What is given after the command goes to pytest, as in
`python tests/matrix.py tests/core`; without it everything of `make test` runs.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
KERNELS = {"default": "SSE41", "avx2": "AVX2", "avx512": "AVX512_CORE"}
"""ATen's name of a kernel set, and oneDNN's."""
THREADS = (1, 2)
COUNTED = re.compile(r"(\d+) (passed|failed|skipped|error)")


@dataclass(frozen=True)
class Outcome:
    """One cell of the matrix: what pytest counted, and how it ended."""

    kernels: str
    threads: int
    counts: dict[str, int]
    code: int
    seconds: float


def limited(kernels: str, threads: int) -> dict[str, str]:
    """The environment of a cell."""
    limits = {"ATEN_CPU_CAPABILITY": kernels, "ONEDNN_MAX_CPU_ISA": KERNELS[kernels]}
    return {**os.environ, **limits, "OMP_NUM_THREADS": str(threads), "SDG_TEST_THREADS": str(threads)}


def here() -> list[str]:
    """The kernel sets that this CPU runs. Asked for one that it lacks, ATen would take it and crash."""
    ask = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    free = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
    done = subprocess.run([sys.executable, "-c", ask], env=free, capture_output=True, text=True, check=True)
    names = list(KERNELS)
    best = done.stdout.strip().lower()
    return names[: names.index(best) + 1] if best in names else names[:1]


def run(kernels: str, threads: int, tests: list[str]) -> Outcome:
    """Runs the tests in a cell, their output passed on."""
    command = [sys.executable, "-m", "pytest", "-q", *tests] if tests else [sys.executable, str(ROOT / "tests/run.py")]
    begun, counts = time.monotonic(), dict[str, int]()
    process = subprocess.Popen(command, cwd=ROOT, env=limited(kernels, threads), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        if re.search(r"\d+ (passed|failed).* in [\d.]+s", line):
            for number, what in COUNTED.findall(line):
                counts[what] = counts.get(what, 0) + int(number)
    return Outcome(kernels, threads, counts, process.wait(), time.monotonic() - begun)


def table(outcomes: list[Outcome], absent: list[str]) -> str:
    """One line for every cell."""
    lines = [f"{'kernels':9} {'threads':>7} {'passed':>7} {'failed':>7} {'skipped':>8} {'minutes':>8}"]
    for o in outcomes:
        failed = o.counts.get("failed", 0) + o.counts.get("error", 0) or o.code
        cells = f"{o.counts.get('passed', 0):7d} {failed:7d} {o.counts.get('skipped', 0):8d} {o.seconds / 60:8.1f}"
        lines.append(f"{o.kernels:9} {o.threads:7d} {cells}")
    return "\n".join(lines + [f"{kernels:9} not run: this CPU has no such kernels" for kernels in absent])


def main(tests: list[str]) -> int:
    """Runs every cell; the number of cells that failed."""
    there = here()
    outcomes = [run(kernels, threads, tests) for kernels in there for threads in THREADS]
    print(table(outcomes, [kernels for kernels in KERNELS if kernels not in there]))
    return sum(o.code != 0 for o in outcomes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
