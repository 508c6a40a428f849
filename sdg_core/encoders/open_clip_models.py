"""Any CLIP of open_clip: from a local file, or by open_clip's pretrained tag."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import printable
from .clip import CLIP_MEAN, CLIP_STD, CleanCLIP, tokenizer_of

if TYPE_CHECKING:
    from open_clip.model import CLIP, CustomTextCLIP


@functools.cache
def architectures() -> list[str]:
    """Names of all architectures that open_clip knows: read off its package, whose import takes seconds."""
    spec = importlib.util.find_spec("open_clip")
    assert spec is not None
    assert spec.origin is not None
    return sorted(path.stem for path in (Path(spec.origin).parent / "model_configs").glob("*.json"))


def load_file(architecture: str, path: Path) -> CleanCLIP:
    """A CLIP from a file of plain weights in open_clip's layout (.safetensors, .pt, .bin), frozen, in eval mode.

    Raises ValueError for unknown architectures, for files that don't fit, and for pickles that would run code.
    """
    import open_clip  # takes seconds, so at first use

    check_architecture(architecture)
    try:
        return _opened(architecture, open_clip.create_model(architecture, pretrained=str(path)), path.name)
    except Exception as error:  # open_clip and torch raise many kinds here, for damage, code and misfits alike
        raise ValueError(
            f"{path.name} was not loaded as {architecture}: {_first_line(error)}. Choose the architecture that the "
            "file was made for; a file must hold plain weights in open_clip's layout."
        ) from error


def download(architecture: str, tag: str, folder: Path | None = None) -> CleanCLIP:
    """A CLIP by open_clip's tag, downloaded with a bar into ``folder`` (None: open_clip's own) unless it is there.

    Raises ValueError for unknown names, naming the known ones, and where the download fails.
    """
    import open_clip

    check_architecture(architecture)
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag not in tags:
        known = f"{', '.join(tags)}. Choose one of these" if tags else "none: choose a file of weights instead"
        raise ValueError(f'open_clip has no weights "{printable(tag)}" for {architecture}. Its tags: {known}.')
    quick = bool(open_clip.get_pretrained_cfg(architecture, tag).get("quick_gelu"))  # as the weights were trained
    try:
        clip = open_clip.create_model(
            architecture, pretrained=tag, cache_dir=folder and str(folder), force_quick_gelu=quick
        )
        return _opened(architecture, clip, tag, quick)
    except Exception as error:
        raise ValueError(
            f"The weights {tag} of {architecture} could not be downloaded or read: {_first_line(error)}. "
            "Check the connection, or put the file into models/open_clip and choose it by name."
        ) from error


def load_any(config: Mapping[str, Any], tag_or_file: str) -> CleanCLIP:
    """The CLIP of a noisy CLIP's open_clip config: from a file, or by tag into open_clip's own folder.

    Raises ValueError where the config does not name its architecture, and as ``load_file`` and ``download`` do.
    """
    if "architecture" not in config:
        raise ValueError("This noisy CLIP's file does not name its architecture, so no other weights fit it for sure.")
    path = Path(tag_or_file)
    if os.path.isfile(path):
        return load_file(config["architecture"], path)
    return download(config["architecture"], tag_or_file)


def check_architecture(name: str) -> None:
    """Raises ValueError, with the nearest names, for an architecture that open_clip does not know."""
    import open_clip

    known = open_clip.list_models()  # with those that were added to it
    if name not in known:
        near = difflib.get_close_matches(name, known, 5, 0.4)
        raise ValueError(f'open_clip knows no architecture "{printable(name)}". Nearest: {", ".join(near) or "none"}.')


def _opened(architecture: str, clip: CLIP | CustomTextCLIP, weights: str, quick_gelu: bool = False) -> CleanCLIP:
    """The opened-up model, with the preprocessing and the tokenizer of its architecture."""
    import open_clip

    size = clip.visual.image_size
    tags = open_clip.list_pretrained_tags_by_model(architecture)  # a bare file does not say how pictures are normalised
    prepared = open_clip.get_pretrained_cfg(architecture, tags[0]) if tags else {}
    mean, std = prepared.get("mean") or CLIP_MEAN, prepared.get("std") or CLIP_STD
    side = size if isinstance(size, int) else size[0]
    config = {**open_clip.get_model_config(architecture), "architecture": architecture}
    config["quick_gelu"] = config.get("quick_gelu", False) or quick_gelu
    model = CleanCLIP(
        clip, side, mean=mean, std=std, tokenizer=tokenizer_of(architecture), build=config,
        source=f"{architecture}/{weights}",
    )  # fmt: skip
    return model.requires_grad_(False).eval()


def _first_line(error: Exception) -> str:
    if "weights_only" in str(error):  # torch's own text advises to switch the protection off
        return "it is a TorchScript archive, or holds more than tensors, which could run code"
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
