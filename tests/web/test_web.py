"""The frontend's code: its own tests, by Node's runner, and its types, by TypeScript."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NODE, TSC = shutil.which("node"), ROOT / "node_modules/typescript/bin/tsc"
OLDEST_NODE = 20

pytestmark = pytest.mark.skipif(NODE is None, reason="Node is not here: install Node.js 20 or newer to run these.")


def node(*arguments: str | Path) -> None:
    """Runs Node in the repository, and fails with what it said."""
    done = subprocess.run([NODE, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_logic_of_charts_and_looks():
    version = subprocess.run([NODE, "--version"], capture_output=True, text=True, check=True).stdout
    if int(version.strip().lstrip("v").split(".")[0]) < OLDEST_NODE:
        pytest.skip(f"Node {version.strip()} has no test runner that will do: install Node.js {OLDEST_NODE} or newer.")
    node("--test", *sorted(Path(__file__).parent.glob("*.test.js")))


@pytest.mark.skipif(not TSC.is_file(), reason="TypeScript is not here: run `npm install` in the repository.")
def test_types():
    node(TSC, "--project", "tests/web")
