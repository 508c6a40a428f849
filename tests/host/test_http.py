"""A real server: the example workflows give the core's pictures, and wrong values are reported on their node."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import shutil
import sys
import urllib.request
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).parents[2]
EXAMPLES = {path.stem: json.loads(path.read_text()) for path in sorted((ROOT / "example_workflows").glob("*.json"))}


def load_helper(name: str) -> ModuleType:
    """A module beside this one."""
    spec = importlib.util.spec_from_file_location(f"sdg_test_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


tools, in_core = load_helper("server"), load_helper("in_core")

FOR_DOWNLOADS = [name for name, workflow in EXAMPLES.items() if tools.needs_download(workflow)]
BUNDLED = [name for name in EXAMPLES if name not in FOR_DOWNLOADS]
TRAINING, TIMED = ["finetune"], ["references"]
"""Examples that the core does not repeat: one learns, one chooses by the time that steps take."""
JOINED, OTHER_SAMPLERS = ["encoder_crossfade"], ["paper"]
"""Two more: one looks through two views at once, which test_latent holds; one is sampled by SamplerCustom, as
test_sampling is."""
OF_PIXELS = ["pixels", "paper"]
PLANS = ["xy"]
"""Examples that give one picture of many runs."""
REPEATED = [name for name in BUNDLED if name not in (*TRAINING, *TIMED, *JOINED, *OTHER_SAMPLERS)]


@pytest.fixture(scope="module")
def installed(comfyui_path, tmp_path_factory) -> Path:
    """A base directory with the pack."""
    base = tmp_path_factory.mktemp("base")
    tools.install(base)
    shutil.copy(comfyui_path / "input/example.png", base / "input")
    return base


@pytest.fixture(scope="module")
def server(comfyui_path, installed):
    with tools.serve(comfyui_path, installed) as server:
        yield server


@pytest.fixture(scope="module")
def info(server):
    return server.get("/object_info")


def pixels(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


@pytest.fixture(scope="module")
def evaluate(installed) -> Callable[[dict, str], Tensor]:
    """evaluate(prompt, node id) -> that node's output, computed by the core alone."""
    core = in_core.Core(installed / "custom_nodes/semantic-diffusion-guidance/sdg_core/avatars")
    return lambda prompt, number: in_core.Graph(core, prompt).output(number)


def scaled(prompt: dict, share: float) -> dict:
    """The prompt with every guidance's scale times ``share``."""
    prompt = deepcopy(prompt)
    for node in prompt.values():
        if "scale" in node["inputs"] and node["class_type"].startswith("SDG"):
            node["inputs"]["scale"] *= share
    return prompt


@pytest.mark.parametrize("name", BUNDLED)
def test_example_runs_as_it_is(server, info, name):
    entry = server.run(tools.to_prompt(EXAMPLES[name], info))
    assert entry["status"]["status_str"] == "success", entry["status"]
    seen = [pixels(file) for file in server.pictures(entry)]
    if name in PLANS:
        assert [picture.shape[0] > 3 * 128 and picture.shape[1] > 5 * 128 for picture in seen] == [True]
        return
    assert [picture.shape for picture in seen] == [(256, 256, 3) if name in OF_PIXELS else (128, 128, 3)] * 4
    assert len({picture.tobytes() for picture in seen}) == 4


@pytest.mark.parametrize("name", REPEATED)
def test_example_gives_the_cores_picture(server, info, evaluate, name):
    """At a hundredth of its scales within four of 255, but for one value in a thousand, where rounding grew at an edge:
    at all of its scales guidance overshoots, and amplifies rounding everywhere."""
    prompt = tools.to_prompt(EXAMPLES[name], info)
    gentle = scaled(prompt, 0.01)
    seen = np.stack([pixels(file) for file in server.pictures(server.run(gentle))])
    if name == "pixels":
        seen = seen[:, 4::8, 4::8]
    (output,) = [number for number, node in prompt.items() if node["class_type"] == "SaveImage"]
    wanted, unguided = (
        ((evaluate(asked, output).movedim(1, -1).numpy() + 1) * 127.5).astype(np.uint8).astype(int)
        for asked in (gentle, scaled(prompt, 0.0))
    )
    off, moved = np.abs(seen - wanted), np.abs(seen - unguided)
    print(f"{name}: mean difference {off.mean():.3f}, largest {off.max()} of 255; guidance moved {moved.mean():.2f}")
    assert seen.shape == wanted.shape
    assert np.quantile(off, 0.999) <= 4
    assert off.mean() <= 0.1
    assert moved.max() >= 5
    assert moved.mean() > 10 * off.mean()


