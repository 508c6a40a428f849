"""Files: safetensors with the config in the metadata; published ``.pt`` state dicts, read without executing code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .adm import ADMConfig, ADMUNet
from .clip import CleanCLIP, build_clip
from .judge import Judge
from .noisy_clip import NoisyCLIP, NoisyCLIPConfig
from .tiny_autoencoder import TinyAutoencoder

BUNDLED = Path(__file__).parent / "avatars"
"""The small models that come with the pack: adm, noisy_clip and judge, each ``.safetensors``."""

TOKEN_IDS = "text.token_ids"
"""Tensor name: ids of the token embeddings kept in a file; row 0 of the table stands for all others."""

KINDS = {
    "adm": "an ADM diffusion model",
    "noisy_clip": "a noisy CLIP",
    "judge": "an attribute judge",
    "clip": "a CLIP",
    "autoencoder": "an autoencoder",
}


def save(path: Path, kind: str, config: Mapping[str, Any], state: Mapping[str, Tensor], half: bool = True) -> None:
    """Writes weights (fp16 unless ``half`` is False) with kind and config in the metadata."""
    tensors = {k: (v.half() if half and v.dtype == torch.float32 else v).contiguous().clone() for k, v in state.items()}
    save_file(tensors, str(path), {"format": "pt", "sdg": json.dumps({"kind": kind, "config": config})})


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


def read_adm(path: Path) -> tuple[ADMConfig, dict[str, Tensor]]:
    """Config and weights of an ADM: our safetensors, or a published guided-diffusion ``.pt``."""
    if path.suffix in (".pt", ".pth"):
        state = load_pickle(path)
        return ADMConfig.from_state_dict(state), state
    config, state = load(path, "adm")
    return ADMConfig.from_json(config), state


def load_adm(path: Path = BUNDLED / "adm.safetensors") -> ADMUNet:
    """The UNet, frozen, in eval mode, float32."""
    config, state = read_adm(path)
    unet = ADMUNet(config)
    fill(unet, state, path)
    return unet.requires_grad_(False).eval()


def save_noisy_clip(path: Path, model: NoisyCLIP, token_ids: Tensor | None = None) -> None:
    """Writes a NoisyCLIP. With ``token_ids``, its token table is a small one: row 0 for unknown tokens, then those."""
    state = dict(model.state_dict())
    if token_ids is not None:
        state[TOKEN_IDS] = token_ids
    save(path, "noisy_clip", {**asdict(model.config), "has_text": model.has_text}, state)


def load_noisy_clip(path: Path = BUNDLED / "noisy_clip.safetensors") -> NoisyCLIP:
    """A NoisyCLIP with its standard token table, frozen, in eval mode, float32."""
    config, state = load(path, "noisy_clip")
    has_text = config.pop("has_text")
    settings = NoisyCLIPConfig.from_json(config)
    if TOKEN_IDS in state:
        state["text.token_embedding.weight"] = _full_table(
            state["text.token_embedding.weight"], state.pop(TOKEN_IDS), settings.clip["text_cfg"]["vocab_size"]
        )
    model = NoisyCLIP(settings, build_clip(settings.clip), has_text)
    fill(model, state, path)
    return model.requires_grad_(False).eval()


def load_clip(path: Path = BUNDLED / "clip.safetensors") -> CleanCLIP:
    """The clean CLIP of our own kind of file, frozen, in eval mode, float32."""
    config, state = load(path, "clip")
    rows, ids = state.pop("token_embedding.weight"), state.pop("token_ids")
    state["token_embedding.weight"] = _full_table(rows, ids, config["clip"]["text_cfg"]["vocab_size"])
    clip = build_clip(config["clip"])
    fill(clip, state, path)
    model = CleanCLIP(clip, config["clip"]["vision_cfg"]["image_size"], config["noise_size"])
    return model.requires_grad_(False).eval()


def load_tiny_autoencoder(path: Path) -> TinyAutoencoder:
    """An autoencoder of our own kind of file, frozen, in eval mode, float32."""
    config, state = load(path, "autoencoder")
    blocks = (tuple(config[f"{half}_blocks"]) for half in ("encoder", "decoder"))
    model = TinyAutoencoder(config["width"], *blocks, config["channels"])
    fill(model, state, path)
    return model.requires_grad_(False).eval()


def load_judge(path: Path = BUNDLED / "judge.safetensors") -> Judge:
    """The attribute judge, frozen, in eval mode."""
    config, state = load(path, "judge")
    judge = Judge(config["attributes"])
    fill(judge, state, path)
    return judge.requires_grad_(False).eval()


def fill(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Loads the weights. Raises ValueError, naming the file, where they don't fit the model its config describes."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path.name} does not hold the weights that its config describes: {error}") from error


def _full_table(rows: Tensor, token_ids: Tensor, vocabulary: int) -> Tensor:
    """Small token table (1 + N, C) -> standard one (vocabulary, C): row 0 everywhere but at the N ids."""
    table = rows[:1].repeat(vocabulary, 1)
    table[token_ids] = rows[1:]
    return table
