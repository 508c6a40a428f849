"""NoisyCLIP: an open_clip model whose image tower knows how noisy its input is (SDG, section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import open_clip
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from .conditioning import TimeConditioning, fold, modulated
from .features import Features
from .schedule import TimestepTable
from .towers import open_tower

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class NoisyCLIPConfig:
    """Everything but the weights.

    ``clip``: open_clip's model config (embed_dim, vision_cfg, text_cfg, quick_gelu). ``noise_size``: side of the
    pictures to which white noise was added in training; 0 means the tower's own size. ``beta_schedule`` is the schedule
    that t counts in. ``hidden`` and ``sinusoid`` size the time embedding.
    """

    clip: Mapping[str, Any]
    noise_size: int = 0
    beta_schedule: str = "linear"
    hidden: int = 512
    sinusoid: int = 128
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def image_size(self) -> int:
        """Side of the tower's input."""
        size = self.clip["vision_cfg"]["image_size"]
        return size if isinstance(size, int) else size[0]


class NoisyCLIP(nn.Module):
    """Reads x_t in VP scaling and t; gives feature maps and the pooled embedding. With its own text tower.

    At initialisation it equals the clean CLIP at every t. ``clip`` is an ``open_clip.CLIP`` built from ``config.clip``;
    its image tower moves into this model. Its text half may be absent (``has_text``); then only image guidances work.
    """

    def __init__(self, config: NoisyCLIPConfig, clip: nn.Module, has_text: bool = True) -> None:
        super().__init__()
        self.config, self.has_text = config, has_text
        self.tower = open_tower(clip.visual)
        self.conditioning = TimeConditioning(
            [_channels(layer) for _, layer in self.tower.norms()], config.hidden, config.sinusoid
        )
        clip.visual = None
        self.text = clip if has_text else None
        self.table = TimestepTable.from_name(config.beta_schedule)

    @property
    def full_depth(self) -> int:
        """The depth that includes the embedding; ``full_depth - 1`` is the number of feature maps."""
        return self.tower.full_depth

    def forward(self, image: Tensor, t: Tensor, depth: int) -> Features:
        """Features of noisy pictures.

        image: x_t in VP scaling, (B, 3, H, W), data in -1..1. t: (1,) when the batch shares it (the conditioning is
        then folded into the norms) or (B,). depth: how many maps to compute; ``full_depth`` adds the embedding.
        """
        image = self.prepare(image)
        modulation = self.conditioning(t)
        norms = self.tower.norms()
        if len(t) == 1:
            return functional_call(self.tower, fold(norms, modulation), (image, depth))
        with modulated(norms, modulation):
            return self.tower(image, depth)

    def prepare(self, image: Tensor) -> Tensor:
        """Pictures of any size in -1..1 -> the tower's size, normalised as CLIP's training was."""
        image = resize(resize(image, self.noise_size), self.config.image_size)
        mean, std = (image.new_tensor(v).view(1, 3, 1, 1) for v in (self.config.mean, self.config.std))
        return ((image + 1) / 2 - mean) / std

    @property
    def noise_size(self) -> int:
        return self.config.noise_size or self.config.image_size

    def noise_gain(self, height: int, width: int) -> float:
        """What ``prepare`` does to white noise of a picture this size before the tower's own enlargement: a factor on
        its standard deviation. Averaging k x k pixels divides it by k; enlarging keeps it.
        """
        return math.prod(min(1.0, self.noise_size / side) for side in (height, width)) ** 0.5

    def encode_text(self, prompts: list[str]) -> Tensor:
        """Normalised text embeddings (N, D). Raises ValueError where the checkpoint came without its text tower."""
        if self.text is None:
            raise ValueError(
                "This noisy CLIP has no text tower, so it cannot guide by text. "
                "Load one with its text tower, or use content, structure or style guidance."
            )
        tokens = open_clip.SimpleTokenizer(context_length=self.text.context_length)(prompts)
        device = self.text.positional_embedding.device
        return self.text.encode_text(tokens.to(device), normalize=True).float()


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


def _channels(layer: nn.Module) -> int:
    return layer.num_features if isinstance(layer, nn.BatchNorm2d) else layer.normalized_shape[0]


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


def noisy(image: Tensor, eps: Tensor, t: Tensor, table: TimestepTable) -> Tensor:
    """q(x_t | x_0): sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, in VP scaling. t (B,) may be fractional."""
    ratio = table.sigma(t).to(image.device, image.dtype).view(-1, 1, 1, 1)
    norm = (1 + ratio.square()).sqrt()
    return image / norm + eps * ratio / norm
