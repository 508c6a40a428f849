"""Self-supervised fine-tuning of a clean CLIP into a noisy one, on pictures without captions (SDG, section 3.3).

The student sees x_t and t, the frozen teacher the clean picture:

    loss = InfoNCE(100 E'(x_t, t) . E(x_0)) + cosine_weight (1 - cos(E'(x_t, t), E(x_0)))

InfoNCE is symmetric, over the whole batch of all processes. Hugging Face's Accelerate runs it on one device or many.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import open_clip
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .clip import CleanCLIP, unit
from .images import Batch, Draws, ImageSet, ImageShards, collate, mixed
from .noisy_clip import NoisyCLIP, from_clean
from .sight import Sight
from .towers import ResNetTower, TimmTower, Tower, ViTTower

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)

LOGIT_SCALE = 100.0
LAYERS = ("all", "last", "conditioning")
TIMESTEPS = ("uniform", "angle")
CACHED_BYTES = 2**31  # of the teacher's embeddings


@dataclass(frozen=True)
class Settings:
    """One fine-tuning.

    ``batch_size``: pictures of a step over all processes, every one a negative of the others. ``micro_batch``: pictures
    of one process that go forward together, 0 for all; the contrastive batch stays whole. ``layers``: train "all",
    the "last" stage, or only the "conditioning" (which always learns). ``timesteps``: "uniform" over the schedule, as
    in the paper, or uniform in the "angle" arctan(sigma / alpha), which spends less on pure noise.
    """

    steps: int = 10_000
    batch_size: int = 256
    micro_batch: int = 0
    learning_rate: float = 3e-4
    weight_decay: float = 0.01
    warmup: float = 0.05
    ema: float = 0.999
    cosine_weight: float = 30.0
    layers: str = "all"
    timesteps: str = "uniform"
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for settings that can't work."""
        if self.batch_size < 2:
            raise ValueError(
                f"Got a batch of {self.batch_size}; wanted 2 or more: a contrastive loss tells a picture from the "
                "others of its batch. 64 and more learn better."
            )
        if self.steps < 1:
            raise ValueError(f"Got {self.steps} steps; wanted 1 or more.")
        for name, value, known in (("layers", self.layers, LAYERS), ("timesteps", self.timesteps, TIMESTEPS)):
            if value not in known:
                raise ValueError(f'Got {name} "{value}"; wanted one of: {", ".join(known)}.')


@dataclass(frozen=True)
class Progress:
    """Where a fine-tuning stands after a step. ``loss`` and its parts are means over the batch of all processes."""

    step: int
    steps: int
    loss: float
    info_nce: float
    cosine: float
    images_per_second: float
    seconds_left: float


class Student(nn.Module):
    """The part of a NoisyCLIP that learns: noisy pictures and t -> embeddings on the unit sphere."""

    def __init__(self, model: NoisyCLIP) -> None:
        super().__init__()
        self.tower, self.conditioning = model.tower, model.conditioning
        self._whole = [model]  # in a list, so that its text tower is not a part of this

    def forward(self, image: Tensor, t: Tensor) -> Tensor:
        model = self._whole[0]
        return unit(model(image, t, model.full_depth).embed)


class Average:
    """Exponential moving average of the trained weights; the first steps count less."""

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self.decay, self.step = decay, 0
        self.weights = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def follow(self, parameters: Mapping[str, Tensor]) -> None:
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.weights.values()), [parameters[name] for name in self.weights], 1 - decay)
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "weights": self.weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step = state["step"]
        for name, weight in self.weights.items():
            weight.copy_(state["weights"][name])


