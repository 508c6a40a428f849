"""The noisy classifiers of guided-diffusion (Dhariwal and Nichol 2021, arXiv 2105.05233): half an ADM UNet and a head.

Module names follow the published checkpoints (64x64_classifier.pt and kin), so that their plain state dicts load as
they are. To the method a classifier is an encoder of noisy pictures whose embedding holds the logits.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..files import printable
from ..method import Features, TimestepTable, averaging_gain, brought, resize, timestep_embedding
from .adm import ADMConfig, AttentionBlock, Block, Builder, matching

SHOWN = 12
"""Class names that an error message lists."""


@dataclass(frozen=True)
class ClassifierConfig:
    """Everything but the weights.

    ``body`` shapes the encoding half of the UNet; what concerns the output of a diffusion model is not read. Its
    ``beta_schedule`` is the one that t counts in. ``class_names`` may be empty; then classes go by number. ``view``
    says what it reads, "pixels" or "linear:<latent format>"; ``covariance`` (3, 3) is that of unit noise between the
    colours through a linear view.
    """

    body: ADMConfig
    classes: int = 1000
    class_names: tuple[str, ...] = ()
    view: str = "pixels"
    covariance: tuple[tuple[float, ...], ...] | None = None

    def __post_init__(self) -> None:
        if self.class_names and len(self.class_names) != self.classes:
            raise ValueError(f"Got {len(self.class_names)} names for {self.classes} classes; wanted one each, or none.")

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> ClassifierConfig:
        """The config written by ``asdict`` through JSON."""
        covariance = fields.get("covariance")
        return cls(
            ADMConfig.from_json(fields["body"]),
            fields["classes"],
            tuple(fields["class_names"]),
            fields.get("view", "pixels"),
            None if covariance is None else tuple(map(tuple, covariance)),
        )

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> ClassifierConfig:
        """Reads the options of a published checkpoint off its keys and shapes.

        Head width (64), attention order and schedule leave no trace in a state dict: the published values are taken.
        The 64 px classifier belongs to a model of the cosine schedule, all others to the linear one. Raises ValueError
        for other heads than attention pooling, and for foreign files.
        """
        check_layout(state)
        positions, stem = state["out.2.positional_embedding"].shape[1] - 1, state["input_blocks.0.0.weight"]
        per_level, levels = _levels(state)
        model_channels = state["time_embed.0.weight"].shape[1]
        firsts = [f"input_blocks.{level * (per_level + 1) + 1}" for level in range(levels)]
        widths = [state[f"{first}.0.out_layers.3.weight"].shape[0] for first in firsts]
        image_size = math.isqrt(positions) * 2 ** (levels - 1)
        body = ADMConfig(
            image_size=image_size,
            model_channels=model_channels,
            channel_mult=tuple(width / model_channels for width in widths),
            num_res_blocks=per_level,
            attention_levels=tuple(i for i, first in enumerate(firsts) if f"{first}.1.qkv.weight" in state),
            scale_shift_norm=state["middle_block.0.emb_layers.1.weight"].shape[0] == 2 * widths[-1],
            resblock_updown=not matching(state, r"input_blocks\.(\d+)\.0\.op\.weight"),
            beta_schedule="cosine" if image_size == 64 else "linear",
            channels=stem.shape[1],
        )
        return cls(body, state["out.2.c_proj.weight"].shape[0])


def check_layout(state: Mapping[str, Tensor]) -> None:
    """Raises ValueError for state dicts of something else, by their names alone."""
    if any(name.startswith("output_blocks.") for name in state):
        raise ValueError("This is a diffusion model, not a classifier: it has output_blocks.*. Use Load ADM for it.")
    if "input_blocks.0.0.weight" not in state or "time_embed.0.weight" not in state:
        raise ValueError(
            "Not a guided-diffusion classifier: it has no input_blocks.0.0.weight and time_embed.0.weight. Wanted: the "
            "plain state dict of one, for example 256x256_classifier.pt."
        )
    if "out.2.positional_embedding" not in state:
        raise ValueError(
            "This classifier does not end in attention pooling: it has no out.2.positional_embedding. Wanted: one "
            "trained with --classifier_pool attention, as the published ones are."
        )


def _levels(state: Mapping[str, Tensor]) -> tuple[int, int]:
    """(residual blocks to a level, levels), such that blocks of one level agree in width and attention.

    Blocks that halve the size close every level but the last; they keep the width and never attend.
    """
    blocks = len(matching(state, r"input_blocks\.(\d+)\..*"))
    strided = matching(state, r"input_blocks\.(\d+)\.0\.op\.weight")
    spacings = [strided[0]] if strided else [n for n in range(2, blocks + 1) if blocks % n == 0]
    fitting = [n for n in spacings if blocks % n == 0 and _fits(state, blocks, n)]
    if len(fitting) != 1:
        raise ValueError(
            f"The {blocks} input blocks of this classifier could be {len(fitting)} different sets of levels; wanted "
            "one. Use a published file, or one saved by this pack, which says what it is."
        )
    return fitting[0] - 1, blocks // fitting[0]


def _fits(state: Mapping[str, Tensor], blocks: int, spacing: int) -> bool:
    """Whether every ``spacing``-th input block may be one that halves the size."""
    for start in range(0, blocks, spacing):
        level = [f"input_blocks.{i}" for i in range(start + 1, start + spacing)]
        attends = {f"{block}.1.qkv.weight" in state for block in level}
        changes = [f"{block}.0.skip_connection.weight" in state for block in level[1:]]
        halving = f"input_blocks.{start}"
        kept = f"{halving}.1.qkv.weight" not in state and f"{halving}.0.skip_connection.weight" not in state
        if len(attends) != 1 or any(changes) or not kept:
            return False
    return True


class AttentionPool(nn.Module):
    """(B, C, size, size) -> (B, out): the mean over places attends to itself and to all of them."""

    def __init__(self, size: int, channels: int, head_channels: int, out: int) -> None:
        super().__init__()
        self.heads = channels // head_channels
        self.positional_embedding = nn.Parameter(torch.randn(channels, size**2 + 1) / channels**0.5)
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)
        tokens = torch.cat([tokens.mean(dim=2, keepdim=True), tokens], dim=2) + self.positional_embedding
        q, k, v = (
            torch.unflatten(part, 1, (self.heads, -1)).transpose(2, 3) for part in self.qkv_proj(tokens).chunk(3, dim=1)
        )
        pooled = F.scaled_dot_product_attention(q[:, :, :1], k, v)  # (B, heads, 1, C / heads)
        logits: Tensor = self.c_proj(pooled.transpose(2, 3).flatten(1, 2))
        return logits.squeeze(2)


class Classifier(nn.Module):
    """p(y | x_t, t): an encoder of noisy pictures in VP scaling that gives no maps, and logits as its embedding.

    It computes in the precision of its weights. Pictures of other sizes than ``image_size`` are brought to it first.
    """

    reads: Literal["noisy"] = "noisy"
    full_depth = 1

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config, body = config, config.body
        base = body.model_channels
        self.time_embed = nn.Sequential(nn.Linear(base, 4 * base), nn.SiLU(), nn.Linear(4 * base, 4 * base))
        widths = [int(base * m) for m in body.channel_mult]
        build, last = Builder(body, 4 * base, nn, {}), widths[-1]
        self.input_blocks = build.encoder(widths)
        self.middle_block = Block(build.res(last, last), AttentionBlock(last, body, nn), build.res(last, last))
        pool = AttentionPool(body.image_size // body.multiple, last, body.head_channels, config.classes)
        self.out = nn.Sequential(nn.GroupNorm(32, last), nn.SiLU(), pool)
        self.table = TimestepTable.from_name(body.beta_schedule)

    if TYPE_CHECKING:  # a module's call is its forward

        def __call__(self, image: Tensor, t: Tensor, depth: int) -> Features: ...

    @property
    def view(self) -> str:
        """What it reads."""
        return self.config.view

    @property
    def image_size(self) -> int:
        """Side of the pictures that it was trained on."""
        return self.config.body.image_size

    def forward(self, image: Tensor, t: Tensor, depth: int) -> Features:
        """Logits of x_t (B, 3, H, W) in VP scaling, data in -1..1, at t (1,) or (B,), as an embedding (B, classes)."""
        return Features((), self.logits(resize(image.to(next(self.parameters()).dtype), self.image_size), t))

    def logits(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, classes) of pictures of its own size and precision."""
        embed = self.time_embed(brought(timestep_embedding(t, self.config.body.model_channels).to(x.dtype), x))
        h = F.pixel_unshuffle(x, self.config.body.patch) if self.config.body.patch > 1 else x
        for block in self.input_blocks:
            h = block(h, embed)
        logits: Tensor = self.out(self.middle_block(h, embed))
        return logits

    def noise_gain(self, height: int, width: int) -> float:
        return averaging_gain(self.image_size, height, width)

    def number_of(self, name: str) -> int:
        """The class of a name (capitals don't matter) or of a number in words, "207". Raises ValueError for others."""
        names = [known.casefold() for known in self.config.class_names]
        wanted, classes = name.strip().casefold(), self.config.classes
        if wanted in names:
            return names.index(wanted)
        if wanted.isdecimal() and int(wanted) < classes:
            return int(wanted)
        near = difflib.get_close_matches(wanted, names, 5, 0.5) or names[:SHOWN]
        named = f", or a name such as {', '.join(near)}" if near else "; this classifier's file gives them no names"
        raise ValueError(
            f'There is no class "{printable(name[:60])}" in this classifier; wanted a number of 0..{classes - 1}'
            f"{named}."
        )
