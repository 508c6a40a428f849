"""How a model of the host scales x, in the terms of ``sdg_core``."""

from __future__ import annotations

from dataclasses import dataclass

import comfy.model_patcher
import comfy.model_sampling as ms
import torch
from torch import Tensor

from ...sdg_core.method import Convention, expand


@dataclass(frozen=True)
class Scaling:
    """A model's x and sigma in the terms of ``sdg_core``.

    Some flow models train with noise of another size, x = (1 - s) x_0 + s c eps. Divided by 1 - s + s c this is the
    usual flow at sigma = s c / (1 - s + s c); denoised does not change.
    """

    convention: Convention
    noise_scale: float = 1.0

    def norm(self, sigma: Tensor) -> Tensor:
        return 1 - sigma + self.noise_scale * sigma if self.noise_scale != 1 else torch.ones_like(sigma)

    def core(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(x (B, ...), sigma (B,)) in the core's convention."""
        if self.noise_scale == 1:
            return x, sigma
        return x / expand(self.norm(sigma), x), self.noise_scale * sigma / self.norm(sigma)


def scaling_of(model: comfy.model_patcher.ModelPatcher) -> Scaling:
    """Read off the class of the model's sampling. Raises ValueError for models whose x is no picture plus noise."""
    sampling = model.get_model_object("model_sampling")
    direct = tuple(getattr(ms, name) for name in ("IMG_TO_IMG", "IMG_TO_IMG_FLOW") if hasattr(ms, name))
    if isinstance(sampling, direct):
        raise ValueError(
            "This model turns one picture into another without noise, so there is nothing to guide step by step. "
            "Use a model that samples from noise, for example from Load ADM."
        )
    if isinstance(sampling, ms.CONST):
        return Scaling(Convention.FLOW, float(getattr(sampling, "noise_scale", 1.0)))
    return Scaling(Convention.VE)
