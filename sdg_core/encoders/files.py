"""Files of encoders: noisy CLIPs (ours, the paper's authors' and GLIDE's), and the small clean CLIP of our own kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from ..files import PICKLES, fill, load, load_pickle, save, save_as_it_is
from . import glide, published
from .clip import CleanCLIP, Unfilled, build_clip
from .noisy_clip import NoisyCLIP, NoisyCLIPConfig

TOKEN_IDS = "text.token_ids"
"""Tensor name: ids of the token embeddings kept in a file; row 0 of the table stands for all others."""


def save_noisy_clip(path: Path, model: NoisyCLIP, token_ids: Tensor | None = None, half: bool = True) -> None:
    """Writes a NoisyCLIP, with its text tower if it has one; fp16 unless ``half`` is False.

    With ``token_ids``, its token table is a small one: row 0 for unknown tokens, then those. Raises as ``save`` does.
    """
    state = dict(model.state_dict())
    if token_ids is not None:
        state[TOKEN_IDS] = token_ids
    save(path, "noisy_clip", {**asdict(model.config), "has_text": model.has_text}, state, half)


def write_retrieval(path: Path, rows: Sequence[Sequence[float]]) -> None:
    """Puts measurements (``NoisyCLIPConfig.retrieval``) into a noisy CLIP's metadata; its tensors stay as they are."""
    config, _ = load(path, "noisy_clip")
    save_as_it_is(path, "noisy_clip", {**config, "retrieval": rows}, load_file(path))


def load_noisy_clip(path: Path) -> NoisyCLIP:
    """A NoisyCLIP with its standard token table, frozen, in eval mode, float32: ours, or a published ``.pt``.

    Raises FileNotFoundError where there is no such file, ValueError where it holds something else.
    """
    if path.suffix in PICKLES:
        return _load_published(path)
    config, state = load(path, "noisy_clip")
    has_text = config.pop("has_text")
    settings = NoisyCLIPConfig.from_json(config)
    if TOKEN_IDS in state:
        state["text.token_embedding.weight"] = _full_table(
            state["text.token_embedding.weight"], state.pop(TOKEN_IDS), settings.clip["text_cfg"]["vocab_size"]
        )
    model = _unfilled_noisy_clip(settings, has_text)
    fill(model, state, path)
    return model.requires_grad_(False).eval()


def _load_published(path: Path) -> NoisyCLIP:
    """One of the paper's own encoders, without a text tower; or GLIDE's, with it where its file is beside."""
    state = load_pickle(path)
    if glide.is_glide(state):
        return _load_glide(path, state)
    published.check_layout(state)
    model = _unfilled_noisy_clip(published.config(), has_text=False)
    fill(model, published.translate(state, model.state_dict()), path)
    return model.requires_grad_(False).eval()


def _load_glide(path: Path, image: Mapping[str, Tensor]) -> NoisyCLIP:
    beside = glide.text_half(path)
    text = load_pickle(beside) if beside != path and beside.is_file() else None
    model = _unfilled_noisy_clip(glide.config(image, text), has_text=text is not None)
    fill(model, glide.translate(image, text), path)
    if text is None:
        model.without_text = glide.no_text(path)
    return model.requires_grad_(False).eval()


def _unfilled_noisy_clip(config: NoisyCLIPConfig, has_text: bool) -> NoisyCLIP:
    with Unfilled():
        return NoisyCLIP(config, build_clip(config.clip), has_text)


def load_clip(path: Path, source: str = "") -> CleanCLIP:
    """The clean CLIP of our own kind of file, frozen, in eval mode, float32. Raises as ``load_noisy_clip`` does.

    ``source`` names the weights; default: the file's name.
    """
    config, state = load(path, "clip")
    build: Mapping[str, Any] = config["clip"]
    rows, ids = state.pop("token_embedding.weight"), state.pop("token_ids")
    state["token_embedding.weight"] = _full_table(rows, ids, build["text_cfg"]["vocab_size"])
    clip = build_clip(build)
    fill(clip, state, path)
    model = CleanCLIP(clip, build["vision_cfg"]["image_size"], config["noise_size"], build=build)
    model.source = source or path.stem
    return model.requires_grad_(False).eval()


def _full_table(rows: Tensor, token_ids: Tensor, vocabulary: int) -> Tensor:
    """Small token table (1 + N, C) -> standard one (vocabulary, C): row 0 everywhere but at the N ids."""
    table = rows[:1].repeat(vocabulary, 1)
    table[token_ids] = rows[1:]
    return table
