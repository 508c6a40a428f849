"""Tiny autoencoders in the layout of TAESD (Bohan 2023), of any width and depth, and encoders rebuilt from their files.

The decoder gives pictures in 0..1, the encoder takes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PREFIXES = ("taesd_encoder.", "encoder.")


class Clamp(nn.Module):
    """Latents softly bounded to -3..3."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class Block(nn.Module):
    """Residual block of three 3x3 convolutions."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(channels, out, 3, padding=1), nn.ReLU(),
            nn.Conv2d(out, out, 3, padding=1), nn.ReLU(),
            nn.Conv2d(out, out, 3, padding=1),
        )  # fmt: skip
        self.skip = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + self.skip(x))


def tiny_encoder(
    width: int | Sequence[int], blocks: tuple[int, ...], latent_channels: int, patch: int = 1
) -> nn.Sequential:
    """TAESD's encoder layout: ``blocks`` counts residual blocks by size, from full size on. TAESD: (1, 3, 3, 3).

    ``width`` is one number of channels, or one for each size. ``patch`` p first folds p x p pixels into one.
    """
    widths = _widths(width, len(blocks))
    layers: list[nn.Module] = [nn.PixelUnshuffle(patch)] if patch > 1 else []
    layers.append(nn.Conv2d(3 * patch**2, widths[0], 3, padding=1))
    for level, count in enumerate(blocks):
        if level:
            layers.append(nn.Conv2d(widths[level - 1], widths[level], 3, stride=2, padding=1, bias=False))
        layers += [Block(widths[level], widths[level]) for _ in range(count)]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], latent_channels, 3, padding=1))


def tiny_decoder(
    width: int | Sequence[int], blocks: tuple[int, ...], latent_channels: int, patch: int = 1
) -> nn.Sequential:
    """TAESD's decoder layout: ``blocks`` by size, up to full size. TAESD: (3, 3, 3, 1).

    ``width`` is one number of channels, or one for each size. ``patch`` p at last unfolds one pixel into p x p.
    """
    widths = _widths(width, len(blocks))
    layers: list[nn.Module] = [Clamp(), nn.Conv2d(latent_channels, widths[0], 3, padding=1), nn.ReLU()]
    for level, count in enumerate(blocks):
        if level:
            wide, narrow = widths[level - 1], widths[level]
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(wide, narrow, 3, padding=1, bias=False)]
        layers += [Block(widths[level], widths[level]) for _ in range(count)]
    layers.append(nn.Conv2d(widths[-1], 3 * patch**2, 3, padding=1))
    return nn.Sequential(*layers, *([nn.PixelShuffle(patch)] if patch > 1 else []))


def _widths(width: int | Sequence[int], levels: int) -> Sequence[int]:
    """One width for each size."""
    widths = [width] * levels if isinstance(width, int) else width
    if len(widths) != levels:
        raise ValueError(f"There are {levels} sizes of blocks and {len(widths)} widths. Give one width for each size.")
    return widths


class TinyAutoencoder(nn.Module):
    """Both halves: ``encoder`` from pictures in 0..1 (B, 3, H, W) to latents (B, C, h, w), ``decoder`` back.

    Widths, blocks and ``patch`` are those of ``tiny_encoder`` and ``tiny_decoder``.
    """

    def __init__(
        self,
        width: int | Sequence[int],
        encoder_blocks: tuple[int, ...],
        decoder_blocks: tuple[int, ...],
        channels: int,
        patch: int = 1,
        decoder_width: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        own = width if decoder_width is None else decoder_width
        self.width = max(*_widths(width, len(encoder_blocks)), *_widths(own, len(decoder_blocks)))
        self.latent_channels, self.downscale = channels, patch * 2 ** (len(encoder_blocks) - 1)
        self.encoder = tiny_encoder(width, encoder_blocks, channels, patch)
        self.decoder = tiny_decoder(own, decoder_blocks, channels, patch)


def encoder_from_state(state: Mapping[str, Tensor]) -> nn.Sequential:
    """The encoder of a TAESD-like file, its width, depth and latent channels read off the keys.

    Keys may carry a usual prefix ("taesd_encoder.", "encoder." or none); a file of encoder and decoder gives its
    encoder. Raises ValueError where the layers are not a tiny encoder's.
    """
    state = _without_prefix(state)
    positions = sorted({int(key.split(".")[0]) for key in state if key.split(".")[0].isdigit()})
    if "0.weight" not in state or state["0.weight"].ndim != 4 or state["0.weight"].shape[1] != 3:
        raise ValueError(
            "Not a tiny encoder: it does not start with a 2-D convolution of pictures. Wanted a file such as "
            "taesd_encoder.safetensors, in models/vae_approx."
        )
    blocks, count = [], 0
    for i in positions[1:-1]:
        if f"{i}.conv.0.weight" in state:
            count += 1
        else:  # the convolution that halves the size
            blocks.append(count)
            count = 0
    encoder = tiny_encoder(len(state["0.weight"]), (*blocks, count), len(state[f"{positions[-1]}.weight"]))
    try:
        encoder.load_state_dict({k: v.float() for k, v in state.items()})
    except RuntimeError as error:
        raise ValueError(f"Not a tiny encoder that this pack can rebuild: {error}") from error
    return encoder


def _without_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's part of a state dict, its keys from the first convolution on."""
    for prefix in PREFIXES:
        if any(key.startswith(f"{prefix}0.") for key in state):
            return {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}
    return dict(state)
