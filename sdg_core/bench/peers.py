"""Other ways to guide by a CLIP, each from its public method, as what it makes of one estimate of the model.

All of them look at the model's estimate x_0(x_t) through its decoder with a clean CLIP; F is the score, s a scale:

- ``through_unet``: the diffusers community pipeline of CLIP guidance (clip_guided_stable_diffusion). It looks at
  x_0 sqrt(1 - abar) + x_t (1 - sqrt(1 - abar)), by four random crops, by spherical distance, and

      denoised' = denoised + sigma^2 s grad_{x_t} F

  with the gradient through decoder and model.
- ``universal``: Universal Guidance (Bansal et al. 2023, arXiv 2302.07121) without recurrence and backward steps:
  eps' = eps - s sqrt(1 - abar) grad_{x_t} F(x_0(x_t)), through decoder and model.
- ``freedom``: FreeDoM (Yu et al. 2023, arXiv 2303.09833) without time travel: x_{t-1} moves by a multiple of
  grad_{x_t} F(x_0(x_t)), whose size is s times the model's own step there (its rule for Stable Diffusion, where the
  step is that of classifier-free guidance).
- ``mpgd``: Manifold Preserving Guided Diffusion (He et al. 2024, arXiv 2311.16424) with the full decoder:
  denoised' = denoised + s grad_{x_0} F(x_0). Nothing runs backward through the model.

x is in VE scaling: x = x_0 + sigma eps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from ..method import Augment, TextGuidance, as_normal, expand, gradient_scope, rms
from ..method.features import Encoder

Method = Literal["through_unet", "universal", "freedom", "mpgd"]
METHODS: tuple[Method, ...] = get_args(Method)

CUTOUTS = Augment(4, 0.7)
"""Of through_unet; the pipeline's cutouts have sides from its CLIP's size up."""

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(x (B, C, H, W), sigma (B,)) -> denoised, differentiable where x asks for a gradient."""


@dataclass(frozen=True)
class Peer:
    """A way to guide: a differentiable ``denoise``, ``decode`` (latents to pictures in -1..1), a clean CLIP and a text.

    Called like a denoiser, (x, sigma) -> guided denoised. ``modules`` are those that gradients pass through.
    """

    method: Method
    denoise: Denoise
    decode: Callable[[Tensor], Tensor]
    clip: Encoder
    text: TextGuidance
    scale: float
    modules: tuple[torch.nn.Module, ...] = ()

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        if self.method == "mpgd":
            denoised = self.denoise(x, sigma).detach()
            grad = self._gradient(denoised, lambda x_0: x_0)
            return denoised + self.scale * grad
        s = expand(sigma, x)
        kept: list[Tensor] = []

        def seen(leaf: Tensor) -> Tensor:
            kept.append(self.denoise(leaf, sigma))
            if self.method != "through_unet":
                return kept[0]
            power = 1 + s.square()  # 1 / abar; x_t in VP scaling is x / sqrt(power)
            share = (s.square() / power).sqrt()
            return kept[0] * share + leaf / power.sqrt() * (1 - share)

        grad = self._gradient(x, seen)
        denoised = kept[0].detach()
        if self.method == "freedom":
            step = rms((x - denoised) / s)
            shift = expand(self.scale * step / rms(grad).clamp(min=1e-30), x) * s * grad
        else:
            shift = self.scale * s.square() * grad
        return denoised + shift

    def _gradient(self, at: Tensor, seen: Callable[[Tensor], Tensor]) -> Tensor:
        """grad of F of what is ``seen`` of a leaf, by that leaf."""
        with gradient_scope(*self.modules):
            leaf = as_normal(at).detach().clone().requires_grad_(True)
            picture = self.decode(seen(leaf))
            (grad,) = torch.autograd.grad(self._score(picture).sum(), leaf)
        return grad

    def _score(self, picture: Tensor) -> Tensor:
        text, t = replace(self.text, embed=self.text.embed.to(picture.device)), torch.zeros(1)
        target = text.target(lambda image, depth: self.clip(image, t, self.clip.full_depth))
        if self.method != "through_unet":
            return text.score(self.clip(picture, t, self.clip.full_depth), target)
        crops = CUTOUTS.crops((picture.shape[-2], picture.shape[-1]), torch.Generator().manual_seed(0))
        scores = [text.score(self.clip(crop(picture), t, self.clip.full_depth), target) for crop in crops]
        return torch.stack(scores).mean(dim=0)
