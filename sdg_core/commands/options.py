"""Options that commands share, and what they mean."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..avatars import BUNDLED, LATENT, NAME, bundled_latent_encoder, load_bundled_clip
from ..encoders import CleanCLIP, open_clip_models
from ..method import LinearView
from ..models import latent_encoder, load_tiny_encoder
from ..training import StudentSight
from .named_views import named_view


def add_models(parser: argparse.ArgumentParser) -> None:
    """Which models."""
    parser.add_argument("--models", type=Path, default=BUNDLED, help="folder of the models; default: the bundled ones")


def add_encoder_options(parser: argparse.ArgumentParser) -> None:
    """Which clean CLIP, which view."""
    parser.add_argument("--arch", default="RN50", help=f'open_clip\'s name, or "{NAME}" for the bundled CLIP')
    parser.add_argument("--pretrained", default="openai", metavar="TAG|FILE", help="its weights; not read for avatars")
    parser.add_argument("--view", default="pixels", help='what the diffusion model draws: "pixels", or as linear:SD15')
    parser.add_argument("--size", type=int, default=0, help="side of its pictures or latents; 0: the CLIP's own size")
    parser.add_argument("--comfyui", type=Path, help="where the factors of linear views are read")


def load_clean(arch: str, pretrained: str) -> CleanCLIP:
    """The bundled CLIP, a file of weights, or one by open_clip's tag (downloaded once)."""
    if arch == NAME:
        return load_bundled_clip()
    open_clip_models.check_architecture(arch)
    if Path(pretrained).is_file():
        return open_clip_models.load_file(arch, Path(pretrained))
    return open_clip_models.download(arch, pretrained)


def sight_of(args: argparse.Namespace, clean: CleanCLIP) -> StudentSight:
    """What the encoder will look at. Raises ValueError for a VAE without latents to look at."""
    view = named_view(args.view, args.comfyui)
    size = args.size or clean.noise_size
    if args.vae is None:
        return StudentSight(size, view)
    if not isinstance(view, LinearView):
        raise ValueError("A VAE is of use with a linear view only. Leave --vae out, or choose --view linear:...")
    if str(args.vae) == NAME or args.vae == LATENT / "autoencoder.safetensors":
        return StudentSight(size, view, *bundled_latent_encoder())
    return StudentSight(size, view, *latent_encoder(load_tiny_encoder(args.vae)))
