"""The house: imports between rooms go one way, others use a room's public names, and importing it is quick."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("method", "encoders", "models", "presets", "training", "avatars", "commands")
HEAVY = {"open_clip", "timm", "torchvision", "transformers", "accelerate", "matplotlib", "webdataset"}
SECONDS = 0.5  # of the processor, beside torch and what else a host has loaded already

IMPORT = """
import json, sys, time
import numpy, PIL.Image, safetensors.torch, torch, torch.utils.data, tqdm
start = time.process_time()
import sdg_core
print(json.dumps({"seconds": time.process_time() - start, "modules": sorted(sys.modules)}))
"""


def lint(folder: Path) -> subprocess.CompletedProcess:
    """import-linter on the ``sdg_core`` in a folder, by the contracts of pyproject.toml."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()"]
    options = ["--config", str(ROOT / "pyproject.toml"), "--no-cache"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run([*command, *options], cwd=folder, env=environment, capture_output=True, text=True)


def test_imports_go_one_way():
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout
    assert "3 kept, 0 broken" in done.stdout


@pytest.mark.parametrize(
    ("module", "line", "broken"),
    [
        ("method/schedule.py", "from ..encoders import CleanCLIP", "Rooms import one way BROKEN"),
        ("models/adm.py", "from ..encoders import CleanCLIP", "Rooms import one way BROKEN"),
        ("training/images.py", "from ..avatars import BUNDLED", "Rooms import one way BROKEN"),
        ("method/features.py", "from .guide import guide", "The method reads from its formulas up BROKEN"),
        ("encoders/clip.py", "from .noisy_clip import NoisyCLIP", "No cycles inside a room BROKEN"),
        ("extra.py", "import torch", "must be declared as a layer"),
    ],
)
def test_a_wrong_import_breaks_the_contract(tmp_path, module, line, broken):
    shutil.copytree(ROOT / "sdg_core", tmp_path / "sdg_core", ignore=shutil.ignore_patterns("*.safetensors", "*.png"))
    path = tmp_path / "sdg_core" / module
    path.write_text((path.read_text() if path.exists() else "") + f"\n{line}\n")
    done = lint(tmp_path)
    assert done.returncode != 0
    assert broken in done.stdout + done.stderr


def imported(path: Path) -> list[tuple[str, list[str]]]:
    """(room, names) of every import of sdg_core in a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sdg_core":
            found.append((node.module.partition(".")[2], [alias.name for alias in node.names]))
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "nodes").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_nodes_use_what_a_room_names(path):
    for room, names in imported(path):
        public = importlib.import_module(f"sdg_core.{room}".rstrip(".")).__all__ if room in ("", *ROOMS) else ()
        assert set(names) <= set(public), f"sdg_core.{room} does not offer {set(names) - set(public)}"


@pytest.mark.parametrize("room", ["", *ROOMS])
def test_a_room_says_what_it_is_for_and_names_only_what_it_has(room):
    module = importlib.import_module(f"sdg_core.{room}".rstrip("."))
    assert module.__doc__
    assert all(hasattr(module, name) for name in module.__all__)


def test_importing_is_quick_and_leaves_heavy_packages_for_later():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", IMPORT], env=environment, capture_output=True, text=True, check=True)
    seen = json.loads(done.stdout)
    print(f"import sdg_core: {seen['seconds']:.2f} s")
    assert not HEAVY & set(seen["modules"])
    assert seen["seconds"] <= SECONDS


def test_the_readmes_python_example_runs(tmp_path):
    """In a process of its own, as a reader would run it."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "guided.png").stat().st_size > 1000
