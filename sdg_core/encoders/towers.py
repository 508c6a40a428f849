"""open_clip image towers opened up: feature maps on the way, early exit, the norms in forward order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..method import Features
from .conditioning import Norm

if TYPE_CHECKING:
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer


class Tower(nn.Module):
    """An image tower of ``stages`` feature maps and then one embedding.

    ``forward(image (B, 3, S, S), depth)`` runs the first ``depth`` stages and gives as many maps; depth
    ``stages + 1`` (``full_depth``) adds the embedding. ``norms()`` names every normalisation layer on the main path.
    """

    stages: int
    visual: nn.Module

    @property
    def full_depth(self) -> int:
        return self.stages + 1

    def norms(self) -> list[tuple[str, Norm]]:
        raise NotImplementedError

    def forward(self, image: Tensor, depth: int) -> Features:
        raise NotImplementedError

    def _norm(self, name: str) -> tuple[str, Norm]:
        layer = self.get_submodule(name)
        assert isinstance(layer, Norm)
        return name, layer


class ResNetTower(Tower):
    """open_clip's ModifiedResNet: maps after the stem and after layer1..layer4. Norms of shortcuts are left alone."""

    stages = 5
    visual: ModifiedResNet

    def __init__(self, visual: ModifiedResNet) -> None:
        super().__init__()
        self.visual = visual.to(memory_format=torch.channels_last)

    def norms(self) -> list[tuple[str, Norm]]:
        names = [f"visual.bn{i}" for i in (1, 2, 3)]
        for layer in (1, 2, 3, 4):
            for block in range(len(getattr(self.visual, f"layer{layer}"))):
                names += [f"visual.layer{layer}.{block}.bn{i}" for i in (1, 2, 3)]
        return [self._norm(name) for name in names]

    def forward(self, image: Tensor, depth: int) -> Features:
        v = self.visual
        maps, x = list[Tensor](), image
        for stage in (v.stem, v.layer1, v.layer2, v.layer3, v.layer4)[:depth]:
            x = stage(x)
            maps.append(x)
        if depth <= self.stages:
            return Features(tuple(maps))
        if x.requires_grad:  # pooling gives its gradient in another format, and the blocks would hand that on
            x.register_hook(_channels_last)  # type: ignore[no-untyped-call]
        return Features(tuple(maps), v.attnpool(x))


class ViTTower(Tower):
    """open_clip's VisionTransformer: maps of the patch tokens after the embedding and each quarter of the blocks."""

    stages = 5
    visual: VisionTransformer

    def __init__(self, visual: VisionTransformer) -> None:
        super().__init__()
        self.visual = visual

    def norms(self) -> list[tuple[str, Norm]]:
        names = ["visual.ln_pre"] if isinstance(self.visual.ln_pre, nn.LayerNorm) else []
        for block in range(len(self.visual.transformer.resblocks)):
            names += [f"visual.transformer.resblocks.{block}.ln_{i}" for i in (1, 2)]
        return [self._norm(name) for name in [*names, "visual.ln_post"]]

    def forward(self, image: Tensor, depth: int) -> Features:
        v = self.visual
        blocks = v.transformer.resblocks
        ends = [round(len(blocks) * stage / (self.stages - 1)) for stage in range(self.stages)]
        tokens = v._embeds(image)
        maps, done = [], 0
        for end in ends[:depth]:
            for block in blocks[done:end]:
                tokens = block(tokens)
            done = end
            maps.append(self._as_map(tokens))
        if depth <= self.stages:
            return Features(tuple(maps))
        pooled, _ = v._pool(tokens)
        return Features(tuple(maps), pooled if v.proj is None else pooled @ v.proj)

    def _as_map(self, tokens: Tensor) -> Tensor:
        """Patch tokens (B, 1 + H W, C) -> map (B, C, H, W)."""
        H, W = self.visual.grid_size
        return torch.unflatten(tokens[:, 1:].transpose(1, 2), 2, (H, W))


class TimmTower(Tower):
    """open_clip's TimmModel (SigLIP, ConvNeXt, EVA and kin): maps by timm's own ``forward_intermediates``.

    Up to five maps, evenly spread over those that the trunk offers, the last one always among them.
    """

    visual: TimmModel

    def __init__(self, visual: TimmModel) -> None:
        super().__init__()
        self.visual = visual
        offered = len(visual.trunk.feature_info)
        self.stages = min(5, offered)
        self.indices = [(stage + 1) * offered // self.stages - 1 for stage in range(self.stages)]

    def norms(self) -> list[tuple[str, Norm]]:
        """Every LayerNorm over the channels of the trunk, without those of attention's queries and keys."""
        found: list[tuple[str, Norm]] = [
            (f"visual.trunk.{name}", layer)
            for name, layer in self.visual.trunk.named_modules()
            if isinstance(layer, nn.LayerNorm) and layer.bias is not None and not name.endswith(("q_norm", "k_norm"))
        ]
        if not found:
            raise ValueError(
                "This image tower (a timm model) has no LayerNorms, so it can't be made aware of noise. Use it clean, "
                "or choose a ResNet, a ViT or a ConvNeXt."
            )
        return found

    def forward(self, image: Tensor, depth: int) -> Features:
        trunk = self.visual.trunk
        if depth <= self.stages:
            indices = self.indices[:depth]
            maps = trunk.forward_intermediates(
                image, indices, stop_early=True, output_fmt="NCHW", intermediates_only=True
            )
            return Features(tuple(maps))
        last, maps = trunk.forward_intermediates(image, self.indices, output_fmt="NCHW")
        return Features(tuple(maps), self.visual.head(trunk.forward_head(last)))


def _channels_last(grad: Tensor) -> Tensor:
    return grad.contiguous(memory_format=torch.channels_last)


def open_tower(visual: nn.Module) -> Tower:
    """Opens up an open_clip image tower. Raises ValueError for kinds without a known inside."""
    from open_clip.modified_resnet import ModifiedResNet  # takes seconds, so at first use
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    if isinstance(visual, ModifiedResNet):
        return ResNetTower(visual)
    if isinstance(visual, VisionTransformer) and visual.transformer.batch_first:
        return ViTTower(visual)
    if isinstance(visual, TimmModel) and hasattr(visual.trunk, "forward_intermediates"):
        return TimmTower(visual)
    raise ValueError(
        f"Got an image tower of kind {type(visual).__name__}; wanted open_clip's ModifiedResNet, VisionTransformer or "
        "TimmModel. Use an architecture such as RN50, RN50x16, ViT-B-32 or ViT-L-14."
    )
