"""How guided pictures are measured: plain statistics of pixels and of the judge's features. Nothing here knows CLIP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..method import gram, squared_distance, squared_size
from .judge import Judge


def layout_correlation(image: Tensor, reference: Tensor, cells: int = 8) -> Tensor:
    """Pearson correlation of the luminance of ``cells`` x ``cells`` areas: (B, 3, H, W) twice -> (B,)."""
    a, b = (_luminance(F.adaptive_avg_pool2d(x, cells)).flatten(1) for x in (image, reference))
    a, b = (x - x.mean(dim=1, keepdim=True) for x in (a, b))
    return F.cosine_similarity(a, b, dim=1)


def histogram_overlap(image: Tensor, reference: Tensor, bins: int = 4) -> Tensor:
    """Shared part (0..1) of two RGB histograms with ``bins`` per channel: (B, 3, H, W) in -1..1 twice -> (B,)."""
    return torch.minimum(_histogram(image, bins), _histogram(reference, bins)).sum(dim=1)


def gram_distance(judge: Judge, image: Tensor, reference: Tensor) -> Tensor:
    """Relative squared Gram distance in the judge's first maps, averaged: (B,). Not centred, as in SDG."""
    pairs = zip(_grams(judge, image), _grams(judge, reference), strict=True)
    return torch.stack([squared_distance(a, b) / squared_size(b) for a, b in pairs]).mean(dim=0)


def gram_distances(judge: Judge, images: Tensor, references: Tensor) -> Tensor:
    """As ``gram_distance``, of every picture (A, 3, H, W) to every reference (B, 3, H, W): (A, B)."""
    pairs = zip(_grams(judge, images), _grams(judge, references), strict=True)
    flat = [(a.flatten(1), b.flatten(1)) for a, b in pairs]
    return torch.stack([torch.cdist(a, b).square() / b.square().sum(dim=1) for a, b in flat]).mean(dim=0)


def _grams(judge: Judge, image: Tensor, blocks: int = 3) -> list[Tensor]:
    """Gram matrices (B, C, C) of the first maps."""
    found = []
    for block in list(judge.body)[:blocks]:
        image = block(image)
        found.append(gram(image, centred=False))
    return found


def grain(image: Tensor) -> Tensor:
    """Median absolute Laplacian of pictures (B, 3, H, W) in -1..1: (B,). Flat drawings have 0."""
    inner = image[..., 1:-1, 1:-1]
    around = image[..., :-2, 1:-1] + image[..., 2:, 1:-1] + image[..., 1:-1, :-2] + image[..., 1:-1, 2:]
    return (around - 4 * inner).abs().flatten(1).median(dim=1).values


def psnr(image: Tensor, reference: Tensor) -> Tensor:
    """Peak signal to noise of pictures in -1..1 twice, in dB: (B,)."""
    return -10 * ((image - reference) / 2).square().flatten(1).mean(dim=1).log10()


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """|m - n|^2 + tr(S + T - 2 (S T)^(1/2)) of two sets' means and covariances: features (N, D) and (M, D).

    Heusel et al. 2017, in a judge's features. The trace of the root is that of (R T R)^(1/2), R = S^(1/2).
    """
    (m, s), (n, t) = _moments(features), _moments(reference)
    values, vectors = torch.linalg.eigh(s)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ t @ root).clamp(min=0).sqrt().sum()
    return float((m - n).square().sum() + s.trace() + t.trace() - 2 * cross)


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    exact = features.double()
    return exact.mean(dim=0), exact.T.cov()


def spread(features: Tensor) -> float:
    """Mean distance between different samples of a group (N, D)."""
    return float(torch.pdist(features).mean())


def nearest(features: Tensor, bank: Tensor) -> Tensor:
    """Distance of every sample (N, D) to its nearest neighbour in a bank (M, D): (N,)."""
    return torch.cdist(features, bank).min(dim=1).values


def _luminance(image: Tensor) -> Tensor:
    return (image * image.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(dim=1)


def _histogram(image: Tensor, bins: int) -> Tensor:
    level = ((image + 1) / 2 * bins).long().clamp(0, bins - 1)
    code = (level[:, 0] * bins + level[:, 1]) * bins + level[:, 2]
    counts = F.one_hot(code.flatten(1), bins**3).sum(dim=1)
    return counts / counts.sum(dim=1, keepdim=True)
