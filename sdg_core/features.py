"""What an encoder gives, and the statistics of feature maps that guidance compares."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Features:
    """Output of every encoder, stopped at the depth asked for.

    ``maps``: feature maps (B, C_i, H_i, W_i), shallow to deep. ``embed``: the pooled embedding (B, D), None where the
    encoder stopped before it.
    """

    maps: tuple[Tensor, ...]
    embed: Tensor | None = None

    def to(self, device: torch.device) -> Features:
        """The same features on a device."""
        return Features(tuple(m.to(device) for m in self.maps), None if self.embed is None else self.embed.to(device))

    def take(self, rows: Tensor | slice) -> Features:
        """The features of some samples."""
        return Features(tuple(m[rows] for m in self.maps), None if self.embed is None else self.embed[rows])


def gram(feature_map: Tensor, centred: bool = True) -> Tensor:
    """Gram matrix (B, C, C) of a map (B, C, H, W): products of channels averaged over positions, per sample.

    ``centred`` subtracts each channel's mean first (a covariance): texture without layout's and palette's mean.
    """
    flat = feature_map.flatten(2).float()
    if centred:
        flat = flat - flat.mean(dim=2, keepdim=True)
    return flat @ flat.transpose(1, 2) / flat.shape[2]


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """Sum of squared differences per sample: (B, ...), (B or 1, ...) -> (B,)."""
    return (a.float() - b.float()).square().flatten(1).sum(dim=1)


def squared_size(a: Tensor) -> Tensor:
    """Sum of squares per sample, never zero: (B, ...) -> (B,)."""
    return a.float().square().flatten(1).sum(dim=1).clamp(min=torch.finfo(torch.float32).tiny ** 0.5)
