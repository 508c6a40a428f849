"""Nodes that compare: one graph samples every guidance at every factor, and one picture shows all of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from comfy_api.latest import io
from torch import Tensor

from ..sdg_core import draw_table
from ..sdg_core.method import combine, name_of
from . import host
from .finetune import as_host_image
from .guidance import COMBINED, GuidanceSocket
from .inputs import check_image, shown, to_factors

FACTORS = "0, 0.5, 1, 2"
MOST_FACTORS = 12
JOINED = " + "


@dataclass(frozen=True)
class Sweep:
    """What a list of guidances runs through, row by row: a name for each row, a factor for each column."""

    rows: tuple[str, ...]
    factors: tuple[float, ...]


SweepSocket = io.Custom("SDG_SWEEP")


def to_sweep(value: object) -> Sweep:
    """What a sweep socket carries. Raises ValueError for anything else."""
    if not isinstance(value, Sweep):
        raise ValueError(
            f"The input sweep got {shown(value)}; wanted an SDG_SWEEP. Connect the one of Guidance XY (SDG)."
        )
    return value


def title_of(guidance: host.HostGuidance) -> str:
    """What its parts are, in letters that grids can draw: a text in others is left out."""
    names = (name_of(term) for term in guidance.terms)
    return JOINED.join(name if name.isascii() else name.split(' "')[0] for name in names)


class SDGGuidanceXY(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SDGGuidanceXY",
            display_name="Guidance XY (SDG)",
            category="SDG/guidance",
            description="Gives each guidance at each factor, one after the other, as an XY plot wants them. What "
            "follows runs once for each; XY Grid shows all in one picture.",
            inputs=[
                *(
                    GuidanceSocket.Input(
                        f"guidance_{number}",
                        optional=True,
                        tooltip="Any guidance, also a combined one: a row. Empty ones are left out.",
                    )
                    for number in range(1, COMBINED + 1)
                ),
                io.String.Input(
                    "factors",
                    default=FACTORS,
                    tooltip="What multiplies the scale, separated by commas: a column each. 0 is unguided, 1 the "
                    f"guidance as it is. At most {MOST_FACTORS}.",
                ),
            ],
            outputs=[
                GuidanceSocket.Output(
                    "GUIDANCE",
                    tooltip="All of them, row by row. Connect to Guided KSampler, which then runs once for each.",
                    is_output_list=True,
                ),
                SweepSocket.Output("SWEEP", display_name="sweep", tooltip="Names of rows and columns, for XY Grid."),
            ],
        )

    @classmethod
    def execute(
        cls,
        factors: str,
        guidance_1: host.HostGuidance | None = None,
        guidance_2: host.HostGuidance | None = None,
        guidance_3: host.HostGuidance | None = None,
        guidance_4: host.HostGuidance | None = None,
    ) -> io.NodeOutput:
        columns = to_factors(factors, MOST_FACTORS)
        sockets = (guidance_1, guidance_2, guidance_3, guidance_4)
        rows = [host.to_guidance(g, f"guidance_{n}") for n, g in enumerate(sockets, 1) if g is not None]
        if not rows:
            raise ValueError("Nothing to compare: all guidance inputs are empty. Connect at least one guidance.")
        swept = [host.HostGuidance(combine([(row.terms, by)]), row.patchers) for row in rows for by in columns]
        return io.NodeOutput(swept, Sweep(tuple(map(title_of, rows)), columns))


class SDGXYGrid(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SDGXYGrid",
            display_name="XY Grid (SDG)",
            category="SDG/sampling",
            description="Puts the pictures of a sweep into one, with a name above each row and a factor above each "
            "column. Use it after Guidance XY.",
            inputs=[
                io.Image.Input(
                    "images", tooltip="What the sweep sampled, decoded. Several pictures at once become several grids."
                ),
                SweepSocket.Input("sweep", tooltip="From Guidance XY, which the pictures were sampled with."),
            ],
            outputs=[io.Image.Output("IMAGE", tooltip="One grid for each picture of the batch.")],
            is_input_list=True,
        )

    @classmethod
    def execute(cls, images: list[Tensor], sweep: list[Sweep]) -> io.NodeOutput:
        plan = to_sweep(sweep[0])
        cells = [check_image(image) for image in images]
        wanted = len(plan.rows) * len(plan.factors)
        if len(cells) != wanted or len({tuple(cell.shape) for cell in cells}) != 1:
            shapes = sorted({tuple(cell.shape) for cell in cells})
            raise ValueError(
                f"Got {len(cells)} runs of shapes {shapes}; wanted {wanted} of one shape, for {len(plan.rows)} "
                f"guidances at {len(plan.factors)} factors. Connect the pictures that this sweep's guidance was "
                "sampled to."
            )
        table = torch.stack([cell.movedim(-1, 1).float().cpu() * 2 - 1 for cell in cells])
        table = table.unflatten(0, (len(plan.rows), len(plan.factors)))
        titles = [f"{number}. {row}" for number, row in enumerate(plan.rows, 1)]
        columns = [f"x {factor:g}" for factor in plan.factors]
        grids = [as_host_image(draw_table(table[:, :, i], titles, columns)) for i in range(table.shape[2])]
        return io.NodeOutput(torch.cat(grids))