class Teacher:
    """Embeddings (B, D) of clean pictures, remembered where a set has few versions of every picture."""

    def __init__(self, clip: CleanCLIP, pictures: int, variants: int) -> None:
        self.clip, self.variants = clip, variants
        width = clip.tower.visual.output_dim if hasattr(clip.tower.visual, "output_dim") else 1024
        kept = pictures * variants * width * 4 <= CACHED_BYTES
        self.known = torch.zeros(pictures, max(variants, 1), dtype=torch.bool) if kept and variants else None
        self.embeds: Tensor | None = None

    @torch.no_grad()
    def __call__(self, batch: Batch, picture: Tensor) -> Tensor:
        if self.known is None:
            return self._embed(picture)
        at = batch.index.cpu(), batch.mirrored.cpu().long() * (self.variants > 1)
        missing = ~self.known[at]
        if missing.any():
            fresh = self._embed(picture[missing.to(picture.device)]).cpu()
            if self.embeds is None:
                self.embeds = torch.zeros(*self.known.shape, fresh.shape[1])
            self.embeds[at[0][missing], at[1][missing]] = fresh
            self.known[at] = True
        return self.embeds[at].to(picture.device)

    def _embed(self, picture: Tensor) -> Tensor:
        t = torch.zeros(1, device=picture.device)
        return unit(self.clip(picture, t, self.clip.full_depth).embed)

    def state_dict(self) -> dict[str, Any]:
        return {"known": self.known, "embeds": self.embeds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.known, self.embeds = state["known"], state["embeds"]


def accelerator(cpu: bool = False, precision: str = "no") -> Accelerator:
    """On the best device here, or the CPU; over as many processes as `accelerate launch` or `torchrun` started.

    ``precision`` of the forward pass: "no", "bf16" or "fp16". Batches are shared among processes, not multiplied.
    """
    from accelerate import Accelerator, DataLoaderConfiguration

    shared = DataLoaderConfiguration(split_batches=True)
    return Accelerator(cpu=cpu, mixed_precision=precision, dataloader_config=shared)


class Finetuning:
    """One fine-tuning, from a clean CLIP to ``result()``.

        run = Finetuning(clean, sight, images, Settings(), accelerator())
        for progress in run.steps():
            ...
        model = run.result()

    ``clean`` stays as it is and is the teacher. ``images`` draws pictures of its ``size``. ``save`` writes everything
    that ``resume`` needs to continue to the same result.
    """

    def __init__(
        self,
        clean: CleanCLIP,
        sight: Sight,
        images: ImageSet | ImageShards,
        settings: Settings,
        accelerator: Accelerator,
        workers: int = 0,
    ) -> None:
        self.settings, self.sight, self.accelerator, self.images, self.workers = (
            settings, sight, accelerator, images, workers
        )  # fmt: skip
        self._check()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)  # the time embedding starts at random
            self.model = from_clean(clean, **sight.config()).to(accelerator.device)
        self.step, self.losses, self.skipped = 0, [], set()
        self.trained = freeze_but(self.model, settings.layers)
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=settings.learning_rate, betas=(0.9, 0.98), eps=1e-6,
            weight_decay=settings.weight_decay,
        )  # fmt: skip
        schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: warm_cosine(step, settings))
        self.student, self.optimizer, self.schedule = accelerator.prepare(Student(self.model), self.optimizer, schedule)
        count, variants = (len(images), images.augment.variants) if isinstance(images, ImageSet) else (0, 0)
        self.teacher = Teacher(clean.to(accelerator.device), count, variants)
        self.average = Average(self.trained, settings.ema)
        self.info_nce = open_clip.ClipLoss(rank=accelerator.process_index, world_size=accelerator.num_processes)
        accelerator.register_for_checkpointing(self.average, self.teacher)

    def _check(self) -> None:
        assert self.accelerator.split_batches  # every process takes its part of one batch
        processes, batch = self.accelerator.num_processes, self.settings.batch_size
        if batch % processes:
            raise ValueError(f"A batch of {batch} can't be shared by {processes} processes. Choose a multiple.")
        if isinstance(self.images, ImageShards) and len(self.images.names) < processes:
            raise ValueError(
                f"Got {len(self.images.names)} shards for {processes} processes; wanted one or more for each. "
                "Split the data into more shards, or start fewer processes."
            )
        if isinstance(self.images, ImageSet) and len(self.images) < batch:
            raise ValueError(
                f"Got {len(self.images)} pictures for a batch of {batch}; wanted at least as many, since no picture "
                "may be its own negative. Add pictures or choose a smaller batch."
            )

    def steps(self) -> Iterator[Progress]:
        """Trains, one Progress a step, from where it stands (0, or where ``resume`` found it) to the last step."""
        begun, first = time.monotonic(), self.step
        for batch in self._batches():
            self._note_unreadable(batch)
            info_nce, cosine = self.learn(batch)
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
        options = {"num_workers": workers, "collate_fn": collate, "persistent_workers": False}
        if isinstance(self.images, ImageSet):
            draws = Draws(len(self.images), s.batch_size, left, s.seed)
            loader = DataLoader(self.images, batch_sampler=draws, **options)
            yield from self.accelerator.prepare_data_loader(loader, device_placement=False)
            return
        processes = self.accelerator.num_processes
        options["num_workers"] = min(workers, len(self.images.names) // processes)  # each reads shards of its own
        loader = iter(DataLoader(self.images, batch_size=s.batch_size // processes, **options))
        for _ in range(self.step):
            next(loader)
        for _ in left:
            yield next(loader)

    def _note_unreadable(self, batch: Batch) -> None:
        for name in set(batch.skipped) - self.skipped:
            log.warning("Skipped %s: Pillow can't read it.", name)
            self.skipped.add(name)

    def learn(self, batch: Batch) -> tuple[float, float]:
        """One step of the optimizer; InfoNCE and cosine, over all processes."""
        picture = batch.picture.to(self.accelerator.device).float() / 127.5 - 1
        with self.accelerator.autocast():
            clean = self.teacher(batch, picture)
        noisy, t = self.look(picture, batch.draw.tolist())
        share = self.settings.micro_batch or len(noisy)
        parts = list(zip(noisy.split(share), t.split(share), strict=True))
        single = len(parts) == 1
        with torch.set_grad_enabled(single):
            embeds = [self.student(*part) for part in parts]
        whole = torch.cat(embeds).detach().requires_grad_()
        loss, info_nce, cosine = self.loss(whole, clean)
        (grad,) = torch.autograd.grad(loss, whole)
        for part, pull in zip(parts, grad.split(share), strict=True):
            if part is parts[-1]:
                self._backward(embeds[0] if single else self.student(*part), pull)
            else:
                with self.accelerator.no_sync(self.student):
                    self._backward(self.student(*part), pull)
        self._update()
        return info_nce, float(self.accelerator.reduce(cosine.detach(), "mean"))

    def look(self, picture: Tensor, draws: Sequence[int]) -> tuple[Tensor, Tensor]:
        """What the student sees of pictures (B, 3, S, S), and their t (B,); each drawn by the seed and its number."""
        shape, device = (self.sight.channels, self.sight.size, self.sight.size), picture.device
        chances, eps = [], []
        for draw in draws:
            generator = torch.Generator(device).manual_seed(mixed(self.settings.seed, 1, draw))
            chances.append(torch.rand(2, generator=generator, device=device))
            eps.append(torch.randn(shape, generator=generator, device=device))
        u, coin = torch.stack(chances).unbind(1)
        table = self.model.table
        if self.settings.timesteps == "angle":
            t = table.timestep((u * torch.pi / 2).tan())
        else:
            t = u * (len(table.ratio) - 1)
        ratio = table.sigma(t).to(picture)
        with torch.no_grad():
            return self.sight.noised(self.sight.clean(picture, coin < 0.5), torch.stack(eps), ratio), t

    def loss(self, seen: Tensor, clean: Tensor) -> tuple[Tensor, float, Tensor]:
        """Of embeddings (B, D) of this process: its part of the loss, InfoNCE of all processes, its mean cosine.

        Every process takes the gradient of the whole InfoNCE by its own embeddings. These add up, but
        DistributedDataParallel averages over processes: hence the factor.
        """
        info_nce = self.info_nce(seen, clean, torch.tensor(LOGIT_SCALE, device=seen.device))
        cosine = (seen * clean).sum(1).mean()
        loss = self.accelerator.num_processes * info_nce + self.settings.cosine_weight * (1 - cosine)
        return loss, float(info_nce.detach()), cosine

    def _backward(self, embeds: Tensor, pull: Tensor) -> None:
        self.accelerator.backward((embeds * pull).sum())

    def _update(self) -> None:
        self.accelerator.clip_grad_norm_(self.trained.values(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.follow(self.trained)

    def agreed(self, flag: bool) -> bool:
        """Whether any process raises the flag; the same answer on all."""
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device)))

    def result(self, **fields: Any) -> NoisyCLIP:
        """The NoisyCLIP of the averaged weights so far, frozen; ``fields`` of its config are set on the way.

        It shares its memory with this run: train no further afterwards.
        """
        with torch.no_grad():
            for name, weight in self.average.weights.items():
                self.trained[name].copy_(weight)
        self.model.config = replace(self.model.config, **fields)
        return self.model.requires_grad_(False).eval()

    def save(self, folder: Path) -> None:
        """Writes all that ``resume`` needs into ``folder``/step-N; whatever is killed meanwhile, one complete state
        stays. Older ones go."""
        done = folder / f"step-{self.step:08d}"
        partial = done.with_suffix(".partial")
        self.accelerator.save_state(str(partial))
        if self.accelerator.is_main_process:
            (partial / "settings.json").write_text(json.dumps({**self._identity(), "losses": self.losses}))
            shutil.rmtree(done, ignore_errors=True)
            partial.rename(done)
            for other in folder.glob("step-*"):
                if other != done:
                    shutil.rmtree(other)
        self.accelerator.wait_for_everyone()

    def _identity(self) -> dict[str, Any]:
        """What a run must have in common with the one that it continues."""
        images = self.images
        count = {"shards": len(images.names)} if isinstance(images, ImageShards) else {"pictures": len(images)}
        view = {"base": self.teacher.clip.source, "view": self.sight.view.name, "size": self.sight.size}
        return {**asdict(self.settings), **view, **count}

    def resume(self, folder: Path) -> int:
        """Continues from the newest complete state in ``folder``; its step.

        Raises FileNotFoundError where there is none, ValueError where it belongs to other settings.
        """
        states = kept_states(folder)
        if not states:
            raise FileNotFoundError(f"There is nothing to resume in {folder}. Start without --resume.")
        kept = json.loads((states[-1] / "settings.json").read_text())
        losses = kept.pop("losses")
        now = self._identity()
        other = [f"{name}: {value} then, {now.get(name)} now" for name, value in kept.items() if now.get(name) != value]
        if other:
            raise ValueError(f"The run in {folder} had other settings ({'; '.join(other)}). Resume with the same ones.")
        self.accelerator.load_state(str(states[-1]))
        self.step, self.losses = len(losses), losses
        return self.step


def kept_states(folder: Path) -> list[Path]:
    """The complete states of an interrupted run, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.suffix != ".partial")


def warm_cosine(step: int, settings: Settings) -> float:
    """Factor on the learning rate: up over the warm-up, then half a cosine to zero at the last step."""
    warm = max(1, round(settings.warmup * settings.steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, settings.steps - warm)))


def freeze_but(model: NoisyCLIP, layers: str) -> dict[str, nn.Parameter]:
    """Freezes all but the layers to train; those, by name. Statistics of batch norms stay the clean CLIP's."""
    model.requires_grad_(False)
    parts: list[nn.Module] = [model.conditioning]
    if layers == "all":
        parts.append(model.tower)
    elif layers == "last":
        parts += last_stage(model.tower)
    for part in parts:
        part.requires_grad_(True)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def last_stage(tower: Tower) -> list[nn.Module | nn.Parameter]:
    """What follows the last but one feature map, up to the embedding."""
    v = tower.visual
    if isinstance(tower, ResNetTower):
        return [v.layer4, v.attnpool]
    if isinstance(tower, ViTTower):
        blocks = v.transformer.resblocks
        return [*blocks[round(len(blocks) * 0.75) :], v.ln_post, *([] if v.proj is None else [v.proj])]
    assert isinstance(tower, TimmTower)
    trunk = v.trunk
    stages = trunk.stages if hasattr(trunk, "stages") else trunk.blocks
    return [*list(stages)[round(len(stages) * 0.75) :], v.head]
