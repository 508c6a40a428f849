"""The fine-tuning nodes: over HTTP from pictures to a guided sample and a file; cancelled; wrong values."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdg_core.avatars import load_bundled_clip
from sdg_core.commands.evaluate import bundled_renders
from sdg_core.encoders import load_noisy_clip

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("sdg_test_server_finetune", Path(__file__).with_name("server.py"))
tools = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = tools
spec.loader.exec_module(tools)


@pytest.fixture(scope="module")
def server(comfyui_path, tmp_path_factory):
    """A server with two hundred of the held-out renders in its input folder, and as one picture sheet."""
    base = tmp_path_factory.mktemp("base")
    tools.install(base)
    (base / "input/faces").mkdir()
    renders = bundled_renders()[:200]
    for i, picture in enumerate(renders):
        Image.fromarray(picture.numpy()).save(base / f"input/faces/{i:03d}.png")
    shutil.copy(comfyui_path / "input/example.png", base / "input")
    with tools.serve(comfyui_path, base) as server:
        yield server


def graph(steps: int = 50, folder: str = "", batch_size: int = 16) -> dict:
    """Load CLIP and pictures of core nodes -> fine-tune -> guide a sampler, and save both results."""
    nodes = {
        "clip": ("SDGLoadCLIP", {"clip_name": "avatars (bundled)", "architecture": "RN50", "pretrained": ""}),
        "tune": ("SDGFinetuneNoisyCLIP", {
            "clip": ["clip", 0], "steps": steps, "batch_size": batch_size, "micro_batch": 64, "learning_rate": 3e-4,
            "train": "all", "timesteps": "angle", "seed": 0, "size": 0, "folder": folder,
        }),
        "keep": ("SDGSaveNoisyCLIP", {
            "noisy_clip": ["tune", 0], "name": "tuned", "dataset": "faces", "licence": "CC0", "half": True,
        }),
        "chart": ("SaveImage", {"images": ["tune", 1], "filename_prefix": "chart"}),
        "text": ("SDGTextGuidance", {
            "noisy_clip": ["tune", 0], "text": "blue background", "scale": 200.0, "start_percent": 0.0,
            "end_percent": 1.0,
        }),
        "adm": ("SDGLoadADM", {"adm_name": "avatars (bundled)"}),
        "empty": ("SDGEmptyPixelLatent", {"width": 32, "height": 32, "batch_size": 1}),
        "sample": ("SDGGuidedKSampler", {
            "model": ["adm", 0], "latent_image": ["empty", 0], "guidance": ["text", 0], "seed": 1, "steps": 10,
            "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0, "strength": "absolute",
            "cap": 1.0,
        }),
        "vae": ("VAELoader", {"vae_name": "pixel_space"}),
        "decode": ("VAEDecode", {"samples": ["sample", 0], "vae": ["vae", 0]}),
        "picture": ("SaveImage", {"images": ["decode", 0], "filename_prefix": "guided"}),
    }  # fmt: skip
    if not folder:  # sixteen different crops of one picture, by core nodes alone
        nodes["image"] = ("LoadImage", {"image": "example.png"})
        for i in range(16):
            place = {"width": 128, "height": 128, "x": 40 * (i % 4), "y": 40 * (i // 4)}
            nodes[f"crop{i}"] = ("ImageCrop", {"image": ["image", 0], **place})
            first = ["crop0", 0] if i == 1 else [f"batch{i - 1}", 0]
            if i:
                nodes[f"batch{i}"] = ("ImageBatch", {"image1": first, "image2": [f"crop{i}", 0]})
        nodes["tune"][1]["images"] = ["batch15", 0]
        nodes["tune"][1]["batch_size"] = 8
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}


def outputs(server, prefix: str) -> list[Path]:
    return sorted((server.base / "output").glob(f"{prefix}_*.png"))


def kept(server) -> list[Path]:
    return sorted((server.base / "models/noisy_clip").glob("*.safetensors"))


def test_a_graph_tunes_guides_and_saves(server):
    """Fifty steps on pictures of core nodes; the encoder guides in the same run; the file is that encoder."""
    entry = server.run(graph())
    assert entry["status"]["status_str"] == "success", entry["status"]
    (file,) = kept(server)
    assert entry["outputs"]["keep"]["text"] == [file.name]
    model = load_noisy_clip(file)
    assert (model.config.notes["dataset"], model.config.notes["licence"]) == ("faces", "CC0")
    assert model.config.notes["steps"] == "50"
    assert len(model.config.retrieval) == 11
    assert len(outputs(server, "guided")) == 1
    assert Image.open(outputs(server, "chart")[0]).width == 900
    before = graph()
    before["text"]["inputs"]["scale"] = 0.0
    server.run(before)
    pictures = [np.asarray(Image.open(path)) for path in outputs(server, "guided")]
    assert np.abs(pictures[0].astype(int) - pictures[1]).mean() > 1


def test_fifty_steps_on_a_folder_teach_to_read_noise(server):
    entry = server.run(graph(50, "faces", 32))
    assert entry["status"]["status_str"] == "success", entry["status"]
    config = load_noisy_clip(kept(server)[-1]).config
    at = {row[0]: row for row in config.retrieval}
    print({t: at[t][1:3] for t in (100, 300, 500)})
    assert at[300][1] > at[300][2]  # noisy @1, clean @1
    assert at[300][5] > at[300][6] + 0.1  # cosines


def test_cancelling_keeps_a_loadable_file_and_a_usable_host(server):
    before = set(kept(server))
    answer = server.queue(graph(100_000, "faces"))
    end = time.monotonic() + 120
    while server.get("/queue")["queue_running"] == [] and time.monotonic() < end:
        time.sleep(0.1)
    time.sleep(10)
    urllib.request.urlopen(urllib.request.Request(server.url + "/interrupt", b"{}"), timeout=60)
    begun = time.monotonic()
    while answer["prompt_id"] not in server.get("/history") and time.monotonic() < begun + 60:
        time.sleep(0.1)
    print(f"answered after {time.monotonic() - begun:.1f} s")
    (file,) = set(kept(server)) - before
    assert file.name.startswith("cancelled_")
    model, clean = load_noisy_clip(file), load_bundled_clip()
    image, t = torch.rand(1, 3, 32, 32), torch.tensor([300.0])
    assert not torch.equal(model(image, t, 6).embed, clean(image, t, 6).embed)
    assert " of 100000" in model.config.notes["steps"]
    again = graph(1, "faces")
    assert server.run(again)["status"]["status_str"] == "success"


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"folder": "nowhere"}, "There is no folder"),
        ({"folder": ""}, "Got no pictures"),
        ({"folder": "faces", "batch_size": 4096}, "wanted at least as many"),
    ],
)
def test_wrong_values_are_reported_on_the_node(server, change, wanted):
    prompt = graph(2, "faces")
    prompt["tune"]["inputs"].update(change)
    entry = server.run(prompt)
    (error,) = [data for kind, data in entry["status"]["messages"] if kind == "execution_error"]
    assert error["node_id"] == "tune"
    assert wanted in error["exception_message"]


def test_a_batch_of_one_is_refused_by_the_node(server):
    prompt = graph(2, "faces", batch_size=1)
    answer = server.queue(prompt)
    assert "Value 1 smaller than min of 2" in str(answer["node_errors"]["tune"])


# In process


def test_names_that_are_no_file_names_are_refused(pack, run, noisy_clip):
    for name in ("../up", "a/b", "", ".hidden"):
        with pytest.raises(ValueError, match="plain file name"):
            run("SDGSaveNoisyCLIP", noisy_clip=noisy_clip, name=name, dataset="", licence="", half=True)


def test_a_latent_model_gives_its_linear_view(pack, run, latent_adm, autoencoder):
    clean = load_bundled_clip()
    made = pack.finetune.sight_of(clean, 16, latent_adm("eps"), autoencoder)
    assert made.view.name == "linear:made up"
    picture = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.inference_mode(False):
        x_0 = made.clean(picture, torch.tensor([True, True]))
    assert x_0.shape == (2, 3, 16, 16)
    assert not x_0.is_inference()


class FramesVAE:
    """A VAE of videos: a batch is the frames of one, of so many channels, an eighth as large. Without ``frames`` one
    of pictures."""

    def __init__(self, channels: int, frames: bool = True) -> None:
        self.channels, self.frames = channels, frames

    def encode(self, picture: torch.Tensor) -> torch.Tensor:
        height, width = picture.shape[1:3]
        means = picture.mean(dim=(1, 2, 3)).view(-1, 1, 1, 1).expand(-1, self.channels, height // 8, width // 8)
        return means.movedim(0, 1)[None] if self.frames else means


@pytest.mark.parametrize("frames", [True, False])
def test_a_video_models_pictures_are_learned_as_its_own_latents(pack, comfy, frames):
    """One frame each, in the scaling that the format has for videos."""
    from comfy.latent_formats import Wan21

    space = Wan21()

    class Model:
        def get_model_object(self, name: str) -> object:
            return space

    made = pack.finetune.sight_of(load_bundled_clip(), 16, Model(), FramesVAE(16, frames))
    picture = torch.stack([torch.full((3, 64, 64), value) for value in (-1.0, 0.5)])
    means = torch.tensor([0.0, 0.75]).view(2, 1, 1, 1, 1).expand(-1, 16, 1, 8, 8)
    torch.testing.assert_close(made.encode(picture), space.process_in(means)[:, :, 0])
    other = pack.finetune.sight_of(load_bundled_clip(), 16, Model(), FramesVAE(4, frames))
    with pytest.raises(ValueError, match=r"encodes to \(4, 8, 8\).*would be \(16, 8, 8\). Connect the VAE"):
        other.encode(picture)
