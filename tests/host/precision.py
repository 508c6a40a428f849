"""How far a guided model in half precision, or with eight-bit weights, is from the same one in float32.

Measured on the small models of small_models.py, for test_precision.py, `make precision` and benchmarks/gpu_check.py.
Distances are RMS of the difference over RMS of the float32 one. The precision's own distance is that of ``denoised``,
from the same x_t; guidance adds a shift to it, and this is what must not go further.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import SimpleNamespace

import comfy.sample
import comfy.samplers
import small_models
import torch
from architectures import conditionings
from torch import Tensor

PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "fp16": (torch.float16, None),
    "fp8": (torch.float8_e4m3fn, torch.float32),
}
"""In which dtype weights are kept, and computed with (None: the same)."""

ENCODERS = ("noisy", "clean")
"""Two small ViTs with random weights, which are smooth."""

KINKED = "ReLU"
"""The bundled clean ResNet: its gradient jumps wherever one of its ReLUs turns."""

PARTS = (0.1, 0.5, 0.9)
"""Where in the run single steps are compared."""

CAP, STEPS = 0.1, 3
"""Whole runs: relative strength, every step shifts by this part of the model's own."""

VIT = small_models.CLIP | {
    "vision_cfg": {"layers": 2, "width": 64, "patch_size": 8, "image_size": 32, "head_width": 32}
}


@dataclass(frozen=True, eq=False)
class Step:
    """One guided model evaluation: what the model gave, and the shift that guidance adds to it."""

    denoised: Tensor
    x_t: Tensor
    sigma: Tensor
    shift: Tensor


@dataclass(frozen=True)
class Row:
    """A family in one precision, worst of ``PARTS``. Distances are from float32.

    ``model``: of denoised. ``noisy`` and ``clean``: of the shift, by encoder; ``times``: the clean one over that of
    denoised. ``plain``: of an unguided picture; ``run_noisy`` and ``run_clean``: of a guided one over that.
    """

    family: str
    precision: str
    finite: bool
    zero: bool
    model: float
    noisy: float
    clean: float
    times: float
    plain: float
    run_noisy: float
    run_clean: float


@dataclass(frozen=True)
class KinkedRow:
    """The same for an encoder with ReLUs. ``shift`` and ``run`` as in ``Row``.

    ``noise_shift`` and ``noise_run``: those of the float32 model with white noise on its denoised, of the precision's
    own distance: what is the encoder's doing.
    """

    family: str
    precision: str
    model: float
    shift: float
    noise_shift: float
    run: float
    noise_run: float


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def distance(a: Tensor, b: Tensor) -> float:
    """RMS of a - b over that of b."""
    return rms(a - b) / rms(b)


