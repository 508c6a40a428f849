"""The artists' controls: each takes a guidance, single or combined, and gives it back with one thing changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from comfy_api.latest import io
from torch import Tensor

from ..sdg_core.method import (
    CHOICES,
    EASES,
    PACES,
    Augment,
    ContentGuidance,
    Curve,
    Goal,
    Region,
    Several,
    Term,
    TextGuidance,
)
from . import host
from .guidance import GuidanceSocket, guidance_output
from .inputs import check_finite, shown, to_frames, to_mask, to_points, to_weights

POINTS = "0:1, 1:1"


def guidance_input() -> io.Input:
    return GuidanceSocket.Input("guidance", tooltip="Any guidance, also a combined one.")


def modified(guidance: object, change: Callable[[Term], Term]) -> io.NodeOutput:
    """The guidance with every term changed, as a node's output."""
    found = host.to_guidance(guidance)
    return io.NodeOutput(host.HostGuidance(tuple(map(change, found.terms)), found.patchers))


class SDGGuidanceSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SDGGuidanceSchedule",
            display_name="Guidance Schedule (SDG)",
            category="SDG/guidance",
            description="Says when a guidance pulls: a curve over the run, and every how many steps its gradient is "
            "taken anew. Use it to set the layout early or details late, or to save time.",
            inputs=[
                guidance_input(),
                io.Combo.Input(
                    "curve",
                    options=list(EASES),
                    default="constant",
                    tooltip="How the strength runs from one point to the next. constant holds a point's value up to "
                    "the next: by default, full strength throughout.",
                ),
                io.String.Input(
                    "points",
                    default=POINTS,
                    tooltip="Part of the run (0 noise, 1 finished) : factor on the strength. "
                    "1 keeps it, 0 is off. For example 0:0, 0.3:1, 1:0.2.",
                ),
                io.Int.Input(
                    "every",
                    default=1,
                    min=1,
                    max=100,
                    tooltip="Take the gradient at every k-th step and reuse it between. 1 is exact; 2 takes half "
                    "as many. Usual: 1 to 3.",
                ),
            ],
            outputs=[guidance_output()],
        )

    @classmethod
    def execute(cls, guidance: host.HostGuidance, curve: str, points: str, every: int) -> io.NodeOutput:
        shape = Curve(to_points(points), curve)
        return modified(
            guidance, lambda term: replace(term, curves=(*term.curves, shape), every=max(every, term.every))
        )


class SDGGuidanceSpeed(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SDGGuidanceSpeed",
            display_name="Guidance Speed (SDG)",
            category="SDG/guidance",
            description="Trades a guidance's exactness for time. Use it for drafts, and for slow encoders on small "
            "models.",
            inputs=[
                guidance_input(),
                io.Combo.Input(
                    "speed",
                    options=list(PACES),
                    default="balanced",
                    tooltip="quality: a gradient at every step. balanced: half of them, most at the start, reused "
                    "between. fast: a third, in the run's first 60 %.",
                ),
            ],
            outputs=[guidance_output()],
        )

    @classmethod
    def execute(cls, guidance: host.HostGuidance, speed: str) -> io.NodeOutput:
        if speed not in PACES:
            raise ValueError(f"Got the speed {shown(speed)}; wanted one of: {', '.join(PACES)}. Choose one.")
        return modified(guidance, PACES[speed].of)


