"""Throughput of a fine-tuning step beside bare contrastive training steps of the same tower, batch and device.

    python benchmarks/finetune.py --arch RN50 --batch-size 16

Four kinds of step take turns, so that whatever else the machine does falls on all of them; medians are compared.

- open_clip: image and text tower forward and backward, ClipLoss, AdamW: open_clip's own training step.
- image tower: the same without the text tower, against fixed embeddings: the least that any contrastive step does.
- ours, teacher fresh: noise, student, teacher, loss, AdamW, average. What random crops need.
- ours, teacher remembered: the same where pictures repeat.

The weights are random: speed does not depend on them. No pictures are read from disk.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

from sdg_core.avatars import load_bundled_clip
from sdg_core.encoders import CleanCLIP
from sdg_core.training import Augment, Finetuning, ImageSet, Settings, StudentSight, accelerator
from sdg_core.training.images import Batch


def clean_clip(arch: str) -> tuple[CleanCLIP, torch.nn.Module]:
    """A clean CLIP of an architecture, and a bare open_clip model of it, both with random weights."""
    if arch == "avatars":
        from sdg_core.encoders import build_clip

        clean = load_bundled_clip()
        return clean, build_clip(clean.build)
    bare, other = (open_clip.create_model(arch) for _ in range(2))
    config = {**open_clip.get_model_config(arch), "architecture": arch}
    size = bare.visual.image_size
    side = size if isinstance(size, int) else size[0]
    return CleanCLIP(other, side, build=config).requires_grad_(False).eval(), bare


def bare_steps(model: torch.nn.Module, batch: int, side: int, device: torch.device) -> dict[str, Callable[[], None]]:
    """open_clip's training step, and the same of the image tower alone."""
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    tower = torch.optim.AdamW(model.visual.parameters(), lr=1e-5)
    loss, scale = open_clip.ClipLoss(), torch.tensor(100.0, device=device)
    image = torch.randn(batch, 3, side, side, device=device)
    text = torch.randint(1, 400, (batch, model.context_length), device=device)
    fixed = F.normalize(torch.randn(batch, model.visual.output_dim, device=device), dim=-1)

    def both() -> None:
        value = loss(model.encode_image(image, normalize=True), model.encode_text(text, normalize=True), scale)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()

    def alone() -> None:
        value = loss(F.normalize(model.visual(image), dim=-1), fixed, scale)
        tower.zero_grad(set_to_none=True)
        value.backward()
        tower.step()

    return {"open_clip": both, "image tower": alone}


def our_steps(clean: CleanCLIP, batch: int, steps: int) -> dict[str, Callable[[], None]]:
    """A step of ours with the teacher asked anew, and with its embeddings remembered."""
    pictures = torch.randint(0, 256, (batch, clean.image_size, clean.image_size, 3), dtype=torch.uint8)
    given = Batch(
        pictures.permute(0, 3, 1, 2).contiguous(), torch.arange(batch), torch.zeros(batch, dtype=torch.bool),
        torch.arange(batch), (),
    )  # fmt: skip
    result = {}
    for name, augment in (("fresh", Augment()), ("remembered", Augment(1.0, False))):
        images = ImageSet(list(pictures), clean.image_size, augment)
        settings = Settings(steps=steps, batch_size=batch, learning_rate=1e-5)
        run = Finetuning(clean, StudentSight(clean.noise_size), images, settings, accelerator())
        result[f"ours, teacher {name}"] = lambda run=run: run.learner.learn(given)
    return result


def measure(arch: str, batch: int, rounds: int) -> dict:
    """Images per second of every kind of step, and how ours compare."""
    torch.manual_seed(0)
    clean, bare = clean_clip(arch)
    device = accelerator().device
    steps = {**our_steps(clean, batch, rounds + 2), **bare_steps(bare, batch, clean.image_size, device)}
    spans: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first warms up
                spans[name].append(time.perf_counter() - start)
    speed = {name: batch / statistics.median(times) for name, times in spans.items()}
    ours = [name for name in speed if name.startswith("ours")]
    return {
        "arch": arch, "batch_size": batch, "device": str(device), "threads": torch.get_num_threads(),
        "images_per_second": speed,
        "of open_clip": {name: speed[name] / speed["open_clip"] for name in ours},
        "of the image tower alone": {name: speed[name] / speed["image tower"] for name in ours},
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="RN50")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(json.dumps(measure(args.arch, args.batch_size, args.rounds), indent=2))
