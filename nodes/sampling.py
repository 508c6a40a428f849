"""Nodes that sample under guidance."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import comfy.samplers
import comfy.sd
import nodes
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..sdg_core.method import Strength
from . import defaults, host
from .guidance import GuidanceSocket
from .inputs import check_finite

LONGEST_SCHEDULE = 1_000_000
"""The most steps and the least denoise that the widgets offer."""

ADVANCED = {"advanced": True}
"""What ComfyUI folds away until it is asked for. Not the argument ``advanced=``, which is newer than some hosts."""


def strength_inputs() -> list[io.Input]:
    return [
        io.Combo.Input(
            "strength",
            options=["absolute", "relative"],
            default="absolute",
            tooltip="absolute: scales act as they are. relative: every step shifts by cap times the model's own, "
            "alike on any model; scales only share it out.",
            extra_dict=ADVANCED,
        ),
        io.Float.Input(
            "cap",
            default=defaults.CAP,
            min=0.0,
            max=10.0,
            step=0.05,
            round=0.001,
            tooltip="absolute: the shift's RMS is at most cap times the model's own step; 0 is no cap, 1 usual. "
            "relative: exactly that; start at 0.25.",
            extra_dict=ADVANCED,
        ),
    ]


def view_inputs() -> list[io.Input]:
    """What encoders look at. New inputs come last, so that saved workflows keep their order."""
    return [
        io.Combo.Input(
            "view",
            options=host.VIEWS,
            default="auto",
            optional=True,
            tooltip="What encoders see. linear: the latent's cheap colours. decoded: by tiny decoder or VAE, sharper "
            "and slower, clean CLIPs only. auto fits the model.",
            extra_dict=ADVANCED,
        ),
        io.Vae.Input(
            "vae",
            optional=True,
            tooltip="For the view decoded: the sharpest and slowest. Empty: ComfyUI's tiny decoder in "
            "models/vae_approx, much faster.",
            extra_dict=ADVANCED,
        ),
    ]


def measure_input() -> io.Input:
    return io.Boolean.Input(
        "measure",
        default=False,
        optional=True,
        tooltip="For Guidance Report: sizes and angles of guidances that share an encoder too, for one more pass "
        "each. The picture stays the same. Usual: off.",
        extra_dict=ADVANCED,
    )


def to_strength(strength: str, cap: float) -> Strength:
    """The two widgets as one setting. Raises ValueError for relative strength without a size."""
    check_finite(cap=cap)
    if strength == "relative" and cap == 0:
        raise ValueError(
            "Relative strength shifts by cap times the model's own step, and cap is 0. Set cap above "
            "0, for example 0.25, or choose absolute."
        )
    return Strength(strength, cap or None)


def check_denoise(steps: int, denoise: float) -> None:
    """Raises ValueError where the host would make a schedule without end: it takes the last ``steps`` of steps /
    denoise."""
    if denoise > 0 and steps / denoise > LONGEST_SCHEDULE:
        raise ValueError(
            f"Got denoise {denoise} with {steps} steps; ComfyUI would make a schedule of {steps / denoise:.3g} steps. "
            "Set denoise to 0.01 or more, or to 0 to keep the latent."
        )


@contextmanager
def seed_explained(seed: int, sampler_name: str) -> Iterator[None]:
    """Raises ValueError in words where a sampler of the host counts on from a seed that is the largest there is."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if "Overflow when unpacking" not in str(error):
            raise
        raise ValueError(
            f"Got the seed {seed}; {sampler_name} counts on from it, past 2^64 - 1, the largest that random numbers "
            "start from. Choose a smaller seed."
        ) from error


def noise_inputs() -> list[io.Input]:
    """Model, seed, steps and cfg, as KSampler has them."""
    return [
        io.Model.Input(
            "model",
            tooltip="Any model that draws pictures or video: from Load Checkpoint, Load ADM and others.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate=True,
            tooltip="Which noise to start from. The same seed gives the same picture.",
        ),
        io.Int.Input(
            "steps",
            default=20,
            min=1,
            max=10000,
            tooltip="Number of sampling steps. More is finer and slower. Guided pictures want some more: 25 to 100.",
        ),
        io.Float.Input(
            "cfg",
            default=8.0,
            min=0.0,
            max=100.0,
            step=0.1,
            round=0.01,
            tooltip="The model's own pull from negative to positive. 1 is off. No effect "
            "where negative is not connected.",
        ),
    ]


def algorithm_inputs() -> list[io.Input]:
    """Sampler and scheduler, as KSampler has them."""
    return [
        io.Combo.Input(
            "sampler_name",
            options=comfy.samplers.KSampler.SAMPLERS,
            tooltip="The algorithm that removes the noise. All of them can be guided; euler is a good start.",
        ),
        io.Combo.Input(
            "scheduler",
            options=comfy.samplers.KSampler.SCHEDULERS,
            tooltip="How the noise falls over the steps. normal is a good start for ADM.",
        ),
    ]


