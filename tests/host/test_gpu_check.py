"""benchmarks/gpu_check.py, which only a card can run for real: its rehearsal on the CPU, what it says without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu_check.py"


def gpu_check(comfyui_path: Path, *options: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "COMFYUI_PATH": str(comfyui_path)}
    return subprocess.run([sys.executable, SCRIPT, *options], env=environment, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="There is a card here: make gpu-check.")
def test_without_a_card_it_says_in_one_line_that_it_was_skipped(comfyui_path):
    done = gpu_check(comfyui_path)
    assert done.returncode == 0
    assert done.stdout.startswith("skipped: no CUDA device here")
    assert len(done.stdout.splitlines()) == 1


def test_every_check_runs_in_its_rehearsal_on_the_cpu(comfyui_path, tmp_path):
    done = gpu_check(comfyui_path, "--cpu", "--json", str(tmp_path / "rows.json"))
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    checks = ["precision", "device", "device", "memory", "out of memory", "time", "time", "time"]
    assert [row["check"] for row in rows] == checks
    assert [row["ok"] for row in rows] == [True, True, None, True, True, None, None, None]
    assert all(row["result"] in done.stdout for row in rows)
    assert "8 pictures in parts of 2" in rows[4]["result"]
