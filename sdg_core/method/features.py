"""What the method asks of an encoder, what one gives, and the statistics of features that guidance compares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import precise
from .schedule import TimestepTable


@dataclass(frozen=True)
class Features:
    """Output of every encoder, stopped at the depth asked for.

    ``maps``: feature maps (B, C_i, H_i, W_i), shallow to deep. ``embed``: the pooled embedding (B, D), None where the
    encoder stopped before it. ``where``: how much each place of the picture counts, (B, 1, h, w) in 0..1; None is 1.
    """

    maps: tuple[Tensor, ...]
    embed: Tensor | None = None
    where: Tensor | None = None

    @property
    def count(self) -> int:
        """How many samples they are of; 0 where there is nothing to compare with."""
        if self.embed is not None:
            return len(self.embed)
        return len(self.maps[0]) if self.maps else 0

    def to(self, device: torch.device) -> Features:
        """The same features on a device."""
        return self.map(lambda tensor: tensor.to(device))

    def take(self, rows: Tensor | slice) -> Features:
        """The features of some samples."""
        return self.map(lambda tensor: tensor[rows])

    def map(self, change: Callable[[Tensor], Tensor]) -> Features:
        """The features with every tensor changed."""
        embed, where = (None if v is None else change(v) for v in (self.embed, self.where))
        return Features(tuple(map(change, self.maps)), embed, where)


def joined(parts: Sequence[Features]) -> Features:
    """The features of samples that were looked at one after the other."""
    embeds = [part.embed for part in parts if part.embed is not None]
    masks = [part.where for part in parts if part.where is not None]
    maps = tuple(torch.cat(layer) for layer in zip(*(part.maps for part in parts), strict=True))
    return Features(maps, torch.cat(embeds) if embeds else None, torch.cat(masks) if masks else None)


class Encoder(Protocol):
    """What guidance needs of an encoder: all that the method knows of one.

    ``reads``: x_t ("noisy", and then it is a ``NoisyEncoder``) or the model's estimate of x_0 ("denoised").
    Called with pictures (B, 3, H, W) in -1..1 (noisy ones in VP scaling), t (1,) or (B,), and how many feature maps to
    compute; ``full_depth`` adds the embedding. It takes pictures of any precision and computes in that of its weights.
    ``noise_gain``: the factor on the deviation of white noise by which it shrinks pictures of this size before it
    reads them.
    """

    @property
    def reads(self) -> Literal["noisy", "denoised"]: ...

    @property
    def full_depth(self) -> int: ...

    def __call__(self, image: Tensor, t: Tensor, depth: int) -> Features: ...

    def noise_gain(self, height: int, width: int) -> float: ...


class NoisyEncoder(Encoder, Protocol):
    """An encoder of x_t: ``table`` is the schedule that its t counts in."""

    @property
    def table(self) -> TimestepTable: ...


def reads_noise(encoder: Encoder) -> TypeGuard[NoisyEncoder]:
    """Whether an encoder reads x_t."""
    return encoder.reads == "noisy"


def embedding(encoder: Encoder, image: Tensor, t: Tensor) -> Tensor:
    """The pooled embedding (B, D), on the unit sphere, of pictures (B, 3, H, W) at t (1,) or (B,)."""
    embed = encoder(image, t, encoder.full_depth).embed
    assert embed is not None
    return unit(embed)


def unit(embed: Tensor) -> Tensor:
    """Embeddings (..., D) on the unit sphere."""
    return F.normalize(precise(embed), dim=-1)


def gram(feature_map: Tensor, centred: bool = True, where: Tensor | None = None) -> Tensor:
    """Gram matrix (B, C, C) of a map (B, C, H, W): products of channels averaged over positions, per sample.

    ``centred`` subtracts each channel's mean first (a covariance): texture without layout's and palette's mean.
    ``where`` (B, 1, h, w) weighs positions, in both averages.
    """
    flat = precise(feature_map).flatten(2).transpose(1, 2)
    if where is not None:
        part = counts(where, feature_map).flatten(2).transpose(1, 2)
        part = part / part.mean(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        centre = (part * flat).mean(dim=1, keepdim=True) if centred else 0.0
        flat = part.sqrt() * (flat - centre)
    elif centred:
        flat = flat - flat.mean(dim=1, keepdim=True)
    products: Tensor = Products.apply(flat)  # type: ignore[no-untyped-call]
    return products / flat.shape[1]


class Products(torch.autograd.Function):
    """x^T x (B, C, C) of x (B, N, C). dF/dx = x (S + S^T), S = dF/d(x^T x): one product, of which torch's own rule for
    a @ b takes two; in the memory format of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.mT @ x

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        x: Tensor = ctx.saved_tensors[0]
        both = slope + slope.mT
        return x @ both if x.stride(-1) == 1 else (both @ x.mT).mT


def counts(where: Tensor, feature_map: Tensor) -> Tensor:
    """How much each place of a map (B, C, H, W) counts: ``where`` (B, 1, h, w) at its size, averaged over areas."""
    return F.interpolate(where.to(precise(feature_map)), feature_map.shape[-2:], mode="area")


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """Sum of squared differences per sample: (B, ...), (B or 1, ...) -> (B,)."""
    return (precise(a) - precise(b)).square().flatten(1).sum(dim=1)


def squared_size(a: Tensor) -> Tensor:
    """Sum of squares per sample, never zero: (B, ...) -> (B,)."""
    return precise(a).square().flatten(1).sum(dim=1).clamp(min=torch.finfo(torch.float32).tiny ** 0.5)
