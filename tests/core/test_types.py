"""Types: mypy, strict, finds nothing in ``sdg_core`` and in its contracts, and does find what is wrong."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOWEST, HERE = "3.10", f"{sys.version_info.major}.{sys.version_info.minor}"

MISUSES = """\
from typing import Literal
from torch import Tensor
from sdg_core import CleanCLIP, ContentGuidance, DecodedView, GuidanceRun, Term, guide, load_noisy_clip, seeded_noise
from sdg_core.method import Features, Guidance, NoisyEncoder, View

class Sighted:
    full_depth = 1
    reads: Literal["noisy", "denoised"] = "denoised"
    def __call__(self, image: Tensor, t: Tensor, depth: int) -> Features: return Features((image,))
    def noise_gain(self, height: int, width: int) -> float: return 1.0

class Blind:
    full_depth = 1
    reads: Literal["noisy", "denoised"] = "denoised"
    def __call__(self, image: Tensor, t: Tensor, depth: int) -> Tensor: return image
    def noise_gain(self, height: int, width: int) -> float: return 1.0

def misuse(clean: CleanCLIP, view: DecodedView, guidance: ContentGuidance, run: GuidanceRun, x: Tensor) -> None:
    seeded_noise([1], 32)
    seeded_noise("seed", 32)  # arg-type
    load_noisy_clip("noisy_clip.safetensors")  # arg-type
    Term(guidance, Sighted(), 1.0)
    Term(guidance, Blind(), 1.0)  # arg-type
    Term(view, clean, 1.0)  # arg-type
    clean(x, 500, 3)  # arg-type
    guide(x, x, run=run)  # call-arg
    wanted: int = guide(x, x, x, run)  # assignment
    noisy: NoisyEncoder = clean  # assignment
    a_view: View = guidance  # assignment
    a_guidance: Guidance = clean  # assignment
"""


def mypy(*arguments: str) -> subprocess.CompletedProcess[str]:
    """mypy as the project sets it up, with the root's cache."""
    return subprocess.run([sys.executable, "-m", "mypy", *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("version", sorted({LOWEST, HERE}))
def test_mypy_finds_nothing(version):
    """As this Python reads it, and as the lowest supported one does."""
    result = mypy("--python-version", version)
    assert result.returncode == 0, result.stdout + result.stderr


def test_mypy_finds_every_misuse_of_public_names_and_nothing_else(tmp_path):
    (tmp_path / "misuses.py").write_text(MISUSES)
    result = mypy(str(tmp_path / "misuses.py"))
    found = re.findall(r"misuses\.py:(\d+): error: .*\[(.+)\]", result.stdout)
    wanted = [(str(n), line.split("  # ")[1]) for n, line in enumerate(MISUSES.splitlines(), 1) if "  # " in line]
    assert found == wanted, result.stdout + result.stderr
