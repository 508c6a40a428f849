"""Nodes that make a noisy CLIP and keep it."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path

import comfy.model_management as mm
import comfy.model_patcher
import comfy.utils
import folder_paths
import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image
from torch import Tensor

from ..sdg_core.encoders import CleanCLIP, NoisyCLIP, save_noisy_clip
from ..sdg_core.method import PIXEL_VIEW
from ..sdg_core.training import (
    PLAIN,
    Augment,
    Finetuning,
    ImageSet,
    Progress,
    Retrieval,
    Settings,
    StudentSight,
    accelerator,
    as_rows,
    draw_chart,
    find_images,
    held_out,
    measure_retrieval,
    retrieval_lines,
)
from . import host
from .inputs import check_finite, check_image
from .loaders import NoisyCLIPSocket

log = logging.getLogger(__name__)

HELD_OUT = 256
LIVE_TIMESTEPS = (300, 500, 700)
LIVE_PICTURES = 48
LIVE_SHARE = 0.1  # of the time may go into measuring on the way


def learning_inputs() -> list[io.Input]:
    """How it learns: from which CLIP, how long, with what at once."""
    return [
        NoisyCLIPSocket.Input("clip", tooltip="The clean CLIP to start from, of Load CLIP. It stays as it is."),
        io.Int.Input(
            "steps", default=1000, min=1, max=1_000_000,
            tooltip="How long it learns. 50 is a trial, 1,000 a start, 10,000 suits a large CLIP.",
        ),
        io.Int.Input(
            "batch_size", default=64, min=2, max=65536,
            tooltip="Pictures told apart in every step. More learn better and take longer. Not above the "
            "number of pictures.",
        ),
        io.Int.Input(
            "micro_batch", default=64, min=1, max=65536,
            tooltip="Pictures in memory at once. Lower it when memory runs out: slower, with the same result.",
        ),
        io.Float.Input(
            "learning_rate", default=3e-4, min=1e-7, max=1e-2, step=1e-5, round=1e-7,
            tooltip="Higher learns faster, too high forgets. Usual 0.0001 to 0.0005.",
        ),
        io.Combo.Input(
            "train", options=["all", "last", "conditioning"], default="all",
            tooltip="What learns: the whole image tower, its last stage, or only how it uses the noise level. "
            "Less is faster and learns less.",
        ),
        io.Combo.Input(
            "timesteps", options=["uniform", "angle"], default="uniform",
            tooltip="How noise levels are drawn: uniform as in the paper; angle spends less on pure noise.",
        ),
        io.Int.Input(
            "seed", default=0, min=0, max=2**31 - 1, control_after_generate=False,
            tooltip="The same seed gives the same encoder.",
        ),
        io.Int.Input(
            "size", default=0, min=0, max=4096,
            tooltip="Side of what the diffusion model draws: pixels, or latent pixels (SD1.5: 64, SDXL: 128). "
            "0: the CLIP's own.",
        ),
    ]  # fmt: skip


def picture_inputs() -> list[io.Input]:
    """What it learns from, and for which model."""
    return [
        io.String.Input(
            "folder", default="",
            tooltip="A folder of pictures, in ComfyUI's input folder or by its whole path. Empty: only those "
            "of the images input.",
        ),
        io.Image.Input("images", optional=True, tooltip="Pictures to learn from, a batch or a list."),
        io.Model.Input(
            "model", optional=True, tooltip="The diffusion model to be guided. Empty: a model of pixels."
        ),
        io.Vae.Input(
            "vae", optional=True,
            tooltip="With a latent model: learn from exact latents as well. Slower, closer to the model.",
        ),
    ]  # fmt: skip


class SDGFinetuneNoisyCLIP(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SDGFinetuneNoisyCLIP",
            display_name="Fine-tune Noisy CLIP (SDG)",
            category="SDG/training",
            description="Teaches a CLIP to read noisy pictures, from pictures without captions. Use it when there is "
            "no noisy CLIP for your model or your kind of picture.",
            is_input_list=True,
            inputs=[*learning_inputs(), *picture_inputs()],
            outputs=[
                NoisyCLIPSocket.Output("NOISY_CLIP", tooltip="Connect to guidance nodes, or to Save Noisy CLIP."),
                io.Image.Output(
                    "IMAGE", display_name="chart", tooltip="How well pictures are found again under noise; the loss."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, folder: list[str], **others: list) -> str:
        if not folder[0]:
            return ""
        files = find_images(input_folder(folder[0]))
        return f"{len(files)}:{max(file.stat().st_mtime_ns for file in files)}"

    @classmethod
    def execute(
        cls, clip: list, steps: list, batch_size: list, micro_batch: list, learning_rate: list, train: list,
        timesteps: list, seed: list, size: list, folder: list, images: list | None = None, model: list | None = None,
        vae: list | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        settings = Settings(
            steps[0], batch_size[0], micro_batch[0], learning_rate[0], layers=train[0], timesteps=timesteps[0],
            seed=seed[0],
        )  # fmt: skip
        check_finite(learning_rate=learning_rate[0])
        patcher = host.single_encoder(clip[0], "clip")
        guided, vae = (given[0] if given else None for given in (model, vae))
        guided, vae = None if guided is None else host.to_model(guided), host.to_vae(vae)
        with torch.inference_mode(False), torch.enable_grad():
            clean = host.load_encoder(patcher)
            sight = sight_of(clean, size[0], guided, vae)
            training, proof = pictures(folder[0], images or [], max(sight.picture_size, clean.noise_size), seed[0])
            mm.free_memory(memory_wanted(clean, settings), patcher.load_device, [])
            with host.explained("a step of this fine-tuning", "Lower micro_batch or size"):
                shown = host.NodeText(cls.hidden), host.NodeCurve(cls.hidden)
                made, chart = finetuned(clean, sight, training, proof, settings, *shown)
            return io.NodeOutput(host.patch_module(made), as_host_image(chart))


class SDGSaveNoisyCLIP(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SDGSaveNoisyCLIP",
            display_name="Save Noisy CLIP (SDG)",
            category="SDG/training",
            description="Writes a noisy CLIP to models/noisy_clip, with what it was made for and how well it does.",
            inputs=[
                NoisyCLIPSocket.Input("noisy_clip", tooltip="From Fine-tune Noisy CLIP, or a loaded one to convert."),
                io.String.Input(
                    "name",
                    default="my_noisy_clip",
                    tooltip="File name without ending. A number is added where it is taken.",
                ),
                io.String.Input("dataset", default="", tooltip="Which pictures it learned from. Kept in the file."),
                io.String.Input("licence", default="", tooltip="Under which licence you share it. Kept in the file."),
                io.Boolean.Input(
                    "half", default=True, tooltip="Half the file size, with no visible difference. Off: float32."
                ),
            ],
            outputs=[],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, noisy_clip: host.NoisyCLIPValue, name: str, dataset: str, licence: str, half: bool
    ) -> io.NodeOutput:
        encoder = host.single_encoder(noisy_clip, "noisy_clip").model
        if encoder.reads != "noisy":
            raise ValueError("This CLIP reads clean pictures only. Connect a noisy one, from Fine-tune Noisy CLIP.")
        precision = next(encoder.tower.parameters()).dtype
        if precision != torch.float32:
            raise ValueError(
                f"Got an encoder in {str(precision).removeprefix('torch.')}; wanted fp32, since what was rounded away "
                "is lost. Set precision of Load Noisy CLIP to fp32."
            )
        said = {"dataset": dataset, "licence": licence}
        with torch.inference_mode(False):
            path = keep(encoder, name, half, {key: value for key, value in said.items() if value})
        host.NodeText(cls.hidden).say(f"Saved {path.name}")
        return io.NodeOutput(ui={"text": [str(path.name)]})


def input_folder(name: str) -> Path:
    """A folder by its whole path, or in ComfyUI's input folder."""
    path = Path(name)
    return path if path.is_absolute() else Path(folder_paths.get_input_directory()) / path


