"""The gradient of guidance: one forward and one backward pass for all terms that share an encoder.

``gradient_scope`` is the only place where autograd is switched on. The diffusion model is never inside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .features import Features
from .guidance import Encoder, Term


@contextmanager
def gradient_scope(*modules: nn.Module) -> Iterator[None]:
    """Autograd for ``modules``, even inside a host's inference mode.

    Inference tensors can't be saved for backward. While the scope is open, parameters and buffers that are inference
    tensors are replaced by normal tensors on the same storage (no copy); the originals come back on exit.
    """
    saved: list[tuple[dict, str, Tensor]] = []
    with torch.inference_mode(False), torch.enable_grad():
        try:
            for module in (m for root in modules for m in root.modules()):
                for store in (module._parameters, module._buffers):
                    for name, tensor in list(store.items()):
                        if tensor is not None and tensor.is_inference():
                            saved.append((store, name, tensor))
                            normal = as_normal(tensor)
                            store[name] = nn.Parameter(normal, False) if store is module._parameters else normal
            yield
        finally:
            for store, name, tensor in saved:
                store[name] = tensor


def as_normal(tensor: Tensor) -> Tensor:
    """A normal tensor on an inference tensor's storage; a copy where the device can't alias."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        normal = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        try:
            return normal.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
        except (NotImplementedError, RuntimeError):  # devices without set_ aliasing
            return tensor.clone()


def score_gradient(
    encoder: Encoder, terms: Sequence[Term], weights: Tensor, targets: Sequence[Features], u: Tensor, t: Tensor
) -> tuple[Tensor, Tensor]:
    """grad_u of F = sum_k weights_k * score_k(E'(u, t)), per sample.

    u: pictures in VP scaling (B, 3, H, W). t: (1,) or (B,). weights: (K, B), one row per term. Returns the gradient
    (B, 3, H, W) and the scores (K, B), both float32. Samples do not mix: their sum is taken only for autograd.
    """
    depth = max(term.guidance.depth(encoder) for term in terms)
    with gradient_scope(*([encoder] if isinstance(encoder, nn.Module) else [])):
        u = u.detach().float().clone().requires_grad_(True)
        features = encoder(u, as_normal(t).clone(), depth)
        scores = torch.stack(
            [term.guidance.score(features, _normal(target)) for term, target in zip(terms, targets, strict=True)]
        )
        (grad,) = torch.autograd.grad((as_normal(weights).clone() * scores).sum(), u)
    return grad, scores.detach()


def _normal(features: Features) -> Features:
    return Features(tuple(map(as_normal, features.maps)), None if features.embed is None else as_normal(features.embed))
