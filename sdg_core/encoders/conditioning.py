"""Time conditioning of an image tower: one scale and one shift per normalised channel, predicted from t; or its token.

After each normalisation layer y becomes y * (1 + scale(t)) + shift(t). Where a whole batch shares t, this folds into
the layer's own weight and bias, so a guided step pays for it once and not per image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..method import brought, timestep_embedding

Modulation = Sequence[tuple[Tensor, Tensor]]
"""(scale, shift), each (B or 1, C_i), for every normalisation layer in forward order."""

Norm = nn.LayerNorm | nn.BatchNorm2d
"""What can be conditioned."""


class TimeConditioning(nn.Module):
    """t -> scale and shift for every normalisation layer; identity at start.

    Sinusoid of t, two-layer MLP, ReLU, one linear layer: the layout of the published SDG encoders (see
    ``published.py``). ``widths`` are the channels of the norms, in forward order.
    """

    def __init__(self, widths: Sequence[int], hidden: int = 512, sinusoid: int = 128) -> None:
        super().__init__()
        self.widths, self.sinusoid = tuple(widths), sinusoid
        self.time_embed = nn.Sequential(nn.Linear(sinusoid, hidden), nn.ReLU(), nn.Linear(hidden, hidden))
        last = nn.Linear(hidden, 2 * sum(widths))
        self.emb_layers = nn.Sequential(nn.ReLU(), last)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, t: Tensor) -> Modulation:
        """t (B,) in 0..999, fractions allowed -> a scale and a shift (B, C_i) per layer."""
        weight = next(self.emb_layers.parameters())
        sinusoids = brought(timestep_embedding(t, self.sinusoid).to(weight.dtype), weight)
        numbers: Tensor = self.emb_layers(self.time_embed(sinusoids))
        parts = torch.split(numbers, [w for width in self.widths for w in (width, width)], dim=1)
        return list(zip(parts[0::2], parts[1::2], strict=True))


class TokenConditioning(nn.Module):
    """t -> the class token of a ViT, one for every timestep, as in GLIDE's noised CLIP; all are alike at start.

    ``token`` (C,) is that of the clean tower.
    """

    def __init__(self, token: Tensor, timesteps: int = 1000) -> None:
        super().__init__()
        self.tokens = nn.Parameter(token.detach().repeat(timesteps, 1))

    def forward(self, t: Tensor) -> Tensor:
        """t (B,), fractions lie between their neighbours -> tokens (B, C)."""
        last = len(self.tokens) - 1
        t = brought(t, self.tokens).clamp(0, last)
        left = t.floor().long().clamp(max=last - 1)
        part = (t - left).to(self.tokens.dtype)[:, None]
        return torch.lerp(self.tokens[left], self.tokens[left + 1], part)


def fold(norms: Sequence[tuple[str, Norm]], modulation: Modulation) -> dict[str, Tensor]:
    """Weights and biases with a shared modulation (batch 1) folded in, by parameter name, for ``functional_call``."""
    folded = {}
    for (name, layer), (scale, shift) in zip(norms, modulation, strict=True):
        gain = 1 + scale[0]
        folded[f"{name}.weight"] = (layer.weight * gain).to(layer.weight.dtype)
        folded[f"{name}.bias"] = (layer.bias * gain + shift[0]).to(layer.bias.dtype)
    return folded


@contextmanager
def modulated(norms: Sequence[tuple[str, Norm]], modulation: Modulation) -> Iterator[None]:
    """While open, every norm's output gets its per-sample scale and shift (B, C)."""
    hooks = [
        layer.register_forward_hook(_modulate(scale, shift))
        for (_, layer), (scale, shift) in zip(norms, modulation, strict=True)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _modulate(scale: Tensor, shift: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    from timm.layers.norm import LayerNorm2d  # takes seconds, so at first use; channels come second, as in a picture

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
        channels_last = isinstance(layer, nn.LayerNorm) and not isinstance(layer, LayerNorm2d)
        shape = (len(scale),) + ((1,) * (y.ndim - 2) + (-1,) if channels_last else (-1,) + (1,) * (y.ndim - 2))
        modulated: Tensor = Modulate.apply(y, 1 + scale.view(shape), shift.view(shape))  # type: ignore[no-untyped-call]
        return modulated

    return hook


class Modulate(torch.autograd.Function):
    """y * gain + shift, where gain and shift have one number for each sample and channel of y.

    As torch's own, but backward works in the memory format of y and with one large temporary instead of three: on maps
    of a large batch most of the time goes into those.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
        ctx.save_for_backward(y, gain)
        return torch.addcmul(shift, y, gain).to(y.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        y, gain = ctx.saved_tensors
        if grad.stride() != y.stride():
            grad = torch.empty_like(y, dtype=grad.dtype).copy_(grad)
        if not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2]):
            return (grad * gain).to(y.dtype), None, None
        places = [k for k in range(1, y.ndim) if gain.shape[k] == 1]
        product = grad.to(gain.dtype) * y
        by_gain = product.sum(places, keepdim=True)
        by_shift = grad.sum(places, keepdim=True, dtype=gain.dtype)
        return torch.mul(grad, gain, out=product).to(y.dtype), by_gain, by_shift
