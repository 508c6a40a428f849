"""GLIDE's noised CLIP (Nichol et al. 2021, arXiv 2112.10741): clip_image_enc.pt and clip_text_enc.pt, in our names.

Both halves are transformers that open_clip has too: the image half is a ViT whose class token is looked up by t, one
for each of 1000 timesteps of the cosine schedule (``conditioning.TokenConditioning``). What they are is read off names
and shapes; only the width of heads, 64, leaves no trace. Prompts are read by CLIP's own tokenizer: GLIDE's token table
has 65,536 rows, of which its published tokenizer, a copy of CLIP's, uses the first 49,408.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .noisy_clip import NoisyCLIPConfig
from .published import problems

HEAD, TIMESTEPS, LOGIT_SCALE = 64, 1000, 100.0
MEAN = tuple(value / 255 for value in (122.77093945, 116.74601272, 104.09373519))
STD = tuple(value / 255 for value in (68.50053285, 66.63215831, 70.32316309))
"""CLIP's, to more digits."""

IMAGE_HALF, TEXT_HALF = "image_enc", "text_enc"
TEXT: dict[str, Any] = {"context_length": 77, "vocab_size": 65536, "width": 512, "heads": 8, "layers": 12}
"""The published text half, where only the image half is there."""

BLOCK = {
    "ln_1": "f_attn.ln",
    "attn.out_proj": "f_attn.f_c",
    "ln_2": "f_mlp.ln",
    "mlp.c_fc": "f_mlp.f_1",
    "mlp.c_proj": "f_mlp.f_2",
}
"""Names of layers of a transformer's block in open_clip, and what the published files call them."""


def is_glide(state: Mapping[str, Tensor]) -> bool:
    """Whether these are names of either half."""
    return any(name in state for name in ("blocks.input.patch_proj", "blocks.input.w_voc"))


def text_half(path: Path) -> Path:
    """Where the text half of an image half is looked for: clip_text_enc.pt beside clip_image_enc.pt."""
    return path.with_name(path.name.replace(IMAGE_HALF, TEXT_HALF))


def no_text(path: Path) -> str:
    """What to do about a missing text half."""
    wanted = text_half(path)
    name = wanted.name if wanted != path else f"clip_{TEXT_HALF}.pt (and name the image half clip_{IMAGE_HALF}.pt)"
    return (
        f"This is the image half of GLIDE's noised CLIP alone, so it cannot guide by text. Put its text half beside "
        f"{path.name}, as {name}, or use content, structure or style guidance."
    )


def config(image: Mapping[str, Tensor], text: Mapping[str, Tensor] | None) -> NoisyCLIPConfig:
    """Of an image half, with its text half where there is one. Raises ValueError where a half is none, or not whole."""
    if "blocks.input.patch_proj" not in image:
        raise ValueError(
            "This is the text half of GLIDE's noised CLIP: it has blocks.input.w_voc. Choose the image half, "
            "clip_image_enc.pt, and keep this one beside it."
        )
    width, _, _, patch = image["blocks.input.patch_proj"].shape
    places = math.isqrt(max(len(image.get("blocks.input.w_pos", ())) - 1, 0))
    inputs: dict[str, tuple[int, ...]] = {
        "patch_proj": (width, 3, patch, patch), "w_t": (TIMESTEPS, width), "w_pos": (places**2 + 1, width),
        "ln.g": (width,), "ln.b": (width,),
    }  # fmt: skip
    _check_whole(image, "image", width, inputs)
    vision = {
        "image_size": places * patch,
        "patch_size": patch,
        "width": width,
        "head_width": HEAD,
        "layers": _layers(image),
    }
    build = {
        "embed_dim": len(image["blocks.output.f.w"]),
        "vision_cfg": vision,
        "text_cfg": TEXT if text is None else _text_config(text),
    }
    notes = {"source": "converted from GLIDE's noised CLIP (arXiv 2112.10741)"}
    return NoisyCLIPConfig(build, beta_schedule="cosine", mean=MEAN, std=STD, notes=notes, conditioning="token")


