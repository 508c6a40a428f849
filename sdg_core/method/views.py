"""Views: how a model's tensor becomes the picture (B, 3, h, w) that an encoder reads.

- ``PixelView``: the tensor of a pixel model is the picture.
- ``LinearView``: a latent through a linear map of its channels, at latent size. Noise stays Gaussian and spatially
  white: a noisy latent x_t = alpha x_0 + sigma eps is seen as alpha (A x_0 + b) + sigma A eps, of covariance A A^T
  between colours. An encoder can be trained for exactly that. Costs nothing.
- ``DecodedView``: a latent through a decoder (TAESD, or the model's VAE). Only for clean estimates.

All are differentiable and take every sample by itself. ``resize`` then brings a picture to the size of an encoder.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .device import Placed
from .precision import precise
from .schedule import expand


@dataclass(frozen=True)
class LatentFormat:
    """A latent space: model latents are (autoencoder latents - shift) * scale.

    ``factors`` (3, C) as nested tuples and ``bias`` (3,) give the linear picture, about -1..1, of a model latent.
    ``downscale``: picture pixels to a latent pixel.
    """

    name: str
    channels: int
    factors: tuple[tuple[float, ...], ...]
    bias: tuple[float, ...] = (0.0, 0.0, 0.0)
    scale: float = 1.0
    shift: float = 0.0
    downscale: int = 8

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> LatentFormat:
        """The format written by ``asdict`` through JSON: lists become tuples again."""
        factors, bias = tuple(map(tuple, fields["factors"])), tuple(fields["bias"])
        return cls(**{**fields, "factors": factors, "bias": bias})

    def tiny_view(self, decoder: nn.Module) -> DecodedView:
        """Through a tiny decoder, which reads the autoencoder's own latents and gives pictures in 0..1."""

        def decode(x: Tensor) -> Tensor:
            latents = (x / self.scale + self.shift).to(next(decoder.parameters()).dtype)
            picture: Tensor = decoder(latents)
            return picture * 2 - 1

        return DecodedView(decode, self.downscale, (decoder,))

    def linear_view(self) -> LinearView:
        return LinearView(self.name, torch.tensor(self.factors), torch.tensor(self.bias))


class View(Protocol):
    """``picture(x (B, C, H, W), signal (B,))`` is (B, 3, h, w); ``signal`` is how much of x is x_0 (1 for denoised).

    ``noise(eps (B, C, H, W))`` is what unit noise on x adds to the picture. ``size(H, W)`` is (h, w). ``modules`` are
    those that a gradient passes through.
    """

    @property
    def name(self) -> str: ...

    @property
    def modules(self) -> tuple[nn.Module, ...]: ...

    def picture(self, x: Tensor, signal: Tensor) -> Tensor: ...

    def noise(self, eps: Tensor) -> Tensor: ...

    def size(self, height: int, width: int) -> tuple[int, int]: ...


class PixelView:
    """x is the picture."""

    name = "pixels"
    modules = ()

    def picture(self, x: Tensor, signal: Tensor) -> Tensor:
        return x

    def noise(self, eps: Tensor) -> Tensor:
        return eps

    def size(self, height: int, width: int) -> tuple[int, int]:
        return height, width


PIXEL_VIEW = PixelView()


@dataclass(frozen=True, eq=False)
class LinearView:
    """picture = A x + signal * b, pixel by pixel. ``factors`` A (3, C), ``bias`` b (3,), both float32.

    Latents that pack p x p positions into their channels are unpacked first, by ``unpack``: the picture is then
    p = ``patch`` times larger. C counts the channels after that.
    """

    format_name: str
    factors: Tensor
    bias: Tensor
    unpack: Callable[[Tensor], Tensor] | None = None
    patch: int = 1
    modules = ()

    @property
    def name(self) -> str:
        return f"linear:{self.format_name}"

    @functools.cached_property
    def _placed(self) -> tuple[Placed, Placed]:
        return Placed(self.factors), Placed(self.bias)

    @property
    def covariance(self) -> Tensor:
        """Covariance (3, 3) between the colours of unit noise seen through the view: A A^T."""
        return self.factors @ self.factors.T

    def picture(self, x: Tensor, signal: Tensor) -> Tensor:
        noise = self.noise(x)
        return noise + expand(signal.to(noise.dtype), x) * self._placed[1].like(noise).view(1, 3, 1, 1)

    def noise(self, eps: Tensor) -> Tensor:
        return self.colours(precise(eps) if self.unpack is None else self.unpack(precise(eps)))

    def colours(self, channels: Tensor) -> Tensor:
        """A x of unpacked channels: (B, C, h, w) -> (B, 3, h, w)."""
        return torch.einsum("rc,bchw->brhw", self._placed[0].like(channels), channels)

    def size(self, height: int, width: int) -> tuple[int, int]:
        return height * self.patch, width * self.patch


@dataclass(frozen=True, eq=False)
class DecodedView:
    """picture = decode(x), differentiable, from model latents to pictures in -1..1 ``upscale`` times larger."""

    decode: Callable[[Tensor], Tensor]
    upscale: int
    modules: tuple[nn.Module, ...] = ()
    name = "decoded"

    def picture(self, x: Tensor, signal: Tensor) -> Tensor:
        return self.decode(x)

    def noise(self, eps: Tensor) -> Tensor:
        raise ValueError(
            "A decoder reads finished latents only, not noisy ones. Use the linear view with a noisy CLIP made for it, "
            "or a clean CLIP from Load CLIP."
        )

    def size(self, height: int, width: int) -> tuple[int, int]:
        return height * self.upscale, width * self.upscale


def resize(image: Tensor, size: int) -> Tensor:
    """(B, 3, H, W) -> (B, 3, size, size): averaging areas down, bilinear up, unchanged where it fits."""
    if image.shape[-2:] == (size, size):
        return image
    height, width = image.shape[-2:]
    smaller = min(height, size), min(width, size)
    if (height, width) != smaller:
        image = F.adaptive_avg_pool2d(image, smaller)
    return (
        image if smaller == (size, size) else F.interpolate(image, (size, size), mode="bilinear", align_corners=False)
    )


def averaging_gain(size: int, height: int, width: int) -> float:
    """What ``resize`` of (height, width) to ``size`` does to white noise: a factor on its standard deviation.

    Averaging k x k pixels divides it by k; enlarging keeps it. Where the sides don't divide, the areas overlap and
    differ in size; the factor is then the root of the mean variance.
    """
    return math.sqrt(_variance_left(size, height) * _variance_left(size, width))


@functools.lru_cache(maxsize=256)
def _variance_left(size: int, side: int) -> float:
    """Of unit noise along one axis: mean_i 1 / (ceil((i + 1) side / size) - floor(i side / size)), the areas that
    ``adaptive_avg_pool2d`` averages."""
    if side <= size:
        return 1.0
    return sum(1 / (-(-(i + 1) * side // size) - i * side // size) for i in range(size)) / size
