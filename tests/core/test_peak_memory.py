"""Peak memory of guiding a latent model with a full-size encoder, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

LIMIT = 300e6  # bytes beside the encoder's weights
ROOT = Path(__file__).parents[2]

# The peak comes from VmHWM, which can be set back: ru_maxrss starts at what the parent process had.
SCRIPT = """
import ctypes
import gc
import json
import open_clip
import torch
from sdg_core.encoders import NoisyCLIP, NoisyCLIPConfig, build_clip
from sdg_core.method import Convention, GuidanceRun, LatentFormat, Strength, StyleGuidance, Term, TextGuidance, guide

torch.set_num_threads(1)
torch.manual_seed(0)


def status(name):
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith(name))


factors = tuple(map(tuple, torch.randn(3, 4).tolist()))
view = LatentFormat("made up", 4, factors).linear_view()
covariance = tuple(map(tuple, view.covariance.tolist()))
clip = open_clip.get_model_config("RN50")
config = NoisyCLIPConfig(clip, view=view.name, covariance=covariance)
encoder = NoisyCLIP(config, build_clip(clip)).requires_grad_(False).eval()
with torch.no_grad():
    text = TextGuidance(encoder.encode_text(["a red hat"]))
terms = (Term(text, encoder, 100.0), Term(StyleGuidance(torch.rand(1, 3, 64, 64)), encoder, 100.0))
run = GuidanceRun(terms, Convention.VE, lambda percent: 1e9 * (1 - percent), Strength(), lambda e: view, 1.0)
x, sigma = torch.randn(1, 4, 64, 64), torch.tensor([2.0])
gc.collect()
ctypes.CDLL("libc.so.6").malloc_trim(0)  # what loading left free must not hide what guiding takes
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = status("VmHWM")
with torch.inference_mode():
    guided = guide(0.5 * x, x, sigma, run)
assert not torch.equal(guided, 0.5 * x)
weights = sum(t.nbytes for t in (*encoder.parameters(), *encoder.buffers()))
print(json.dumps({"before": before, "peak": status("VmHWM"), "weights": weights}))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Reads peaks from Linux's /proc.")
def test_guiding_a_latent_by_rn50_takes_less_than_300_mb_beside_its_weights():
    """One 4 x 64 x 64 latent through the linear view, text and style, every layer."""
    at_once = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**17)}  # freed tensors go back: no gaps in the heap
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, env=at_once, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    extra = seen["peak"] - seen["before"]
    print(f"RN50: weights {seen['weights'] / 1e6:.0f} MB, beside them at most {extra / 1e6:.0f} MB.")
    assert 0 < extra < LIMIT
