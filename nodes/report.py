"""The node that says what happened in a guided run."""

from __future__ import annotations

import time

from comfy_api.latest import io, ui

from ..sdg_core.method import draw_report
from . import host
from .finetune import as_host_image


class SDGGuidanceReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SDGGuidanceReport",
            display_name="Guidance Report (SDG)",
            category="SDG/sampling",
            description="Says what each guidance did in a run: score, size, angles, where the cap bound, and time. "
            "Use it to choose scales. It goes into pictures that are saved after it.",
            inputs=[
                io.Latent.Input("latent", tooltip="From Guided KSampler, directly. Other samplers report nothing.")
            ],
            outputs=[
                io.Latent.Output(
                    "LATENT", tooltip="The same latent. Decode this one, so that saved pictures hold the report."
                ),
                io.Image.Output("IMAGE", display_name="plot", tooltip="Scores, sizes, angles and times over the run."),
                io.String.Output("TEXT", display_name="text", tooltip="The run in a few words."),
                io.String.Output("JSON", display_name="json", tooltip="All numbers, of each evaluation and picture."),
            ],
            is_output_node=True,
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: object) -> int:
        """Never the same: the metadata belongs to one prompt, so a cached report would be missing in the next one's
        pictures."""
        return time.monotonic_ns()

    @classmethod
    def execute(cls, latent: dict) -> io.NodeOutput:
        report = host.report_of(latent)
        host.keep_with_pictures(cls.hidden, report)
        text, plot = "\n".join(report.lines()), as_host_image(draw_report(report))
        host.NodeText(cls.hidden).say(text)
        return io.NodeOutput(latent, plot, text, report.to_json(), ui=ui.PreviewImage(plot))
