"""NoisyCLIP: an open_clip model whose image tower knows how noisy its input is (SDG, section 3.3)."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..method import Features, TimestepTable, joined, precise, version_of
from .clip import CLIP_MEAN, CLIP_STD, CleanCLIP, Unfilled, tokenizer_of
from .conditioning import Norm, TimeConditioning, TokenConditioning, fold, modulated
from .towers import ViTTower

if TYPE_CHECKING:
    from open_clip.model import CLIP, CustomTextCLIP

FOLDS_KEPT = 64
"""Noise levels whose conditioning, folded into the norms, stays with an encoder: some 200 KB each of an RN50."""

DEFAULT_CROSSOVER = 100.0
"""Timestep at which a clean encoder takes over from a noisy one whose file has no measurements."""


@dataclass(frozen=True)
class NoisyCLIPConfig:
    """Everything but the weights.

    ``clip``: open_clip's model config (embed_dim, vision_cfg, text_cfg, quick_gelu, its name as "architecture").
    ``noise_size``: side of the pictures to which white noise was added in training; 0 means the tower's own size.
    ``beta_schedule`` is the schedule that t counts in. ``hidden`` and ``sinusoid`` size the time embedding. ``view`` is
    what it reads: "pixels" or "linear:<latent format>"; ``covariance`` (3, 3) is that of unit noise between the colours
    of the view, None where they are independent. ``retrieval`` holds measurements: rows (t, retrieval@1 of noisy
    pictures, the same of the clean encoder on them, and where measured both's retrieval@5 and both's cosines).
    ``notes``: base, data set, licence and the like. ``conditioning`` says where t enters: "norms" (the paper's), or
    "token" (a ViT's class token, as in GLIDE; then ``hidden`` and ``sinusoid`` are not read).
    """

    clip: Mapping[str, Any]
    noise_size: int = 0
    beta_schedule: str = "linear"
    hidden: int = 512
    sinusoid: int = 128
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    notes: Mapping[str, str] = field(default_factory=dict)
    view: str = "pixels"
    covariance: tuple[tuple[float, ...], ...] | None = None
    retrieval: tuple[tuple[float, ...], ...] = ()
    conditioning: str = "norms"

    def crossover(self) -> float:
        """The timestep below which the clean encoder retrieves better, by linear interpolation of ``retrieval``.

        0 where it never does, the last t where it always does; ``DEFAULT_CROSSOVER`` where nothing was measured.
        """
        if not self.retrieval:
            return DEFAULT_CROSSOVER
        if all(clean > noisy for _, noisy, clean, *_ in self.retrieval):
            return max(t for t, *_ in self.retrieval)
        rows = sorted(row[:3] for row in self.retrieval)
        for (t, noisy, clean), (t_next, noisy_next, clean_next) in itertools.pairwise(rows):
            lead, lead_next = clean - noisy, clean_next - noisy_next
            if lead > 0 >= lead_next:
                return t + (t_next - t) * lead / (lead - lead_next)
        return 0.0

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> NoisyCLIPConfig:
        """The config written by ``asdict`` through JSON: lists become tuples again."""
        kept = dict(fields)
        for name in ("mean", "std"):
            kept[name] = tuple(kept[name])
        for name in ("covariance", "retrieval"):
            if kept.get(name) is not None:
                kept[name] = tuple(map(tuple, kept[name]))
        return cls(**kept)

    @property
    def image_size(self) -> int:
        """Side of the tower's input."""
        size: int | tuple[int, int] = self.clip["vision_cfg"]["image_size"]
        return size if isinstance(size, int) else size[0]


class NoisyCLIP(CleanCLIP):
    """Reads x_t in VP scaling and t; gives feature maps and the pooled embedding. With its own text tower.

    At initialisation it equals the clean CLIP at every t. ``clip`` is an ``open_clip.CLIP`` built from ``config.clip``;
    its image tower moves into this model. Its text half may be absent (``has_text``); then only image guidances work.
    """

    reads = "noisy"

    def __init__(self, config: NoisyCLIPConfig, clip: CLIP | CustomTextCLIP, has_text: bool = True) -> None:
        name = config.clip.get("architecture")
        tokenizer = tokenizer_of(name) if name else None
        super().__init__(
            clip, config.image_size, config.noise_size, config.mean, config.std, has_text, tokenizer, config.clip
        )
        self.config = config
        self.conditioning = self._new_conditioning()
        self._folds: dict[tuple[object, ...], dict[str, Tensor]] = {}
        self.table = TimestepTable.from_name(config.beta_schedule)

    @property
    def view(self) -> str:
        """What it was trained to read: "pixels" or "linear:<latent format>"."""
        return self.config.view

    def forward(self, image: Tensor, t: Tensor, depth: int) -> Features:
        """Features of noisy pictures.

        image: x_t in VP scaling, (B, 3, H, W), data in -1..1. t: (1,) when the batch shares it (the conditioning is
        then folded into the norms) or (B,). depth: how many maps to compute; ``full_depth`` adds the embedding.
        """
        image = self.prepare(image)
        conditioning = self.conditioning
        if isinstance(conditioning, TokenConditioning):
            return self._by_token(conditioning(t), image, depth)
        if len(t) == 1:
            features: Features = functional_call(
                self.tower, self._folded(conditioning, t), (image, depth), tie_weights=False
            )
            return features
        with modulated(self.tower.norms(), conditioning(t)):
            features = self.tower.forward(image, depth)  # never compiled: what hooks the norms differs by noise level
        return features

    def compute_in(self, dtype: torch.dtype) -> None:
        super().compute_in(dtype)
        self._folds.clear()

    def _folded(self, conditioning: TimeConditioning, t: Tensor) -> dict[str, Tensor]:
        """The tower's norms at t (1,). Where nothing is trained and t is on the CPU, they are kept for the next call:
        the head may be larger than the tower, and a run comes back to its noise levels."""
        last = next(reversed(list(conditioning.parameters())))
        if last.requires_grad or t.device.type != "cpu":
            return fold(self.tower.norms(), conditioning(t))
        key = (float(t), last.device, last.dtype, last.data_ptr(), version_of(self))
        if key not in self._folds:
            with torch.inference_mode(False), torch.no_grad():
                self._folds[key] = fold(self.tower.norms(), conditioning(t))
            while len(self._folds) > FOLDS_KEPT:
                self._folds.pop(next(iter(self._folds)))
        return self._folds[key]

    def _new_conditioning(self) -> TimeConditioning | TokenConditioning:
        """As at the start of a training. Raises ValueError for a kind that the tower can't have."""
        if self.config.conditioning == "norms":
            widths = [_channels(layer) for _, layer in self.tower.norms()]
            return TimeConditioning(widths, self.config.hidden, self.config.sinusoid)
        if self.config.conditioning != "token" or not isinstance(self.tower, ViTTower):
            raise ValueError(
                f'Got the conditioning "{self.config.conditioning}" of a {type(self.tower).__name__}; wanted "norms", '
                'or "token" of a ViT. Use another file.'
            )
        return TokenConditioning(self.tower.visual.class_embedding)

    def _by_token(self, tokens: Tensor, image: Tensor, depth: int) -> Features:
        """One pass for a token (1, C) that all share, otherwise one for each sample: the tower knows one token."""
        rows = torch.split(image, len(image) if len(tokens) == 1 else 1)
        parts: list[Features] = [
            functional_call(
                self.tower, {"visual.class_embedding": token.to(some.dtype)}, (some, depth), tie_weights=False
            )
            for token, some in zip(tokens, rows, strict=True)
        ]
        return parts[0] if len(parts) == 1 else joined(parts)


def from_clean(clean: CleanCLIP, **settings: Any) -> NoisyCLIP:
    """A NoisyCLIP, trainable, that equals a clean CLIP at every t: where fine-tuning starts. ``clean`` stays as it is.

    ``settings`` are fields of NoisyCLIPConfig. Raises ValueError for encoders that read noise already.
    """
    if clean.reads != "denoised" or clean.build is None or clean.text is None:
        raise ValueError("Fine-tuning starts from a clean CLIP with its text tower. Load one with Load CLIP.")
    clip = copy.deepcopy(clean.text)
    clip.visual = copy.deepcopy(clean.tower.visual)
    config = NoisyCLIPConfig(clip=clean.build, mean=clean.mean, std=clean.std, **settings)
    weight = precise(next(clean.tower.parameters()))  # halves learn nothing small
    return NoisyCLIP(config, clip).to(weight).eval()


def with_text(encoder: NoisyCLIP, clip: CleanCLIP) -> NoisyCLIP:
    """An encoder like ``encoder``, on its device, with a copy of the text tower of ``clip``. Neither of them changes.

    The image tower and the conditioning are shared with ``encoder``. ``clip`` is the model from which it was
    fine-tuned, since only there do both towers speak of the same embeddings. Raises ValueError for CLIPs without a text
    tower, of another embedding width, or of another build.
    """
    build = _check_text(encoder, clip)
    assert clip.text is not None
    text = copy.deepcopy(clip.text).to(next(encoder.parameters()).device)
    text.visual = encoder.tower.visual
    with Unfilled():
        lent = NoisyCLIP(replace(encoder.config, clip={**build, "vision_cfg": encoder.config.clip["vision_cfg"]}), text)
    lent.conditioning = encoder.conditioning
    return lent.train(encoder.training)


def _check_text(encoder: NoisyCLIP, clip: CleanCLIP) -> Mapping[str, Any]:
    """open_clip's config of ``clip``. Raises ValueError where its text tower does not belong to ``encoder``."""
    build = clip.build
    if build is None or clip.text is None:
        raise ValueError("Got a CLIP without a text tower to lend. Load one with its text tower, with Load CLIP.")
    own = encoder.config.clip
    name = own.get("architecture", "the one from which it was fine-tuned")
    if own["embed_dim"] != build["embed_dim"]:
        raise ValueError(
            f"The text tower gives {build['embed_dim']} numbers and the noisy CLIP {own['embed_dim']}, so they can't "
            f"be compared. Take the text tower of this noisy CLIP's own architecture: {name}."
        )
    differing = [part for part, of in _BUILD.items() if of(own) != of(build)]
    if differing:
        raise ValueError(
            f"The text tower belongs to {build.get('architecture', 'a CLIP')}, whose {' and '.join(differing)} "
            f"differs from this noisy CLIP's, so their embeddings have nothing in common. Wanted: {name}."
        )
    return build


_BUILD: dict[str, Callable[[Mapping[str, Any]], object]] = {
    "image tower": lambda config: {**config["vision_cfg"], "image_size": None},
    "text tower": lambda config: config["text_cfg"],
    "activation (quick_gelu)": lambda config: config.get("quick_gelu", False),
}
"""What two CLIPs of one build have in common."""


def _channels(layer: Norm) -> int:
    return layer.num_features if isinstance(layer, nn.BatchNorm2d) else layer.normalized_shape[0]


def noisy(image: Tensor, eps: Tensor, t: Tensor, table: TimestepTable) -> Tensor:
    """q(x_t | x_0): sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, in VP scaling. t (B,) may be fractional."""
    ratio = table.sigma(t).to(image.device, image.dtype).view(-1, 1, 1, 1)
    norm = (1 + ratio.square()).sqrt()
    return image / norm + eps * ratio / norm
