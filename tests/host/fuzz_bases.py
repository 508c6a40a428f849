"""The prompts that fuzz cases and soak runs start from: the example workflows, made small, and graphs for the rest."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "example_workflows"
SMALL = {
    "SDGGuidedKSampler": {"steps": 2},
    "SDGEmptyPixelLatent": {"width": 32, "height": 32, "batch_size": 1},
    "EmptyLatentImage": {"width": 64, "height": 64, "batch_size": 1},
    "SDGFinetuneNoisyCLIP": {"steps": 1, "batch_size": 2, "micro_batch": 2},
}
NOISY, CLEAN = "avatars (bundled)", "avatars (bundled)"
LATENT_MODEL, LATENT_NOISY = "avatars latent v (bundled)", "avatars latent (bundled)"


def sibling(name: str):
    full = f"sdg_test_{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, HERE / f"{name}.py")
        sys.modules[full] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[full])
    return sys.modules[full]


@contextlib.contextmanager
def serve_odd(host: Path, base: Path, **environment: str) -> Iterator:
    """A running host with this pack and the odd one, cut off the network, with more environment variables."""
    tools = sibling("server")
    tools.install(base)
    shutil.copytree(HERE / "odd_nodes", base / "custom_nodes/odd_nodes", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(host / "input/example.png", base / "input")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**nowhere, "NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "1", **environment}.items():
            patch.setenv(name, value)
        with tools.serve(host, base) as server:
            yield server


def world(info: dict):
    """All of it, by the host's schemas."""
    return sibling("fuzz_cases").World(info, {**examples(info), **graphs()})


def examples(info: dict) -> dict[str, dict]:
    """The example workflows that need no download, with few steps and pixels."""
    tools = sibling("server")
    found = {path.stem: json.loads(path.read_text()) for path in sorted(EXAMPLES.glob("*.json"))}
    prompts = {name: tools.to_prompt(w, info) for name, w in found.items() if not tools.needs_download(w)}
    return {name: made_small(prompt) for name, prompt in prompts.items()}


def made_small(prompt: dict) -> dict:
    """Few steps and pixels; where it learns, a few pictures more than a batch."""
    learns = any(node["class_type"] == "SDGFinetuneNoisyCLIP" for node in prompt.values())
    for node in prompt.values():
        small = dict(SMALL.get(node["class_type"], {}))
        if learns and node["class_type"] == "SDGEmptyPixelLatent":
            small["batch_size"] = 3
        node["inputs"] |= {name: value for name, value in small.items() if not isinstance(node["inputs"][name], list)}
    return prompt


def node(class_type: str, **inputs: object) -> dict:
    return {"class_type": class_type, "inputs": inputs}


