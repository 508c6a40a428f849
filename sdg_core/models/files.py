"""Files of models: ADMs and classifiers (ours, and published ones), and tiny autoencoders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from ..files import PICKLES, fill, load, load_pickle, load_plain
from .adm import ADMConfig, ADMUNet
from .classifier import Classifier, ClassifierConfig
from .tiny_autoencoder import TinyAutoencoder, encoder_from_state


def read_adm(path: Path) -> tuple[ADMConfig, dict[str, Tensor]]:
    """Config and weights of an ADM: our safetensors, or a published guided-diffusion ``.pt``."""
    if path.suffix in PICKLES:
        state = load_pickle(path)
        return ADMConfig.from_state_dict(state), state
    config, state = load(path, "adm")
    return ADMConfig.from_json(config), state


def load_adm(path: Path) -> ADMUNet:
    """The UNet, frozen, in eval mode, float32."""
    config, state = read_adm(path)
    unet = ADMUNet(config)
    fill(unet, state, path)
    return unet.requires_grad_(False).eval()


def read_classifier(path: Path) -> tuple[ClassifierConfig, dict[str, Tensor]]:
    """Config and weights of a classifier: our safetensors, or a published guided-diffusion ``.pt``.

    A published one of 1000 classes is one of ImageNet: it gets their names, as open_clip words them.
    """
    if path.suffix not in PICKLES:
        fields, state = load(path, "classifier")
        return ClassifierConfig.from_json(fields), state
    state = load_pickle(path)
    config = ClassifierConfig.from_state_dict(state)
    if config.classes != 1000:
        return config, state
    from open_clip import IMAGENET_CLASSNAMES  # takes seconds, so at first use

    return replace(config, class_names=tuple(IMAGENET_CLASSNAMES)), state


def load_classifier(path: Path) -> Classifier:
    """The classifier, frozen, in eval mode, float32. Raises FileNotFoundError and ValueError as ``load_adm`` does."""
    config, state = read_classifier(path)
    classifier = Classifier(config)
    fill(classifier, state, path)
    return classifier.float().requires_grad_(False).eval()


def load_tiny_autoencoder(path: Path) -> TinyAutoencoder:
    """An autoencoder of our own kind of file, frozen, in eval mode, float32."""
    config, state = load(path, "autoencoder")
    encoder, decoder = (tuple(config[f"{half}_blocks"]) for half in ("encoder", "decoder"))
    model = TinyAutoencoder(config["width"], encoder, decoder, config["channels"])
    fill(model, state, path)
    return model.requires_grad_(False).eval()


def load_tiny_encoder(path: Path) -> nn.Sequential:
    """A TAESD encoder, frozen, in eval mode, float32: pictures in 0..1 to a model's own latents.

    Raises FileNotFoundError where there is no such file, ValueError where it holds something else.
    """
    state = load_pickle(path) if path.suffix in PICKLES else load_plain(path)
    return encoder_from_state(state).requires_grad_(False).eval()


def latent_encoder(
    encoder: nn.Module, scale: float = 1.0, shift: float = 0.0
) -> tuple[Callable[[Tensor], Tensor], int]:
    """Pictures (B, 3, H, W) in -1..1 -> model latents (z - shift) * scale; and picture pixels to a latent pixel.

    ``encoder`` takes pictures in 0..1, and follows them in device and precision.
    """
    halvings = sum(isinstance(layer, nn.Conv2d) and layer.stride == (2, 2) for layer in encoder.children())

    def encode(picture: Tensor) -> Tensor:
        latents: Tensor = encoder.to(picture)((picture + 1) / 2)
        return (latents - shift) * scale

    return encode, 2**halvings
