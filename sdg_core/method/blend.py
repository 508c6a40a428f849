"""How guidances that were combined come together: how their pulls are shared out, and what becomes of conflicts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .precision import precise

SWEEPS = 1000
"""Iterations that find the projections; two guidances need about forty, near copies of each other many."""


@dataclass(frozen=True, eq=False)
class Blend:
    """How the gradients g_k of terms with the same blend (the same object) come together, per sample.

    ``balance`` b, 0 to 1: how far their sizes n_k = rms(g_k) are set to the terms' shares p_k (which add up to 1):

        g_k' = g_k * (p_k * sum_j n_j / n_k)^b

    ``project``: then each gives up what works against others (Yu et al. 2020, arXiv 2001.06782, made symmetric). It
    becomes the nearest vector that lowers no other score:

        g_k'' = argmin_v |v - g_k'|   with   v . g_j' >= 0 for all j other than k

    so that for two in conflict g_1'' = g_1' - (g_1' . g_2') / |g_2'|^2 g_2'. Their order doesn't matter, and their sum
    lowers no score, to first order.
    """

    balance: float = 0.0
    project: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.balance <= 1:
            raise ValueError(f"Got a balance of {self.balance}; wanted 0 (sizes as they are) to 1 (sizes by shares).")

    def __call__(self, grads: Tensor, shares: Tensor) -> Tensor:
        """Gradients (K, B, ...) with shares (K, B), in any units -> gradients (K, B, ...)."""
        grads = balanced(grads, shares, self.balance) if self.balance else grads
        return projected(grads) if self.project else grads


def balanced(grads: Tensor, shares: Tensor, balance: float) -> Tensor:
    """Gradients (K, B, ...) at the sizes that their shares (K, B) ask for, as far as ``balance`` says."""
    size = precise(grads).flatten(2).square().mean(dim=2).sqrt()
    acts = size > 0
    shares = torch.where(acts, shares.abs().to(size), torch.zeros_like(size))
    tiny = torch.finfo(size.dtype).tiny
    wanted = shares / shares.sum(dim=0).clamp(min=tiny) * size.sum(dim=0)
    factor = (wanted / size.clamp(min=tiny)).pow(balance)
    return grads * torch.where(acts, factor, torch.ones_like(factor)).view(*size.shape, *(1,) * (grads.ndim - 2))


def projected(grads: Tensor) -> Tensor:
    """Each of the gradients (K, B, ...) at the nearest point where it works against no other.

    v_i = u_i + sum_j L_ij u_j of unit gradients u, with L >= 0 and L_ii = 0: of two, L_ij = max(0, -u_i . u_j). Of more
    they solve the dual problem: projected gradient steps on small matrices, for all i at once, so in no order; there
    the device is waited for.
    """
    flat = precise(grads).flatten(2)
    size = flat.norm(dim=2, keepdim=True)
    units = (flat / size.clamp(min=torch.finfo(flat.dtype).tiny)).transpose(0, 1)  # (B, K, n)
    if len(grads) == 2:
        against = -(units[:, 0] * units[:, 1]).sum(dim=1).nan_to_num(0.0).clamp(max=0)
        bent: Tensor = flat + size * against[:, None] * units.transpose(0, 1).flip(0)
        return bent.view_as(grads).to(grads)
    cosines = (units @ units.transpose(1, 2)).cpu().double().nan_to_num(0.0)
    K = cosines.shape[1]
    others = 1 - torch.eye(K, dtype=cosines.dtype)
    if not bool((cosines * others < 0).any()):
        return grads
    step = 1 / torch.linalg.eigvalsh(cosines)[:, -1].clamp(min=1.0)[:, None, None]
    parts = torch.zeros_like(cosines)
    for _ in range(SWEEPS):
        moved = (parts - step * (cosines + parts @ cosines)).clamp(min=0) * others
        done = bool((moved - parts).abs().max() < 1e-14)
        parts = moved
        if done:
            break
    joined: Tensor = flat + size * (parts.to(units) @ units).transpose(0, 1)
    return joined.view_as(grads).to(grads)