class SDGGuidanceMask(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SDGGuidanceMask",
            display_name="Guidance Mask (SDG)",
            category="SDG/guidance",
            description="Says where a guidance acts, and which part of its reference it reads. Use it to guide one "
            "region, or to take a style from a detail.",
            inputs=[
                guidance_input(),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White: where the picture is read and pulled. Outside nothing is changed. Any size; "
                    "several are one for each picture or frame. Empty: everywhere.",
                ),
                io.Mask.Input(
                    "reference_mask",
                    optional=True,
                    tooltip="White: the part of the reference picture that is read. Any size; one for all references, "
                    "or one for each. Empty: all of it.",
                ),
                io.Float.Input(
                    "feather",
                    default=0.0,
                    min=0.0,
                    max=0.5,
                    step=0.01,
                    round=0.001,
                    optional=True,
                    tooltip="Softens the masks' edges inwards, over this part of the picture. 0 is a sharp edge. "
                    "Usual: 0 to 0.1.",
                ),
            ],
            outputs=[guidance_output()],
        )

    @classmethod
    def execute(
        cls,
        guidance: host.HostGuidance,
        mask: Tensor | None = None,
        reference_mask: Tensor | None = None,
        feather: float = 0.0,
    ) -> io.NodeOutput:
        check_finite(feather=feather)
        region = Region(to_mask(mask, "mask"), to_mask(reference_mask, "reference_mask"), feather)
        empty = region.picture is None and region.reference is None
        return modified(guidance, lambda term: term if empty else replace(term, region=region))


class SDGGuidanceTarget(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SDGGuidanceTarget",
            display_name="Guidance Target (SDG)",
            category="SDG/guidance",
            description="Says how similar the picture should become, instead of a scale: each step pulls as hard as "
            "that takes, under the cap, and not at all once it is reached.",
            inputs=[
                guidance_input(),
                io.Float.Input(
                    "similarity",
                    default=0.3,
                    min=-1.0,
                    max=1.0,
                    step=0.01,
                    round=0.001,
                    tooltip="What to reach, 1 at most: the cosine for text and content, 1 minus the "
                    "distance for structure and style. Usual: text 0.25, pictures 0.7.",
                ),
            ],
            outputs=[guidance_output()],
        )

    @classmethod
    def execute(cls, guidance: host.HostGuidance, similarity: float) -> io.NodeOutput:
        check_finite(similarity=similarity)
        goal = Goal(similarity)
        return modified(guidance, lambda term: replace(term, goal=goal))


class SDGGuidanceAway(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SDGGuidanceAway",
            display_name="Guidance Away (SDG)",
            category="SDG/guidance",
            description="Turns a guidance into a negative one, that pushes away from its text or picture and stops "
            "where nothing is left of it. Use it as a negative prompt or a negative picture.",
            inputs=[
                guidance_input(),
                io.Float.Input(
                    "until",
                    default=0.0,
                    min=-1.0,
                    max=1.0,
                    step=0.01,
                    round=0.001,
                    tooltip="Similarity where pushing stops. 0: nothing in common (orthogonal). Higher stops earlier, "
                    "-1 never. Usual: 0 to 0.2.",
                ),
            ],
            outputs=[guidance_output()],
        )

    @classmethod
    def execute(cls, guidance: host.HostGuidance, until: float) -> io.NodeOutput:
        check_finite(until=until)
        goal = Goal(until, adapted=False)
        return modified(guidance, lambda term: replace(term, scale=-abs(term.scale), goal=goal))


class SDGGuidanceFrames(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SDGGuidanceFrames",
            display_name="Guidance Frames (SDG)",
            category="SDG/guidance",
            description="Lets a guidance act on chosen frames of a video only. Pictures stay as they are.",
            inputs=[
                guidance_input(),
                io.String.Input(
                    "frames",
                    default="0",
                    tooltip="Latent frames from 0, with commas and ranges; -1 is the last. A latent frame holds "
                    "several of the video's. Usual: 0, or 0-4,-1.",
                ),
            ],
            outputs=[guidance_output()],
        )

    @classmethod
    def execute(cls, guidance: host.HostGuidance, frames: str) -> io.NodeOutput:
        chosen = to_frames(frames)
        return modified(guidance, lambda term: replace(term, frames=chosen))


