"""The ADM UNet of guided-diffusion (Dhariwal and Nichol 2021, arXiv 2105.05233).

Module names follow the published checkpoints, so that their plain state dicts load as they are.
Additions of ours, all off for published models: a pixel-unshuffle stem (``patch`` > 1), other predictions than eps,
and networks of the angle (``time``), which serve as models of every prediction.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..method import LatentFormat, TimestepTable, brought, timestep_embedding
from .faces import Face


@dataclass(frozen=True)
class ADMConfig:
    """Everything that shapes an ADM UNet and says how its output is meant.

    ``attention_levels`` counts down-samplings: level 3 attends at 1/8 of the (unshuffled) size.
    ``heads`` counts when ``head_channels`` is 0. ``prediction`` is "eps" (published models), "v" or "flow" (eps - x_0,
    its timestep 1000 * sigma). ``beta_schedule`` names the training schedule, see ``method.betas``; a flow's samplers
    count a straight line with ``flow_shift``, see ``faces.shifted``.
    ``channels`` is 3 for pixels; a latent model has its space's, described in ``latent_format``.
    ``time`` is what the network was trained on: the "schedule" of its prediction, or the "angle", and then it passes
    for a model of any prediction (see ``faces``); such a network learns no sigma.
    """

    image_size: int = 256
    model_channels: int = 256
    channel_mult: tuple[float, ...] = (1, 1, 2, 2, 4, 4)
    num_res_blocks: int = 2
    attention_levels: tuple[int, ...] = (3, 4, 5)
    head_channels: int = 64
    heads: int = 4
    learn_sigma: bool = True
    scale_shift_norm: bool = True
    resblock_updown: bool = True
    new_attention_order: bool = False
    patch: int = 1
    prediction: str = "eps"
    beta_schedule: str = "linear"
    channels: int = 3
    latent_format: LatentFormat | None = None
    time: str = "schedule"
    flow_shift: float = 1.0

    @property
    def multiple(self) -> int:
        """Height and width must be multiples of this."""
        multiple: int = self.patch * 2 ** (len(self.channel_mult) - 1)
        return multiple

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> ADMConfig:
        """The config written by ``asdict`` through JSON: lists become tuples again."""
        kept: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        if kept.get("latent_format") is not None:
            kept["latent_format"] = LatentFormat.from_json(kept["latent_format"])
        return cls(**kept)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], image_size: int = 256) -> ADMConfig:
        """Reads the options of a published checkpoint off its keys and shapes.

        Head width (64), attention order and schedule leave no trace in a state dict: the values of the published
        256 px models are taken. Raises ValueError for class-conditional checkpoints and for foreign files.
        """
        if "input_blocks.0.0.weight" not in state or "out.2.weight" not in state:
            raise ValueError(
                "Not a guided-diffusion checkpoint: it has no input_blocks.0.0.weight and out.2.weight. "
                "Wanted: the plain state dict of an ADM UNet, for example 256x256_diffusion_uncond.pt."
            )
        if "label_emb.weight" in state:
            raise ValueError(
                "This ADM is class-conditional (it has label_emb.weight); guidance needs an unconditional one. "
                "Use for example 256x256_diffusion_uncond.pt."
            )
        model_channels = state["time_embed.0.weight"].shape[1]
        up_convs = matching(state, r"output_blocks\.(\d+)\.[12]\.conv\.weight")
        up_blocks = matching(state, r"output_blocks\.(\d+)\.[12]\.in_layers\.2\.weight")
        levels = len(up_convs or up_blocks) + 1
        blocks = matching(state, r"output_blocks\.(\d+)\.0\.in_layers\.2\.weight")
        per_level = len(blocks) // levels
        widths = [state[f"output_blocks.{i * per_level}.0.out_layers.3.weight"].shape[0] for i in range(levels)]
        attended = {i // per_level for i in matching(state, r"output_blocks\.(\d+)\.1\.qkv\.weight")}
        embed = state["input_blocks.1.0.emb_layers.1.weight"].shape[0]
        return cls(
            image_size=image_size,
            model_channels=model_channels,
            channel_mult=tuple(w / model_channels for w in reversed(widths)),
            num_res_blocks=per_level - 1,
            attention_levels=tuple(sorted(levels - 1 - i for i in attended)),
            learn_sigma=state["out.2.weight"].shape[0] == 2 * state["input_blocks.0.0.weight"].shape[1],
            scale_shift_norm=embed == 2 * state["input_blocks.1.0.out_layers.3.weight"].shape[0],
            resblock_updown=not up_convs,
        )


def matching(state: Mapping[str, Tensor], pattern: str) -> list[int]:
    """The numbers that a pattern's group has among the names of a state dict, ascending."""
    return sorted({int(m[1]) for key in state if (m := re.fullmatch(pattern, key))})


