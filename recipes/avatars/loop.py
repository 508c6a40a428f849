"""What all trainings of the recipe share: schedule, EMA, checkpoints that resume, processes that share a batch."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from muon import Muon, split
from torch import Tensor, nn

SAVE_SECONDS = 60.0

Told = dict[str, Tensor]
"""What a step says for the log: names and numbers."""


@dataclass(frozen=True)
class Plan:
    """One training: ``images`` in total, ``batch`` over all processes, peak learning rate, where it is kept.

    With ``muon``, its rate, matrices are Muon's and ``lr`` is that of what is left to AdamW; ``vectors`` are names of
    matrices that are left to AdamW too. ``decay``: the last part of the run, in which rates fall to zero.
    ``bfloat16``: the loss and Muon's matrices are computed in it where that is safe (autocast); weights stay float32.
    ``seconds``: on a card (see card.py), how long it trains instead, where time is short.
    """

    out: Path
    images: int
    batch: int
    lr: float
    seed: int
    weight_decay: float = 0.01
    ema: float = 0.999
    processes: int = 1
    rank: int = 0
    muon: float = 0.0
    vectors: tuple[str, ...] = ()
    decay: float = 0.35
    bfloat16: bool = False
    seconds: float = 0.0

    @property
    def steps(self) -> int:
        return self.images // self.batch

    @property
    def share(self) -> int:
        """Images of a batch that fall to one process."""
        return self.batch // self.processes


def learning_rate(step: int, plan: Plan, warmup: int = 200) -> float:
    """Part of the peak rate: warm-up, constant, then linear to zero over the last part of the run."""
    left = (plan.steps - step) / (plan.decay * plan.steps)
    return min(1.0, (step + 1) / warmup, max(left, 0.0))


class Optimizers:
    """AdamW, or Muon for matrices and AdamW for the rest."""

    def __init__(
        self, plan: Plan, model: nn.Module, rate: Callable[[float], float | Tensor] = float, **kw: Any
    ) -> None:
        matrices, rest = split(model, plan.vectors) if plan.muon else ([], [*model.parameters()])
        rest = [p for p in rest if p.requires_grad]
        adam = torch.optim.AdamW(rest, lr=rate(plan.lr), betas=(0.9, 0.99), weight_decay=plan.weight_decay, **kw)
        dtype = torch.bfloat16 if plan.bfloat16 else torch.float32
        muon = [Muon(matrices, rate(plan.muon), dtype=dtype)] if matrices else []
        self.each: list[torch.optim.Optimizer] = [adam, *muon]
        self.peaks = [plan.lr, plan.muon]

    def set(self, part: float) -> None:
        """Rates become ``part`` of their peaks; those that are tensors stay where they are."""
        for optimizer, peak in zip(self.each, self.peaks, strict=False):
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(peak * part)
                else:
                    group["lr"] = peak * part

    def step(self) -> None:
        """One step at the rates that are set."""
        for optimizer in self.each:
            optimizer.step()

    def state_dict(self) -> list[dict[str, object]]:
        return [optimizer.state_dict() for optimizer in self.each]

    def load_state_dict(self, states: list[dict[str, object]]) -> None:
        for optimizer, state in zip(self.each, states, strict=True):
            optimizer.load_state_dict(state)


def train(
    plan: Plan, model: nn.Module, loss: Callable[[int, torch.Generator], tuple[Tensor, Told]]
) -> dict[str, Tensor]:
    """Runs or resumes a training and returns the EMA weights.

    ``loss(step, generator)`` gives this process's mean loss and numbers for the log; the generator is seeded by seed,
    step and rank, so that a resumed run draws what an uninterrupted one draws. Gradients are averaged over processes.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizers = Optimizers(plan, model)
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    first = _resume(plan, model, optimizers, average)
    started, saved, log = time.time(), time.time(), 0.0
    for step in range(first, plan.steps):
        generator = torch.Generator().manual_seed((plan.seed * 1_000_003 + step) * 64 + plan.rank)
        with torch.autocast("cpu", torch.bfloat16, enabled=plan.bfloat16):
            value, told = loss(step, generator)
        model.zero_grad(set_to_none=True)
        value.backward()
        if plan.processes > 1:
            _average_gradients(parameters, plan.processes)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizers.set(learning_rate(step, plan))
        optimizers.step()
        _follow(average, model, min(plan.ema, (1 + step) / (10 + step)))
        log = value.item() if step == first else 0.98 * log + 0.02 * value.item()
        if plan.rank == 0 and (time.time() - saved > SAVE_SECONDS or step == plan.steps - 1):
            saved = time.time()
            speed = (step + 1 - first) * plan.batch / (saved - started)
            left = (plan.steps - step - 1) * plan.batch / speed / 60
            print(
                f"step {step + 1}/{plan.steps} loss {log:.4f} {words(told)} {speed:.0f} images/s {left:.0f} min left",
                flush=True,
            )
            _save(plan, step + 1, model, optimizers, average)
    return average


def words(told: Told) -> str:
    """The numbers of a step, for the log."""
    return " ".join(f"{name} {float(value):.4f}" for name, value in told.items())


def _follow(average: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    with torch.no_grad():
        for k, v in model.state_dict().items():
            if v.is_floating_point():
                average[k].lerp_(v, 1 - decay)
            else:
                average[k].copy_(v)


def _average_gradients(parameters: list[nn.Parameter], processes: int) -> None:
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat /= processes
    for g, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        g.copy_(part.view_as(g))


def _save(plan: Plan, step: int, model: nn.Module, optimizers: Optimizers, average: dict[str, Tensor]) -> None:
    plan.out.parent.mkdir(parents=True, exist_ok=True)
    part = plan.out.with_suffix(".part")
    torch.save({"step": step, "model": model.state_dict(), "optimizers": optimizers.state_dict(), "ema": average}, part)
    os.replace(part, plan.out)


def _resume(plan: Plan, model: nn.Module, optimizers: Optimizers, average: dict[str, Tensor]) -> int:
    if not plan.out.exists():
        return 0
    kept = torch.load(plan.out, weights_only=True)
    model.load_state_dict(kept["model"])
    optimizers.load_state_dict(kept["optimizers"])
    for k, v in kept["ema"].items():
        average[k].copy_(v)
    return kept["step"]


def spawn(job: Callable[[int, int], None], processes: int) -> None:
    """Runs ``job(rank, processes)`` with one thread each, joined by gloo."""
    if processes == 1:
        torch.set_num_threads(1)
        job(0, 1)
    else:
        torch.multiprocessing.spawn(_worker, args=(job, processes), nprocs=processes)


def _worker(rank: int, job: Callable[[int, int], None], processes: int) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29531")
    dist.init_process_group("gloo", rank=rank, world_size=processes)
    job(rank, processes)
    dist.destroy_process_group()
