"""Classifier guidance (Dhariwal and Nichol 2021, arXiv 2105.05233, section 4): the pull that the paper generalises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .features import Encoder, Features
from .precision import precise


@dataclass(frozen=True, eq=False)
class ClassGuidance:
    """F = log p(y | x_t, t), y the class ``number``, from 0.

    Its encoder is a classifier of noisy pictures, whose embedding (B, classes) holds the logits.
    """

    number: int
    best, aligned = 0.0, False

    def depth(self, encoder: Encoder) -> int:
        return encoder.full_depth

    def target(self, look: Callable[[Tensor, int | None], Features]) -> Features:
        return Features(())

    def score(self, features: Features, target: Features) -> Tensor:
        assert features.embed is not None
        return precise(features.embed).log_softmax(dim=1)[:, self.number]
