"""Files of models: ADMs and classifiers (ours, and published ones), and tiny autoencoders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from ..files import PICKLES, fill, load, load_pickle, load_plain
from .adm import ADMConfig, ADMUNet
from .classifier import Classifier, ClassifierConfig
from .faces import FACES, FLOW_SHIFT
from .tiny_autoencoder import TinyAutoencoder, encoder_from_state


def read_adm(path: Path, face: str | None = None) -> tuple[ADMConfig, dict[str, Tensor]]:
    """Config and weights of an ADM: our safetensors, or a published guided-diffusion ``.pt``.

    A network of the angle passes for an "eps", "v" or "flow" model, as ``face`` says; None leaves its own prediction.
    Raises ValueError for other faces, and for a face of any other ADM.
    """
    if path.suffix in PICKLES:
        state = load_pickle(path)
        config = ADMConfig.from_state_dict(state)
    else:
        fields, state = load(path, "adm")
        config = ADMConfig.from_json(fields)
    return (config if face is None else _faced(config, face, path)), state


def _faced(config: ADMConfig, face: str, path: Path) -> ADMConfig:
    if config.time != "angle":
        raise ValueError(
            f'Got the face "{face}" for {path.name}, which was trained to predict {config.prediction} alone; wanted a '
            "network of the angle. Leave the face out, or choose another file."
        )
    if face not in FACES:
        raise ValueError(f'Got the face "{face}" for {path.name}; wanted "eps", "v" or "flow".')
    return replace(config, prediction=face, flow_shift=FLOW_SHIFT)


def load_adm(path: Path, face: str | None = None) -> ADMUNet:
    """The UNet, frozen, in eval mode, float32. ``face`` as in ``read_adm``."""
    config, state = read_adm(path, face)
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
    patch, decoder_width = config.get("patch", 1), config.get("decoder_width")
    model = TinyAutoencoder(config["width"], encoder, decoder, config["channels"], patch, decoder_width)
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
    patch = next((layer.downscale_factor for layer in encoder.children() if isinstance(layer, nn.PixelUnshuffle)), 1)

    def encode(picture: Tensor) -> Tensor:
        latents: Tensor = encoder.to(picture)((picture + 1) / 2)
        return (latents - shift) * scale

    return encode, patch * 2**halvings
