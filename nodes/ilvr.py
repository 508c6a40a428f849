"""The node of ILVR: a reference whose low frequencies a model's pictures take over."""

from __future__ import annotations

import comfy.sd
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ..sdg_core.method import check_range
from . import host
from .inputs import check_finite, to_references


class SDGILVRReference(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        fraction = {"min": 0.0, "max": 1.0, "step": 0.01, "round": 0.001}
        return io.Schema(
            node_id="SDGILVRReference",
            display_name="ILVR Reference (SDG)",
            category="SDG/guidance",
            description="Holds a picture's low frequencies to those of a reference (ILVR) and leaves the rest to the "
            "model. Use it to keep colours and coarse layout, alone or under guidance.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="Any model that draws pictures or video, also one from Apply Guidance."
                ),
                io.Image.Input(
                    "image",
                    tooltip="The reference. Any size: it is scaled to cover the picture. One for all, or one for each "
                    "picture of the batch.",
                ),
                io.Int.Input(
                    "down_factor",
                    default=8,
                    min=1,
                    max=1024,
                    tooltip="What is coarser than so many (latent) pixels is the reference's. Higher "
                    "is freer; 1 copies it. Usual: 4 to 32, latents 2 to 8.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    **fraction,
                    tooltip="Hold from this part of the run on. 0 is pure noise; higher leaves the layout to the "
                    "model.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    **fraction,
                    tooltip="Hold up to this part of the run. 1 is the finished picture; lower lets the model drift "
                    "from the reference. Usual: 0.5 to 1.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="The model's own VAE, for latent models. Pixel models need none.",
                ),
            ],
            outputs=[io.Model.Output("MODEL", tooltip="The model with the reference. The one that came in stays.")],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        image: Tensor,
        down_factor: int,
        start_percent: float,
        end_percent: float,
        vae: comfy.sd.VAE | None = None,
    ) -> io.NodeOutput:
        check_finite(down_factor=down_factor, start_percent=start_percent, end_percent=end_percent)
        check_range(down_factor, start_percent, end_percent)
        references = to_references(image)
        patcher, encoder = host.to_model(model), host.to_vae(vae)
        return io.NodeOutput(
            host.hold_low_frequencies(patcher, references, down_factor, start_percent, end_percent, encoder)
        )
