"""A tiny autoencoder as a VAE object of ComfyUI."""

from __future__ import annotations

import comfy.sd
import torch
from torch import Tensor, nn

from ...sdg_core.models import TinyAutoencoder
from .memory import patch_module


def host_vae(autoencoder: TinyAutoencoder) -> comfy.sd.VAE:
    """The host has no VAE of this shape, so its simplest one, that of pixels, gets another model and other numbers."""
    vae = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})
    vae.first_stage_model = HostAutoencoder(autoencoder).eval().requires_grad_(False)
    vae.patcher = patch_module(vae.first_stage_model)
    vae.device, vae.vae_dtype, vae.working_dtypes = vae.patcher.load_device, torch.float32, [torch.float32]
    vae.latent_channels = autoencoder.latent_channels
    vae.downscale_ratio = vae.upscale_ratio = autoencoder.downscale
    vae.disable_offload = False
    vae.memory_used_encode = lambda shape, dtype: 4 * 64 * shape[2] * shape[3] * autoencoder.width
    vae.memory_used_decode = lambda shape, dtype: (
        4 * 64 * shape[2] * shape[3] * autoencoder.width * autoencoder.downscale**2
    )
    return vae


class HostAutoencoder(nn.Module):
    """Pictures in -1..1 to latents and back, as the host calls a first stage."""

    def __init__(self, autoencoder: TinyAutoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def encode(self, pixels: Tensor, *unused: object, **also: object) -> Tensor:
        return self.autoencoder.encoder((pixels + 1) / 2)

    def decode(self, samples: Tensor, *unused: object, **also: object) -> Tensor:
        return self.autoencoder.decoder(samples) * 2 - 1
