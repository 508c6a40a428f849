"""Nodes that load models, and the empty picture to start from."""

from __future__ import annotations

import math
from typing import Any

import comfy.model_management
import nodes
import torch
from comfy_api.latest import io

from ..sdg_core.avatars import load_bundled_clip
from ..sdg_core.encoders import NoisyCLIP, load_noisy_clip, open_clip_models, with_text
from ..sdg_core.method import Fade
from ..sdg_core.models import load_tiny_autoencoder
from . import host
from .inputs import check_finite, shown

NoisyCLIPSocket = io.Custom("NOISY_CLIP")
DOWNLOAD = "download by tag"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def precision_input() -> io.Input:
    """New inputs come last, so that saved workflows keep their order."""
    return io.Combo.Input(
        "precision",
        options=list(PRECISIONS),
        default="fp32",
        optional=True,
        tooltip="Of the image tower. bf16: half the memory and, where it is known, about half the time; the gradient "
        "turns by ten degrees or so.",
        extra_dict={"advanced": True},
    )


def to_precision(precision: str) -> torch.dtype:
    """The dtype of a widget. Raises ValueError for other words."""
    if precision not in PRECISIONS:
        raise ValueError(f"Got the precision {shown(precision)}; wanted one of: {', '.join(PRECISIONS)}. Choose one.")
    return PRECISIONS[precision]


class SDGLoadNoisyCLIP(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SDGLoadNoisyCLIP",
            display_name="Load Noisy CLIP (SDG)",
            category="SDG/loaders",
            description="Loads a CLIP that can read noisy pictures, for guidances to look through. Use it where your "
            "model has one; Load CLIP otherwise.",
            inputs=[
                io.Combo.Input(
                    "noisy_clip_name",
                    options=host.model_names("noisy_clip"),
                    tooltip="A file of models/noisy_clip, or a bundled one for cartoon avatars: for the "
                    "bundled latent models, or the one of pixels.",
                ),
                NoisyCLIPSocket.Input(
                    "text_from",
                    optional=True,
                    tooltip="A CLIP from Load CLIP whose text tower is used, for files that come without one. "
                    "Published checkpoints: RN50x16.",
                ),
                precision_input(),
            ],
            outputs=[NoisyCLIPSocket.Output("NOISY_CLIP", tooltip="Connect to the guidance nodes.")],
        )

    @classmethod
    def fingerprint_inputs(cls, noisy_clip_name: str, text_from: None = None, precision: str = "fp32") -> str:
        return host.fingerprint("noisy_clip", noisy_clip_name)

    @classmethod
    def execute(
        cls, noisy_clip_name: str, text_from: host.NoisyCLIPValue | None = None, precision: str = "fp32"
    ) -> io.NodeOutput:
        path, dtype = host.model_path("noisy_clip", noisy_clip_name), to_precision(precision)
        with torch.inference_mode(False):
            encoder = load_noisy_clip(path)
            if text_from is not None:
                encoder = with_text(encoder, host.single_encoder(text_from, "text_from").model)
            encoder.compute_in(dtype)
            return io.NodeOutput(host.patch_module(encoder))


class SDGLoadCLIP(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SDGLoadCLIP",
            display_name="Load CLIP (SDG)",
            category="SDG/loaders",
            description="Loads any CLIP that open_clip knows, as it is. It reads the model's clean estimate instead of "
            "the noisy picture: start here when there is no noisy CLIP for your model.",
            inputs=[
                io.Combo.Input(
                    "clip_name",
                    options=[*host.model_names("open_clip"), DOWNLOAD],
                    default=host.BUNDLED_NAME,
                    tooltip="A file of models/open_clip, the small one for cartoon avatars, or download by tag. "
                    "Files and downloads need the architecture below.",
                ),
                io.Combo.Input(
                    "architecture",
                    options=open_clip_models.architectures(),
                    default="ViT-B-32",
                    tooltip="open_clip's name of the file's architecture, for example ViT-L-14, RN50 or "
                    "ViT-B-16-SigLIP. The bundled one does not read it.",
                ),
                io.String.Input(
                    "pretrained",
                    default="laion2b_s34b_b79k",
                    tooltip="For download by tag: open_clip's tag of the weights, such as openai or laion2b_s34b_b79k. "
                    "They go to models/open_clip when this node runs.",
                ),
                precision_input(),
            ],
            outputs=[NoisyCLIPSocket.Output("NOISY_CLIP", tooltip="Connect to the guidance nodes.")],
        )

    @classmethod
    def fingerprint_inputs(cls, clip_name: str, architecture: str, pretrained: str, precision: str = "fp32") -> str:
        if clip_name == DOWNLOAD:
            return f"{architecture}/{pretrained}"
        return f"{architecture}/{host.fingerprint('open_clip', clip_name)}"

    @classmethod
    def execute(cls, clip_name: str, architecture: str, pretrained: str, precision: str = "fp32") -> io.NodeOutput:
        dtype = to_precision(precision)
        with torch.inference_mode(False):
            if clip_name == host.BUNDLED_NAME:
                clip = load_bundled_clip(host.model_path("open_clip", clip_name))
            elif clip_name == DOWNLOAD:
                clip = open_clip_models.download(architecture, pretrained, host.download_folder("open_clip"))
            else:
                clip = open_clip_models.load_file(architecture, host.model_path("open_clip", clip_name))
            clip.compute_in(dtype)
            return io.NodeOutput(host.patch_module(clip))


