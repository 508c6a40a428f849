"""Every test that can run here: the core, the frontend's code, and the host tests once for each ComfyUI at hand; in the
newest one a browser too.

`COMFYUI_PATH` names one ComfyUI (comfy-cli's default place otherwise); `COMFYUI_PATH_OLD` may name an older one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACE = Path.home() / "comfy"


def hosts() -> list[Path]:
    """The folders of the ComfyUIs to test in, newest first."""
    places = [
        os.environ.get("COMFYUI_PATH") or PLACE / "ComfyUI",
        os.environ.get("COMFYUI_PATH_OLD") or PLACE / "ComfyUI-0.8",
    ]
    return [path for path in map(Path, places) if (path / "main.py").is_file()]


def pytest(tests: list[str], host: Path | None) -> tuple[int, str]:
    """Runs pytest in its own process, since one process holds one host: how it ended, and what it said."""
    environment = {**os.environ, **({"COMFYUI_PATH": str(host)} if host else {})}
    command = [sys.executable, "-m", "pytest", *tests]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return done.returncode, done.stdout


def main() -> int:
    """Two suites at a time where there are two cores, the longest first; each says what it has to say at its end."""
    found = hosts()
    suites = [(["tests/host", "tests/browser"], host) for host in found[:1]]
    suites += [(["tests/core", "tests/web"] + ([] if found else ["tests/host"]), None)]
    suites += [(["tests/host"], host) for host in found[1:]]
    codes = []
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as lanes:
        running = {lanes.submit(pytest, *suite): suite for suite in suites}
        for future in as_completed(running):
            tests, host = running[future]
            code, said = future.result()
            print(f"{' '.join(tests)}{f', {version(host)}' if host else ''}:\n{said}", flush=True)
            if code < 0:
                print(f"pytest was ended by signal {-code}, from outside or for want of memory.", flush=True)
            codes.append(code)
    if found:
        print("Host tests ran in " + " and ".join(version(host) for host in found) + ".")
    else:
        print(
            "The host tests were skipped: no ComfyUI was found. To run them, install ComfyUI (`pip install comfy-cli`, "
            "`comfy install`) or set COMFYUI_PATH to its folder, then run `make test` again."
        )
    return int(any(codes))


def version(host: Path) -> str:
    """The host's name and version."""
    match = re.search(r'__version__ = "(.+)"', (host / "comfyui_version.py").read_text())
    return f"ComfyUI {match[1] if match else '(unknown version)'}"


if __name__ == "__main__":
    sys.exit(main())
