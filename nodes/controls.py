"""The artists' controls: each takes a guidance, single or combined, and gives it back with one thing changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from comfy_api.latest import io

from ..sdg_core.method import EASES, Curve, Term
from . import host
from .guidance import GuidanceSocket, guidance_output
from .inputs import to_points

POINTS = "0:1, 1:0"


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
                    "the next: with the default points, full strength throughout.",
                ),
                io.String.Input(
                    "points",
                    default=POINTS,
                    tooltip="Part of the run (0 noise, 1 finished) : factor on the strength, with commas. "
                    "1 keeps it, 0 is off. For example 0:0, 0.3:1, 1:0.2.",
                ),
                io.Int.Input(
                    "every",
                    default=1,
                    min=1,
                    max=100,
                    tooltip="Take the gradient at every k-th step and reuse it between. 1 is exact; 2 halves what "
                    "guidance costs, with little change. Usual: 1 to 3.",
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
