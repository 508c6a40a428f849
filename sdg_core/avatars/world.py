"""The bundled avatars worlds, ready to sample: model, encoder, judge and held-out renders. Of pixels and of latents."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..encoders import CleanCLIP, load_noisy_clip
from ..method import (
    DEFAULT_INTERVAL,
    DEFAULT_SCALE,
    PACES,
    PIXEL_VIEW,
    ClassGuidance,
    ContentGuidance,
    Convention,
    Curve,
    DecodedView,
    DirectionGuidance,
    Goal,
    Guidance,
    GuidanceRun,
    Kind,
    LowFrequencies,
    Region,
    Strength,
    StructureGuidance,
    StyleGuidance,
    Term,
    TextGuidance,
    View,
)
from ..models import (
    ADMDenoiser,
    Classifier,
    Step,
    euler,
    euler_ancestral,
    euler_ancestral_flow,
    guided,
    held,
    load_adm,
    load_classifier,
    load_tiny_autoencoder,
    paper,
)
from .files import BUNDLED, HeldOut, latent_model_file, load_bundled_clip, load_held_out, load_renders
from .judge import Judge, load_judge

Sampler = Literal["euler", "euler_ancestral", "paper"]
SAMPLERS: tuple[Sampler, ...] = ("euler", "euler_ancestral", "paper")


NOISY_SCALE: dict[Kind, float] = {"text": 135.0, "content": 500.0, "structure": 1000.0, "style": 4000.0}
NOISY_INTERVAL = {**DEFAULT_INTERVAL, "text": (0.0, 1.0), "content": (0.0, 0.95), "style": (0.2, 1.0)}
"""Scales and intervals that the noisy CLIP was measured at on the latent models: their runs start at less noise."""

NOISY_CURVE: dict[str, Curve] = {"content": Curve(((0.0, 0.6), (0.2, 5.0), (0.5, 8.0), (0.8, 0.3)), "constant")}
"""Held back in the noisiest fifth, where a strong pull leaps to a picture that it then has to keep, and in the last,
which cleans up."""

NOISY_SEVERAL = 340 / 135
"""Times its scale that each of several texts has: they share the shift."""

NOISY_SMALL = {"expression": (1100.0, (0.4, 1.0))}
"""Scales and intervals of texts about few pixels: early on, where the model draws no more than blots, they do harm."""

NEGATIVE = "a person"
"""What all pictures of the latent models share: texts pull better without it."""

CLEAN_SCALE: dict[Kind, float] = {"text": 600.0, "content": 600.0, "structure": 600.0, "style": 2000.0}
CLEAN_INTERVAL = {**DEFAULT_INTERVAL, "text": (0.0, 0.95)}
"""Scales and intervals that clean encoders were measured at on the latent models: they pull less, and need longer."""

OTHERS: dict[Literal["class", "direction"], tuple[float, tuple[float, float]]] = {
    "class": (20.0, (0.0, 1.0)),
    "direction": (600.0, (0.0, 1.0)),
}
"""Scales and intervals of classifier and direction guidance."""

RELATIVE_CAP = 0.25
RELATIVE_INTERVAL = dict.fromkeys(DEFAULT_SCALE, (0.05, 0.8))
"""Relative strength and where it acts, by kind, that clean encoders were measured at on the latent models.

