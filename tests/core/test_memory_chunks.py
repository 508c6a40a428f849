"""Out of memory in the gradient: it is taken in parts, with the same result, and says so once."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sdg_core.method import (
    ContentGuidance,
    Convention,
    Features,
    GuidanceRun,
    Strength,
    StyleGuidance,
    Term,
    TextGuidance,
    guide,
)

pytestmark = pytest.mark.usefixtures("float64")

ROOT = Path(__file__).parents[2]
SIGMA = torch.full((5,), 2.0)
NO_ROOM = """
import resource, torch
from sdg_core.method import is_out_of_memory
conv, x = torch.nn.Conv2d(64, 64, 3, padding=1), torch.zeros(512, 64, 32, 32)
conv(x[:2])
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize(), resource.RLIM_INFINITY))
try:
    conv(x)
except RuntimeError as error:
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    print(is_out_of_memory(error), error)
"""
"""What it prints where a convolution that ran before has no room."""


@pytest.fixture
def small_memory(tiny_encoder):
    """Makes toy encoders that run out of memory over ``most`` samples; ``passes`` lists the sizes that were tried."""

    class SmallMemory(tiny_encoder):
        def __init__(self, most: float) -> None:
            super().__init__()
            self.most, self.passes = most, []
            self.error: RuntimeError = torch.OutOfMemoryError("The toy's memory is full.")

        def forward(self, image: Tensor, t: Tensor, depth: int) -> Features:
            self.passes.append(len(image))
            if len(image) > self.most:
                raise self.error
            return super().forward(image, t, depth)

    return SmallMemory


@pytest.fixture
def step(draw):
    x_0 = draw(5, 3, 8, 8).clamp(-1, 1)
    return 0.9 * x_0, x_0 + 2 * draw(5, 3, 8, 8, seed=1), SIGMA


@pytest.fixture
def make_run(draw):
    def run(encoder, reads: str = "noisy") -> GuidanceRun:
        encoder.reads = reads
        image = draw(1, 3, 8, 8, seed=2).clamp(-1, 1)
        guidances = (
            TextGuidance(F.normalize(draw(1, 5, seed=3), dim=-1)),
            ContentGuidance(image),
            StyleGuidance(image, (1, 2)),
        )
        terms = tuple(Term(guidance, encoder, 5.0) for guidance in guidances)
        return GuidanceRun(terms, Convention.VE, lambda p: math.inf if p <= 0 else 0.0, Strength())

    return run


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("reads", ["noisy", "denoised"])
@pytest.mark.parametrize("most", [1, 2, 4])
def test_parts_give_the_same_result(most, reads, small_memory, make_run, step):
    whole, parts = make_run(small_memory(math.inf), reads), make_run(small_memory(most), reads)
    torch.testing.assert_close(guide(*step, parts), guide(*step, whole), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(parts.trace[0].scores, whole.trace[0].scores, rtol=1e-9, atol=1e-9)


def test_parts_are_remembered_and_told_of_once(small_memory, make_run, step, caplog):
    encoder = small_memory(2)
    run = make_run(encoder)
    for _ in range(3):
        guide(*step, run)
    assert encoder.passes == [1, 5, 2, 2, 1, *[2, 2, 1] * 2]  # the reference; 5 fails, and is not tried again
    (message,) = warnings_of(caplog)
    assert "Out of memory in the guidance gradient of 5 pictures" in message


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: out of memory",
        "MPS backend out of memory (MPS allocated: 9.05 GB, other allocations: 8.01 KB, max allowed: 9.07 GB)",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1073741824 bytes.",
        "[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 1073741824 bytes.",
        "could not create a primitive",
        "std::bad_alloc",
    ],
)
def test_errors_of_other_kinds_are_known_by_their_words(words, small_memory, make_run, step):
    encoder = small_memory(2)
    encoder.error = RuntimeError(words)
    whole = guide(*step, make_run(small_memory(math.inf)))
    torch.testing.assert_close(guide(*step, make_run(encoder)), whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "words",
    [
        "mat1 and mat2 shapes cannot be multiplied",
        "could not create a primitive descriptor for a convolution forward propagation primitive",
    ],
)
def test_other_errors_are_not_taken_for_it(words, small_memory, make_run, step):
    encoder = small_memory(2)
    encoder.error = RuntimeError(words)
    with pytest.raises(RuntimeError, match=words):
        guide(*step, make_run(encoder))
    assert encoder.passes[-1] == 5


def test_halving_twice_is_told_of_once(small_memory, make_run, step, caplog):
    encoder = small_memory(1)
    run = make_run(encoder)
    guide(*step, run)
    guide(*step, run)
    assert encoder.passes == [1, 5, 2, *[1] * 10]
    assert len(warnings_of(caplog)) == 1


def test_each_run_starts_afresh(small_memory, make_run, step):
    encoder = small_memory(2)
    for _ in range(2):
        encoder.passes.clear()
        guide(*step, make_run(encoder))
        assert 5 in encoder.passes


def test_enough_memory_is_not_worth_a_word(small_memory, make_run, step, caplog):
    encoder = small_memory(5)
    guide(*step, make_run(encoder))
    assert encoder.passes == [1, 5]
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("batch", [1, 5])
def test_a_single_sample_that_does_not_fit_raises_as_it_is(batch, small_memory, make_run, step):
    encoder = small_memory(1)
    run = make_run(encoder)
    guide(*(v[:1] for v in step), run)  # looks at the references
    encoder.most = 0
    with pytest.raises(torch.OutOfMemoryError, match=r"The toy's memory is full\."):
        guide(*(v[:batch] for v in step), run)
    assert encoder.passes[-1] == 1


def test_frames_of_a_video_in_parts_follow_their_own_references(small_memory, draw):
    """Five references on five frames, two frames at a time; a second guidance has a weight on some frames only."""
    x_0 = draw(1, 3, 5, 8, 8)
    video = 0.9 * x_0, x_0 + 2 * draw(1, 3, 5, 8, 8, seed=1), torch.tensor([2.0])
    results = []
    for most in (math.inf, 2):
        encoder = small_memory(math.inf)
        images = draw(5, 3, 8, 8, seed=2).clamp(-1, 1)
        terms = (
            Term(ContentGuidance(images), encoder, 50.0),
            Term(StyleGuidance(images, (2,)), encoder, 9.0, frames=(0, 3)),
        )
        run = GuidanceRun(terms, Convention.VE, lambda p: math.inf if p <= 0 else 0.0)
        guide(*video, run)  # looks at the references
        encoder.most = most
        results.append(guide(*video, run))
    assert encoder.passes[-4:] == [5, 2, 2, 1]
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)


@pytest.mark.skipif(sys.platform != "linux", reason="limits a process's memory as Linux does")
def test_a_convolution_without_room_is_known():
    """oneDNN's words for it change; what this torch says where no byte is free must be known."""
    done = subprocess.run([sys.executable, "-c", NO_ROOM], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("True "), done.stdout + done.stderr
