"""Every test that can run here: the core, then the host tests once for each ComfyUI at hand.

`COMFYUI_PATH` names one ComfyUI (comfy-cli's default place otherwise); `COMFYUI_PATH_OLD` may name an older one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
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


def pytest(tests: list[str], host: Path | None) -> int:
    """Runs pytest in its own process: one host per process."""
    environment = {**os.environ, **({"COMFYUI_PATH": str(host)} if host else {})}
    return subprocess.run([sys.executable, "-m", "pytest", *tests], cwd=ROOT, env=environment).returncode


def main() -> int:
    found = hosts()
    codes = [pytest(["tests/core", "tests/host"] if not found else ["tests/core"], None)]
    codes += [pytest(["tests/host"], host) for host in found]
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