def pictures(folder: str, images: list[Tensor], size: int, seed: int) -> tuple[ImageSet, ImageSet | None]:
    """Training and held-out pictures of a folder and of IMAGE values (B, H, W, C) in 0..1.

    Raises ValueError where there are none.
    """
    given = [image for batch in images if batch is not None for image in check_image(opaque(batch))]
    files = find_images(input_folder(folder)) if folder else []
    if not given and not files:
        raise ValueError("Got no pictures to learn from. Connect images, or give a folder of pictures.")
    sources = [*files, *((image.clamp(0, 1) * 255).round().byte().cpu() for image in given)]
    kept, measured_on = held_out(len(sources), HELD_OUT, seed)
    chosen = [[sources[i] for i in part] for part in (kept, measured_on)]
    return (
        ImageSet(chosen[0], size, Augment(), seed),
        ImageSet(chosen[1], size, PLAIN) if len(chosen[1]) > 1 else None,
    )


def opaque(image: Tensor) -> Tensor:
    """Without an alpha channel, of which nothing is learned."""
    return image[..., :3] if isinstance(image, Tensor) and image.shape[-1:] == (4,) else image


def sight_of(clean: CleanCLIP, size: int, model: comfy.model_patcher.ModelPatcher | None, vae) -> StudentSight:
    """What the encoder will look at, from the model to be guided."""
    latent = None if model is None else model.get_model_object("latent_format")
    if latent is None or latent.latent_channels == 3:
        return StudentSight(size or clean.noise_size, PIXEL_VIEW)
    view = host.linear_view(latent)
    if vae is None:
        return StudentSight(size or clean.noise_size, view)
    downscale = host.downscale_of(latent)

    def encode(picture: Tensor) -> Tensor:
        with torch.inference_mode():
            pixels, video = ((picture + 1) / 2).movedim(1, -1), getattr(latent, "latent_dimensions", 2) == 3
            parts = pixels.split(1) if video else [pixels]  # a VAE of videos takes a batch for the frames of one
            latents = torch.cat([vae.encode(part) for part in parts])
            made = latents.shape[1], latents.shape[-2], latents.shape[-1]
            wanted = latent.latent_channels, picture.shape[-2] // downscale, picture.shape[-1] // downscale
            sized = hasattr(latent, "spacial_downscale_ratio")  # older hosts do not say
            if made[0] != wanted[0] or (sized and made != wanted):
                raise ValueError(
                    f"Got a VAE that encodes to {made} (channels, height, width); the latents of this model would be "
                    f"{wanted}. Connect the VAE that belongs to the model."
                )
            if latents.ndim == 4 and video:
                latents = latents[:, :, None]
            latents = latent.process_in(latents)
        return (latents[:, :, 0] if latents.ndim == 5 else latents).clone().to(picture)

    return StudentSight(size or clean.noise_size, view, encode, downscale)