class Family:
    """The guided runs of one family, of the same noise in every precision.

    ``pack``: its ``nodes`` by id, and its modules ``host``, ``seam`` and ``encoders``.
    """

    def __init__(self, pack: SimpleNamespace, name: str) -> None:
        self.pack, self.name, self.architecture = pack, name, small_models.small(name)
        self.model, self.noise = functools.cache(self._model), {}
        encoders = {"noisy": self._noisy_vit(), "clean": vit(self.pack), KINKED: self._bundled()}
        self.guidance = {name: self._text(encoder, 100.0) for name, encoder in encoders.items()}
        self.off = self._text(encoders["noisy"], 0.0)
        self.steps, self.picture = functools.cache(self._steps), functools.cache(self._picture)

    def run(self, node_id: str, **inputs: object) -> object:
        """A node's first output, in inference mode as the host runs nodes."""
        with torch.inference_mode():
            return self.pack.nodes[node_id].execute(**inputs).args[0]

    def row(self, precision: str) -> Row:
        moved = {name: self.moved(precision, name) for name in ENCODERS}
        models, noisy, clean = (max(v) for v in (moved["clean"][0], moved["noisy"][1], moved["clean"][1]))
        times = max(shift / model if model else 0.0 for model, shift in zip(*moved["clean"], strict=True))
        values = [v for name in ENCODERS for step in self.steps(precision, name) for v in (step.denoised, step.shift)]
        values += [self.picture(precision, name) for name in (None, *ENCODERS)]
        finite = all(bool(v.isfinite().all()) for v in values)
        zero = torch.equal(self.picture(precision, "off"), self.picture(precision))
        plain, *runs = self.apart(precision, *ENCODERS)
        return Row(self.name, precision, finite, zero, models, noisy, clean, times, plain, *runs)

    def kinked_row(self, precision: str) -> KinkedRow:
        models, shifts = self.moved(precision, KINKED)
        self.noise[f"{precision} noise"] = max(models)
        _, noise_shifts = self.moved(f"{precision} noise", KINKED)
        (_, run), (_, noise_run) = (self.apart(name, KINKED) for name in (precision, f"{precision} noise"))
        return KinkedRow(self.name, precision, max(models), max(shifts), max(noise_shifts), run, noise_run)

    def moved(self, precision: str, encoder: str) -> tuple[list[float], list[float]]:
        """Distances of denoised and of the shift, at each of ``PARTS``."""
        pairs = list(zip(self.steps(precision, encoder), self.steps("fp32", encoder), strict=True))
        return (
            [distance(step.denoised, exact.denoised) for step, exact in pairs],
            [distance(step.shift, exact.shift) for step, exact in pairs],
        )

    def apart(self, precision: str, *encoders: str) -> list[float]:
        """The distance of the unguided picture, and for each encoder that of the guided one over it."""
        plain, *guided = (
            distance(self.picture(precision, name), self.picture("fp32", name)) for name in (None, *encoders)
        )
        return [plain, *(d / plain if plain else d for d in guided)]

    def _model(self, precision: str) -> object:
        """Of ``PRECISIONS``, or the float32 one with ``noise`` of a name on its denoised."""
        if precision in PRECISIONS:
            return small_models.build(self.architecture, *PRECISIONS[precision])
        model, level = self.model("fp32").clone(), self.noise[precision]

        def disturb(args: dict) -> Tensor:
            generator = torch.Generator().manual_seed(int(1000 * args["sigma"].flatten()[0]))
            denoised = args["denoised"]
            return denoised + level * rms(denoised) * torch.randn(denoised.shape, generator=generator)

        model.set_model_sampler_post_cfg_function(disturb, disable_cfg1_optimization=True)
        return model

    def _steps(self, precision: str, encoder: str) -> list[Step]:
        """Guided at its plain scale, without a cap, from the same x_t in every precision."""
        guidance = {"guidance": self.guidance[encoder], "strength": "absolute", "cap": 0.0}
        model = self.run("SDGApplyGuidance", model=self.model(precision), **guidance)
        generator = torch.Generator().manual_seed(3)
        x_0 = self.architecture.latent()["samples"]
        noise, x_0 = (torch.randn(x_0.shape, generator=generator) for _ in range(2))
        positive, negative = conditionings(self.architecture)
        euler, sampling = comfy.samplers.sampler_object("euler"), model.get_model_object("model_sampling")
        with watched(self.pack.seam) as steps, torch.inference_mode():
            for part in PARTS:
                sigmas = torch.tensor([float(sampling.percent_to_sigma(part)), 0.0])
                comfy.sample.sample_custom(
                    model, noise, 1.0, euler, sigmas, positive, negative, x_0, disable_pbar=True, seed=7
                )
        return steps

    def _picture(
        self, precision: str, encoder: str | None = None, latents: torch.dtype = torch.float32, cfg: float = 1.0
    ) -> Tensor:
        """The latent of a short run; ``encoder`` None is the host's own KSampler, "off" one guided at scale 0."""
        positive, negative = conditionings(self.architecture)
        inputs = {
            "model": self.model(precision), "seed": 7, "steps": STEPS, "cfg": cfg, "sampler_name": "euler",
            "scheduler": "simple", "positive": positive, "negative": negative, "denoise": 1.0,
            "latent_image": {"samples": self.architecture.latent()["samples"].to(latents)},
        }  # fmt: skip
        if encoder is None:
            with torch.inference_mode():
                return self.pack.ksampler().sample(**inputs)[0]["samples"]
        guidance = self.off if encoder == "off" else self.guidance[encoder]
        pull = {"guidance": guidance, "strength": "relative", "cap": CAP}
        return self.run("SDGGuidedKSampler", **inputs, **pull)["samples"]

    def _text(self, encoder: object, scale: float) -> object:
        whole = {"start_percent": 0.0, "end_percent": 1.0}
        return self.run("SDGTextGuidance", noisy_clip=encoder, text="a red hat", scale=scale, **whole)

    def _noisy_vit(self) -> object:
        latent = self.model("fp32").get_model_object("latent_format")
        return noisy_encoder(self.pack, latent, VIT)

    def _bundled(self) -> object:
        return self.run("SDGLoadCLIP", clip_name=self.pack.host.BUNDLED_NAME, architecture="RN50", pretrained="")


