"""All that a card trains for both worlds, in ten minutes: CLIP, NoisyCLIPs, diffusion models. See card.py.

`python train_world_on_card.py --data DIR --out DIR` needs the renders of world_data.py in --data, and the latents and
format of train_world_autoencoder.py in --out. Existing results are left as they are, so a stopped run goes on with the
next training. `--device cpu --images N` rehearses it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

import small_clip
import train_adm
import train_world_clip
import train_world_latent
import train_world_noisy_clip as noisy
from card import train_on_card
from loop import Plan
from world_data import in_memory, load

from sdg_core.models import ADMUNet

IMAGES = {
    "world_clip": 900_000,
    "noisy_clip_latents": 2_400_000,
    "noisy_clip_pixels": 1_400_000,
    "world_latent": 4_600_000,
    "adm": 1_300_000,
}
BATCH = {"world_clip": 256, "noisy_clip_latents": 512, "noisy_clip_pixels": 512, "world_latent": 128, "adm": 512}


class Card:
    """The trainings, their data brought to ``device`` once. ``images`` replaces every number of images."""

    def __init__(self, data: Path, out: Path, device: str, images: int = 0) -> None:
        self.data, self.out, self.device, self.images = data, out, device, images
        pictures, self.labels = load(data, "train", 64)
        self.pictures = in_memory(pictures).to(device)
        self.words = len(train_world_clip.vocabulary(self.labels))

    def plan(self, name: str, **settings: object) -> Plan:
        images, batch = (self.images or IMAGES[name]), BATCH[name]
        if self.images:
            batch = min(batch, self.images)
        mixed = self.device != "cpu"
        return Plan(self.out / f"{name}.pt", images, batch, bfloat16=mixed, **{"weight_decay": 0.0, **settings})

    def run(self) -> None:
        """Those that have no result yet, in the order in which they need each other."""
        trainings = {
            "world_clip": self.clip,
            "noisy_clip_latents": lambda: self.noisy_clip("latents"),
            "noisy_clip_pixels": lambda: self.noisy_clip("pixels"),
            "world_latent": self.latent,
            "adm": self.adm,
        }
        for name, training in trainings.items():
            if not (self.out / f"{name}.pt").exists():
                training()

    def clip(self) -> None:
        """All losses from the start: the probe gives picture features of what is small a gradient at once."""
        torch.manual_seed(12)
        both = train_world_clip.with_probe(small_clip.build(self.words)).to(self.device)
        both["clip"].visual.to(memory_format=torch.channels_last)
        said = train_world_clip.said_of(self.labels)
        plan = self.plan(
            "world_clip",
            lr=1e-3,
            weight_decay=0.05,
            seed=12,
            muon=0.02,
            vectors=train_world_clip.VECTORS,
            ema=0.998,
            decay=0.5,
        )
        loss = train_world_clip.Loss(both, self.pictures, said, plan.batch, (1.0, 1.0))
        average = train_on_card(plan, both, loss)
        ours = {name.removeprefix("clip."): value for name, value in average.items() if name.startswith("clip.")}
        torch.save({"ema": ours}, plan.out)

    def noisy_clip(self, world: str) -> None:
        seed, name, view = noisy.SEEDS[world], f"noisy_clip_{world}", noisy.view_of(self.out, world)
        torch.manual_seed(seed)
        model = noisy.student(self.out, self.words, view).requires_grad_(True).to(self.device)
        model.text.requires_grad_(False)
        clean, small = self.seen()
        pictures = noisy.Pictures(view, self.latents() if world == "latents" else None, small)
        plan = self.plan(
            name,
            lr=4e-4,
            weight_decay=0.01,
            seed=seed,
            muon=0.01,
            vectors=train_world_clip.VECTORS,
            ema=0.998,
            decay=0.5,
        )
        model.load_state_dict(train_on_card(plan, model, noisy.Loss(model, pictures, clean, plan.batch)))
        torch.save(noisy.measured(model.cpu(), world, self.data, self.out), self.out / f"{name}_retrieval.pt")

    @torch.no_grad()
    def seen(self) -> tuple[Tensor, Tensor]:
        """Clean embeddings of all pictures, and pictures averaged to latent size."""
        clip, embeds, small = noisy.trained_clip(self.out, self.words).to(self.device), [], []
        for part in self.pictures.split(1000):
            x = part.float() / 127.5 - 1
            embeds.append(clip.encode_image(small_clip.prepare(x), normalize=True))
            small.append(F.avg_pool2d(x, 2).half())
        return torch.cat(embeds), torch.cat(small)

    def latents(self) -> Tensor:
        return torch.from_numpy(np.load(self.out / "world_latents_train.npy")).to(self.device)

    def latent(self) -> None:
        plan = self.plan(
            "world_latent", lr=1e-3, seed=13, muon=0.02, vectors=train_world_latent.VECTORS, ema=0.9995, decay=0.75
        )
        self.diffusion(plan, ADMUNet(train_world_latent.CONFIG), train_world_latent.Loss, self.latents())

    def adm(self) -> None:
        """On the renders of the 128 px world, averaged to 32 px."""
        vectors = train_world_latent.VECTORS
        plan = self.plan("adm", lr=1e-3, seed=1, muon=0.02, vectors=vectors, ema=0.998, decay=0.5)
        self.diffusion(plan, ADMUNet(train_adm.CONFIG), train_adm.Loss, train_adm.halved(self.pictures))

    def diffusion(self, plan: Plan, model: nn.Module, loss: type, x: Tensor) -> None:
        model = model.to(self.device, memory_format=torch.channels_last)
        forward = model if self.device == "cpu" else torch.compile(model)
        train_on_card(plan, model, loss(forward, x, plan.batch))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--images", type=int, default=0, help="of every training, to rehearse")
    args = parser.parse_args()
    Card(args.data, args.out, args.device, args.images).run()
