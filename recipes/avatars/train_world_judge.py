"""The judge of the 128 px world, at 64 px: attributes of renders that no other model was trained on.

Own split, own seed, own augmentation. `python train_world_judge.py --data DIR --out DIR` trains (or resumes) and prints
its accuracy on held-out renders, and on what the trained autoencoder makes of them where there is one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from data import LABELS
from loop import Plan, spawn, train
from train_judge import Loss, accuracy
from world_data import in_memory, load

from sdg_core.avatars import Judge

CONFIG = {"width": 24, "size": 64}


def job(rank: int, processes: int, data: Path, out: Path, images: int) -> None:
    plan = Plan(out / "world_judge.pt", images, batch=128, lr=1.5e-3, seed=14, ema=0.995, muon=0.02, vectors=("heads",))
    torch.manual_seed(plan.seed)
    judge = Judge(LABELS, **CONFIG)
    pictures, labels = load(data, "judge", 64)
    loss = Loss(judge, in_memory(pictures), torch.from_numpy(labels).long(), plan.share)
    judge.load_state_dict(train(plan, judge, loss))
    held_out, truth = load(data, "test", 64)
    print(accuracy(judge, in_memory(held_out), truth), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=160_000)
    args = parser.parse_args()
    spawn(lambda rank, n: job(rank, n, args.data, args.out, args.images), 1)