class SDGGuidanceReferences(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SDGGuidanceReferences",
            display_name="Guidance References (SDG)",
            category="SDG/guidance",
            description="Says how a guidance follows several reference pictures, given to it as one batch: all, the "
            "nearest, each in turn, or each picture its own.",
            inputs=[
                guidance_input(),
                io.Combo.Input(
                    "choice",
                    options=list(CHOICES),
                    default="mean",
                    tooltip="mean: all at once. nearest: the one each picture fits best. in turn: another at each "
                    "step. one each: the nth picture follows the nth.",
                ),
                io.String.Input(
                    "weights",
                    default="",
                    tooltip="One number above 0 for each reference, with commas: how much, or how often, it counts. "
                    "Empty: all alike. one each takes none.",
                ),
            ],
            outputs=[guidance_output()],
        )

    @classmethod
    def execute(cls, guidance: host.HostGuidance, choice: str, weights: str) -> io.NodeOutput:
        several = Several(choice, to_weights(weights))
        if not any(map(_has_references, host.to_guidance(guidance).terms)):
            raise ValueError(
                "Got a guidance without reference pictures; wanted Content, Structure, Style or Direction Guidance. "
                "Connect one of these, or take this node out."
            )
        return modified(guidance, lambda term: replace(term, several=several) if _has_references(term) else term)


def _has_references(term: Term) -> bool:
    return getattr(term.guidance, "image", None) is not None


class SDGGuidanceAugment(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SDGGuidanceAugment",
            display_name="Guidance Augment (SDG)",
            category="SDG/guidance",
            description="Lets a clean encoder (Load CLIP) look at random crops and mirror images, so that it can't be "
            "pleased by hidden patterns. Noisy CLIPs need no crops and get none.",
            inputs=[
                guidance_input(),
                io.Int.Input(
                    "crops",
                    default=4,
                    min=0,
                    max=64,
                    tooltip="Crops at each step, their gradients averaged. More is steadier and slower: each costs a "
                    "pass. 0 is off. Usual: 2 to 8.",
                ),
                io.Float.Input(
                    "least",
                    default=0.7,
                    min=0.1,
                    max=1.0,
                    step=0.05,
                    round=0.001,
                    tooltip="The smallest crop, as a part of the picture's sides. Lower looks at details, 1 mirrors "
                    "only. Usual: 0.5 to 0.9.",
                ),
                io.Boolean.Input(
                    "spherical",
                    default=False,
                    tooltip="Text and content, of noisy CLIPs too: the angle instead of its cosine. Pulls on where the "
                    "cosine is nearly reached. Off: the cosine.",
                ),
            ],
            outputs=[guidance_output()],
        )

    @classmethod
    def execute(cls, guidance: host.HostGuidance, crops: int, least: float, spherical: bool) -> io.NodeOutput:
        check_finite(least=least)
        augment = Augment(crops, least) if crops else None
        terms = host.to_guidance(guidance).terms
        if augment is not None and not any(term.encoder.reads == "denoised" for term in terms):
            raise ValueError(
                "Got a guidance that looks through noisy CLIPs only; crops are for clean ones. Use Load CLIP (SDG) or "
                "an Encoder Crossfade, or take this node out."
            )

        def change(term: Term) -> Term:
            if isinstance(term.guidance, TextGuidance | ContentGuidance):
                term = replace(term, guidance=replace(term.guidance, spherical=spherical))
            return replace(term, augment=augment) if term.encoder.reads == "denoised" else term

        return modified(guidance, change)


class SDGGuidanceBudget(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SDGGuidanceBudget",
            display_name="Guidance Budget (SDG)",
            category="SDG/guidance",
            description="Says how much time guidance may cost. The first steps are measured; then its gradient is "
            "taken as often as that allows and reused between. The log says what was chosen.",
            inputs=[
                guidance_input(),
                io.Float.Input(
                    "percent",
                    default=25.0,
                    min=1.0,
                    max=1000.0,
                    step=1.0,
                    round=0.1,
                    tooltip="At most so much more time than the model alone takes, after two steps. "
                    "Lower is faster and follows more roughly. Usual: 10 to 50.",
                ),
            ],
            outputs=[guidance_output()],
        )

    @classmethod
    def execute(cls, guidance: host.HostGuidance, percent: float) -> io.NodeOutput:
        check_finite(percent=percent)
        return modified(guidance, lambda term: replace(term, budget=min(percent, term.budget or percent)))
