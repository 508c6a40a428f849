"""A real ComfyUI in this process, the pack as it loads it, and small random models in its model folders."""

from __future__ import annotations

import asyncio
import functools
import importlib
import importlib.util
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sdg_core.encoders import NoisyCLIP, NoisyCLIPConfig, build_clip, save_noisy_clip
from sdg_core.files import save
from sdg_core.method import LatentFormat
from sdg_core.models import ADMConfig, ADMUNet, Classifier, ClassifierConfig, TinyAutoencoder

torch.set_num_threads(int(os.environ.get("SDG_TEST_THREADS", "1")))  # the models are small: one is quicker

ROOT = Path(__file__).parents[2]
PLACE = Path.home() / "comfy/ComfyUI"

ADM_CONFIG = ADMConfig(
    image_size=16,
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_levels=(1,),
    head_channels=32,
    resblock_updown=False,
    patch=2,
    prediction="v",
)
CLIP_CONFIG = NoisyCLIPConfig(
    clip={
        "embed_dim": 32,
        "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32, "head_width": 32},
        "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    },
    noise_size=16,
    hidden=32,
    sinusoid=32,
)
CLASSIFIER_CONFIG = ClassifierConfig(ADM_CONFIG, classes=3, class_names=("glasses", "blue background", "pink hair"))
PREDICTIONS = ("eps", "v", "flow")
FORMAT = LatentFormat(
    "made up",
    channels=4,
    factors=((0.4, -0.2, 0.3, 0.1), (0.1, 0.5, -0.3, 0.2), (-0.3, 0.2, 0.2, 0.5)),
    bias=(0.1, -0.1, 0.2),
    scale=0.8,
    shift=0.3,
    downscale=2,
)
LATENT_CONFIG = replace(
    ADM_CONFIG, patch=1, learn_sigma=False, beta_schedule="scaled_linear", channels=4, latent_format=FORMAT
)


@pytest.fixture(scope="session")
def comfyui_path() -> Path:
    """The ComfyUI of this test process: one process tests one host."""
    path = Path(os.environ.get("COMFYUI_PATH") or PLACE)
    if not (path / "main.py").is_file():
        pytest.skip(f"No ComfyUI at {path}. Install one there, or set COMFYUI_PATH to its folder, to run these tests.")
    return path


@pytest.fixture(scope="session")
def models_folder(tmp_path_factory) -> Path:
    """models/adm, noisy_clip and classifier, each with random.safetensors: small, with random weights.

    And the same for latents: see ``write_latent_models``.
    """
    folder = tmp_path_factory.mktemp("models")
    write_random_models(folder)
    write_latent_models(folder)
    return folder


def write_random_models(folder: Path, adm: ADMConfig = ADM_CONFIG, clip: NoisyCLIPConfig = CLIP_CONFIG) -> None:
    for kind in ("adm", "noisy_clip", "classifier"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = randomised(ADMUNet(adm))
        save(folder / "adm/random.safetensors", "adm", asdict(adm), unet.state_dict())
        encoder = randomised(NoisyCLIP(clip, build_clip(clip.clip)))
        save_noisy_clip(folder / "noisy_clip/random.safetensors", encoder)
        classifier = randomised(Classifier(CLASSIFIER_CONFIG))
        config = asdict(CLASSIFIER_CONFIG)
        save(folder / "classifier/random.safetensors", "classifier", config, classifier.state_dict())


def write_latent_models(folder: Path) -> None:
    """adm/latent_{eps,v,flow}, noisy_clip/latent and latent/autoencoder, all of the same made-up latents."""
    (folder / "latent").mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for prediction in PREDICTIONS:
            config = replace(LATENT_CONFIG, prediction=prediction)
            unet = randomised(ADMUNet(config))
            save(folder / f"adm/latent_{prediction}.safetensors", "adm", asdict(config), unet.state_dict())
        covariance = tuple(map(tuple, FORMAT.linear_view().covariance.tolist()))
        config = replace(CLIP_CONFIG, view="linear:made up", covariance=covariance)
        encoder = randomised(NoisyCLIP(config, build_clip(config.clip)))
        save_noisy_clip(folder / "noisy_clip/latent.safetensors", encoder)
        halves = {"width": 16, "encoder_blocks": (1, 1), "decoder_blocks": (1, 1), "channels": 4}
        model = TinyAutoencoder(*halves.values())
        save(folder / "latent/autoencoder.safetensors", "autoencoder", halves, model.state_dict())


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Layers that start at zero get weights, so that every path of the model counts."""
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model.eval()


@pytest.fixture(scope="session")
def comfy(comfyui_path: Path, models_folder: Path, tmp_path_factory) -> SimpleNamespace:
    """ComfyUI's modules, on the CPU, with the random models in reach."""
    sys.path.insert(0, str(comfyui_path))
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import folder_paths

    for kind in ("adm", "noisy_clip", "classifier"):
        folder_paths.add_model_folder_path(kind, str(models_folder / kind))
    folder_paths.set_output_directory(str(tmp_path_factory.mktemp("output")))
    folder_paths.set_temp_directory(str(tmp_path_factory.mktemp("temp")))
    names = ["nodes", "comfy.sample", "comfy.samplers", "comfy.model_base", "comfy.model_management"]
    names += ["comfy.model_patcher", "comfy.model_sampling", "comfy.supported_models_base", "comfy.utils", "comfy.sd"]
    names += ["comfy.supported_models", "comfy.nested_tensor"]
    modules = {name.replace("comfy.", ""): importlib.import_module(name) for name in names}
    modules["utils"].PROGRESS_BAR_ENABLED = False
    return SimpleNamespace(folder_paths=folder_paths, **modules)


@pytest.fixture(scope="session")
def pack(comfy: SimpleNamespace) -> SimpleNamespace:
    """The node pack: its node classes by id, and its modules by the last part of their names."""
    name = str(ROOT).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    extension = asyncio.run(module.comfy_entrypoint())
    nodes = {node.GET_SCHEMA().node_id: node for node in asyncio.run(extension.get_node_list())}
    parts = [f"nodes.{part}" for part in ("host", "inputs", "loaders", "finetune")]
    parts += [f"nodes.host.{part}" for part in ("files", "live", "memory", "routes", "seam", "views")]
    parts += [f"sdg_core.{room}" for room in ("method", "encoders", "models", "avatars")]
    parts += ["sdg_core.method.gradient", "sdg_core.encoders.published"]
    modules = {part.split(".")[-1]: importlib.import_module(f"{name}.{part}") for part in parts}
    return SimpleNamespace(nodes=nodes, **modules)


@pytest.fixture(scope="session")
def run(pack: SimpleNamespace):
    """run(node_id, **inputs) -> its first output, in inference mode as the host runs nodes."""

    def execute(node_id: str, **inputs):
        with torch.inference_mode():
            return pack.nodes[node_id].execute(**inputs).args[0]

    return execute


# In float64. The host keeps x in float32 between steps, and guidance amplifies what it rounds; so models, encoders and
# decoders compute in float64 here, and every step rounds once: equal runs then differ by that rounding only.

ROUNDED = 1e-6
"""How far two equal runs may be apart, as a part of the largest value: float32 has 24 bits, 6e-8."""


@pytest.fixture(scope="session")
def assert_equal_runs():
    """assert_equal_runs(a, b, rounded): two runs in float64 gave the same, but for so many roundings."""

    def check(a: torch.Tensor, b: torch.Tensor, rounded: int = 1) -> None:
        apart = float((a - b).abs().max() / b.abs().max().clamp(min=1))
        assert apart < rounded * ROUNDED, f"{apart:.1e} apart"

    return check


@pytest.fixture
def exact(pack, monkeypatch):
    """exact(patcher) -> the same one, computing in float64; and the seam's shift is computed in float64."""
    shift = pack.seam.guidance_shift

    def in_float64(denoised: torch.Tensor, x: torch.Tensor, sigma: torch.Tensor, run) -> torch.Tensor | None:
        found = shift(denoised.double(), x.double(), sigma.double(), run)
        return None if found is None else found.float()

    monkeypatch.setattr(pack.seam, "guidance_shift", in_float64)
    return doubled


def doubled(patcher):
    """A freshly loaded MODEL, NOISY_CLIP or VAE, with weights in float64."""
    is_vae = hasattr(patcher, "first_stage_model")
    net = patcher.first_stage_model if is_vae else getattr(patcher.model, "diffusion_model", patcher.model)
    with torch.inference_mode():  # as the host moves weights
        net.double()
    if is_vae:
        patcher.vae_dtype, patcher.working_dtypes = torch.float64, [torch.float64]
    if hasattr(net, "dtype"):
        net.dtype = torch.float64
    return patcher


@pytest.fixture
def exact_adm(run, exact):
    """The small random ADM in float64."""
    return exact(run("SDGLoadADM", adm_name="random.safetensors"))


@pytest.fixture
def exact_noisy_clip(run, exact):
    """The small random NoisyCLIP in float64."""
    return exact(run("SDGLoadNoisyCLIP", noisy_clip_name="random.safetensors"))


@pytest.fixture(scope="session")
def adm(run):
    """A small random ADM as a MODEL."""
    return run("SDGLoadADM", adm_name="random.safetensors")


@pytest.fixture(scope="session")
def noisy_clip(run):
    """A small random NoisyCLIP."""
    return run("SDGLoadNoisyCLIP", noisy_clip_name="random.safetensors")


# Of latents


@pytest.fixture(scope="session")
def latent_adm(run):
    """latent_adm("eps", "v" or "flow") -> a small random ADM of latents as a MODEL."""
    return functools.cache(lambda prediction: run("SDGLoadADM", adm_name=f"latent_{prediction}.safetensors"))


@pytest.fixture(scope="session")
def linear_noisy_clip(run):
    """A small random NoisyCLIP for the linear picture of the same latents."""
    return run("SDGLoadNoisyCLIP", noisy_clip_name="latent.safetensors")


@pytest.fixture(scope="session")
def clean_clip(pack, run):
    """The bundled clean CLIP."""
    return run("SDGLoadCLIP", clip_name=pack.host.BUNDLED_NAME, architecture="RN50", pretrained="")


@pytest.fixture(scope="session")
def autoencoder(pack, run, models_folder):
    """A small random autoencoder of the same latents as a VAE."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack.files, "BUNDLED", models_folder)
        return run("SDGLoadAutoencoder")
