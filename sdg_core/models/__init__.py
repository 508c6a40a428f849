"""Models without a host: what draws pictures. The ADM UNet as a denoiser, samplers as generators, tiny autoencoders;
and the classifiers made of half a UNet.

A new model is a module like ``adm`` and a denoiser like ``denoiser``; a new sampler is a function of ``samplers``.
"""

from .adm import ADMConfig, ADMUNet
from .classifier import Classifier, ClassifierConfig
from .denoiser import ADMDenoiser, Prediction, initial, normal_sigmas, percent_to_sigma
from .files import latent_encoder, load_adm, load_classifier, load_tiny_autoencoder, load_tiny_encoder, read_adm
from .samplers import Step, euler, euler_ancestral, euler_ancestral_flow, guided, held, noise_like, paper, posterior
from .tiny_autoencoder import TinyAutoencoder, encoder_from_state, tiny_decoder, tiny_encoder

__all__ = [
    "ADMConfig",
    "ADMDenoiser",
    "ADMUNet",
    "Classifier",
    "ClassifierConfig",
    "Prediction",
    "Step",
    "TinyAutoencoder",
    "encoder_from_state",
    "euler",
    "euler_ancestral",
    "euler_ancestral_flow",
    "guided",
    "held",
    "initial",
    "latent_encoder",
    "load_adm",
    "load_classifier",
    "load_tiny_autoencoder",
    "load_tiny_encoder",
    "noise_like",
    "normal_sigmas",
    "paper",
    "percent_to_sigma",
    "posterior",
    "read_adm",
    "tiny_decoder",
    "tiny_encoder",
]
