"""The fine-tuned RN50x16 encoders that the paper's authors published: their plain state dict in this pack's names."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping

from torch import Tensor

from .noisy_clip import NoisyCLIPConfig

IMAGE_SIZE = 256


@functools.cache
def config() -> NoisyCLIPConfig:
    """Of every published checkpoint. They come without a text tower."""
    import open_clip  # takes seconds, so at first use

    clip = open_clip.get_model_config("RN50x16")
    vision = {**clip["vision_cfg"], "image_size": IMAGE_SIZE}
    # OpenAI's activation, of which the image tower has none and the text tower that belongs to it many
    build = {**clip, "vision_cfg": vision, "quick_gelu": True, "architecture": "RN50x16-quickgelu"}
    notes = {"source": "converted from a published checkpoint of arXiv 2112.05744"}
    return NoisyCLIPConfig(build, noise_size=IMAGE_SIZE, notes=notes)


PUBLISHED = {
    "tower.visual.conv1": "visual_frozen.0",
    "tower.visual.bn1": "visual_frozen.1",
    "tower.visual.conv2": "visual_frozen.3",
    "tower.visual.bn2": "visual_frozen.4",
    "tower.visual.conv3": "visual_frozen.6",
    "tower.visual.bn3": "visual_frozen.7",
    "tower.visual.layer1": "visual_frozen.10",
    "tower.visual.layer2": "visual_frozen.11",
    "tower.visual.layer3": "visual_frozen.12",
    "tower.visual.layer4": "layer4",
    "tower.visual.attnpool": "attn_pool",
    "conditioning.time_embed": "time_embed",
    "conditioning.emb_layers": "emb_layers",
}
"""Names of modules in a NoisyCLIP, and what the published files call them."""


def check_layout(state: Mapping[str, Tensor]) -> None:
    """Raises ValueError for state dicts of something else, by their names alone."""
    if not any(name.startswith("visual_frozen.") for name in state):
        raise ValueError(
            f"Not a published noisy CLIP: its tensors are named {_few(state) or 'not at all'}; wanted visual_frozen.*, "
            "layer4.*, attn_pool.*, time_embed.* and emb_layers.*. Choose another file; a CLIP that was not fine-tuned "
            "on noise goes into Load CLIP."
        )


def translate(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict in our names, in float32.

    ``wanted``: the state dict of a NoisyCLIP of ``config()`` without text; its values are not read. Raises ValueError,
    with a few names as they are in the file, where tensors are missing, too many, or of other shapes.
    """
    names = {published_name(name): name for name in wanted}
    found = problems(state, {theirs: wanted[ours].shape for theirs, ours in names.items()})
    if found:
        raise ValueError(
            f"This is not a whole published noisy CLIP (RN50x16, {IMAGE_SIZE} pixels). {' '.join(found)} "
            "Download the file again, or choose another."
        )
    return {ours: _float32(state[theirs]) for theirs, ours in names.items()}


def published_name(name: str) -> str:
    """What the published files call a tensor of a NoisyCLIP."""
    for ours, theirs in PUBLISHED.items():
        if name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    raise AssertionError(f"{name} has no published name")


def problems(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """One sentence for each way in which a state dict differs from what was wanted."""
    misshapen = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(shape)}"
        for name, shape in shapes.items()
        if name in state and state[name].shape != shape
    ]
    found = {
        "Missing": [name for name in shapes if name not in state],
        "Unknown": [name for name in state if name not in shapes],
        "Wrong shape": misshapen,
    }
    return [f"{what}: {_few(names)}." for what, names in found.items() if names]


def _few(names: Collection[str], count: int = 3) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(list(names)[:count]) + more


def _float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