def _text_config(text: Mapping[str, Tensor]) -> dict[str, Any]:
    if "blocks.input.w_voc" not in text:
        raise ValueError("The file beside GLIDE's image half is not its text half: it has no blocks.input.w_voc.")
    vocabulary, width = text["blocks.input.w_voc"].shape
    context = len(text.get("blocks.input.w_pos", ()))
    _check_whole(text, "text", width, {"w_voc": (vocabulary, width), "w_pos": (context, width)})
    return {
        "context_length": context,
        "vocab_size": vocabulary,
        "width": width,
        "heads": width // HEAD,
        "layers": _layers(text),
    }


def translate(image: Mapping[str, Tensor], text: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Both halves in the names of a NoisyCLIP of ``config``, in float32 where they are halves."""
    times, state = image["blocks.input.w_t"], _transformer(image, "tower.visual.")
    state |= {
        "conditioning.tokens": times,
        "tower.visual.class_embedding": times[0],  # not read: the conditioning's takes its place
        "tower.visual.positional_embedding": image["blocks.input.w_pos"],
        "tower.visual.conv1.weight": image["blocks.input.patch_proj"],
        "tower.visual.proj": image["blocks.output.f.w"].T,
        **_affine(image, "blocks.input.ln", "tower.visual.ln_pre"),
        **_affine(image, "blocks.output.ln", "tower.visual.ln_post"),
    }
    if text is not None:
        state |= _transformer(text, "text.") | _affine(text, "blocks.output.ln", "text.ln_final")
        state |= {
            "text.token_embedding.weight": text["blocks.input.w_voc"],
            "text.positional_embedding": text["blocks.input.w_pos"],
            "text.text_projection": text["blocks.output.f.w"].T,
            "text.logit_scale": torch.tensor(math.log(LOGIT_SCALE)),
        }
    return {name: value.float() if value.dtype == torch.float16 else value for name, value in state.items()}


def _transformer(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """All blocks. Keys have no bias in the published files, and one of zeros in open_clip's."""
    found: dict[str, Tensor] = {}
    for number in range(_layers(state)):
        theirs, ours = f"blocks.block_{number}.", f"{prefix}transformer.resblocks.{number}."
        for name, layer in BLOCK.items():
            found |= _affine(state, theirs + layer, ours + name)
        q, k, v = (f"{theirs}f_attn.f_{part}" for part in "qkv")
        biases = state[f"{q}.b"], torch.zeros_like(state[f"{q}.b"]), state[f"{v}.b"]
        found[f"{ours}attn.in_proj_weight"] = torch.cat([state[f"{part}.w"] for part in (q, k, v)])
        found[f"{ours}attn.in_proj_bias"] = torch.cat(biases)
    return found


def _affine(state: Mapping[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    """A linear layer (w, b) or a normalisation (g, b)."""
    weight = state[f"{theirs}.g"] if f"{theirs}.g" in state else state[f"{theirs}.w"]
    return {f"{ours}.weight": weight, f"{ours}.bias": state[f"{theirs}.b"]}


def _layers(state: Mapping[str, Tensor]) -> int:
    return len({found[1] for name in state if (found := re.match(r"blocks\.block_(\d+)\.", name))})


def _check_whole(state: Mapping[str, Tensor], half: str, width: int, inputs: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError, with a few names, where tensors of a half are missing, too many, or of other shapes."""
    wanted = {f"blocks.input.{name}": shape for name, shape in inputs.items()}
    for number in range(_layers(state)):
        wanted |= _block(f"blocks.block_{number}.", width)
    embed = len(state.get("blocks.output.f.w", ()))
    wanted |= _norm("blocks.output.ln", width) | {"blocks.output.f.w": (embed, width)}
    found = problems(state, wanted)
    if found:
        raise ValueError(
            f"This is not a whole {half} half of GLIDE's noised CLIP. {' '.join(found)} Download the file again, or "
            "choose another."
        )


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.g": (width,), f"{name}.b": (width,)}


def _block(name: str, width: int) -> dict[str, tuple[int, ...]]:
    shapes = _norm(f"{name}f_attn.ln", width) | _norm(f"{name}f_mlp.ln", width)
    shapes |= {f"{name}f_attn.f_{part}.w": (width, width) for part in "qkvc"}
    shapes |= {f"{name}f_attn.f_{part}.b": (width,) for part in "qvc"}
    shapes |= {f"{name}f_mlp.f_1.w": (4 * width, width), f"{name}f_mlp.f_1.b": (4 * width,)}
    return shapes | {f"{name}f_mlp.f_2.w": (width, 4 * width), f"{name}f_mlp.f_2.b": (width,)}
