"""Nodes that load models, and the empty picture to start from."""

from __future__ import annotations

import comfy.model_management
import nodes
import torch
from comfy_api.latest import io

from ..sdg_core.checkpoint import load_noisy_clip
from . import host
from .pixel_model import load_adm_model

NoisyCLIPSocket = io.Custom("NOISY_CLIP")


class SDGLoadNoisyCLIP(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SDGLoadNoisyCLIP",
            display_name="Load Noisy CLIP (SDG)",
            category="SDG/loaders",
            description="Loads a CLIP that can read noisy pictures. Every guidance looks through one.",
            inputs=[
                io.Combo.Input(
                    "noisy_clip_name",
                    options=host.model_names("noisy_clip"),
                    default=host.BUNDLED_NAME,
                    tooltip="A file of models/noisy_clip, or the small one for cartoon avatars that "
                    "comes with this pack.",
                )
            ],
            outputs=[NoisyCLIPSocket.Output("NOISY_CLIP", tooltip="Connect to the guidance nodes.")],
        )

    @classmethod
    def fingerprint_inputs(cls, noisy_clip_name: str) -> str:
        return host.fingerprint("noisy_clip", noisy_clip_name)

    @classmethod
    def execute(cls, noisy_clip_name: str) -> io.NodeOutput:
        path = host.model_path("noisy_clip", noisy_clip_name)
        with torch.inference_mode(False):
            return io.NodeOutput(host.patch_encoder(load_noisy_clip(path)))


class SDGLoadADM(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SDGLoadADM",
            display_name="Load ADM (SDG)",
            category="SDG/loaders",
            description="Loads an unconditional pixel diffusion model (guided-diffusion's ADM) as a "
            "MODEL for any sampler. "
            "Decode its latents with Load VAE, pixel_space.",
            inputs=[
                io.Combo.Input(
                    "adm_name",
                    options=host.model_names("adm"),
                    default=host.BUNDLED_NAME,
                    tooltip="A file of models/adm, or the small one for cartoon avatars, 32 pixels, "
                    "that comes with this pack.",
                )
            ],
            outputs=[
                io.Model.Output("MODEL", tooltip="An unconditional pixel model: 3 channels, no VAE to compress it."),
                io.Conditioning.Output(
                    "CONDITIONING",
                    display_name="blank",
                    tooltip="An ADM has no prompt. Connect this where a sampler of ComfyUI wants positive or negative.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, adm_name: str) -> str:
        return host.fingerprint("adm", adm_name)

    @classmethod
    def execute(cls, adm_name: str) -> io.NodeOutput:
        model = load_adm_model(host.model_path("adm", adm_name))
        return io.NodeOutput(model, host.blank_conditioning())


class SDGEmptyPixelLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        size = {"default": 32, "min": 8, "max": nodes.MAX_RESOLUTION, "step": 8}
        return io.Schema(
            node_id="SDGEmptyPixelLatent",
            display_name="Empty Pixel Latent (SDG)",
            category="SDG/loaders",
            description="An empty latent for pixel models, one latent pixel for each picture pixel.",
            inputs=[
                io.Int.Input(
                    "width", **size, tooltip="Width in pixels. The bundled model knows 32, published ADMs 256."
                ),
                io.Int.Input(
                    "height", **size, tooltip="Height in pixels. The bundled model knows 32, published ADMs 256."
                ),
                io.Int.Input("batch_size", default=1, min=1, max=4096, tooltip="How many pictures to sample at once."),
            ],
            outputs=[io.Latent.Output("LATENT", tooltip="Connect to a sampler.")],
        )

    @classmethod
    def execute(cls, width: int, height: int, batch_size: int) -> io.NodeOutput:
        samples = torch.zeros(batch_size, 3, height, width, device=comfy.model_management.intermediate_device())
        return io.NodeOutput({"samples": samples, "downscale_ratio_spacial": 1})