def pull_inputs() -> list[io.Input]:
    """What to pull towards: all of it optional, for a model that draws alone."""
    return [
        GuidanceSocket.Input("guidance", optional=True, tooltip="What to pull towards. Empty: a plain KSampler."),
        io.Conditioning.Input(
            "positive",
            optional=True,
            tooltip="The model's own prompt. Leave it empty for an ADM, which has none.",
        ),
        io.Conditioning.Input(
            "negative",
            optional=True,
            tooltip="The model's own negative prompt. Leave it empty for an ADM, which has none, "
            "and use Guidance Away.",
        ),
    ]


def start_inputs() -> list[io.Input]:
    """Latent and denoise, as KSampler has them."""
    return [
        io.Latent.Input("latent_image", tooltip="The latent to start from, for example Empty Pixel Latent."),
        io.Float.Input(
            "denoise",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="How much noise to put on the latent. 1 starts anew; lower keeps more of it.",
        ),
    ]


class SDGGuidedKSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SDGGuidedKSampler",
            display_name="Guided KSampler (SDG)",
            category="SDG/sampling",
            description="ComfyUI's KSampler under semantic guidance. Without guidance it gives "
            "exactly KSampler's picture.",
            inputs=[
                *noise_inputs(),
                *algorithm_inputs(),
                *pull_inputs(),
                *start_inputs(),
                *strength_inputs(),
                *view_inputs(),
                measure_input(),
            ],
            outputs=[io.Latent.Output("LATENT", tooltip="The sampled latent. Guidance Report says how it came about.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        latent_image: dict,
        denoise: float,
        strength: str,
        cap: float,
        guidance: host.HostGuidance | None = None,
        positive: list | None = None,
        negative: list | None = None,
        view: str = "auto",
        vae: comfy.sd.VAE | None = None,
        measure: bool = False,
    ) -> io.NodeOutput:
        check_finite(cfg=cfg, denoise=denoise)
        check_denoise(steps, denoise)
        model, latent_image = host.to_model(model), host.to_latent(latent_image)
        choice = host.ViewChoice(view, host.to_vae(vae))
        pulls = [host.to_conditioning(cond, name) for cond, name in ((positive, "positive"), (negative, "negative"))]
        conds, watch = host.conditioning(model, *pulls, cfg), host.Watch(measure)
        curve = host.NodeCurve(cls.hidden)
        if guidance is None:
            curve.clear()
            host.check_dimensions(model, latent_image)
        else:
            model = host.attach(model, host.to_guidance(guidance), to_strength(strength, cap), choice, watch, curve)
        with host.explained("this sampling run"), seed_explained(seed, sampler_name):
            (latent,) = nodes.common_ksampler(
                model,
                seed,
                steps,
                conds.cfg,
                sampler_name,
                scheduler,
                conds.positive,
                conds.negative,
                latent_image,
                denoise,
            )
        return io.NodeOutput(host.with_report(latent, watch))


class SDGApplyGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SDGApplyGuidance",
            display_name="Apply Guidance (SDG)",
            category="SDG/guidance",
            description="Gives a MODEL that any sampler node samples guided. Use it for KSampler "
            "(Advanced) or custom sampling.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="Any model that draws pictures or video: from Load Checkpoint, Load ADM and others.",
                ),
                GuidanceSocket.Input("guidance", tooltip="What to pull towards."),
                *strength_inputs(),
                *view_inputs(),
            ],
            outputs=[
                io.Model.Output("MODEL", tooltip="The model under guidance. The one that came in stays as it is.")
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        guidance: host.HostGuidance,
        strength: str,
        cap: float,
        view: str = "auto",
        vae: comfy.sd.VAE | None = None,
    ) -> io.NodeOutput:
        pull, choice = host.to_guidance(guidance), host.ViewChoice(view, host.to_vae(vae))
        curve, strength = host.NodeCurve(cls.hidden), to_strength(strength, cap)
        return io.NodeOutput(host.attach(host.to_model(model), pull, strength, choice, curve=curve))


class SDGPaperSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SDGPaperSampler",
            display_name="Paper Sampler (SDG)",
            category="SDG/sampling",
            description="The paper's ancestral sampler with learned variance, for SamplerCustom. Use "
            "it to reproduce SDG "
            "with an ADM. The cap of other nodes does not apply here.",
            inputs=[
                GuidanceSocket.Input(
                    "guidance",
                    optional=True,
                    tooltip="What to pull towards, at its plain scale: strength and cap don't apply "
                    "in this sampler. Empty: unguided.",
                )
            ],
            outputs=[io.Sampler.Output("SAMPLER", tooltip="Connect to SamplerCustom or SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, guidance: host.HostGuidance | None = None) -> io.NodeOutput:
        pull = None if guidance is None else host.to_guidance(guidance)
        return io.NodeOutput(comfy.samplers.KSAMPLER(host.paper_sampler(pull)))
