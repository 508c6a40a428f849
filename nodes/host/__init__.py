"""All that is peculiar to ComfyUI, each trick in one file with its why. Nodes use what is named here.

``files`` and ``text`` (its folders, its words on nodes), ``encoders`` and ``sockets`` (what sockets carry),
``scaling``, ``views``, ``decoders`` and ``conditioning`` (its models in the terms of ``sdg_core``), ``memory`` (its
model management), ``seam`` and ``ilvr`` (where guidance and a reference's low frequencies enter a run), ``reports``
(how word of a run travels), ``live`` and ``routes`` (curves of running nodes, and what pages ask for), ``adm``,
``vae`` and ``paper`` (models and a sampler that it does not have).
"""

from .adm import load_adm_model
from .conditioning import blank_conditioning, conditioning
from .decoders import downscale_of
from .encoders import (
    EncoderPair,
    HostGuidance,
    NoisyCLIPValue,
    encoder_parts,
    load_encoder,
    single_encoder,
    to_classifier,
    to_guidance,
)
from .files import (
    BUNDLED_NAME,
    download_folder,
    fingerprint,
    free_path,
    latent_world_file,
    model_file,
    model_names,
    model_path,
    read_text,
    register_folders,
)
from .ilvr import hold_low_frequencies
from .live import Heading, NodeCurve
from .memory import activation_bytes, check_free, explained, patch_module
from .paper import paper_sampler
from .reports import keep_with_pictures, report_of, with_report
from .routes import register_routes
from .seam import Watch, attach
from .sockets import check_dimensions, to_conditioning, to_latent, to_model, to_vae
from .text import NodeText
from .vae import host_vae
from .views import VIEWS, ViewChoice, linear_view

__all__ = [
    "BUNDLED_NAME",
    "VIEWS",
    "EncoderPair",
    "Heading",
    "HostGuidance",
    "NodeCurve",
    "NodeText",
    "NoisyCLIPValue",
    "ViewChoice",
    "Watch",
    "activation_bytes",
    "attach",
    "blank_conditioning",
    "check_dimensions",
    "check_free",
    "conditioning",
    "download_folder",
    "downscale_of",
    "encoder_parts",
    "explained",
    "fingerprint",
    "free_path",
    "hold_low_frequencies",
    "host_vae",
    "keep_with_pictures",
    "latent_world_file",
    "linear_view",
    "load_adm_model",
    "load_encoder",
    "model_file",
    "model_names",
    "model_path",
    "paper_sampler",
    "patch_module",
    "read_text",
    "register_folders",
    "register_routes",
    "report_of",
    "single_encoder",
    "to_classifier",
    "to_conditioning",
    "to_guidance",
    "to_latent",
    "to_model",
    "to_vae",
    "with_report",
]