# Graphs: nodes, links and values against the host's own schemas, also where the models are not here


def schema(info: dict, node: dict) -> dict:
    """A node's inputs by name: [type, options]."""
    inputs = info[node["type"]]["input"]
    return inputs.get("required", {}) | inputs.get("optional", {})


@pytest.mark.parametrize("name", EXAMPLES)
def test_nodes_of_an_example_are_the_hosts_or_the_packs(info, name):
    assert {node["type"] for node in EXAMPLES[name]["nodes"]} <= {*info, *tools.NOTES}


@pytest.mark.parametrize("name", EXAMPLES)
def test_links_of_an_example_join_sockets_of_one_type(info, name):
    nodes = {node["id"]: node for node in EXAMPLES[name]["nodes"]}
    for number, source, output, target, slot, kind in EXAMPLES[name]["links"]:
        start, end = nodes[source]["outputs"][output], nodes[target]["inputs"][slot]
        assert number in start["links"]
        assert end["link"] == number
        assert info[nodes[source]["type"]]["output"][output] == start["type"] == kind
        assert schema(info, nodes[target])[end["name"]][0] == end["type"] == kind


@pytest.mark.parametrize("name", FOR_DOWNLOADS)
def test_the_host_misses_nothing_of_an_example_but_the_files_that_its_loaders_name(server, info, name):
    answer = server.queue(tools.to_prompt(EXAMPLES[name], info))
    problems = [(number, error) for number, node in answer["node_errors"].items() for error in node["errors"]]
    missing = {(number, error["extra_info"].get("received_value")) for number, error in problems}
    named = {(str(node["id"]), model["name"]) for node in EXAMPLES[name]["nodes"] for model in tools.models_of(node)}
    assert {error["type"] for _, error in problems} == {"value_not_in_list"}, problems
    assert missing == named


@pytest.mark.parametrize("name", FOR_DOWNLOADS)
def test_files_that_loaders_name_are_offered_once_they_are_where_the_example_says(server, installed, name):
    folders = server.get("/models")
    for node in EXAMPLES[name]["nodes"]:
        for model in tools.models_of(node):
            assert model["url"].startswith("https://")
            assert model["url"].split("?")[0].endswith(f"/{model['name']}")
            assert model["directory"] in folders
            with empty_file(installed / "models" / model["directory"] / model["name"]):
                inputs = schema(server.get(f"/object_info/{node['type']}"), node)
            assert any(model["name"] in choices(*part) for part in inputs.values())


