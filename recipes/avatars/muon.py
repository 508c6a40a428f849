"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon): steps whose singular values are all one.

Convolutions are matrices of output channels x everything else. Written out because torch.optim.Muon takes only 2-D
weights and always works in bfloat16, which many CPUs emulate. Everything that is no matrix is AdamW's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonal(g: Tensor, iterations: int = 5) -> Tensor:
    """The nearest half-orthogonal matrices to ``g`` (..., M, N), roughly: Newton-Schulz in its dtype."""
    wide = g if g.shape[-2] <= g.shape[-1] else g.mT
    x, (a, b, c) = wide / (wide.norm(dim=(-2, -1), keepdim=True) + 1e-7), QUINTIC
    for _ in range(iterations):
        xx = x @ x.mT
        x = a * x + (b * xx + c * (xx @ xx)) @ x
    return x if wide is g else x.mT


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised in ``dtype``. A step of rate ``lr`` changes each matrix by
    lr * sqrt(max(1, M / N))."""

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.dtype = dtype
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault(p.shape, []).append(p)
            for some in alike.values():
                self._step(some, group)

    def _step(self, some: list[Tensor], group: dict[str, Any]) -> None:
        """One step of matrices of one shape, together."""
        for p in some:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        momenta, grads = [self.state[p]["momentum"] for p in some], [p.grad for p in some]
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, grads)
        g = torch.stack(torch._foreach_add(grads, momenta, alpha=group["momentum"])).flatten(2)
        step = orthogonal(g.to(self.dtype)) * (-group["lr"] * max(1.0, g.shape[1] / g.shape[2]) ** 0.5)
        torch._foreach_mul_(some, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(some, [part.view_as(p) for part, p in zip(step.to(g.dtype), some, strict=True)])


def split(model: nn.Module, keep: Iterable[str] = ()) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trained parameters that are matrices of a hidden layer, and the others: vectors, and names that hold one of
    ``keep`` (embeddings, the last layer)."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrix = [p.ndim >= 2 and not any(word in name for word in keep) for name, p in named]
    return (
        [p for (_, p), m in zip(named, matrix, strict=True) if m],
        [p for (_, p), m in zip(named, matrix, strict=True) if not m],
    )