class SDGEncoderCrossfade(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SDGEncoderCrossfade",
            display_name="Encoder Crossfade (SDG)",
            category="SDG/loaders",
            description="Two encoders in one: the noisy CLIP where there is much noise, the clean one where there is "
            "little.",
            inputs=[
                NoisyCLIPSocket.Input("noisy", tooltip="Reads at high noise, from Load Noisy CLIP."),
                NoisyCLIPSocket.Input("clean", tooltip="Reads at low noise, from Load CLIP."),
                io.Float.Input(
                    "crossover",
                    default=-1.0,
                    min=-1.0,
                    max=999.0,
                    step=1.0,
                    round=0.1,
                    tooltip="Timestep, of 0 to 999, where they share the work. Higher gives the clean one more. "
                    "-1: where the noisy file's own measurements cross.",
                ),
            ],
            outputs=[NoisyCLIPSocket.Output("NOISY_CLIP", tooltip="Connect to the guidance nodes.")],
        )

    @classmethod
    def execute(cls, noisy: host.NoisyCLIPValue, clean: host.NoisyCLIPValue, crossover: float) -> io.NodeOutput:
        check_finite(crossover=crossover)
        pair = [host.single_encoder(value, name) for name, value in (("noisy", noisy), ("clean", clean))]
        reading = tuple(patcher.model.reads for patcher in pair)
        if reading != ("noisy", "denoised"):
            raise ValueError(
                f"Got encoders that read {reading[0]} and {reading[1]}; wanted a noisy CLIP in the first input (Load "
                "Noisy CLIP) and a clean one in the second (Load CLIP)."
            )
        encoder: NoisyCLIP = pair[0].model
        t = crossover if crossover >= 0 else encoder.config.crossover()
        ratio = float(encoder.table.sigma(torch.tensor(t)))
        parts = tuple((patcher, Fade(ratio, rising)) for patcher, rising in zip(pair, (True, False), strict=True))
        return io.NodeOutput(host.EncoderPair(parts))


class SDGLoadAutoencoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SDGLoadAutoencoder",
            display_name="Load Autoencoder (SDG)",
            category="SDG/loaders",
            description="The small autoencoder of the bundled latent models as a VAE, for VAE Decode and VAE Encode.",
            inputs=[],
            outputs=[io.Vae.Output("VAE", tooltip="Connect to VAE Decode, VAE Encode or a guidance view.")],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        path = host.latent_world_file("autoencoder")
        with torch.inference_mode(False):
            return io.NodeOutput(host.host_vae(load_tiny_autoencoder(path)))


class SDGLoadADM(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SDGLoadADM",
            display_name="Load ADM (SDG)",
            category="SDG/loaders",
            description="Loads an unconditional diffusion model (guided-diffusion's ADM) as a MODEL for any sampler. "
            "Decode pixels with Load VAE, pixel_space; the bundled latent ones with Load Autoencoder.",
            inputs=[
                io.Combo.Input(
                    "adm_name",
                    options=host.model_names("adm"),
                    tooltip="A file of models/adm, or a bundled one for cartoon avatars: 128 pixels by latents "
                    "(v, eps or flow), or 32 pixels.",
                )
            ],
            outputs=[
                io.Model.Output(
                    "MODEL", tooltip="An unconditional model: of pixels, or of the latents of the bundled autoencoder."
                ),
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
        model = host.load_adm_model(*host.model_file("adm", adm_name))
        return io.NodeOutput(model, host.blank_conditioning())


class SDGEmptyPixelLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        size = {"default": 128, "min": 8, "max": nodes.MAX_RESOLUTION, "step": 8}
        return io.Schema(
            node_id="SDGEmptyPixelLatent",
            display_name="Empty Pixel Latent (SDG)",
            category="SDG/loaders",
            description="An empty latent for pixel models, one latent pixel for each picture pixel. With a VAE, for "
            "models of its latents.",
            inputs=[
                io.Int.Input(
                    "width",
                    **size,
                    tooltip="Width in pixels. The bundled latent models know 128, the one of pixels 32, published "
                    "ADMs 256.",
                ),
                io.Int.Input(
                    "height",
                    **size,
                    tooltip="Height in pixels. The bundled latent models know 128, the one of pixels 32, published "
                    "ADMs 256.",
                ),
                io.Int.Input("batch_size", default=1, min=1, max=4096, tooltip="How many pictures to sample at once."),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="For a latent model: the VAE of its latents, such as Load Autoencoder's. Empty: pixels.",
                ),
            ],
            outputs=[io.Latent.Output("LATENT", tooltip="Connect to a sampler.")],
        )

    @classmethod
    def execute(cls, width: int, height: int, batch_size: int, vae: Any = None) -> io.NodeOutput:
        maker = host.to_vae(vae)
        channels, ratio = (3, 1) if maker is None else (maker.latent_channels, maker.spacial_compression_encode())
        shape = (batch_size, channels, max(1, height // ratio), max(1, width // ratio))
        what = f"{batch_size} pictures of {width} x {height}"
        host.check_free(what, 4 * math.prod(shape))
        with host.explained(what):
            samples = torch.zeros(shape, device=comfy.model_management.intermediate_device())
        return io.NodeOutput({"samples": samples, "downscale_ratio_spacial": ratio})
