"""A real ComfyUI in this process, the pack as it loads it, and small random models in its model folders."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import os
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sdg_core.adm import ADMConfig, ADMUNet
from sdg_core.checkpoint import save, save_noisy_clip
from sdg_core.clip import build_clip
from sdg_core.noisy_clip import NoisyCLIP, NoisyCLIPConfig

torch.set_num_threads(1)  # the models are small, and more threads get in each other's way

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


@pytest.fixture(scope="session")
def comfyui_path() -> Path:
    """The ComfyUI of this test process: one process tests one host."""
    path = Path(os.environ.get("COMFYUI_PATH") or PLACE)
    if not (path / "main.py").is_file():
        pytest.skip(f"No ComfyUI at {path}. Install one there, or set COMFYUI_PATH to its folder, to run these tests.")
    return path


@pytest.fixture(scope="session")
def models_folder(tmp_path_factory) -> Path:
    """models/adm/random.safetensors and models/noisy_clip/random.safetensors, small, with random weights."""
    folder = tmp_path_factory.mktemp("models")
    write_random_models(folder)
    return folder


def write_random_models(folder: Path, adm: ADMConfig = ADM_CONFIG, clip: NoisyCLIPConfig = CLIP_CONFIG) -> None:
    for kind in ("adm", "noisy_clip"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = randomised(ADMUNet(adm))
        save(folder / "adm/random.safetensors", "adm", asdict(adm), unet.state_dict())
        encoder = randomised(NoisyCLIP(clip, build_clip(clip.clip)))
        save_noisy_clip(folder / "noisy_clip/random.safetensors", encoder)


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

    for kind in ("adm", "noisy_clip"):
        folder_paths.add_model_folder_path(kind, str(models_folder / kind))
    folder_paths.set_output_directory(str(tmp_path_factory.mktemp("output")))
    folder_paths.set_temp_directory(str(tmp_path_factory.mktemp("temp")))
    names = ["nodes", "comfy.sample", "comfy.samplers", "comfy.model_base", "comfy.model_management"]
    names += ["comfy.model_patcher", "comfy.model_sampling", "comfy.supported_models_base", "comfy.utils"]
    modules = {name.replace("comfy.", ""): importlib.import_module(name) for name in names}
    modules["utils"].PROGRESS_BAR_ENABLED = False
    return SimpleNamespace(folder_paths=folder_paths, **modules)


@pytest.fixture(scope="session")
def pack(comfy: SimpleNamespace) -> SimpleNamespace:
    """The node pack: its node classes by id, and its modules."""
    name = str(ROOT).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    extension = asyncio.run(module.comfy_entrypoint())
    nodes = {node.GET_SCHEMA().node_id: node for node in asyncio.run(extension.get_node_list())}
    modules = {
        part: importlib.import_module(f"{name}.nodes.{part}") for part in ("host", "pixel_model", "paper", "inputs")
    }
    core = {
        f"core_{part}": importlib.import_module(f"{name}.sdg_core.{part}")
        for part in ("guidance", "guide", "features", "schedule", "noisy_clip", "sampling", "checkpoint")
    }
    return SimpleNamespace(nodes=nodes, **modules, **core)


@pytest.fixture(scope="session")
def run(pack: SimpleNamespace):
    """run(node_id, **inputs) -> its first output, in inference mode as the host runs nodes."""

    def execute(node_id: str, **inputs):
        with torch.inference_mode():
            return pack.nodes[node_id].execute(**inputs).args[0]

    return execute


@pytest.fixture(scope="session")
def adm(run):
    """A small random ADM as a MODEL."""
    return run("SDGLoadADM", adm_name="random.safetensors")


@pytest.fixture(scope="session")
def noisy_clip(run):
    """A small random NoisyCLIP."""
    return run("SDGLoadNoisyCLIP", noisy_clip_name="random.safetensors")
