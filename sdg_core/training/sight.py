"""What a noisy encoder is trained and measured on: a view, its size, its noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..encoders import resize
from ..method import PIXEL_VIEW, LinearView, PixelView, expand


@dataclass(frozen=True)
class StudentSight:
    """What the student looks at: a view, the side of its pictures, and optionally an autoencoder.

    ``encode``: pictures (B, 3, S, S) in -1..1, ``downscale`` times larger -> model latents (B, C, side, side). With it
    half of the pictures are the linear pictures of their own latents; the others, and all without it, are the pictures
    averaged to the view's size.
    """

    size: int
    view: PixelView | LinearView = PIXEL_VIEW
    encode: Callable[[Tensor], Tensor] | None = None
    downscale: int = 1

    @property
    def picture_size(self) -> int:
        """Side of the pictures that it wants at least."""
        return self.size * self.downscale if self.encode else self.size

    @property
    def channels(self) -> int:
        return self.view.factors.shape[1] if isinstance(self.view, LinearView) else 3

    def clean(self, picture: Tensor, exact: Tensor | None = None) -> Tensor:
        """x_0 of the view (B, 3, side, side) of pictures in -1..1; ``exact`` (B,) chooses those that are encoded."""
        small = resize(picture, self.size)
        if self.encode is None:
            return small
        latents = self.encode(picture)
        linear = self.view.picture(latents, torch.ones(len(latents)))
        return linear if exact is None else torch.where(expand(exact, linear), linear, small)

    def noised(self, x_0: Tensor, eps: Tensor, ratio: Tensor) -> Tensor:
        """x_t in VP scaling: x_0 and noise eps (B, channels, side, side) through the view, at sigma / alpha (B,)."""
        noise = eps if isinstance(self.view, PixelView) else self.view.colours(eps)
        ratio = expand(ratio, x_0)
        return (x_0 + ratio * noise) / (1 + ratio.square()).sqrt()

    def config(self) -> dict[str, Any]:
        """Fields of NoisyCLIPConfig that say what the encoder was made for."""
        if isinstance(self.view, PixelView):
            return {"noise_size": self.size}
        covariance = tuple(map(tuple, self.view.covariance.tolist()))
        return {"noise_size": self.size, "view": self.view.name, "covariance": covariance}
