"""The small CLIP of both worlds: its shape, its tokens, and pictures as its image tower wants them."""

from __future__ import annotations

import sys
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

from open_clip.model import CLIP
from torch import Tensor

from sdg_core.method import Placed

CONFIG = {
    "embed_dim": 128,
    "vision_cfg": {"layers": [1, 2, 2, 1], "width": 24, "image_size": 64, "head_width": 64},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 2},
}
MEAN, STD = Placed((0.48145466, 0.4578275, 0.40821073)), Placed((0.26862954, 0.26130258, 0.27577711))


def tokenizer() -> open_clip.SimpleTokenizer:
    return open_clip.SimpleTokenizer(context_length=CONFIG["text_cfg"]["context_length"])


def build(words: int) -> CLIP:
    """The CLIP with a table of ``words`` used tokens and one shared row (index 0) for all others."""
    text = {**CONFIG["text_cfg"], "vocab_size": words + 1}
    model = CLIP(CONFIG["embed_dim"], CONFIG["vision_cfg"], text)
    model.visual.to(memory_format=torch.channels_last)
    return model


def token_table(used: Tensor) -> Tensor:
    """Standard token id -> row of the small table."""
    table = torch.zeros(CONFIG["text_cfg"]["vocab_size"], dtype=torch.long)
    table[used] = torch.arange(1, len(used) + 1)
    return table


def prepare(images: Tensor) -> Tensor:
    """Pictures (B, 3, 32, 32) in -1..1 as the tower wants them: enlarged and normalised."""
    mean, std = (placed.like(images).view(1, 3, 1, 1) for placed in (MEAN, STD))
    large = F.interpolate(images, CONFIG["vision_cfg"]["image_size"], mode="bilinear", antialias=False)
    return (((large + 1) / 2 - mean) / std).contiguous(memory_format=torch.channels_last)


def shifted(images: Tensor, generator: torch.Generator | None, reach: int = 2) -> Tensor:
    """Every picture moved by up to ``reach`` pixels, its border repeated."""
    B, _, H, W = images.shape
    padded, device = F.pad(images, (reach,) * 4, mode="replicate"), images.device
    dy, dx = torch.randint(0, 2 * reach + 1, (2, B), generator=generator, device=device)
    rows = (dy[:, None] + torch.arange(H, device=device))[:, None, :, None]
    columns = (dx[:, None] + torch.arange(W, device=device))[:, None, None, :]
    sample, channel = torch.arange(B, device=device), torch.arange(3, device=device)
    return padded[sample[:, None, None, None], channel[None, :, None, None], rows, columns]
