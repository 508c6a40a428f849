"""A toy encoder with every part that guidance reads: two maps, an embedding, and a dependence on t."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdg_core.method import Features, TimestepTable

torch.set_num_threads(int(os.environ.get("SDG_TEST_THREADS", "1")))


class TinyEncoder(nn.Module):
    """Two convolutions and a linear head over fixed random weights; ``calls`` counts the forward passes.

    ``gain`` is the smaller factor on white noise that the encoder claims for its input.
    """

    full_depth = 3
    reads = "noisy"

    def __init__(self, seed: int = 0, gain: float = 1.0) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.head = nn.Linear(6, 5)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4, generator=generator)
        self.register_buffer("offset", torch.linspace(-0.5, 0.5, 4).view(1, 4, 1, 1))
        self.table = TimestepTable.from_name("linear")
        self.gain, self.calls = gain, 0

    def forward(self, image: Tensor, t: Tensor, depth: int) -> Features:
        self.calls += 1
        image = image.to(self.first.weight.dtype)
        first = torch.tanh(self.first(image)) * (1 + t.to(image).view(-1, 1, 1, 1) / 500) + self.offset
        if depth == 1:
            return Features((first,))
        second = F.softplus(self.second(first))
        return Features((first, second), self.head(second.mean(dim=(2, 3))) if depth == 3 else None)

    def noise_gain(self, height: int, width: int) -> float:
        return self.gain


@pytest.fixture
def float64() -> Iterator[None]:
    """Everything that a test makes is float64: equality then means 1e-9 or so, on every CPU."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def tiny_encoder() -> Callable[..., TinyEncoder]:
    """Makes toy encoders: ``tiny_encoder(seed, gain)``."""
    return TinyEncoder


@pytest.fixture
def draw() -> Callable[..., Tensor]:
    """Unit noise of a shape, from a generator of its own: ``draw(*shape, seed=0)``."""

    def normal(*shape: int, seed: int = 0) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    return normal
