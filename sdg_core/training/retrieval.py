"""How well an encoder finds pictures again under noise: the proof of a noisy CLIP.

At every t, noisy pictures are looked up among the clean encoder's embeddings of all N clean ones: retrieval@k is the
share whose own picture is among the k nearest. The clean encoder reads the same noisy pictures beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from ..encoders import CleanCLIP, NoisyCLIP
from ..method import embedding
from .images import ImageSet, mixed
from .sight import StudentSight

TIMESTEPS = (0, 100, 200, 300, 400, 500, 600, 700, 800, 900, 999)
BATCH = 64


@dataclass(frozen=True)
class Retrieval:
    """One t: shares in 0..1, cosine between the embedding of the noisy picture and that of the clean one."""

    t: float
    noisy_at_1: float
    clean_at_1: float
    noisy_at_5: float
    clean_at_5: float
    noisy_cosine: float
    clean_cosine: float


@torch.no_grad()
def measure_retrieval(
    noisy: NoisyCLIP,
    clean: CleanCLIP,
    sight: StudentSight,
    images: ImageSet,
    timesteps: Sequence[float] = TIMESTEPS,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Retrieval]:
    """Both encoders on the pictures of ``images`` (N of them, one noise each, the same at every t).

    Raises ValueError for fewer than two pictures.
    """
    if len(images) < 2:
        raise ValueError(f"Got {len(images)} picture to find again; wanted 2 or more, best 1,000.")
    device = next(noisy.parameters()).device
    pictures = [images[i, i] for i in range(len(images))]
    parts = [torch.stack([s.picture for s in pictures[i : i + BATCH]]) for i in range(0, len(pictures), BATCH)]
    wanted = torch.cat([embedding(clean, _shown(part, device), torch.zeros(1, device=device)) for part in parts])
    rows = []
    for number, t in enumerate(timesteps):
        found = _embeddings(noisy, clean, sight, parts, float(t), seed)
        (n1, n5, ncos), (c1, c5, ccos) = (_score(embed, wanted) for embed in found)
        rows.append(Retrieval(float(t), *(round(value, 4) for value in (n1, c1, n5, c5, ncos, ccos))))
        progress(number + 1, len(timesteps))
    return rows


def _embeddings(
    noisy: NoisyCLIP, clean: CleanCLIP, sight: StudentSight, parts: Sequence[Tensor], t: float, seed: int
) -> tuple[Tensor, Tensor]:
    """What both encoders say (N, D) of all pictures noised to t."""
    ratio = noisy.table.sigma(torch.tensor([t]))
    result: list[list[Tensor]] = [[], []]
    for number, picture in enumerate(parts):
        generator = torch.Generator().manual_seed(mixed(seed, number))
        part = _shown(picture, next(noisy.parameters()).device)
        eps = torch.randn(len(part), sight.channels, sight.size, sight.size, generator=generator).to(part)
        seen = sight.noised(sight.clean(part), eps, ratio.to(part).expand(len(part)))
        for embeds, encoder in zip(result, (noisy, clean), strict=True):
            embeds.append(embedding(encoder, seen, torch.tensor([t], device=part.device)))
    return torch.cat(result[0]), torch.cat(result[1])


def _shown(part: Tensor, device: torch.device) -> Tensor:
    """Pictures of bytes (B, 3, S, S), which wait on the CPU, on a device in -1..1."""
    return part.to(device).float() / 127.5 - 1


def _score(embed: Tensor, wanted: Tensor) -> tuple[float, float, float]:
    """Retrieval@1, @5 and the mean cosine of (N, D) with their own (N, D)."""
    similar = embed @ wanted.T
    own = similar.diagonal()[:, None]
    rank = (~(similar < own)).sum(1) - 1  # of itself none; what is as near, or no number, counts against it
    return float((rank < 1).float().mean()), float((rank < 5).float().mean()), float(own.mean())


def as_rows(curve: Sequence[Retrieval]) -> tuple[tuple[float, ...], ...]:
    """For ``NoisyCLIPConfig.retrieval``."""
    return tuple(astuple(row) for row in curve)
