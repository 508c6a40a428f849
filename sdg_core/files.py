"""Files: safetensors with the config in the metadata; published ``.pt`` state dicts, read without executing code."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

PICKLES = (".pt", ".pth")

KINDS = {
    "adm": "an ADM diffusion model",
    "noisy_clip": "a noisy CLIP",
    "judge": "an attribute judge",
    "clip": "a CLIP",
    "autoencoder": "an autoencoder",
    "held_out": "a judge's features of held-out renders",
    "classifier": "a noisy classifier",
}


def printable(text: object) -> str:
    """A text that somebody sent, for a message: halves of characters, which no log can write, are escaped."""
    return str(text).encode("utf-8", "backslashreplace").decode()


def save(path: Path, kind: str, config: Mapping[str, Any], state: Mapping[str, Tensor], half: bool = True) -> None:
    """Writes weights (fp16 unless ``half`` is False) with kind and config in the metadata: the whole file, or nothing.

    Raises FileNotFoundError where there is no such folder, ValueError where it can't be written to.
    """
    tensors = {k: (_halved(v) if half else v).contiguous().clone() for k, v in state.items()}
    save_as_it_is(path, kind, config, tensors)


def save_as_it_is(path: Path, kind: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """``save`` of tensors in their own dtypes."""
    metadata = {"format": "pt", "sdg": json.dumps({"kind": kind, "config": config})}
    with _replaced(path) as part:
        save_file(dict(tensors), str(part), metadata)


def _halved(tensor: Tensor) -> Tensor:
    """In fp16, but for tensors of other kinds than float32 and those with numbers beyond fp16's range."""
    if tensor.dtype != torch.float32:
        return tensor
    half = tensor.half()
    return half if torch.equal(half.isfinite(), tensor.isfinite()) else tensor


@contextmanager
def _replaced(path: Path) -> Iterator[Path]:
    """A new file beside ``path`` that takes its place when the block ends well. Otherwise ``path`` stays as it was."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {path.parent} for {path.name}. Make it, or choose another.")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.touch()
        mode = part.stat().st_mode
        yield part
        part.chmod(mode)  # safetensors makes files that only their owner may read
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} was not written: {error}. Check that its folder can be written to and that the disk has room."
        ) from error
    finally:
        part.unlink(missing_ok=True)


def load(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and float32 weights of one of our safetensors files.

    Raises FileNotFoundError where there is no such file, ValueError where it is not one of ours or of another kind.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}. Wanted: {KINDS[kind]} in safetensors format.")
    try:
        with safe_open(str(path), framework="pt") as file:
            meta = json.loads((file.metadata() or {}).get("sdg", "null"))
            state = {name: file.get_tensor(name) for name in file.keys()} if meta else {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path.name} is not a readable safetensors file ({error}). Download or export it again."
        ) from error
    if meta is None:
        raise ValueError(
            f"{path.name} is a safetensors file of another program: its metadata has no SDG config. "
            f"Wanted: {KINDS[kind]} saved by this pack."
        )
    if meta["kind"] != kind:
        raise ValueError(
            f"{path.name} holds {KINDS.get(meta['kind'], meta['kind'])}; wanted {KINDS[kind]}. "
            "Choose another file, or load this one with the node made for it."
        )
    return meta["config"], {k: v.float() if v.dtype == torch.float16 else v for k, v in state.items()}


def load_pickle(path: Path) -> dict[str, Tensor]:
    """The plain state dict of a published ``.pt``. Anything that would execute code is refused (ValueError)."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}. Wanted: a .pt checkpoint.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds here, for damage and for code alike
        raise ValueError(
            f"{path.name} was not loaded: it is damaged, or holds more than tensors (which could run code). "
            "Wanted: a plain state dict."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path.name} does not hold a plain state dict (names to tensors). Save it as one first.")
    return state


def load_plain(path: Path) -> dict[str, Tensor]:
    """All tensors of any safetensors file. Raises FileNotFoundError and ValueError as ``load`` does."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}. Wanted: weights in safetensors format.")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path.name} is not a readable safetensors file ({error}). Download it again.") from error


def fill(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Loads the weights. Raises ValueError, naming the file, where they don't fit the model its config describes."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path.name} does not hold the weights that its config describes: {error}") from error