The start keeps off the first steps of flow models, which may leap from any sigma / alpha; the last fifth adds little.
"""

STEPS = {"pixels": 50, "latents": 20}
CONTENT_STEPS = 50
"""Sampling steps of the measurements, and of those of content on latents: a whole picture is wished for there, and the
noise that each step adds anew lets a run leave what it leapt to first."""


class Change(NamedTuple):
    """An edit: a picture (3, h, w) in -1..1, and what a text about it should change from and to."""

    picture: Tensor
    before: str
    after: str


@dataclass(frozen=True)
class Pull:
    """One wish in plain words: a kind, what it is towards, a scale and an interval; None is the default of its kind.

    Towards a prompt, a reference picture (3, h, w) in -1..1, the name of a class of the world's classifier (of the kind
    "class"), or a change. ``region`` (h, w) is where it acts, 1 inside; ``away`` turns it around, until its similarity
    is ``until``; its gradient is taken at ``every`` k-th noise level, or at a ready-made ``pace``. ``negative`` text of
    a text: None is the world's own, "" none; what is pushed away has none. Of content: pictures (N, 3, h, w).
    ``curve``: None is that of the kind, where the scale is as well.
    """

    kind: Kind | Literal["class", "direction"]
    target: str | Tensor | Change
    scale: float | None = None
    interval: tuple[float, float] | None = None
    region: Tensor | None = None
    away: bool = False
    until: float = 0.0
    every: int = 1
    pace: str = "quality"
    negative: str | Tensor | None = None
    curve: Curve | None = None


Route = Literal["noisy linear", "clean linear", "clean decoded"]
"""How an encoder looks at a latent model: a noisy CLIP at x_t, or a clean one at denoised, through which view."""
ROUTES: tuple[Route, ...] = ("noisy linear", "clean linear", "clean decoded")
LATENT_MODELS = ("eps", "v", "flow")


@dataclass(frozen=True)
class WorldName:
    """Which world: the folder of its files, and, for the latent one, a model and a route."""

    folder: Path = BUNDLED
    model: str = ""
    route: Route | None = None


@dataclass(frozen=True)
class World:
    """Model, encoder and what measures them. ``renders`` (N, 3, S, S) in -1..1, ``labels`` (N, A), -1 unknown.

    ``decoded`` makes pictures of latents, None where the model draws pictures. ``scales``, ``intervals`` and ``curves``
    are the defaults by kind, ``negative`` that of texts; ``several`` and ``small`` are as ``NOISY_SEVERAL`` and
    ``NOISY_SMALL``. ``seen``: what the judge sees in held-out renders; None: it looks at ``renders``.
    """

    denoiser: ADMDenoiser
    encoder: CleanCLIP
    judge: Judge
    renders: Tensor
    labels: Tensor
    view: View = PIXEL_VIEW
    variance: float = 0.25
    decoded: DecodedView | None = None
    scales: Mapping[Kind, float] = field(default_factory=lambda: DEFAULT_SCALE)
    intervals: Mapping[Kind, tuple[float, float]] = field(default_factory=lambda: DEFAULT_INTERVAL)
    seen: HeldOut | None = None
    classifier_file: Path | None = None
    negative: str = ""
    curves: Mapping[str, Curve] = field(default_factory=dict)
    several: float = 1.0
    small: Mapping[str, tuple[float, tuple[float, float]]] = field(default_factory=dict)

    @functools.cached_property
    def held_out(self) -> HeldOut:
        """What the judge sees in renders that no model was trained on."""
        return self.seen or HeldOut(self.judge.features(self.renders), self.labels)

    def decode(self, x: Tensor) -> Tensor:
        """The picture (B, 3, S, S) of what the model drew."""
        return x if self.decoded is None else self.decoded.decode(x).clamp(-1, 1)

    def open_run(self, terms: tuple[Term, ...], strength: Strength | None = None) -> GuidanceRun:
        """The state of one sampling run of this world's model; no ``strength`` is the usual one."""
        to_sigma = self.denoiser.percent_to_sigma()
        return GuidanceRun(
            terms, self.denoiser.convention, to_sigma, strength or Strength(), lambda encoder: self.view, self.variance
        )

    def text(self, words: str, about: str = "", among: int = 1) -> Pull:
        """A text at the strength that was measured for it: ``about`` which attribute, and ``among`` how many texts."""
        scale, interval = self.small.get(about, (self.scales["text"], None))
        return Pull("text", words, scale * (self.several if among > 1 else 1.0), interval)

    def term(self, pull: Pull) -> Term:
        """The pull as a term, at the default scale, interval and curve of its kind unless it has its own."""
        if pull.kind == "class" or pull.kind == "direction":
            (usual, interval), encoder = OTHERS[pull.kind], self.classifier if pull.kind == "class" else self.encoder
        else:
            usual, interval, encoder = self.scales[pull.kind], self.intervals[pull.kind], self.encoder
        scale, interval = usual if pull.scale is None else pull.scale, pull.interval or interval
        curve = pull.curve or (self.curves.get(pull.kind) if pull.scale is None else None)
        term = PACES[pull.pace].of(Term(self._guidance(pull), encoder, scale, *interval, every=pull.every))
        if curve is not None:
            term = replace(term, curves=(curve,))
        if pull.region is not None:
            term = replace(term, region=Region(pull.region[None, None]))
        return replace(term, scale=-term.scale, goal=Goal(pull.until, adapted=False)) if pull.away else term

    @functools.cached_property
    def classifier(self) -> Classifier:
        """The classifier of noisy pictures. Raises ValueError in worlds without one."""
        if self.classifier_file is None:
            raise ValueError("The pixel world has no classifier of its own. Open the latent one.")
        return load_classifier(self.classifier_file)

    def _guidance(self, pull: Pull) -> Guidance:
        if pull.kind == "class":
            return ClassGuidance(self.classifier.number_of(str(pull.target)))
        if isinstance(pull.target, str):
            assert not isinstance(pull.negative, Tensor), "Texts have a text as their negative."
            negative = self.negative if pull.negative is None and not pull.away else pull.negative or ""
            with torch.no_grad():
                against = self.encoder.encode_text([negative]) if negative else None
                wanted = self.encoder.encode_text([pull.target])
            return TextGuidance(wanted, False, (pull.target,), against, (negative,) if negative else ())
        if isinstance(pull.target, Change):
            with torch.no_grad():
                before, after = self.encoder.encode_text([pull.target.before, pull.target.after]).tensor_split(2)
            return DirectionGuidance(pull.target.picture[None], after - before, pull.target[1:])
        if isinstance(pull.negative, Tensor):
            return ContentGuidance(pull.target[None], negative=pull.negative)
        kinds: dict[str, Callable[[Tensor], Guidance]] = {
            "content": ContentGuidance, "structure": StructureGuidance, "style": StyleGuidance
        }  # fmt: skip
        return kinds[pull.kind](pull.target[None])