def _zero(layer: nn.Module) -> None:
    """Residual branches and the output start at zero, as in guided-diffusion."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


class Upsample(nn.Module):
    """Nearest neighbour to twice the size, then an optional 3x3 convolution."""

    def __init__(self, channels: int, use_conv: bool, ops: Any, **kw: Any) -> None:
        super().__init__()
        self.conv = ops.Conv2d(channels, channels, 3, padding=1, **kw) if use_conv else None

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        if self.conv is not None:
            x = self.conv(x)
        return x


class Downsample(nn.Module):
    """Half the size, by a strided 3x3 convolution or by averaging."""

    def __init__(self, channels: int, use_conv: bool, ops: Any, **kw: Any) -> None:
        super().__init__()
        self.op = ops.Conv2d(channels, channels, 3, stride=2, padding=1, **kw) if use_conv else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.op(x)
        return x


class ResBlock(nn.Module):
    """Residual block conditioned on the embedding of t; ``resample`` halves or doubles the size inside."""

    def __init__(
        self, channels: int, embed: int, out: int, config: ADMConfig, ops: Any, resample: str = "", **kw: Any
    ) -> None:
        super().__init__()
        self.scale_shift = config.scale_shift_norm
        self.in_layers = nn.Sequential(
            ops.GroupNorm(32, channels, **kw), nn.SiLU(), ops.Conv2d(channels, out, 3, padding=1, **kw)
        )
        resampler = {"up": Upsample, "down": Downsample}.get(resample)
        self.h_upd = resampler(channels, False, ops) if resampler else nn.Identity()
        self.x_upd = resampler(channels, False, ops) if resampler else nn.Identity()
        self.emb_layers = nn.Sequential(nn.SiLU(), ops.Linear(embed, 2 * out if self.scale_shift else out, **kw))
        self.out_layers = nn.Sequential(
            ops.GroupNorm(32, out, **kw), nn.SiLU(), nn.Dropout(0.0), ops.Conv2d(out, out, 3, padding=1, **kw)
        )
        self.skip_connection = nn.Identity() if out == channels else ops.Conv2d(channels, out, 1, **kw)
        _zero(self.out_layers[-1])

    def forward(self, x: Tensor, embed: Tensor) -> Tensor:
        norm, act, conv = self.in_layers
        h = conv(self.h_upd(act(norm(x))))
        embed = self.emb_layers(embed).type(h.dtype)[:, :, None, None]
        norm, act, dropout, conv = self.out_layers
        if self.scale_shift:
            scale, shift = embed.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + embed)
        x = self.skip_connection(self.x_upd(x)) + conv(dropout(act(h)))
        return x


class AttentionBlock(nn.Module):
    """Self-attention over positions. The legacy order splits heads first and q, k, v inside each head."""

    def __init__(self, channels: int, config: ADMConfig, ops: Any, **kw: Any) -> None:
        super().__init__()
        self.heads = channels // config.head_channels if config.head_channels else config.heads
        self.new_order = config.new_attention_order
        self.norm = ops.GroupNorm(32, channels, **kw)
        self.qkv = ops.Conv1d(channels, 3 * channels, 1, **kw)
        self.proj_out = ops.Conv1d(channels, channels, 1, **kw)
        _zero(self.proj_out)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        tokens = x.reshape(B, C, H * W)
        qkv = self.qkv(self.norm(tokens))
        if self.new_order:
            q, k, v = qkv.reshape(B, 3, self.heads, C // self.heads, H * W).transpose(-1, -2).unbind(1)
        else:
            q, k, v = qkv.reshape(B, self.heads, 3, C // self.heads, H * W).transpose(-1, -2).unbind(2)
        h: Tensor = F.scaled_dot_product_attention(q, k, v)
        h = self.proj_out(h.transpose(-1, -2).reshape(B, C, H * W))
        return x + h.reshape(B, C, H, W)


class Block(nn.Sequential):
    """A sequence that hands the embedding of t to its residual blocks."""

    def forward(self, x: Tensor, embed: Tensor) -> Tensor:  # type: ignore[override]  # a Sequential for its names only
        for layer in self:
            x = layer(x, embed) if isinstance(layer, ResBlock) else layer(x)
        return x


class ADMUNet(nn.Module):
    """The UNet: (x (B, C, H, W), timesteps (B,)) -> (B, C or 2 C, H, W), C = ``config.channels``.

    With ``learn_sigma`` the second half of the channels is v of eq. 15 of Nichol and Dhariwal 2021: where the log
    variance lies between its two bounds, -1..1. H and W must be multiples of ``config.multiple``.
    ``ops`` supplies the layers (torch.nn or a host's casting variants of it).
    """

    def __init__(self, config: ADMConfig, ops: Any = nn, **kw: Any) -> None:
        super().__init__()
        self.config = config
        base = config.model_channels
        embed = 4 * base
        self.time_embed = nn.Sequential(ops.Linear(base, embed, **kw), nn.SiLU(), ops.Linear(embed, embed, **kw))
        widths = [int(base * m) for m in config.channel_mult]  # 512 px models start at half
        build = Builder(config, embed, ops, kw)
        self.input_blocks = build.encoder(widths)
        self.middle_block = Block(
            build.res(widths[-1], widths[-1]), build.attention(widths[-1]), build.res(widths[-1], widths[-1])
        )
        self.output_blocks = build.decoder(widths)
        out = config.channels * config.patch**2 * (2 if config.learn_sigma else 1)
        self.out = nn.Sequential(
            ops.GroupNorm(32, widths[0], **kw), nn.SiLU(), ops.Conv2d(widths[0], out, 3, padding=1, **kw)
        )
        _zero(self.out[-1])
        angle = config.time == "angle"
        self.face = Face(config.prediction, TimestepTable.from_name(config.beta_schedule)) if angle else None

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        return self.network(x, timesteps) if self.face is None else self.face(self.network, x, timesteps)

    def network(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """What the weights compute, of whatever they were trained on: see ``ADMConfig.time``."""
        patch = self.config.patch
        embed = self.time_embed(brought(timestep_embedding(timesteps, self.config.model_channels).to(x.dtype), x))
        h = F.pixel_unshuffle(x, patch) if patch > 1 else x
        skips = []
        for block in self.input_blocks:
            h = block(h, embed)
            skips.append(h)
        h = self.middle_block(h, embed)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), embed)
        h = self.out(h)
        return F.pixel_shuffle(h, patch) if patch > 1 else h


class Builder:
    """Builds the halves of the UNet in the order of the published checkpoints."""

    def __init__(self, config: ADMConfig, embed: int, ops: Any, kw: dict[str, Any]) -> None:
        self.config, self.embed, self.ops, self.kw = config, embed, ops, kw
        self.skips: list[int] = []

    def res(self, channels: int, out: int, resample: str = "") -> ResBlock:
        return ResBlock(channels, self.embed, out, self.config, self.ops, resample, **self.kw)

    def attention(self, channels: int) -> AttentionBlock:
        return AttentionBlock(channels, self.config, self.ops, **self.kw)

    def resample(self, channels: int, direction: str) -> nn.Module:
        if self.config.resblock_updown:
            return self.res(channels, channels, direction)
        return {"up": Upsample, "down": Downsample}[direction](channels, True, self.ops, **self.kw)

    def encoder(self, widths: list[int]) -> nn.ModuleList:
        stem = self.config.channels * self.config.patch**2
        blocks = [Block(self.ops.Conv2d(stem, widths[0], 3, padding=1, **self.kw))]
        channels, self.skips = widths[0], [widths[0]]
        for level, width in enumerate(widths):
            for _ in range(self.config.num_res_blocks):
                layers: list[nn.Module] = [self.res(channels, width)]
                channels = width
                if level in self.config.attention_levels:
                    layers.append(self.attention(channels))
                blocks.append(Block(*layers))
                self.skips.append(channels)
            if level < len(widths) - 1:
                blocks.append(Block(self.resample(channels, "down")))
                self.skips.append(channels)
        return nn.ModuleList(blocks)

    def decoder(self, widths: list[int]) -> nn.ModuleList:
        blocks, skips, channels = [], list(self.skips), widths[-1]
        for level, width in reversed(list(enumerate(widths))):
            for i in range(self.config.num_res_blocks + 1):
                layers: list[nn.Module] = [self.res(channels + skips.pop(), width)]
                channels = width
                if level in self.config.attention_levels:
                    layers.append(self.attention(channels))
                if level > 0 and i == self.config.num_res_blocks:
                    layers.append(self.resample(channels, "up"))
                blocks.append(Block(*layers))
        return nn.ModuleList(blocks)
