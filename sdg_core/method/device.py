"""What lets the processor run ahead of a device: nothing inside a step waits for what the device has still to do.

Numbers of the schedule (sigma, alpha, weights, timesteps) live on the CPU, pictures on their device; ``expand`` brings
the former to the latter. What a step wants to know of the device afterwards, its times among them, is read when the
run is over.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Moment:
    """A point in a device's work: by the clock, or, on a GPU, which is asked for work before it does it, an event."""

    seconds: float
    event: torch.cuda.Event | None = None

    def since(self, earlier: Moment) -> float:
        """Seconds from an earlier moment. On a GPU it waits until this one has come."""
        if self.event is None or earlier.event is None:
            return self.seconds - earlier.seconds
        self.event.synchronize()
        return float(earlier.event.elapsed_time(self.event)) / 1000


def now(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> Moment:
    """The moment at which a device gets to where its work stands; ``clock`` gives seconds."""
    if device.type != "cuda":
        return Moment(clock())
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return Moment(clock(), event)


@dataclass(frozen=True)
class Span:
    """Between two moments; ``share`` is the part of it that counts here."""

    begun: Moment
    ended: Moment
    share: float = 1.0

    @property
    def seconds(self) -> float:
        return self.share * self.ended.since(self.begun)


def is_out_of_memory(error: BaseException) -> bool:
    """torch's own kind, and what says so in words: CUDA and cuDNN where they allocate themselves, MPS, and the CPU.

    On a CPU torch's allocator says it, on Windows in other words, and oneDNN does not say it: a convolution that ran
    before "could not create a primitive" where there is no room for its working memory.
    """
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or bool(_MEMORY_ENDED.search(str(error)))


_MEMORY_ENDED = re.compile(
    r"out of memory|alloc_failed|can't allocate memory|not enough memory|bad_alloc|could not create a memory object"
    r"|could not create a primitive(?! descriptor)",
    re.IGNORECASE,
)


class Placed:
    """Constant numbers as tensors beside others, made once for each device and precision.

    They are normal tensors, which autograd can save, also where a host's inference mode is on.
    """

    def __init__(self, numbers: Tensor | Sequence[float]) -> None:
        self._numbers = torch.as_tensor(numbers, dtype=None if isinstance(numbers, Tensor) else torch.float64)
        self._known: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def like(self, other: Tensor) -> Tensor:
        """The numbers with the device and dtype of another tensor."""
        key = other.device, other.dtype
        if key not in self._known:
            with torch.inference_mode(False):
                self._known[key] = self._numbers.to(other.device, other.dtype, copy=True)
        return self._known[key]


Rows = slice | Tensor
"""Which samples: all of them as a slice, or their numbers (b,), on the CPU."""


def beside(rows: Rows, other: Tensor) -> Rows:
    """The same samples, to index a tensor on its own device."""
    return rows if isinstance(rows, slice) else brought(rows, other)


def brought(tensor: Tensor, other: Tensor) -> Tensor:
    """A tensor on the device of another. A CUDA device is not waited for; others may read the memory too late."""
    return tensor.to(other.device, non_blocking=other.device.type == "cuda")


def version_of(module: object) -> int:
    """Counts up with every in-place change of a module's parameters (not those behind ``.data``, nor in inference
    mode): what was computed with them may be kept as long as it stays."""
    parameters = module.parameters() if isinstance(module, nn.Module) else ()
    return sum(map(_version, parameters))


def _version(parameter: Tensor) -> int:
    try:
        return parameter._version
    except RuntimeError:  # made in inference mode, and that stays so where its data became normal: nothing counts there
        return 0


class Early:
    """A small tensor on its way to the CPU: asked for before long work is given to its device, it is there at once.

    Read after that work has been given, it waits for what came before it alone.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._there = tensor.detach()
        self._event: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self._there = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._there.copy_(tensor.detach(), non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def read(self) -> Tensor:
        """The tensor, on the CPU."""
        if self._event is not None:
            self._event.synchronize()
        return self._there.cpu()