@contextlib.contextmanager
def empty_file(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    try:
        yield
    finally:
        path.unlink()


def choices(kind: str | list, options: dict | None = None) -> list:
    """What a widget offers: older nodes give the list as the type."""
    return kind if isinstance(kind, list) else (options or {}).get("options", [])


# Errors


def changed_text_example(info, node: str, **changes) -> tuple[dict, str]:
    """The text example with other inputs at one node (None takes one away), and that node's id."""
    prompt = tools.to_prompt(EXAMPLES["text"], info)
    (number,) = [n for n, part in prompt.items() if part["class_type"] == node]
    inputs = prompt[number]["inputs"] | changes
    prompt[number]["inputs"] = {name: value for name, value in inputs.items() if value is not None}
    return prompt, number


def errors(entry: dict) -> list[dict]:
    return [data for kind, data in entry["status"]["messages"] if kind == "execution_error"]


@pytest.mark.parametrize(
    ("node", "changes", "said"),
    [
        ("SDGTextGuidance", {"text": " "}, "empty text"),
        ("SDGTextGuidance", {"start_percent": 0.8, "end_percent": 0.2}, "start below end"),
        ("SDGTextGuidance", {"start_percent": 1.0}, "start below end"),
        ("SDGGuidedKSampler", {"strength": "relative", "cap": 0.0}, "cap is 0"),
    ],
)
def test_wrong_values_are_reported_on_their_node(server, info, node, changes, said):
    prompt, number = changed_text_example(info, node, **changes)
    (error,) = errors(server.run(prompt))
    assert (error["node_type"], error["node_id"]) == (node, number)
    assert said in error["exception_message"]


@pytest.mark.parametrize(
    ("node", "changes"),
    [
        ("SDGTextGuidance", {"noisy_clip": None}),
        ("SDGTextGuidance", {"scale": 1e9}),
        ("SDGLoadADM", {"adm_name": "gone.safetensors"}),
        ("SDGLoadNoisyCLIP", {"noisy_clip_name": "gone.safetensors"}),
        ("SDGGuidedKSampler", {"model": None}),
        ("SDGGuidedKSampler", {"strength": "strong"}),
    ],
)
def test_values_that_the_host_checks_are_rejected_on_their_node(server, info, node, changes):
    prompt, number = changed_text_example(info, node, **changes)
    assert list(server.queue(prompt)["node_errors"]) == [number]


def test_combined_guidance_needs_no_weights_in_the_prompt(server, info):
    prompt = tools.to_prompt(EXAMPLES["text"], info)
    (number,) = [n for n, part in prompt.items() if part["class_type"] == "SDGTextGuidance"]
    (sampler,) = [n for n, part in prompt.items() if part["class_type"] == "SDGGuidedKSampler"]
    prompt["100"] = {"class_type": "SDGCombineGuidance", "inputs": {"guidance_2": [number, 0]}}
    prompt[sampler]["inputs"] |= {"guidance": ["100", 0], "steps": 2}
    assert server.run(prompt)["status"]["status_str"] == "success"


def test_paper_sampler_runs_in_sampler_custom(server, info):
    prompt = tools.to_prompt(EXAMPLES["text"], info)
    find = {part["class_type"]: n for n, part in prompt.items()}
    adm = find["SDGLoadADM"]
    scheduler = {"model": [adm, 0], "scheduler": "normal", "steps": 3, "denoise": 1.0}
    prompt["100"] = {"class_type": "SDGPaperSampler", "inputs": {"guidance": [find["SDGTextGuidance"], 0]}}
    prompt["101"] = {"class_type": "BasicScheduler", "inputs": scheduler}
    inputs = {
        "model": [adm, 0], "add_noise": True, "noise_seed": 0, "cfg": 1.0, "positive": [adm, 1], "negative": [adm, 1],
        "sampler": ["100", 0], "sigmas": ["101", 0], "latent_image": [find["SDGEmptyPixelLatent"], 0],
    }  # fmt: skip
    prompt[find["SDGGuidedKSampler"]] = {"class_type": "SamplerCustom", "inputs": inputs}
    assert server.run(prompt)["status"]["status_str"] == "success"


def test_applied_guidance_in_the_hosts_ksampler_gives_the_same_picture(server, info):
    prompt, number = changed_text_example(info, "SDGGuidedKSampler", steps=5)
    inputs = prompt[number]["inputs"]
    applied = {name: inputs[name] for name in ("model", "guidance", "strength", "cap")}
    blank = [inputs["model"][0], 1]
    kept = ("seed", "steps", "cfg", "sampler_name", "scheduler", "latent_image", "denoise")
    plain = {name: inputs[name] for name in kept} | {"model": ["100", 0], "positive": blank, "negative": blank}
    other = prompt | {
        "100": {"class_type": "SDGApplyGuidance", "inputs": applied},
        number: {"class_type": "KSampler", "inputs": plain},
    }
    first, second = (server.pictures(server.run(p)) for p in (prompt, other))
    assert [pixels(f).tobytes() for f in first] == [pixels(f).tobytes() for f in second]


def metadata_of(file: bytes) -> dict:
    return {name: json.loads(text) for name, text in Image.open(io.BytesIO(file)).text.items()}


def test_saved_pictures_hold_the_report_of_their_run_also_where_the_sampler_is_cached(server, info):
    prompt, sampler = changed_text_example(info, "SDGGuidedKSampler", steps=4)
    (decode,) = [n for n, part in prompt.items() if part["class_type"] == "VAEDecode"]
    (save,) = [n for n, part in prompt.items() if part["class_type"] == "SaveImage"]
    prompt["100"] = {"class_type": "SDGGuidanceReport", "inputs": {"latent": [sampler, 0]}}
    prompt[decode]["inputs"]["samples"] = ["100", 0]
    plain = server.pictures(server.run(changed_text_example(info, "SDGGuidedKSampler", steps=4)[0]))
    for prefix in ("first", "second"):
        prompt[save]["inputs"]["filename_prefix"] = prefix
        entry = server.run(prompt, metadata={"workflow": {"nodes": []}})
        assert entry["status"]["status_str"] == "success", entry["status"]
        files = server.pictures(entry)
        assert [pixels(file).tobytes() for file in files] == [pixels(file).tobytes() for file in plain]
        for file in files:
            held = metadata_of(file)
            assert held["workflow"] == {"nodes": []}
            assert list(held["sdg_report"]) == ["100"]
            report = held["sdg_report"]["100"]
            assert report["pictures"] == len(files)
            assert [part["name"].split()[0] for part in report["guidances"]] == ["text", "text"]
            assert all(0 < value <= 1 + 1e-5 for value in report["pull"]["mean"])
    assert sampler in {
        n for kind, data in entry["status"]["messages"] if kind == "execution_cached" for n in data["nodes"]
    }
    assert "sdg_report" not in metadata_of(plain[0])


def test_a_report_needs_no_metadata_and_is_not_another_samplers(server, info):
    prompt, sampler = changed_text_example(info, "SDGGuidedKSampler", steps=2)
    inputs = prompt[sampler]["inputs"]
    blank = [inputs["model"][0], 1]
    kept = ("seed", "steps", "cfg", "sampler_name", "scheduler", "denoise", "model")
    again = {name: inputs[name] for name in kept} | {"positive": blank, "negative": blank, "latent_image": [sampler, 0]}
    prompt["100"] = {"class_type": "SDGGuidanceReport", "inputs": {"latent": [sampler, 0]}}
    assert server.run(prompt)["status"]["status_str"] == "success"
    prompt["101"] = {"class_type": "KSampler", "inputs": again}
    prompt["100"]["inputs"]["latent"] = ["101", 0]
    (error,) = errors(server.run(prompt))
    assert error["node_type"] == "SDGGuidanceReport"
    assert "another node changed" in error["exception_message"]


def test_a_kept_guidance_is_offered_at_once_and_gives_the_same_picture(server, info):
    prompt, sampler = changed_text_example(info, "SDGGuidedKSampler", steps=3)
    (text,) = [n for n, part in prompt.items() if part["class_type"] == "SDGTextGuidance"]
    prompt["100"] = {"class_type": "SDGSavePreset", "inputs": {"guidance": [text, 0], "name": "kept"}}
    entry = server.run(prompt)
    assert entry["outputs"]["100"]["text"] == ["kept.json"]
    first = server.pictures(entry)
    inputs = {"preset_name": "kept.json", "noisy_clip": prompt[text]["inputs"]["noisy_clip"]}
    prompt["100"] = {"class_type": "SDGLoadPreset", "inputs": inputs}
    prompt[sampler]["inputs"]["guidance"] = ["100", 0]
    del prompt[text]
    second = server.pictures(server.run(prompt))
    assert [pixels(file).tobytes() for file in first] == [pixels(file).tobytes() for file in second]


def test_help_and_examples_are_served(server, info):
    for node in (name for name in info if name.startswith("SDG")):
        with urllib.request.urlopen(f"{server.url}/extensions/semantic-diffusion-guidance/docs/{node}.md") as page:
            assert page.read().startswith(b"# ")
    templates = server.get("/workflow_templates")
    assert sorted(templates["semantic-diffusion-guidance"]) == sorted(EXAMPLES)
