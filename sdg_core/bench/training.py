"""Throughput of a fine-tuning step beside bare contrastive training steps of the same tower, batch and device.

Four kinds of step take turns:

- open_clip: image and text tower forward and backward, ClipLoss, AdamW: open_clip's own training step.
- image tower: the same without the text tower, against fixed embeddings: the least that any contrastive step does.
- fresh: ours: noise, student, teacher, loss, AdamW, average. What random crops need.
- remembered: the same where pictures repeat, and the teacher's answers are remembered.

The weights are random: speed does not depend on them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import open_clip
import torch
import torch.nn.functional as F

from ..encoders import CleanCLIP
from ..training import Augment, Finetuning, ImageSet, Settings, StudentSight, accelerator
from ..training.images import Batch
from .rows import Row, by_turns


def clean_clip(arch: str) -> tuple[CleanCLIP, torch.nn.Module]:
    """A clean CLIP of an architecture, and a bare open_clip model of it, both with random weights."""
    bare, other = (open_clip.create_model(arch) for _ in range(2))
    config = {**open_clip.get_model_config(arch), "architecture": arch}
    size = bare.visual.image_size
    side = size if isinstance(size, int) else size[0]
    return CleanCLIP(other, side, build=config).requires_grad_(False).eval(), bare


def bare_steps(model: torch.nn.Module, batch: int, side: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """open_clip's training step, and the same of the image tower alone."""
    clip: Any = model.to(device).train()
    optimizer = torch.optim.AdamW(clip.parameters(), lr=1e-5)
    tower = torch.optim.AdamW(clip.visual.parameters(), lr=1e-5)
    loss, scale = open_clip.ClipLoss(), torch.tensor(100.0, device=device)
    image = torch.randn(batch, 3, side, side, device=device)
    text = torch.randint(1, 400, (batch, clip.context_length), device=device)
    fixed = F.normalize(torch.randn(batch, clip.visual.output_dim, device=device), dim=-1)

    def both() -> None:
        value = loss(clip.encode_image(image, normalize=True), clip.encode_text(text, normalize=True), scale)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()

    def alone() -> None:
        value = loss(F.normalize(clip.visual(image), dim=-1), fixed, scale)
        tower.zero_grad(set_to_none=True)
        value.backward()
        tower.step()

    return {"open_clip": both, "image tower": alone}


def our_steps(clean: CleanCLIP, batch: int, steps: int) -> dict[str, Callable[[], object]]:
    """A step of ours with the teacher asked anew, and with its embeddings remembered."""
    pictures = torch.randint(0, 256, (batch, clean.image_size, clean.image_size, 3), dtype=torch.uint8)
    given = Batch(
        pictures.permute(0, 3, 1, 2).contiguous(), torch.arange(batch), torch.zeros(batch, dtype=torch.bool),
        torch.arange(batch), (),
    )  # fmt: skip
    result: dict[str, Callable[[], object]] = {}
    for name, augment in (("fresh", Augment()), ("remembered", Augment(1.0, False))):
        images = ImageSet(list(pictures), clean.image_size, augment)
        settings = Settings(steps=steps, batch_size=batch, learning_rate=1e-5)
        run = Finetuning(clean, StudentSight(clean.noise_size), images, settings, accelerator())
        result[name] = functools.partial(run.learner.learn, given)
    return result


def training_rows(rounds: int, arch: str = "RN50", batch: int = 16) -> list[Row]:
    """`finetune_over_open_clip`, `finetune_over_image_tower`, and the same where the teacher's answers are remembered:
    pictures per second of ours over theirs."""
    torch.manual_seed(0)
    clean, bare = clean_clip(arch)
    device = accelerator().device
    steps = {**our_steps(clean, batch, rounds + 2), **bare_steps(bare, batch, clean.image_size, device)}
    took = by_turns(steps, rounds)
    names = {"finetune": "fresh", "finetune_remembered": "remembered"}
    others = {"open_clip": "open_clip", "image_tower": "image tower"}
    return [
        *(Row(f"{name}_over_{other}", took[task] / took[ours], "x", rounds)
          for name, ours in names.items() for other, task in others.items()),
        Row("finetune_pictures_per_second", batch / took["fresh"], "1/s", rounds),
    ]  # fmt: skip
