"""Self-supervised fine-tuning of a clean CLIP into a noisy one, on pictures without captions (SDG, section 3.3).

The student sees x_t and t, the frozen teacher the clean picture; ``learner`` has the loss. Hugging Face's Accelerate
runs it on one device or many.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from ..encoders import CleanCLIP, NoisyCLIP, from_clean
from .extras import extra
from .images import Batch, Draws, ImageSet, ImageShards, collate
from .learner import Learner
from .settings import Progress, Settings
from .sight import StudentSight
from .states import load_state, save_state

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)


def accelerator(cpu: bool = False, precision: str = "no") -> Accelerator:
    """On the best device here, or the CPU; over as many processes as `accelerate launch` or `torchrun` started.

    ``precision`` of the forward pass: "no", "bf16" or "fp16". Batches are shared among processes, not multiplied.
    """
    accelerate = extra("accelerate")
    shared = accelerate.DataLoaderConfiguration(split_batches=True)
    made: Accelerator = accelerate.Accelerator(cpu=cpu, mixed_precision=precision, dataloader_config=shared)
    return made


class Finetuning:
    """One fine-tuning, from a clean CLIP to ``result()``.

        run = Finetuning(clean, sight, images, Settings(), accelerator())
        for progress in run.steps():
            ...
        model = run.result()

    ``clean`` stays as it is and is the teacher; the student has its precision. ``images`` draws pictures of its
    ``size``. ``save`` writes everything that ``resume`` needs to continue to the same result. Raises ValueError for
    pictures, settings and processes that don't fit each other.
    """

    def __init__(
        self,
        clean: CleanCLIP,
        sight: StudentSight,
        images: ImageSet | ImageShards,
        settings: Settings,
        accelerator: Accelerator,
        workers: int = 0,
    ) -> None:
        check_shares(images, settings, accelerator)
        self.settings, self.sight, self.images, self.workers = settings, sight, images, workers
        self.accelerator, self.source = accelerator, clean.source
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)  # the time embedding starts at random
            self.model = from_clean(clean, **sight.config()).to(accelerator.device)
        counts = (len(images), images.augment.variants) if isinstance(images, ImageSet) else (0, 0)
        self.learner = Learner(self.model, clean, sight, settings, accelerator, *counts)
        self.step, self.losses, self.skipped = 0, list[float](), set[str]()

    def steps(self) -> Iterator[Progress]:
        """Trains, one Progress a step, from where it stands (0, or where ``resume`` found it) to the last step."""
        begun, first = time.monotonic(), self.step
        for batch in self._batches():
            self._note_unreadable(batch)
            info_nce, cosine = self.learner.learn(batch)
            loss = info_nce + self.settings.cosine_weight * (1 - cosine)
            self.losses.append(loss)
            self.step += 1
            rate = (self.step - first) / (time.monotonic() - begun)
            yield Progress(
                self.step, self.settings.steps, loss, info_nce, cosine, rate * self.settings.batch_size,
                (self.settings.steps - self.step) / rate,
            )  # fmt: skip

    def _batches(self) -> Iterator[Batch]:
        s, workers = self.settings, self.workers
        left = range(self.step, s.steps)
        options: dict[str, Any] = {"num_workers": workers, "collate_fn": collate, "persistent_workers": False}
        if isinstance(self.images, ImageSet):
            draws = Draws(len(self.images), s.batch_size, left, s.seed)
            loader = DataLoader(self.images, batch_sampler=draws, **options)
            yield from self.accelerator.prepare_data_loader(loader, device_placement=False)
            return
        processes = self.accelerator.num_processes
        options["num_workers"] = min(workers, len(self.images.names) // processes)  # each reads shards of its own
        stream = iter(DataLoader(self.images, batch_size=s.batch_size // processes, **options))
        for _ in range(self.step):
            next(stream)
        for _ in left:
            yield next(stream)

    def _note_unreadable(self, batch: Batch) -> None:
        for name in set(batch.skipped) - self.skipped:
            log.warning("Skipped %s: Pillow can't read it.", name)
            self.skipped.add(name)

    def agreed(self, flag: bool) -> bool:
        """Whether any process raises the flag; the same answer on all."""
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device)))

    def result(self, **fields: Any) -> NoisyCLIP:
        """The NoisyCLIP of the averaged weights so far, frozen; ``fields`` of its config are set on the way.

        It shares its memory with this run: train no further afterwards.
        """
        self.learner.average.copy_to(self.learner.trained)
        self.model.config = replace(self.model.config, **fields)
        return self.model.requires_grad_(False).eval()

    def save(self, folder: Path) -> None:
        """Writes all that ``resume`` needs into ``folder``/step-N; whatever is killed meanwhile, one complete state
        stays. Older ones go."""
        save_state(self.accelerator, folder, self._identity(), self.losses)

    def resume(self, folder: Path) -> int:
        """Continues from the newest complete state in ``folder``; its step.

        Raises FileNotFoundError where there is none, ValueError where it belongs to other settings.
        """
        self.losses = load_state(self.accelerator, folder, self._identity())
        self.step = len(self.losses)
        return self.step

    def _identity(self) -> dict[str, Any]:
        """What a run must have in common with the one that it continues."""
        images = self.images
        count = {"shards": len(images.names)} if isinstance(images, ImageShards) else {"pictures": len(images)}
        view = {"base": self.source, "view": self.sight.view.name, "size": self.sight.size}
        return {**asdict(self.settings), **view, **count}


def check_shares(images: ImageSet | ImageShards, settings: Settings, accelerator: Accelerator) -> None:
    """Raises ValueError where a batch can't be shared among the processes, or has too few pictures to draw from."""
    assert accelerator.split_batches  # every process takes its part of one batch
    processes, batch = accelerator.num_processes, settings.batch_size
    if batch % processes:
        raise ValueError(f"A batch of {batch} can't be shared by {processes} processes. Choose a multiple.")
    if isinstance(images, ImageShards) and len(images.names) < processes:
        raise ValueError(
            f"Got {len(images.names)} shards for {processes} processes; wanted one or more for each. "
            "Split the data into more shards, or start fewer processes."
        )
    if isinstance(images, ImageSet) and len(images) < batch:
        raise ValueError(
            f"Got {len(images)} pictures for a batch of {batch}; wanted at least as many, since no picture "
            "may be its own negative. Add pictures or choose a smaller batch."
        )