def memory_wanted(clean: CleanCLIP, settings: Settings) -> int:
    """Bytes of a step: activations of a micro batch; weights, gradients, averages and the optimizer's two."""
    weights = 4 * sum(p.numel() for p in clean.tower.parameters())
    return host.activation_bytes(clean) * min(settings.batch_size, settings.micro_batch) + 6 * weights


def finetuned(
    clean: CleanCLIP,
    sight: StudentSight,
    training: ImageSet,
    proof: ImageSet | None,
    settings: Settings,
    text: host.NodeText,
    losses: host.NodeCurve,
) -> tuple[NoisyCLIP, Image.Image]:
    """Runs it, with a live chart on the node; the encoder and the last chart.

    A cancelled run writes what there is to models/noisy_clip before it ends.
    """
    device = next(clean.parameters()).device
    precision = "bf16" if device.type == "cuda" and mm.should_use_bf16(device) else "no"
    run = Finetuning(clean, sight, training, settings, accelerator(device.type == "cpu", precision))
    notes = {"base": clean.source, "steps": str(settings.steps), "batch_size": str(settings.batch_size)}
    learn(run, Live(run, clean, proof, text, losses), notes)
    model = run.result(notes=notes)
    curve: list[Retrieval] = []
    if proof is not None:
        curve = measure_retrieval(model, clean, sight, proof)
        model.config = replace(model.config, retrieval=as_rows(curve))
    return model, draw_chart(curve, f"{clean.source}, {sight.view.name}, {settings.steps} steps", run.losses)