SAMPLING = {"seed": 0, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
WHOLE = {"start_percent": 0.0, "end_percent": 1.0}
STRENGTH = {"strength": "absolute", "cap": 1.0}


def pixel_model() -> dict[str, dict]:
    """Nodes 1 to 4: a model, an encoder, an empty picture, and a text."""
    return {
        "1": node("SDGLoadADM", adm_name=NOISY),
        "2": node("SDGLoadNoisyCLIP", noisy_clip_name=NOISY),
        "3": node("SDGEmptyPixelLatent", width=32, height=32, batch_size=1),
        "4": node("SDGTextGuidance", noisy_clip=["2", 0], text="a person with red hair", scale=200.0, **WHOLE),
    }


def graphs() -> dict[str, dict]:
    """Prompts for the nodes that no example uses."""
    return {
        "crossfade": {
            **pixel_model(),
            "5": node("SDGLoadCLIP", clip_name=CLEAN, architecture="RN50", pretrained=""),
            "6": node("SDGEncoderCrossfade", noisy=["2", 0], clean=["5", 0], crossover=-1.0),
            "7": node("SDGTextGuidance", noisy_clip=["6", 0], text="glasses", scale=100.0, **WHOLE),
            "8": node("SDGGuidanceFrames", guidance=["7", 0], frames="0,-1"),
            "9": node("SDGCombineGuidance", guidance_1=["4", 0], weight_1=1.0, guidance_3=["8", 0], weight_3=-0.5),
            "10": node("SDGApplyGuidance", model=["1", 0], guidance=["9", 0], **STRENGTH),
            "11": node(
                "KSampler", model=["10", 0], positive=["1", 1], negative=["1", 1], latent_image=["3", 0], **SAMPLING
            ),
            "12": node("OddSink", value=["11", 0]),
        },
        "pictures": {
            **pixel_model(),
            "5": node("OddPicture", kind="plain"),
            "6": node("SDGContentGuidance", noisy_clip=["2", 0], image=["5", 0], scale=300.0, **WHOLE),
            "7": node("SDGStructureGuidance", noisy_clip=["2", 0], image=["5", 0], scale=300.0, layers="3", **WHOLE),
            "8": node(
                "SDGStyleGuidance", noisy_clip=["2", 0], image=["5", 0], scale=1e3, layers="5", centred=True, **WHOLE
            ),
            "9": node(
                "SDGCombineGuidance",
                **{f"guidance_{i}": [n, 0] for i, n in enumerate("4678", 1)},
                **{f"weight_{i}": 1.0 for i in (1, 2, 3, 4)},
            ),
            "10": node(
                "SDGGuidedKSampler", model=["1", 0], guidance=["9", 0], latent_image=["3", 0], **SAMPLING, **STRENGTH
            ),
            "11": node("OddSink", value=["10", 0]),
        },
        "paper": {
            **pixel_model(),
            "5": node("SDGPaperSampler", guidance=["4", 0]),
            "6": node("BasicScheduler", model=["1", 0], scheduler="normal", steps=2, denoise=1.0),
            "7": node(
                "SamplerCustom", model=["1", 0], add_noise=True, noise_seed=0, cfg=1.0, positive=["1", 1],
                negative=["1", 1], sampler=["5", 0], sigmas=["6", 0], latent_image=["3", 0],
            ),
            "8": node("OddSink", value=["7", 1]),
        },
        "decoded": {
            "1": node("SDGLoadADM", adm_name=LATENT_MODEL),
            "2": node("SDGLoadCLIP", clip_name=CLEAN, architecture="RN50", pretrained=""),
            "3": node("EmptyLatentImage", width=64, height=64, batch_size=1),
            "4": node("SDGTextGuidance", noisy_clip=["2", 0], text="a hat", scale=600.0, **WHOLE),
            "5": node("SDGLoadAutoencoder"),
            "6": node(
                "SDGGuidedKSampler", model=["1", 0], guidance=["4", 0], latent_image=["3", 0], vae=["5", 0],
                view="decoded", **SAMPLING, **STRENGTH,
            ),
            "7": node("VAEDecode", samples=["6", 0], vae=["5", 0]),
            "8": node("OddSink", value=["7", 0]),
        },
        "linear": {
            "1": node("SDGLoadADM", adm_name=LATENT_MODEL),
            "2": node("SDGLoadNoisyCLIP", noisy_clip_name=LATENT_NOISY),
            "3": node("EmptyLatentImage", width=64, height=64, batch_size=2),
            "4": node("SDGTextGuidance", noisy_clip=["2", 0], text="a hat", scale=500.0, **WHOLE),
            "5": node(
                "SDGGuidedKSampler", model=["1", 0], guidance=["4", 0], latent_image=["3", 0], **SAMPLING, **STRENGTH
            ),
            "6": node("OddSink", value=["5", 0]),
        },
        "stable diffusion": {
            "1": node("OddModel", kind="stable diffusion"),
            "2": node("SDGLoadCLIP", clip_name=CLEAN, architecture="RN50", pretrained=""),
            "3": node("EmptyLatentImage", width=64, height=64, batch_size=1),
            "4": node("SDGTextGuidance", noisy_clip=["2", 0], text="a hat", scale=500.0, **WHOLE),
            "5": node("OddValue", kind="conditioning"),
            "6": node(
                "SDGGuidedKSampler", model=["1", 0], guidance=["4", 0], latent_image=["3", 0], positive=["5", 0],
                negative=["5", 0], **SAMPLING, **STRENGTH,
            ),
            "7": node("OddSink", value=["6", 0]),
        },
        "learn": {
            "1": node("SDGLoadCLIP", clip_name=CLEAN, architecture="RN50", pretrained=""),
            "2": node("OddPicture", kind="plain"),
            "3": node(
                "SDGFinetuneNoisyCLIP", clip=["1", 0], steps=1, batch_size=2, micro_batch=2, learning_rate=3e-4,
                train="conditioning", timesteps="uniform", seed=0, size=0, folder="", images=["4", 0],
            ),
            "4": node("RepeatImageBatch", image=["2", 0], amount=4),
            "5": node("OddSink", value=["3", 1]),
        },
        "controls": {
            **pixel_model(),
            "5": node("OddPicture", kind="plain"),
            "6": node("SolidMask", value=1.0, width=32, height=32),
            "7": node("SDGGuidanceMask", guidance=["4", 0], mask=["6", 0], reference_mask=["6", 0], feather=0.1),
            "8": node("SDGGuidanceTarget", guidance=["7", 0], similarity=0.3),
            "9": node("SDGContentGuidance", noisy_clip=["2", 0], image=["5", 0], scale=300.0, **WHOLE),
            "10": node("SDGGuidanceReferences", guidance=["9", 0], choice="nearest", weights="1"),
            "11": node("SDGGuidanceSchedule", guidance=["21", 0], curve="linear", points="0:0, 0.5:1, 1:0.2", every=2),
            "21": node("SDGGuidanceSpeed", guidance=["10", 0], speed="balanced"),
            "12": node("SDGLoadCLIP", clip_name=CLEAN, architecture="RN50", pretrained=""),
            "13": node(
                "SDGDirectionGuidance", noisy_clip=["12", 0], image=["5", 0], from_text="a person",
                to_text="a person with glasses", scale=200.0, **WHOLE,
            ),
            "14": node("SDGGuidanceAugment", guidance=["13", 0], crops=2, least=0.7, spherical=True),
            "15": node("SDGTextGuidance", noisy_clip=["2", 0], text="glasses", scale=200.0, **WHOLE),
            "16": node("SDGGuidanceAway", guidance=["15", 0], until=0.0),
            "17": node(
                "SDGCombineGuidance", guidance_1=["8", 0], guidance_2=["11", 0], guidance_3=["14", 0],
                guidance_4=["16", 0], **{f"weight_{i}": 1.0 for i in (1, 2, 3, 4)}, conflicts="project", balance=0.5,
            ),
            "18": node("SDGGuidanceBudget", guidance=["17", 0], percent=25.0),
            "19": node(
                "SDGGuidedKSampler", model=["1", 0], guidance=["18", 0], latent_image=["3", 0], **SAMPLING, **STRENGTH
            ),
            "20": node("OddSink", value=["19", 0]),
        },
        "save": {
            "1": node("SDGLoadNoisyCLIP", noisy_clip_name=LATENT_NOISY),
            "2": node("SDGSaveNoisyCLIP", noisy_clip=["1", 0], name="fuzz", dataset="", licence="", half=True),
        },
    }  # fmt: skip