def vit(pack: SimpleNamespace) -> object:
    """A clean CLIP with random weights."""
    with seeded():
        clip = pack.encoders.CleanCLIP(pack.encoders.build_clip(VIT), 32, config=VIT)
        return pack.host.patch_module(clip.requires_grad_(False).eval())


def noisy_encoder(pack: SimpleNamespace, latent: object, clip: dict) -> object:
    """A NOISY_CLIP with random weights for the linear picture that the host makes of a latent format."""
    factors = torch.tensor(latent.latent_rgb_factors).T
    covariance = tuple(map(tuple, (factors @ factors.T).tolist()))
    view = f"linear:{type(latent).__name__}"
    config = pack.encoders.NoisyCLIPConfig(clip, hidden=32, sinusoid=32, view=view, covariance=covariance)
    with seeded():
        encoder = pack.encoders.NoisyCLIP(config, pack.encoders.build_clip(clip))
        return pack.host.patch_module(encoder.requires_grad_(False).eval())


@contextmanager
def seeded() -> Iterator[None]:
    """The same random weights each time, and normal tensors, as encoders are loaded."""
    with torch.random.fork_rng(), torch.inference_mode(False):
        torch.manual_seed(0)
        yield


@contextmanager
def watched(seam: SimpleNamespace) -> Iterator[list[Step]]:
    """A list that fills with every guided model evaluation."""
    original, steps = seam.guidance_shift, []

    def watch(denoised: Tensor, x_t: Tensor, sigma: Tensor, run: object) -> Tensor | None:
        shift = original(denoised, x_t, sigma, run)
        steps.append(Step(denoised.clone(), x_t.clone(), sigma.clone(), shift))
        return shift

    seam.guidance_shift = watch
    try:
        yield steps
    finally:
        seam.guidance_shift = original


HEAD = (
    "| family | precision | finite | scale 0 | denoised | shift: noisy | clean | times denoised | picture | "
    "guided: noisy times | clean times |\n|---|---|---|---|---|---|---|---|---|---|---|"
)
KINKED_HEAD = (
    "| family | precision | denoised | shift: ReLU | noise as large | guided times | noise as large times |\n"
    "|---|---|---|---|---|---|---|"
)


def line(row: Row | KinkedRow) -> str:
    """A line of the table under ``HEAD`` or ``KINKED_HEAD``."""
    words = []
    for name, value in asdict(row).items():
        if isinstance(value, bool):
            words.append(("yes" if name == "finite" else "same bits") if value else "**no**")
        elif isinstance(value, str):
            words.append(value)
        elif name == "times" or "run" in name:
            words.append(f"{value:.2f}")
        else:
            words.append(f"{value:.1e}" if value else "0")
    return "| " + " | ".join(words) + " |"