class Live:
    """The chart on the node while it learns. Retrieval is measured as often as ``LIVE_SHARE`` of the time allows."""

    def __init__(
        self, run: Finetuning, clean: CleanCLIP, proof: ImageSet | None, text: host.NodeText, losses: host.NodeCurve
    ) -> None:
        self.run, self.clean, self.text = run, clean, text
        self.proof = proof and proof.first(LIVE_PICTURES)
        self.every = max(1, run.settings.steps // 20)
        self.bar = comfy.utils.ProgressBar(run.settings.steps)
        self.drawing = losses.begin(host.Heading("loss", ("loss",), run.settings.steps))
        self.curve: list[Retrieval] = []
        self.next = self.told = time.monotonic()

    def show(self, progress: Progress) -> None:
        """After every step: the bar and the loss; about twenty times the chart; every second the numbers."""
        self.drawing.add(lambda: (progress.step, None, None, progress.loss))
        preview = None
        if progress.step % self.every == 0:
            self._measure()
            preview = (
                "JPEG",
                draw_chart(self.curve, f"step {progress.step} of {progress.steps}", self.run.losses),
                1024,
            )
        self.bar.update_absolute(progress.step, progress.steps, preview)
        if preview or time.monotonic() > self.told + 1:
            self.told = time.monotonic()
            self.text.say(progress_line(progress, self.curve))

    def _measure(self) -> None:
        begun = time.monotonic()
        if self.proof is not None and begun >= self.next:
            self.curve = measure_retrieval(self.run.model, self.clean, self.run.sight, self.proof, LIVE_TIMESTEPS)
            self.next = time.monotonic() + (time.monotonic() - begun) / LIVE_SHARE


def learn(run: Finetuning, live: Live, notes: dict[str, str]) -> None:
    """All steps. A cancelled run keeps what it has learned in a file."""
    try:
        for progress in run.steps():
            live.show(progress)
            mm.throw_exception_if_processing_interrupted()
    except mm.InterruptProcessingException:
        if run.step:
            name = f"cancelled_{time.strftime('%Y%m%d_%H%M%S')}_step_{run.step}"
            model = run.result(notes={**notes, "steps": f"{run.step} of {run.settings.steps}"})
            log.info("Cancelled. What was learned so far is in %s.", keep(model, name, True, {}))
        raise
    finally:
        live.drawing.end()


def progress_line(progress: Progress, curve: list[Retrieval]) -> str:
    """What the node shows while it learns."""
    left = f"{progress.seconds_left / 60:.0f} min" if progress.seconds_left > 90 else f"{progress.seconds_left:.0f} s"
    lines = [f"loss {progress.loss:.2f}, {progress.images_per_second:.0f} images/s, {left} left"]
    return "\n".join(lines + retrieval_lines(as_rows(curve)))


def keep(encoder: NoisyCLIP, name: str, half: bool, said: dict[str, str]) -> Path:
    """Writes an encoder to models/noisy_clip under a name that is free. Raises ValueError for names that are none."""
    path = host.free_path("noisy_clip", name, ".safetensors")
    notes = encoder.config.notes
    try:
        encoder.config = replace(encoder.config, notes={**notes, **said})
        save_noisy_clip(path, encoder, half=half)
    finally:
        encoder.config = replace(encoder.config, notes=notes)
    return path


def as_host_image(picture: Image.Image) -> Tensor:
    """IMAGE (1, H, W, 3) in 0..1."""
    return torch.from_numpy(np.asarray(picture).copy()).float()[None] / 255
