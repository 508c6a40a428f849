"""The judge of the bundled world: a plain attribute classifier that shares nothing with the CLIP it judges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..files import fill, load


class Judge(nn.Module):
    """A GroupNorm CNN with one linear head per attribute.

    ``attributes``: name -> its values, in the order of the logits. ``forward(image (B, 3, size, size) in -1..1)`` gives
    the logits by name and the features (B, 8 width) before the heads. A judge of 64 px halves its first maps.
    """

    def __init__(self, attributes: Mapping[str, Sequence[object]], width: int = 24, size: int = 32) -> None:
        super().__init__()
        self.size = size
        self.attributes = {name: tuple(values) for name, values in attributes.items()}
        w = width
        self.body = nn.Sequential(
            _block(3, w, size // 32),
            _block(w, 2 * w, 2),
            _block(2 * w, 4 * w, 2),
            _block(4 * w, 8 * w, 2),
            _block(8 * w, 8 * w, 1),
        )
        self.heads = nn.ModuleDict({name: nn.Linear(8 * w, len(v)) for name, v in self.attributes.items()})

    def features(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in -1..1 -> (B, 8 width). Other sizes are averaged or enlarged to the judge's own."""
        if image.shape[-1] != self.size:
            image = F.interpolate(image, (self.size, self.size), mode="area")
        maps: Tensor = self.body(image)
        return maps.mean(dim=(2, 3))

    def forward(self, image: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        features = self.features(image)
        return {name: head(features) for name, head in self.heads.items()}, features

    @torch.no_grad()
    def verdict(self, image: Tensor) -> dict[str, Tensor]:
        """The likeliest value of every attribute, as an index (B,)."""
        logits, _ = self(image)
        return {name: value.argmax(dim=1) for name, value in logits.items()}


def load_judge(path: Path) -> Judge:
    """The attribute judge, frozen, in eval mode. Raises FileNotFoundError and ValueError as ``files.load`` does."""
    config, state = load(path, "judge")
    judge = Judge(config["attributes"], config.get("width", 24), config.get("size", 32))
    fill(judge, state, path)
    return judge.requires_grad_(False).eval()


def _block(channels: int, out: int, stride: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, out, 3, stride, 1), nn.GroupNorm(8, out), nn.SiLU(),
        nn.Conv2d(out, out, 3, 1, 1), nn.GroupNorm(8, out), nn.SiLU(),
    )  # fmt: skip
