"""The gradient of guidance: one forward and one backward pass for all terms that share an encoder.

``gradient_scope`` is the only place where autograd is switched on. The diffusion model is never inside it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .controls import Crop, Several
from .device import brought, is_out_of_memory
from .features import Encoder, Features
from .guidance import Guidance, Term
from .precision import precise
from .schedule import expand
from .views import View

log = logging.getLogger(__name__)


@contextmanager
def gradient_scope(*modules: nn.Module) -> Iterator[None]:
    """Autograd for ``modules``, even inside a host's inference mode.

    Inference tensors can't be saved for backward. While the scope is open, parameters and buffers that are inference
    tensors are replaced by normal tensors on the same storage (no copy); the originals come back on exit.
    """
    saved: list[tuple[dict[str, Any], str, Tensor]] = []
    with torch.inference_mode(False), torch.enable_grad():
        try:
            for module in (m for root in modules for m in root.modules()):
                stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
                for store in stores:
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


@dataclass(frozen=True)
class Window:
    """A mask (B, 1, h, w) on what the encoder sees, and the picture (1, 3, h, w) that stands outside."""

    mask: Tensor
    blank: Tensor

    def take(self, rows: slice) -> Window:
        return Window(self.mask[rows], self.blank)

    def normal(self) -> Window:
        return Window(as_normal(self.mask).clone(), as_normal(self.blank).clone())


@dataclass(frozen=True)
class Sight:
    """What the encoder looks at in one evaluation: ``view`` of a tensor x of which ``signal`` (B,) is x_0, at timestep
    t (1 or B,), through a ``window`` and by a ``crop`` if there are any."""

    view: View
    signal: Tensor
    t: Tensor
    window: Window | None = None
    crop: Crop | None = None

    def take(self, rows: slice) -> Sight:
        window = None if self.window is None else self.window.take(rows)
        return Sight(self.view, self.signal[rows], self.t if len(self.t) == 1 else self.t[rows], window, self.crop)

    def features(self, encoder: Encoder, picture: Tensor, depth: int) -> Features:
        """What the encoder gives of the picture (B, 3, h, w)."""
        t, mask = as_normal(self.t).clone(), None
        if self.window is not None:
            window = self.window.normal()
            mask, picture = window.mask, window.mask * picture + (1 - window.mask) * window.blank
        if self.crop is not None:
            mask, picture = None if mask is None else self.crop(mask), self.crop(picture)
        features = encoder(picture, t, depth)
        return features if mask is None else replace(features, where=mask)


def score_gradient(
    encoder: Encoder,
    terms: Sequence[Term],
    weights: Tensor,
    targets: Sequence[Target],
    x: Tensor,
    sight: Sight,
) -> tuple[Tensor, Tensor]:
    """grad_x of F = sum_k weights_k * score_k(E'(view(x), t)), per sample.

    x (B, C, H, W). weights (K, B), one row per term. Returns the gradient (B, C, H, W) in the precision of x, at least
    float32, and the scores (K, B) in the encoder's. Samples do not mix: their sum is taken only for autograd.
    """
    depth = max(term.guidance.depth(encoder) for term in terms)
    with gradient_scope(*([encoder] if isinstance(encoder, nn.Module) else []), *sight.view.modules):
        x = precise(x.detach()).clone().requires_grad_(True)
        picture = precise(sight.view.picture(x, as_normal(sight.signal).clone()))
        features = sight.features(encoder, picture, depth)
        scores = torch.stack(
            [target.score(term.guidance, features) for term, target in zip(terms, targets, strict=True)]
        )
        total = (brought(as_normal(weights).clone().to(scores.dtype), scores) * scores).sum()
        if not sight.view.modules:
            (grad,) = torch.autograd.grad(total, x)
        else:
            (seen,) = torch.autograd.grad(total, picture)
            grad = _through_decoder(seen, picture, x)
    return grad, scores.detach()


def _through_decoder(seen: Tensor, picture: Tensor, x: Tensor) -> Tensor:
    """The gradient ``seen`` (B, 3, h, w) of a decoded picture, taken back to x: per sample at size 1 on the way.

    A decoder may compute in fp16, which ends at 6e-8, where gradients of pixels often are. The size taken out and put
    back is a power of two, so other decoders give the same bits.
    """
    exponent = torch.frexp(seen.abs().flatten(1).amax(dim=1)).exponent
    size = expand(torch.ldexp(torch.ones_like(exponent, dtype=seen.dtype), exponent), seen)
    (grad,) = torch.autograd.grad(picture, x, seen / size)
    return grad * expand(size, grad)


@dataclass(frozen=True)
class Target:
    """What a term compares with. ``reference`` (B,) picks one of the target's references for each sample (the frames of
    a video); None averages over all of them, or joins them as ``several`` says.
    """

    features: Features
    reference: Tensor | None = None
    several: Several | None = None

    def take(self, rows: slice) -> Target:
        return self if self.reference is None else Target(self.features, self.reference[rows])

    def score(self, guidance: Guidance, features: Features) -> Tensor:
        """(B,)."""
        wanted = _normal(self.features)
        if self.several is not None:
            each = [guidance.score(features, wanted.take(slice(r, r + 1))) for r in range(wanted.count)]
            return self.several.joined(torch.stack(each), guidance.best)
        if self.reference is None:
            return guidance.score(features, wanted)
        parts = []
        for i, r in enumerate(self.reference.tolist()):
            parts.append(guidance.score(features.take(slice(i, i + 1)), wanted.take(slice(r, r + 1))))
        return torch.cat(parts)


class Chunks:
    """How many samples a gradient takes at once. Out of memory halves it, for the rest of the run, and says so once."""

    def __init__(self) -> None:
        self.size: int | None = None

    def gradient(
        self,
        encoder: Encoder,
        terms: Sequence[Term],
        weights: Tensor,
        targets: Sequence[Target],
        x: Tensor,
        sight: Sight,
    ) -> tuple[Tensor, Tensor]:
        """``score_gradient``, in as many parts as memory asks for. A single sample that doesn't fit raises as it is."""
        while True:
            size = min(self.size or len(x), len(x))
            try:
                parts = []
                for start in range(0, len(x), size):
                    rows = slice(start, start + size)
                    few = [target.take(rows) for target in targets]
                    parts.append(score_gradient(encoder, terms, weights[:, rows], few, x[rows], sight.take(rows)))
                if len(parts) == 1:
                    return parts[0]
                return torch.cat([grad for grad, _ in parts]), torch.cat([scores for _, scores in parts], dim=1)
            except (RuntimeError, MemoryError) as error:
                if size == 1 or not is_out_of_memory(error):
                    raise
                told, self.size = self.size is not None, size // 2
            if not told:
                log.warning("Out of memory in the guidance gradient of %d pictures; it is taken in parts now.", size)
            if x.device.type == "cuda":
                torch.cuda.empty_cache()


def _normal(features: Features) -> Features:
    return features.map(as_normal)
