"""A training on one card: data and weights stay on it, and a whole step is one CUDA graph.

Same plans and losses as ``loop.train``. Steps draw from the card's own generator, seeded by the plan, so a run with the
same plan on the same card draws the same; with ``Plan.seconds`` rates follow the clock, and no two runs are alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from loop import Optimizers, Plan, Told, learning_rate, words
from torch import Tensor, nn

AHEAD, WARMUP, TELL_SECONDS = 50, 3, 10.0  # steps that are queued at most; steps before the graph is recorded

Loss = Callable[[int, "torch.Generator | None"], "tuple[Tensor, Told]"]


class Step:
    """One training step: loss, gradient, optimisers, average. ``record`` makes a CUDA graph of it."""

    def __init__(self, plan: Plan, model: nn.Module, loss: Loss) -> None:
        self.plan, self.model, self.loss = plan, model, loss
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        on_card = {"foreach": True, "capturable": True} if self.device.type == "cuda" else {"foreach": False}
        self.optimizers = Optimizers(plan, model, self._rate, **on_card)
        self.state = model.state_dict()
        self.average = {name: value.detach().clone() for name, value in self.state.items()}
        self.graph: torch.cuda.CUDAGraph | None = None
        self.told: Told = {}

    def _rate(self, rate: float) -> Tensor:
        return torch.tensor(rate, device=self.device)

    def __call__(self) -> None:
        if self.graph is None:
            self.run()
        else:
            self.graph.replay()

    def run(self) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.plan.bfloat16):
            value, told = self.loss(0, None)
        self.model.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self.optimizers.step()
        self._follow()
        self.told = {"loss": value.detach(), **{name: value.detach() for name, value in told.items()}}

    @torch.no_grad()
    def _follow(self) -> None:
        floats = [name for name, value in self.state.items() if value.is_floating_point()]
        ours, theirs = [self.average[name] for name in floats], [self.state[name] for name in floats]
        torch._foreach_lerp_(ours, theirs, 1 - self.plan.ema)

    def record(self) -> None:
        """Weights, optimisers and averages stay as they are, but for momenta of ``WARMUP`` steps at no rate."""
        self.optimizers.set(0.0)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP):
                self.run()
        torch.cuda.current_stream().wait_stream(stream)
        self.model.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run()
        self.graph = graph


def train_on_card(
    plan: Plan, model: nn.Module, loss: Loss, ready: Callable[[], None] = lambda: None
) -> dict[str, Tensor]:
    """Trains and returns the averaged weights, on the CPU. ``ready`` is called between recording and the first step."""
    torch.manual_seed(plan.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    step = Step(plan, model, loss)
    if step.device.type == "cuda":
        step.record()
    ready()
    started = told = time.time()
    marks: list[torch.cuda.Event] = []
    done, part = 0, 0.0
    while part < 1:
        at = round(part * plan.steps) if plan.seconds else done
        step.optimizers.set(min((done + 1) / 200, learning_rate(at, plan, warmup=1)))
        step()
        done += 1
        if step.device.type == "cuda":
            marks.append(torch.cuda.Event())
            marks[-1].record()
            if len(marks) > AHEAD:
                marks.pop(0).synchronize()
        now = time.time()
        part = (now - started) / plan.seconds if plan.seconds else done / plan.steps
        if now - told > TELL_SECONDS or part >= 1:
            told, speed = now, done * plan.batch / (now - started)
            print(f"{plan.out.stem} {part:.3f} step {done} {words(step.told)} {speed:.0f} images/s", flush=True)
    average = {
        name: value.detach().float().cpu() if value.is_floating_point() else value.cpu()
        for name, value in step.average.items()
    }
    plan.out.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"step": done, "ema": average}, plan.out)
    return average
