"""A clean CLIP opened up: any open_clip model, whose image tower reads finished pictures, with its text tower."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import open_clip
import torch.nn.functional as F
from torch import Tensor, nn

from .features import Features
from .towers import open_tower

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class CleanCLIP(nn.Module):
    """Feature maps and the pooled embedding of clean pictures. It reads a model's denoised estimate.

    ``clip`` is an open_clip model; its image tower moves into this one. ``text`` is what is left of it, None where the
    file has no text tower (then only image guidances work). ``image_size``: side of the tower's input.
    ``picture_size``: pictures are first brought to this side, 0 for the tower's own. ``tokenizer`` maps prompts to
    tokens (N, L); None is CLIP's own.
    """

    reads = "denoised"
    view = "any"

    def __init__(
        self,
        clip: nn.Module,
        image_size: int,
        picture_size: int = 0,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        has_text: bool = True,
        tokenizer: Callable[[list[str]], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.image_size, self.noise_size = image_size, picture_size or image_size
        self.mean, self.std, self.has_text, self.tokenizer = tuple(mean), tuple(std), has_text, tokenizer
        self.tower = open_tower(clip.visual)
        clip.visual = None
        self.text = clip if has_text else None

    @property
    def full_depth(self) -> int:
        """The depth that includes the embedding; ``full_depth - 1`` is the number of feature maps."""
        return self.tower.full_depth

    def forward(self, image: Tensor, t: Tensor, depth: int) -> Features:
        """Features of pictures (B, 3, H, W) in -1..1. ``t`` is not read. depth: see ``Tower``."""
        return self.tower(self.prepare(image), depth)

    def prepare(self, image: Tensor) -> Tensor:
        """Pictures of any size in -1..1 -> the tower's size, normalised as CLIP's training was."""
        image = resize(resize(image, self.noise_size), self.image_size)
        mean, std = (image.new_tensor(v).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return ((image + 1) / 2 - mean) / std

    def noise_gain(self, height: int, width: int) -> float:
        """What ``prepare`` does to white noise of a picture this size before the tower's own enlargement: a factor on
        its standard deviation. Averaging k x k pixels divides it by k; enlarging keeps it.
        """
        return math.prod(min(1.0, self.noise_size / side) for side in (height, width)) ** 0.5

    def encode_text(self, prompts: list[str]) -> Tensor:
        """Normalised text embeddings (N, D). Raises ValueError where the checkpoint came without its text tower."""
        if self.text is None:
            raise ValueError(
                "This CLIP has no text tower, so it cannot guide by text. "
                "Load one with its text tower, or use content, structure or style guidance."
            )
        tokenizer = self.tokenizer or open_clip.SimpleTokenizer(context_length=self.text.context_length)
        device = next(self.text.parameters()).device
        return self.text.encode_text(tokenizer(prompts).to(device), normalize=True).float()


def resize(image: Tensor, size: int) -> Tensor:
    """(B, 3, H, W) -> (B, 3, size, size): averaging areas down, bilinear up, unchanged where it fits."""
    if image.shape[-2:] == (size, size):
        return image
    smaller = [min(side, size) for side in image.shape[-2:]]
    if list(image.shape[-2:]) != smaller:
        image = F.adaptive_avg_pool2d(image, smaller)
    return (
        image if smaller == [size, size] else F.interpolate(image, (size, size), mode="bilinear", align_corners=False)
    )


def unit(embed: Tensor) -> Tensor:
    """Embeddings (..., D) on the unit sphere, in float32."""
    return F.normalize(embed.float(), dim=-1)


def build_clip(config: Mapping[str, Any]) -> nn.Module:
    """The open_clip model of a config, without weights worth keeping."""
    from open_clip.model import CLIP

    return CLIP(
        config["embed_dim"],
        dict(config["vision_cfg"]),
        dict(config["text_cfg"]),
        quick_gelu=config.get("quick_gelu", False),
    )
