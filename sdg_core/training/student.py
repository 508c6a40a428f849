"""Who learns and who teaches: the trainable part of a noisy CLIP, its average, and the frozen clean CLIP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..encoders import CleanCLIP, NoisyCLIP, ResNetTower, TimmTower, Tower, ViTTower
from ..method import embedding
from .images import Batch

CACHED_BYTES = 2**31  # of the teacher's embeddings


class Student(nn.Module):
    """The part of a NoisyCLIP that learns: noisy pictures and t -> embeddings on the unit sphere."""

    def __init__(self, model: NoisyCLIP) -> None:
        super().__init__()
        self.tower, self.conditioning = model.tower, model.conditioning
        self._whole = [model]  # in a list, so that its text tower is not a part of this

    def forward(self, image: Tensor, t: Tensor) -> Tensor:
        return embedding(self._whole[0], image, t)


class Average:
    """Exponential moving average of the trained weights; the first steps count less."""

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self.decay, self.step = decay, 0
        self.weights = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def follow(self, parameters: Mapping[str, Tensor]) -> None:
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.weights.values()), [parameters[name] for name in self.weights], 1 - decay)
        self.step += 1

    @torch.no_grad()
    def copy_to(self, parameters: Mapping[str, Tensor]) -> None:
        """Puts the averages into the parameters."""
        for name, weight in self.weights.items():
            parameters[name].copy_(weight)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "weights": self.weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step = state["step"]
        for name, weight in self.weights.items():
            weight.copy_(state["weights"][name])


class Teacher:
    """Embeddings (B, D) of clean pictures, remembered where a set has few versions of every picture."""

    def __init__(self, clip: CleanCLIP, pictures: int, variants: int) -> None:
        self.clip, self.variants = clip, variants
        width: int = getattr(clip.tower.visual, "output_dim", 1024)
        kept = pictures * variants * width * 4 <= CACHED_BYTES
        self.known = torch.zeros(pictures, max(variants, 1), dtype=torch.bool) if kept and variants else None
        self.embeds: Tensor | None = None

    @torch.no_grad()
    def __call__(self, batch: Batch, picture: Tensor) -> Tensor:
        if self.known is None:
            return self._embed(picture)
        at = batch.which.cpu(), batch.mirrored.cpu().long() * (self.variants > 1)
        missing = ~self.known[at]
        if missing.any():
            fresh = self._embed(picture[missing.to(picture.device)]).cpu()
            if self.embeds is None:
                self.embeds = fresh.new_zeros(*self.known.shape, fresh.shape[1])
            self.embeds[at[0][missing], at[1][missing]] = fresh
            self.known[at] = True
        assert self.embeds is not None
        return self.embeds[at].to(picture.device)

    def _embed(self, picture: Tensor) -> Tensor:
        return embedding(self.clip, picture, torch.zeros(1, device=picture.device))

    def state_dict(self) -> dict[str, Any]:
        return {"known": self.known, "embeds": self.embeds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.known, self.embeds = state["known"], state["embeds"]


def freeze_but(model: NoisyCLIP, layers: str) -> dict[str, nn.Parameter]:
    """Freezes all but the layers to train; those, by name. Statistics of batch norms stay the clean CLIP's."""
    model.requires_grad_(False)
    parts: list[nn.Module | nn.Parameter] = [model.conditioning]
    if layers == "all":
        parts.append(model.tower)
    elif layers == "last":
        parts += last_stage(model.tower)
    for part in parts:
        part.requires_grad_(True)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def last_stage(tower: Tower) -> list[nn.Module | nn.Parameter]:
    """What follows the last but one feature map, up to the embedding."""
    if isinstance(tower, ResNetTower):
        return [tower.visual.layer4, tower.visual.attnpool]
    if isinstance(tower, ViTTower):
        v = tower.visual
        blocks = v.transformer.resblocks
        return [*blocks[round(len(blocks) * 0.75) :], v.ln_post, *([] if v.proj is None else [v.proj])]
    assert isinstance(tower, TimmTower)
    trunk = tower.visual.trunk
    stages = trunk.stages if hasattr(trunk, "stages") else trunk.blocks
    return [*list(stages)[round(len(stages) * 0.75) :], tower.visual.head]
