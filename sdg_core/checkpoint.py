"""Files: safetensors with the config in the metadata; published ``.pt`` state dicts, read without executing code."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import published
from .adm import ADMConfig, ADMUNet
from .clip import CleanCLIP, Unfilled, build_clip
from .judge import Judge
from .noisy_clip import NoisyCLIP, NoisyCLIPConfig
from .tiny_autoencoder import TinyAutoencoder, encoder_from_state

BUNDLED = Path(__file__).parent / "avatars"
"""The small models that come with the pack: adm, noisy_clip and judge, each ``.safetensors``."""

TOKEN_IDS = "text.token_ids"
"""Tensor name: ids of the token embeddings kept in a file; row 0 of the table stands for all others."""

PICKLES = (".pt", ".pth")

KINDS = {
    "adm": "an ADM diffusion model",
    "noisy_clip": "a noisy CLIP",
    "judge": "an attribute judge",
    "clip": "a CLIP",
    "autoencoder": "an autoencoder",
}


def save(path: Path, kind: str, config: Mapping[str, Any], state: Mapping[str, Tensor], half: bool = True) -> None:
    """Writes weights (fp16 unless ``half`` is False) with kind and config in the metadata: the whole file, or nothing.

    Raises FileNotFoundError where there is no such folder, ValueError where it can't be written to.
    """
    tensors = {k: (_halved(v) if half else v).contiguous().clone() for k, v in state.items()}
    with _replaced(path) as part:
        save_file(tensors, str(part), _metadata(kind, config))


def _metadata(kind: str, config: Mapping[str, Any]) -> dict[str, str]:
    return {"format": "pt", "sdg": json.dumps({"kind": kind, "config": config})}


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


def _plain_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of any safetensors file. Raises FileNotFoundError and ValueError as ``load`` does."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}. Wanted: weights in safetensors format.")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path.name} is not a readable safetensors file ({error}). Download it again.") from error


def load_latent_encoder(path: Path) -> tuple[Callable[[Tensor], Tensor], int]:
    """Pictures (B, 3, H, W) in -1..1 -> model latents, and how many picture pixels a latent pixel spans.

    From a TAESD encoder, whose latents are a model's own, or the bundled autoencoder. Raises ValueError for others.
    """
    if path == BUNDLED / "latent" / "autoencoder.safetensors":
        space = read_adm(BUNDLED / "latent" / "v.safetensors")[0].latent_format
        encoder, scale, shift = load_tiny_autoencoder(path).encoder, space.scale, space.shift
    else:
        state = load_pickle(path) if path.suffix in PICKLES else _plain_tensors(path)
        encoder, scale, shift = encoder_from_state(state).requires_grad_(False).eval(), 1.0, 0.0
    halvings = sum(isinstance(layer, nn.Conv2d) and layer.stride == (2, 2) for layer in encoder)

    def encode(picture: Tensor) -> Tensor:
        return (encoder.to(picture.device)((picture + 1) / 2) - shift) * scale

    return encode, 2**halvings


def read_adm(path: Path) -> tuple[ADMConfig, dict[str, Tensor]]:
    """Config and weights of an ADM: our safetensors, or a published guided-diffusion ``.pt``."""
    if path.suffix in PICKLES:
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
    tensors = load_file(path)
    with _replaced(path) as part:
        save_file(tensors, str(part), _metadata("noisy_clip", {**config, "retrieval": rows}))


def load_noisy_clip(path: Path = BUNDLED / "noisy_clip.safetensors") -> NoisyCLIP:
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
    """One of the paper's own encoders, without a text tower."""
    state = load_pickle(path)
    published.check_layout(state)
    model = _unfilled_noisy_clip(published.CONFIG, has_text=False)
    fill(model, published.translate(state, model.state_dict()), path)
    return model.requires_grad_(False).eval()


def _unfilled_noisy_clip(config: NoisyCLIPConfig, has_text: bool) -> NoisyCLIP:
    with Unfilled():
        return NoisyCLIP(config, build_clip(config.clip), has_text)


def load_clip(path: Path = BUNDLED / "clip.safetensors") -> CleanCLIP:
    """The clean CLIP of our own kind of file, frozen, in eval mode, float32."""
    config, state = load(path, "clip")
    rows, ids = state.pop("token_embedding.weight"), state.pop("token_ids")
    state["token_embedding.weight"] = _full_table(rows, ids, config["clip"]["text_cfg"]["vocab_size"])
    clip = build_clip(config["clip"])
    fill(clip, state, path)
    size = config["clip"]["vision_cfg"]["image_size"]
    model = CleanCLIP(clip, size, config["noise_size"], config=config["clip"], source="avatars")
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
