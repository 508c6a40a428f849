"""One step of fine-tuning: what the student sees, the loss, the gradient over the whole contrastive batch, the update.

    loss = InfoNCE(100 E'(x_t, t) . E(x_0)) + cosine_weight (1 - cos(E'(x_t, t), E(x_0)))

InfoNCE is symmetric, over the whole batch of all processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..encoders import CleanCLIP, NoisyCLIP
from .images import Batch, mixed
from .settings import Settings, warm_cosine
from .sight import StudentSight
from .student import Average, Student, Teacher, freeze_but

if TYPE_CHECKING:
    from accelerate import Accelerator

LOGIT_SCALE = 100.0


class Learner:
    """The student with its teacher, optimizer and average, over the processes of ``accelerator``.

    ``pictures`` and ``variants``: how many the set has, and versions of each, 0 for endlessly many (see ``Teacher``).
    """

    def __init__(
        self,
        model: NoisyCLIP,
        clean: CleanCLIP,
        sight: StudentSight,
        settings: Settings,
        accelerator: Accelerator,
        pictures: int,
        variants: int,
    ) -> None:
        import open_clip  # takes seconds, so at first use

        self.model, self.sight, self.settings, self.accelerator = model, sight, settings, accelerator
        self.trained = freeze_but(model, settings.layers)
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=settings.learning_rate, betas=(0.9, 0.98), eps=1e-6,
            weight_decay=settings.weight_decay,
        )  # fmt: skip
        schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: warm_cosine(step, settings))
        self.student, self.optimizer, self.schedule = accelerator.prepare(Student(model), self.optimizer, schedule)
        self.teacher = Teacher(clean.to(accelerator.device), pictures, variants)
        self.average = Average(self.trained, settings.ema)
        self.info_nce = open_clip.ClipLoss(rank=accelerator.process_index, world_size=accelerator.num_processes)
        accelerator.register_for_checkpointing(self.average, self.teacher)

    def learn(self, batch: Batch) -> tuple[float, float]:
        """One step of the optimizer; InfoNCE and cosine, over all processes."""
        picture = batch.picture.to(self.accelerator.device).float() / 127.5 - 1
        with self.accelerator.autocast():
            clean = self.teacher(batch, picture)
        noisy, t = self.look(picture, batch.draw.tolist())
        share = self.settings.micro_batch or len(noisy)
        parts = list(zip(torch.split(noisy, share), torch.split(t, share), strict=True))
        single = len(parts) == 1
        with torch.set_grad_enabled(single):
            embeds = [self.student(*part) for part in parts]
        whole = torch.cat(embeds).detach().requires_grad_()
        loss, info_nce, cosine = self.loss(whole, clean)
        (grad,) = torch.autograd.grad(loss, whole)
        for part, pull in zip(parts, torch.split(grad, share), strict=True):
            if part is parts[-1]:
                self._backward(embeds[0] if single else self.student(*part), pull)
            else:
                with self.accelerator.no_sync(self.student):
                    self._backward(self.student(*part), pull)
        self._update()
        return info_nce, float(self.accelerator.reduce(cosine.detach(), "mean"))

    def look(self, picture: Tensor, draws: Sequence[int]) -> tuple[Tensor, Tensor]:
        """What the student sees of pictures (B, 3, S, S), and their t (B,); each drawn by the seed and its number.

        Both in the precision of the student's weights.
        """
        shape, device = (self.sight.channels, self.sight.size, self.sight.size), picture.device
        chances, eps = [], []
        for draw in draws:
            generator = torch.Generator(device).manual_seed(mixed(self.settings.seed, 1, draw))
            chances.append(torch.rand(2, generator=generator, device=device))
            eps.append(torch.randn(shape, generator=generator, device=device))
        weights = next(iter(self.trained.values()))
        u, coin = torch.stack(chances).to(weights.dtype).unbind(1)
        picture = picture.to(weights.dtype)
        table = self.model.table
        if self.settings.timesteps == "angle":
            t = table.timestep((u * torch.pi / 2).tan())
        else:
            t = u * (len(table.ratio) - 1)
        ratio = table.sigma(t).to(picture)
        with torch.no_grad():
            x_0 = self.sight.clean(picture, coin < 0.5)
            return self.sight.noised(x_0, torch.stack(eps).to(picture), ratio), t

    def loss(self, seen: Tensor, clean: Tensor) -> tuple[Tensor, float, Tensor]:
        """Of embeddings (B, D) of this process: its part of the loss, InfoNCE of all processes, its mean cosine.

        Every process takes the gradient of the whole InfoNCE by its own embeddings. These add up, but
        DistributedDataParallel averages over processes: hence the factor.
        """
        info_nce = self.info_nce(seen, clean, torch.tensor(LOGIT_SCALE, dtype=seen.dtype, device=seen.device))
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
