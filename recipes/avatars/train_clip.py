"""The small CLIP of the bundled world, trained on captions made from the labels.

`python train_clip.py --data DIR --out DIR` trains (or resumes) on the CPU and prints zero-shot accuracies.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

from data import LABELS, STYLE_WORDS, caption, load, phrase
from loop import Plan, Told, spawn, train
from open_clip.model import CLIP
from torch import Tensor

from sdg_core.method import Placed

CONFIG = {
    "embed_dim": 128,
    "vision_cfg": {"layers": [1, 2, 2, 1], "width": 24, "image_size": 64, "head_width": 64},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 2},
}
NOISE_SIZE = 32  # the size of the pictures, enlarged to the tower's 64
MEAN, STD = Placed((0.48145466, 0.4578275, 0.40821073)), Placed((0.26862954, 0.26130258, 0.27577711))


def vocabulary(labels: np.ndarray) -> Tensor:
    """Ids of all tokens that the captions use, ascending (so that the end token stays the largest)."""
    rng = random.Random(0)
    tokens = tokenizer()([caption(row, rng) for row in labels[:20_000]])
    return torch.unique(tokens)


def tokenizer() -> open_clip.SimpleTokenizer:
    return open_clip.SimpleTokenizer(context_length=CONFIG["text_cfg"]["context_length"])


def build(words: int) -> CLIP:
    """The CLIP with a table of ``words`` used tokens and one shared row (index 0) for all others."""
    text = {**CONFIG["text_cfg"], "vocab_size": words + 1}
    model = CLIP(CONFIG["embed_dim"], CONFIG["vision_cfg"], text)
    model.visual.to(memory_format=torch.channels_last)
    return model


def token_table(used: Tensor) -> Tensor:
    """Standard token id -> row of the small table."""
    table = torch.zeros(CONFIG["text_cfg"]["vocab_size"], dtype=torch.long)
    table[used] = torch.arange(1, len(used) + 1)
    return table


def prepare(images: Tensor) -> Tensor:
    """Pictures (B, 3, 32, 32) in -1..1 as the tower wants them: enlarged and normalised."""
    mean, std = (placed.like(images).view(1, 3, 1, 1) for placed in (MEAN, STD))
    large = F.interpolate(images, CONFIG["vision_cfg"]["image_size"], mode="bilinear", antialias=False)
    return (((large + 1) / 2 - mean) / std).contiguous(memory_format=torch.channels_last)


def shifted(images: Tensor, generator: torch.Generator | None, reach: int = 2) -> Tensor:
    """Every picture moved by up to ``reach`` pixels, its border repeated."""
    B, _, H, W = images.shape
    padded, device = F.pad(images, (reach,) * 4, mode="replicate"), images.device
    dy, dx = torch.randint(0, 2 * reach + 1, (2, B), generator=generator, device=device)
    rows = (dy[:, None] + torch.arange(H, device=device))[:, None, :, None]
    columns = (dx[:, None] + torch.arange(W, device=device))[:, None, None, :]
    sample, channel = torch.arange(B, device=device), torch.arange(3, device=device)
    return padded[sample[:, None, None, None], channel[None, :, None, None], rows, columns]


class Loss:
    """Symmetric InfoNCE between pictures and random captions of them (open_clip's ClipLoss)."""

    def __init__(self, model: CLIP, images: Tensor, labels: np.ndarray, batch: int) -> None:
        self.model, self.images, self.labels, self.batch = model, images, labels, batch
        self.tokenizer, self.table = tokenizer(), token_table(vocabulary(labels))
        self.loss = open_clip.ClipLoss()

    def __call__(self, step: int, generator: torch.Generator) -> tuple[Tensor, Told]:
        index = torch.randint(len(self.images), (self.batch,), generator=generator)
        images = shifted(self.images[index].float() / 127.5 - 1, generator)
        rng = random.Random(int(torch.randint(2**62, (1,), generator=generator)))
        tokens = self.table[self.tokenizer([caption(self.labels[i], rng) for i in index.tolist()])]
        image, text, scale = self.model(prepare(images), tokens)
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=4.6052)
        return self.loss(image, text, scale), {"scale": scale}


@torch.no_grad()
def zero_shot(model: CLIP, images: Tensor, labels: np.ndarray, table: Tensor) -> dict[str, float]:
    """Accuracy per attribute, each value named by one short prompt, on renders that show the attribute."""
    model.eval()
    features = torch.cat(
        [model.encode_image(prepare(b.float() / 127.5 - 1), normalize=True) for b in images.split(500)]
    )
    result = {}
    for column, (name, values) in enumerate(LABELS.items()):
        prompts = [STYLE_WORDS[v] if name == "style" else f"a person with {phrase(name, v)}" for v in values]
        text = model.encode_text(table[tokenizer()(prompts)], normalize=True)
        truth = torch.from_numpy(labels[:, column]).long()
        guess = (features @ text.T).argmax(1)
        result[name] = (guess == truth)[truth >= 0].float().mean().item()
    return result


def job(rank: int, processes: int, data: Path, out: Path, images: int) -> None:
    plan = Plan(out / "clip.pt", images, batch=128, lr=1e-3, seed=2, weight_decay=0.05)
    torch.manual_seed(plan.seed)
    pictures, labels = load(data, "train")
    used = vocabulary(labels)
    model = build(len(used))
    pictures = torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()
    model.load_state_dict(train(plan, model, Loss(model, pictures, labels, plan.share)))
    held_out, truth = load(data, "test")
    print(zero_shot(model, torch.from_numpy(held_out).permute(0, 3, 1, 2), truth, token_table(used)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=320_000)
    args = parser.parse_args()
    spawn(lambda rank, n: job(rank, n, args.data, args.out, args.images), 1)
