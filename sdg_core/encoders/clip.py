"""A clean CLIP opened up: any open_clip model, whose image tower reads finished pictures, with its text tower."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..method import Features, Placed, averaging_gain, cache_of, precise, resize
from .towers import open_tower

if TYPE_CHECKING:
    from open_clip.model import CLIP, CustomTextCLIP

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class CleanCLIP(nn.Module):
    """Feature maps and the pooled embedding of clean pictures. It reads a model's denoised estimate.

    It computes in the precision of its weights: ``.double()`` makes it float64 throughout.

    ``clip`` is an open_clip model; its image tower moves into this one. ``text`` is what is left of it, None where the
    file has no text tower (then only image guidances work). ``image_size``: side of the tower's input.
    ``picture_size``: pictures are first brought to this side, 0 for the tower's own. ``tokenizer`` maps prompts to
    tokens (N, L); None is CLIP's own. ``build`` is open_clip's config of the whole model, with its name as
    "architecture" where it has one: what a noisy CLIP of the same build needs. ``source`` names the weights.
    """

    reads: Literal["noisy", "denoised"] = "denoised"
    without_text = (
        "This CLIP has no text tower, so it cannot guide by text. Connect Load CLIP to text_from of Load Noisy CLIP "
        "(published checkpoints: RN50x16, openai), or use content, structure or style guidance."
    )

    def __init__(
        self,
        clip: CLIP | CustomTextCLIP,
        image_size: int,
        picture_size: int = 0,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        has_text: bool = True,
        tokenizer: Callable[[list[str]], Tensor] | None = None,
        build: Mapping[str, Any] | None = None,
        source: str = "",
    ) -> None:
        super().__init__()
        self.image_size, self.noise_size = image_size, picture_size or image_size
        self.mean, self.std, self.has_text, self.tokenizer = tuple(mean), tuple(std), has_text, tokenizer
        self._placed = Placed(self.mean), Placed(self.std)
        self.build, self.source = build, source
        self.tower = open_tower(clip.visual)
        clip.visual = None
        self.text = clip if has_text else None

    if TYPE_CHECKING:  # a module's call is its forward

        def __call__(self, image: Tensor, t: Tensor, depth: int) -> Features: ...

    @property
    def view(self) -> str:
        """The view that it reads."""
        return "any"

    @property
    def full_depth(self) -> int:
        """The depth that includes the embedding; ``full_depth - 1`` is the number of feature maps."""
        return self.tower.full_depth

    def forward(self, image: Tensor, t: Tensor, depth: int) -> Features:
        """Features of pictures (B, 3, H, W) in -1..1. ``t`` is not read. depth: see ``Tower``."""
        features: Features = self.tower(self.prepare(image), depth)
        return features

    def prepare(self, image: Tensor) -> Tensor:
        """Pictures of any size in -1..1 -> the tower's size, normalised as CLIP's training was."""
        dtype = next(self.tower.parameters()).dtype
        image = image.to(torch.promote_types(dtype, torch.float32))
        image = resize(resize(image, self.noise_size), self.image_size)
        mean, std = (placed.like(image).view(1, 3, 1, 1) for placed in self._placed)
        return (((image + 1) / 2 - mean) / std).to(dtype)

    def compute_in(self, dtype: torch.dtype) -> None:
        """Keeps the image tower's weights in another precision, and computes in it.

        What is compared of features is float32 all the same; the text tower and the conditioning stay as they are.
        """
        self.tower.to(dtype)
        cache_of(self).clear()

    def compile_tower(self) -> None:
        """From its next use on the image tower runs compiled (torch.compile): the first pass of each depth, batch and
        precision takes a minute or so, all others less. Needs what torch.compile needs: a C++ compiler, or Triton.

        Pictures of one batch at noise levels of their own go on as they are.
        """
        self.tower.compile()

    def noise_gain(self, height: int, width: int) -> float:
        """What ``prepare`` does to white noise of a picture this size before the tower's own enlargement: a factor on
        its standard deviation. Averaging k x k pixels divides it by k; enlarging keeps it.
        """
        return averaging_gain(self.noise_size, height, width)

    def encode_text(self, prompts: list[str]) -> Tensor:
        """Normalised text embeddings (N, D). Raises ValueError where the checkpoint came without its text tower."""
        if self.text is None:
            raise ValueError(self.without_text)
        tokenizer = self.tokenizer or _standard_tokenizer(self.text.context_length)
        device = next(self.text.parameters()).device
        return precise(self.text.encode_text(tokenizer(prompts).to(device), normalize=True))


class Unfilled(TorchFunctionMode):
    """While open, no random initial weights are drawn, which takes long in large models: others are about to be loaded.

    Everything else is computed as usual, also buffers that no file holds.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _RANDOM_FILLS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


_RANDOM_FILLS = {nn.init.kaiming_uniform_, nn.init.normal_, nn.init.uniform_, Tensor.normal_, Tensor.uniform_}


def build_clip(config: Mapping[str, Any]) -> CLIP | CustomTextCLIP:
    """The open_clip model of a config, without weights worth keeping. Nothing is downloaded."""
    from open_clip.model import CLIP, CustomTextCLIP

    vision, text = dict(config["vision_cfg"]), dict(config["text_cfg"])
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    if "hf_model_name" in text:
        text["hf_model_pretrained"] = False
    custom = config.get("custom_text", False) or "hf_model_name" in text
    others = {k: config[k] for k in ("init_logit_scale", "init_logit_bias") if k in config}
    model = CustomTextCLIP if custom else CLIP
    return model(config["embed_dim"], vision, text, quick_gelu=config.get("quick_gelu", False), **others)


@functools.cache
def _standard_tokenizer(context_length: int) -> Callable[[list[str]], Tensor]:
    """CLIP's own. Reading its list of words takes longer than a guided step of a small model, so once."""
    import open_clip  # takes seconds, so at first use

    tokenizer: Callable[[list[str]], Tensor] = open_clip.SimpleTokenizer(context_length=context_length)
    return tokenizer


def tokenizer_of(architecture: str) -> Callable[[list[str]], Tensor]:
    """Prompts -> tokens (N, L), as an architecture of open_clip reads them. Some are downloaded at first use."""
    return functools.partial(_tokens, architecture)


@functools.cache
def _tokenizer(architecture: str) -> Callable[[list[str]], Any]:
    import open_clip

    tokenizer: Callable[[list[str]], Any] = open_clip.get_tokenizer(architecture)
    return tokenizer


def _tokens(architecture: str, prompts: list[str]) -> Tensor:
    try:
        tokens = _tokenizer(architecture)(prompts)
    except OSError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"The tokenizer of {architecture} could not be loaded: {reason}. It is downloaded at first use; check the "
            "connection. Content, structure and style guidance work without it."
        ) from error
    return tokens if isinstance(tokens, Tensor) else torch.as_tensor(tokens)
