"""In which precision the method computes: that of what comes in, at least float32."""

from __future__ import annotations

import torch
from torch import Tensor


def precise(x: Tensor) -> Tensor:
    """x in its own precision, at least float32: halves become float32, float64 stays. ``x`` itself where it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def added(x: Tensor, shift: Tensor) -> Tensor:
    """x + shift in x's dtype, both of one shape: rounded once, and never beyond what the dtype holds."""
    if x.dtype == shift.dtype:
        return x + shift
    bound = torch.finfo(x.dtype).max
    return (precise(x) + shift).clamp(-bound, bound).to(x.dtype)
