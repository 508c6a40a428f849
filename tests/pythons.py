"""The core tests on every supported Python that is here, one after the other, and a table of them.

A Python is here where `pythonX.Y` is on PATH or pyenv has one. Each gets its own environment, .venv-X.Y. Some may be
named: `python3 tests/pythons.py 3.10 3.13`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
VERSIONS = ("3.10", "3.11", "3.12", "3.13")
NEEDS = (ROOT / "pyproject.toml", ROOT / "tests" / "constraints.txt")


@dataclass(frozen=True)
class Outcome:
    """What one Python made of the tests; ``passed`` is None where they could not run."""

    version: str
    passed: int | None
    failed: int
    skipped: int
    seconds: float


def find(version: str) -> str | None:
    """An interpreter of this version that runs: pyenv's commands on PATH may stand for one that is not chosen."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    others = sorted(pyenv.glob(f"{version}.*/bin/python"), key=lambda path: int(path.parts[-3].rsplit(".", 1)[-1]))
    for candidate in (shutil.which(f"python{version}"), *reversed(others)):
        if candidate and exact(str(candidate)).startswith(f"{version}."):
            return str(candidate)
    return None


def exact(python: str) -> str:
    """An interpreter's full version, nothing where it does not run."""
    asked = [python, "-c", "import platform; print(platform.python_version())"]
    return subprocess.run(asked, capture_output=True, text=True).stdout.strip()


def environment(python: str, version: str) -> str | None:
    """The interpreter of an environment with all that the tests need, made unless it is there. None if that fails."""
    folder = ROOT / f".venv-{version}"
    own, stamp = str(folder / ("Scripts" if os.name == "nt" else "bin") / "python"), folder / ".test"
    if stamp.is_file() and all(stamp.stat().st_mtime >= path.stat().st_mtime for path in NEEDS):
        return own
    pip = [own, "-m", "pip", "install", "--quiet"]
    steps = (
        [python, "-m", "venv", str(folder)],
        [*pip, "--upgrade", "pip"],
        [*pip, "--constraint", str(NEEDS[1]), "--editable", ".[test]"],
    )
    if any(subprocess.run(step, cwd=ROOT).returncode for step in steps):
        return None
    stamp.touch()
    return own


def tested(python: str, version: str) -> Outcome:
    """Runs tests/core."""
    print(f"--- Python {exact(python)}", flush=True)
    own = environment(python, version)
    if own is None:
        return Outcome(exact(python), None, 0, 0, 0.0)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        subprocess.run([own, "-m", "pytest", "tests/core", "-q", f"--junitxml={report}"], cwd=ROOT)
        suite = ElementTree.parse(report).find("testsuite") if report.is_file() else None
    if suite is None:
        return Outcome(exact(own), None, 0, 0, time.monotonic() - start)
    count = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    passed = count["tests"] - failed - count["skipped"]
    return Outcome(exact(own), passed, failed, count["skipped"], time.monotonic() - start)


def table(outcomes: list[Outcome]) -> str:
    """One line for each Python."""
    lines = [f"{'Python':10} {'passed':>7} {'failed':>7} {'skipped':>8} {'time':>7}"]
    for o in outcomes:
        took = f"{int(o.seconds) // 60}:{int(o.seconds) % 60:02}"
        numbers = f"{'could not be run':>24}" if o.passed is None else f"{o.passed:7} {o.failed:7} {o.skipped:8}"
        lines.append(f"{o.version:10} {numbers} {took:>7}")
    return "\n".join(lines)


def main() -> int:
    wanted = sys.argv[1:] or VERSIONS
    here = {version: python for version in wanted if (python := find(version))}
    outcomes = [tested(python, version) for version, python in here.items()]
    print("\n" + table(outcomes))
    missing = [version for version in wanted if version not in here]
    if missing:
        print(f"Not here: {', '.join(missing)}. With pyenv: " + "; ".join(f"pyenv install {v}" for v in missing))
    return int(not outcomes or any(not o.passed or o.failed for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
