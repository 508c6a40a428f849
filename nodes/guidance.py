"""Nodes that say what to pull towards: text, the content, structure or style of a picture, a change; sums of these."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ..sdg_core.method import (
    Blend,
    ContentGuidance,
    DirectionGuidance,
    Guidance,
    StructureGuidance,
    StyleGuidance,
    Term,
    TextGuidance,
    check_layers,
    combine,
)
from . import defaults, host
from .inputs import check_finite, shown, to_layers, to_lines, to_prompt, to_references
from .loaders import NoisyCLIPSocket

GuidanceSocket = io.Custom("SDG_GUIDANCE")
COMBINED = 4
CONFLICTS = ["add up", "project"]


def noisy_clip_input() -> io.Input:
    return NoisyCLIPSocket.Input(
        "noisy_clip", tooltip="The encoder to look through, from Load Noisy CLIP or Load CLIP."
    )


def image_input(what: str) -> io.Input:
    return io.Image.Input("image", tooltip=f"{what} Any size: it is scaled to cover the picture. Several are averaged.")


def scale_input(default: float, tooltip: str) -> io.Input:
    return io.Float.Input(
        "scale",
        default=default,
        min=defaults.SCALE_MIN,
        max=defaults.SCALE_MAX,
        step=defaults.SCALE_STEP,
        round=0.01,
        tooltip=tooltip,
    )


def layers_input(default: str, tooltip: str) -> io.Input:
    return io.String.Input("layers", default=default, tooltip=tooltip)


def interval_inputs(start: float, end: float) -> list[io.Input]:
    fraction = {"min": 0.0, "max": 1.0, "step": 0.01, "round": 0.001}
    return [
        io.Float.Input(
            "start_percent",
            default=start,
            **fraction,
            tooltip="Guide from this part of the run on. 0 is pure noise; higher leaves the layout to the model.",
        ),
        io.Float.Input(
            "end_percent",
            default=end,
            **fraction,
            tooltip="Guide up to this part of the run. 1 is the finished picture; lower leaves fine "
            "detail to the model.",
        ),
    ]


def blend_inputs() -> list[io.Input]:
    """How combined guidances come together. New inputs come last, so that saved workflows keep their order."""
    return [
        io.Combo.Input(
            "conflicts",
            options=CONFLICTS,
            default=CONFLICTS[0],
            optional=True,
            tooltip="What becomes of guidances that work against each other. add up: nothing. project: "
            "each gives up what works against another, so none undoes another.",
        ),
        io.Float.Input(
            "balance",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.05,
            round=0.001,
            optional=True,
            tooltip="0: scales and gradients decide who pulls how strongly. 1: the weights alone, so that equal "
            "weights pull equally. Between: part of the way.",
        ),
    ]


def to_blend(conflicts: str, balance: float) -> Blend | None:
    """The two widgets; None where guidances simply add up. Raises ValueError for other words."""
    if conflicts not in CONFLICTS:
        raise ValueError(f"Got the conflicts {shown(conflicts)}; wanted one of: {', '.join(CONFLICTS)}. Choose one.")
    blend = Blend(balance, conflicts == "project")
    return blend if blend.project or blend.balance else None


def guidance_output() -> io.Output:
    return GuidanceSocket.Output("GUIDANCE", tooltip="Connect to Guided KSampler, Apply Guidance or Combine Guidance.")


def terms_of(
    noisy_clip: host.NoisyCLIPValue,
    scale: float,
    start: float,
    end: float,
    *made: Callable[[ModelPatcher], Guidance],
) -> io.NodeOutput:
    """A node's output: of each guidance a term for each encoder of the socket, ``made`` called with its patcher."""
    check_finite(scale=scale)
    parts = host.encoder_parts(noisy_clip)
    terms = tuple(
        Term(make(patcher), patcher.model, scale, start, end, fade) for make in made for patcher, fade in parts
    )
    return io.NodeOutput(host.HostGuidance(terms, tuple(patcher for patcher, _ in parts)))


class SDGTextGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SDGTextGuidance",
            display_name="Text Guidance (SDG)",
            category="SDG/guidance",
            description="Pulls the picture towards a text. Use it to give an unconditional model a "
            "prompt, or any model one more.",
            inputs=[
                noisy_clip_input(),
                io.String.Input(
                    "text",
                    multiline=True,
                    default="a person with red hair\na person with glasses",
                    tooltip="What the picture should show, in words that the encoder knows. One wish a line is "
                    "followed better than many in one sentence.",
                ),
                scale_input(
                    defaults.TEXT_SCALE,
                    "How strongly to follow the text. Higher follows closer and varies less; 0 is off, "
                    "negative pushes away (better: Guidance Away). Usual: 50 to 300.",
                ),
                *interval_inputs(*defaults.TEXT_INTERVAL),
                io.String.Input(
                    "negative",
                    optional=True,
                    default="",
                    tooltip="What to pull away from, half as strongly. Best: what all pictures share, such as "
                    '"a person": the rest of the text counts more then.',
                ),
            ],
            outputs=[guidance_output()],
        )

    @classmethod
    def execute(
        cls,
        noisy_clip: host.NoisyCLIPValue,
        text: str,
        scale: float,
        start_percent: float,
        end_percent: float,
        negative: str = "",
    ) -> io.NodeOutput:
        negatives = (negative.strip(),) if negative.strip() else ()

        def make(line: str, patcher: ModelPatcher) -> TextGuidance:
            encoder = host.load_encoder(patcher)
            with torch.no_grad():
                against = encoder.encode_text(list(negatives)) if negatives else None
                return TextGuidance(encoder.encode_text([line]), False, (line,), against, negatives)

        made = (functools.partial(make, line) for line in to_lines(text))
        return terms_of(noisy_clip, scale, start_percent, end_percent, *made)


class SDGContentGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SDGContentGuidance",
            display_name="Content Guidance (SDG)",
            category="SDG/guidance",
            description="Pulls towards what a reference picture shows. Pose and layout stay free: "
            "use it for variations.",
            inputs=[
                noisy_clip_input(),
                image_input("The picture whose content to follow."),
                scale_input(
                    defaults.CONTENT_SCALE,
                    "How strongly to follow the content. Higher is closer to the reference; 0 is off, "
                    "negative pushes away (better: Guidance Away). Usual: 100 to 500.",
                ),
                *interval_inputs(*defaults.CONTENT_INTERVAL),
                io.Image.Input(
                    "negative",
                    optional=True,
                    tooltip="Pictures to pull away from, half as strongly. Best: 8 to 16 that the model draws "
                    "unguided; what sets the image apart counts more then.",
                ),
            ],
            outputs=[guidance_output()],
        )

    @classmethod
    def execute(
        cls,
        noisy_clip: host.NoisyCLIPValue,
        image: Tensor,
        scale: float,
        start_percent: float,
        end_percent: float,
        negative: Tensor | None = None,
    ) -> io.NodeOutput:
        guidance = ContentGuidance(to_references(image), negative=None if negative is None else to_references(negative))
        return terms_of(noisy_clip, scale, start_percent, end_percent, lambda patcher: guidance)


class SDGStructureGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SDGStructureGuidance",
            display_name="Structure Guidance (SDG)",
            category="SDG/guidance",
            description="Pulls towards the layout of a reference picture: things in the same places. "
            "Use it where content guidance is too loose.",
            inputs=[
                noisy_clip_input(),
                image_input("The picture whose layout to follow."),
                scale_input(
                    defaults.STRUCTURE_SCALE,
                    "How strongly to follow the layout. Higher is closer to the reference; 0 is off, "
                    "negative pushes away (better: Guidance Away). Usual: 100 to 1000.",
                ),
                layers_input(
                    defaults.STRUCTURE_LAYERS,
                    "Feature maps to compare, from 1, separated by commas. "
                    "Shallow ones fix strokes and colours, deep ones parts and layout. Usual: 3 or 4.",
                ),
                *interval_inputs(*defaults.STRUCTURE_INTERVAL),
            ],
            outputs=[guidance_output()],
        )

    @classmethod
    def execute(
        cls,
        noisy_clip: host.NoisyCLIPValue,
        image: Tensor,
        scale: float,
        layers: str,
        start_percent: float,
        end_percent: float,
    ) -> io.NodeOutput:
        references, numbers = to_references(image), to_layers(layers)

        def make(patcher: ModelPatcher) -> StructureGuidance:
            return StructureGuidance(references, check_layers(numbers, patcher.model))

        return terms_of(noisy_clip, scale, start_percent, end_percent, make)


class SDGStyleGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SDGStyleGuidance",
            display_name="Style Guidance (SDG)",
            category="SDG/guidance",
            description="Pulls towards the style of a reference picture: strokes, texture and "
            "palette, whatever it shows.",
            inputs=[
                noisy_clip_input(),
                image_input("The picture whose style to follow."),
                scale_input(
                    defaults.STYLE_SCALE,
                    "How strongly to follow the style. Higher is closer to the reference; 0 is off, "
                    "negative pushes away (better: Guidance Away). Usual: 500 to 4000.",
                ),
                layers_input(
                    defaults.STYLE_LAYERS,
                    "Feature maps to compare, from 1, separated by commas. "
                    "Shallow ones carry strokes and palette, deep ones parts. Usual: 5.",
                ),
                *interval_inputs(*defaults.STYLE_INTERVAL),
                io.Boolean.Input(
                    "centred",
                    default=defaults.STYLE_CENTRED,
                    tooltip="Leave out each feature's mean: less of the reference's layout and palette comes along. "
                    "Off: the paper's Gram matrix.",
                ),
            ],
            outputs=[guidance_output()],
        )

    @classmethod
    def execute(
        cls,
        noisy_clip: host.NoisyCLIPValue,
        image: Tensor,
        scale: float,
        layers: str,
        start_percent: float,
        end_percent: float,
        centred: bool,
    ) -> io.NodeOutput:
        references, numbers = to_references(image), to_layers(layers)

        def make(patcher: ModelPatcher) -> StyleGuidance:
            return StyleGuidance(references, check_layers(numbers, patcher.model), centred)

        return terms_of(noisy_clip, scale, start_percent, end_percent, make)


class SDGDirectionGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SDGDirectionGuidance",
            display_name="Direction Guidance (SDG)",
            category="SDG/guidance",
            description="Changes a given picture as one text changes into another. Use it for editing: start "
            "from the picture's own latent, at a denoise below 1.",
            inputs=[
                noisy_clip_input(),
                image_input("The picture to edit, the one that the latent holds."),
                io.String.Input(
                    "from_text",
                    multiline=True,
                    default="a person",
                    tooltip="What the picture shows now, as far as it should change.",
                ),
                io.String.Input(
                    "to_text",
                    multiline=True,
                    default="a person with glasses",
                    tooltip="What it should show instead. Only the difference of the two texts counts.",
                ),
                scale_input(
                    defaults.DIRECTION_SCALE,
                    "How strongly to follow the change. Higher changes more; 0 is off, "
                    "negative changes the other way. Usual: 50 to 600.",
                ),
                *interval_inputs(*defaults.DIRECTION_INTERVAL),
            ],
            outputs=[guidance_output()],
        )

    @classmethod
    def execute(
        cls,
        noisy_clip: host.NoisyCLIPValue,
        image: Tensor,
        from_text: str,
        to_text: str,
        scale: float,
        start_percent: float,
        end_percent: float,
    ) -> io.NodeOutput:
        references, prompts = to_references(image), [to_prompt(from_text), to_prompt(to_text)]

        def make(patcher: ModelPatcher) -> DirectionGuidance:
            with torch.no_grad():
                before, after = host.load_encoder(patcher).encode_text(prompts).split(1)
            return DirectionGuidance(references, after - before, tuple(prompts))

        return terms_of(noisy_clip, scale, start_percent, end_percent, make)


class SDGCombineGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SDGCombineGuidance",
            display_name="Combine Guidance (SDG)",
            category="SDG/guidance",
            description="Adds guidances up, each with a weight: text and pictures pull at once. "
            "Chain it for more than four.",
            inputs=[part for number in range(1, COMBINED + 1) for part in cls.pair(number)] + blend_inputs(),
            outputs=[guidance_output()],
        )

    @classmethod
    def pair(cls, number: int) -> list[io.Input]:
        return [
            GuidanceSocket.Input(
                f"guidance_{number}",
                optional=True,
                tooltip="Any guidance, also one that is combined already. Empty ones are left out.",
            ),
            io.Float.Input(
                f"weight_{number}",
                default=1.0,
                min=-100.0,
                max=100.0,
                step=0.05,
                round=0.001,
                optional=True,
                tooltip=f"Multiplies the scale of guidance {number}. 1 keeps it, 0 turns it off, "
                "negative pushes away. Usual: 0.5 to 2.",
            ),
        ]

    @classmethod
    def execute(
        cls,
        guidance_1: host.HostGuidance | None = None,
        weight_1: float = 1.0,
        guidance_2: host.HostGuidance | None = None,
        weight_2: float = 1.0,
        guidance_3: host.HostGuidance | None = None,
        weight_3: float = 1.0,
        guidance_4: host.HostGuidance | None = None,
        weight_4: float = 1.0,
        conflicts: str = CONFLICTS[0],
        balance: float = 0.0,
    ) -> io.NodeOutput:
        check_finite(weight_1=weight_1, weight_2=weight_2, weight_3=weight_3, weight_4=weight_4, balance=balance)
        pairs = [(guidance_1, weight_1), (guidance_2, weight_2), (guidance_3, weight_3), (guidance_4, weight_4)]
        named = [(f"guidance_{number}", *pair) for number, pair in enumerate(pairs, 1) if pair[0] is not None]
        parts = [(host.to_guidance(guidance, name), weight) for name, guidance, weight in named]
        if not parts:
            raise ValueError("Nothing to combine: all guidance inputs are empty. Connect at least one guidance.")
        patchers = {id(patcher): patcher for guidance, _ in parts for patcher in guidance.patchers}
        terms = combine([(guidance.terms, weight) for guidance, weight in parts], to_blend(conflicts, balance))
        return io.NodeOutput(host.HostGuidance(terms, tuple(patchers.values())))