def load_world(folder: Path = BUNDLED) -> World:
    """The world of the bundled files. Raises FileNotFoundError, naming the file, where one is missing."""
    renders, labels = load_renders(folder / "renders.png")
    return World(
        ADMDenoiser(load_adm(folder / "adm.safetensors")),
        load_noisy_clip(folder / "noisy_clip.safetensors"),
        load_judge(folder / "judge.safetensors"),
        renders,
        labels,
    )


def open_world(name: WorldName) -> World:
    """The world of a name. Raises FileNotFoundError, naming the file, where one is missing."""
    return load_world(name.folder) if name.route is None else load_latent_world(name)


def load_latent_world(name: WorldName) -> World:
    """The 128 px world: a face of its latent model, with the encoder and view of the name's route."""
    latent = name.folder / "latent"
    denoiser = ADMDenoiser(load_adm(*latent_model_file(name.model, name.folder)))
    autoencoder = load_tiny_autoencoder(latent / "autoencoder.safetensors")
    space = denoiser.unet.config.latent_format
    assert space is not None
    decoded = space.tiny_view(autoencoder.decoder)
    noisy = name.route == "noisy linear"
    if noisy:
        encoder: CleanCLIP = load_noisy_clip(latent / "noisy_clip.safetensors")
    else:
        encoder = load_bundled_clip(latent / "clip.safetensors")
    renders, labels = load_renders(latent / "renders.png")
    world = World(
        denoiser,
        encoder,
        load_judge(latent / "judge.safetensors"),
        renders,
        labels,
        decoded if name.route == "clean decoded" else space.linear_view(),
        1.0,
        decoded,
        CLEAN_SCALE,
        CLEAN_INTERVAL,
        load_held_out(latent / "held_out.safetensors"),
        latent / "classifier.safetensors",
    )
    if not noisy:
        return world
    return replace(
        world, scales=NOISY_SCALE, intervals=NOISY_INTERVAL, negative=NEGATIVE, curves=NOISY_CURVE,
        several=NOISY_SEVERAL, small=NOISY_SMALL,
    )  # fmt: skip


def batch_noise(seed: int, count: int, size: int, channels: int = 3) -> Tensor:
    """The noise that ComfyUI draws for a batch of this seed: (count, channels, size, size)."""
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def seeded_noise(seeds: Sequence[int], size: int, channels: int = 3) -> Tensor:
    """Noise of single pictures, each from its own seed, so that a batch equals single runs."""
    return torch.cat([batch_noise(seed, 1, size, channels) for seed in seeds])


def sample(
    world: World,
    pulls: Sequence[Pull],
    noise: Tensor,
    *,
    steps: int = 50,
    sampler: Sampler = "euler_ancestral",
    strength: Strength | None = None,
    seed: int = 0,
    progress: Callable[[Step], object] = lambda step: None,
    low: LowFrequencies | None = None,
    picture: Tensor | None = None,
    denoise: float = 1.0,
) -> Tensor:
    """Guided pictures (B, 3, S, S), about -1..1, from unit noise of the shape that the model draws.

    ``seed`` drives the noise that ancestral samplers add (the first noise is given). ``low``: frequencies that the
    pictures keep (ILVR). Neither that nor ``strength`` applies to the paper's sampler. ``picture`` (1 or B, C, H, W),
    in the model's own space, is where a run at ``denoise`` below 1 starts, as in ComfyUI.
    """
    denoiser = world.denoiser
    run = world.open_run(tuple(world.term(pull) for pull in pulls), strength)
    sigmas = denoiser.sigmas(int(steps / denoise))[-(steps + 1) :]
    x = denoiser.initial(noise, sigmas) if picture is None else denoiser.noised(picture, noise, sigmas)
    generator = torch.Generator().manual_seed(seed + 1)  # ComfyUI's step noise on the CPU starts one seed further
    ancestral = euler_ancestral_flow if denoiser.convention is Convention.FLOW else euler_ancestral
    estimate = guided(denoiser, run)
    if low is not None:
        estimate = held(estimate, low, denoiser.percent_to_sigma())
    if sampler == "paper":
        process = paper(denoiser.predict, x, sigmas, generator, run)
    elif sampler == "euler_ancestral":
        process = ancestral(estimate, x, sigmas, generator)
    else:
        process = euler(estimate, x, sigmas)
    for step in process:
        progress(step)
        x = step.x
    run.warn()
    with torch.no_grad():
        return world.decode(x)
