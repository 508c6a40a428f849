"""Fine-tuning: the loss in closed form, batches in parts, over processes, killed and resumed; bad input."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdg_core.commands import main
from sdg_core.encoders import CleanCLIP, build_clip, load_noisy_clip
from sdg_core.method import LinearView
from sdg_core.training import PLAIN, Augment, Finetuning, ImageSet, Settings, StudentSight, accelerator

ROOT = Path(__file__).parents[2]
VIT = "ViT-S-32-alt"
TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
VISION = {
    "vit": {"image_size": 32, "layers": 4, "width": 32, "head_width": 16, "patch_size": 8},
    "resnet": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8},
}


@pytest.fixture
def clean(request) -> CleanCLIP:
    """A small random CLIP in float64, its batch statistics not those of a fresh layer."""
    torch.manual_seed(0)
    kind = getattr(request, "param", "vit")
    config = {"embed_dim": 16, "vision_cfg": VISION[kind], "text_cfg": TEXT}
    clip = build_clip(config)
    for layer in clip.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean, std=0.1)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
    return CleanCLIP(clip, 32, build=config, source=kind).requires_grad_(False).eval().double()


@pytest.fixture
def images() -> ImageSet:
    """Twelve pictures of coarse random patches."""
    pictures = torch.randint(0, 256, (12, 4, 4, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return ImageSet(list(pictures.repeat_interleave(12, 1).repeat_interleave(12, 2)), 32, Augment(), seed=5)


@pytest.fixture
def start(clean, images) -> Callable[..., Finetuning]:
    """start(**settings) -> a fine-tuning of the small CLIP."""

    def build(sight: StudentSight | None = None, **settings) -> Finetuning:
        wanted = {"steps": 3, "batch_size": 6, "learning_rate": 1e-3, **settings}
        return Finetuning(clean, sight or StudentSight(32), images, Settings(**wanted), accelerator(cpu=True))

    return build


def finished(run: Finetuning) -> dict[str, Tensor]:
    for _ in run.steps():
        pass
    return {name: value.clone() for name, value in run.result().state_dict().items()}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


# The method


def test_loss_is_the_papers(start, draw):
    seen, clean = (F.normalize(draw(6, 16, seed=s), dim=1) for s in (1, 2))
    loss, info_nce, cosine = start(cosine_weight=7.0).learner.loss(seen, clean)
    logits = 100 * seen @ clean.T
    rows, columns = (-x.log_softmax(1).diagonal().mean() for x in (logits, logits.T))
    assert info_nce == pytest.approx(float(rows + columns) / 2, rel=1e-5)
    assert float(cosine) == pytest.approx(float((seen * clean).sum(1).mean()), rel=1e-5)
    assert float(loss) == pytest.approx(info_nce + 7 * (1 - float(cosine)), rel=1e-5)


@pytest.mark.parametrize("clean", ["vit", "resnet"], indirect=True)
def test_the_student_starts_as_the_clean_clip(clean, start, draw):
    model, image = start().model, draw(2, 3, 32, 32)
    wanted = clean(image, torch.zeros(1), clean.full_depth).embed
    for t in (torch.tensor([0.0, 700.0]), torch.tensor([321.0])):
        assert torch.allclose(model(image, t, model.full_depth).embed, wanted, rtol=0, atol=1e-12)


def test_timesteps_are_uniform_over_the_schedule_or_over_the_angle(start, images):
    picture = torch.zeros(2000, 3, 4, 4)
    t = {
        kind: start(StudentSight(4), timesteps=kind).learner.look(picture, range(2000))[1]
        for kind in ("uniform", "angle")
    }
    table = start().model.table
    angle = table.sigma(t["angle"]).atan() / (torch.pi / 2)
    for value in (t["uniform"] / 999, angle):
        assert torch.allclose(
            value.float().quantile(torch.tensor([0.25, 0.5, 0.75])), torch.tensor([0.25, 0.5, 0.75]), atol=0.04
        )


def test_noisy_pictures_have_the_schedules_signal_and_noise(start):
    run, ones = start(), torch.ones(64, 3, 32, 32)
    x_t, t = run.learner.look(ones, range(64))
    abar = 1 / (1 + run.model.table.sigma(t).square())
    assert torch.allclose(x_t.mean((1, 2, 3)), abar.sqrt(), atol=0.08)
    assert torch.allclose(x_t.var((1, 2, 3)), 1 - abar, atol=0.08)


def test_noise_of_a_linear_view_has_the_covariance_of_its_factors(draw):
    view = LinearView("made up", draw(3, 4), torch.zeros(3))
    sight = StudentSight(64, view)
    noise = sight.noised(torch.zeros(8, 3, 64, 64), draw(8, 4, 64, 64, seed=1), torch.full((8,), 1e6))
    seen = torch.cov(noise.transpose(0, 1).flatten(1))
    assert torch.allclose(seen, view.covariance, atol=0.05 * view.covariance.abs().max().item())
    assert sight.config()["view"] == "linear:made up"
    assert torch.allclose(torch.tensor(sight.config()["covariance"]), view.covariance)


def test_an_autoencoder_gives_half_of_the_pictures_exactly(draw):
    view = LinearView("made up", draw(3, 4), draw(3, seed=1))
    latents, picture = draw(2, 4, 8, 8, seed=2), draw(2, 3, 64, 64, seed=3)
    sight = StudentSight(8, view, lambda picture: latents, downscale=8)
    x_0 = sight.clean(picture, torch.tensor([True, False]))
    assert sight.picture_size == 64
    assert torch.equal(x_0[0], view.picture(latents, torch.ones(2))[0])
    assert torch.allclose(x_0[1], F.avg_pool2d(picture, 8)[1], atol=1e-6)


@pytest.mark.parametrize("clean", ["vit", "resnet"], indirect=True)
def test_a_batch_in_parts_is_the_whole_batch(start):
    assert distance(finished(start()), finished(start(micro_batch=2))) < 1e-9


@pytest.mark.parametrize("clean", ["vit", "resnet"], indirect=True)
@pytest.mark.parametrize(
    ("layers", "learn", "stay"),
    [
        ("conditioning", "conditioning.", "tower."),
        ("last", ("tower.visual.layer4.", "tower.visual.transformer.resblocks.3."), ("tower.visual.conv1.",)),
        ("all", "tower.visual.conv1.", "text."),
    ],
)
def test_only_the_chosen_layers_learn(start, layers, learn, stay):
    run = start(layers=layers)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    after = finished(run)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith(learn) for name in changed)
    assert not any(name.startswith(stay) for name in changed)
    assert not any("running" in name for name in changed)


def test_the_seed_decides(start):
    first = finished(start())
    assert distance(first, finished(start())) == 0
    assert distance(first, finished(start(seed=1))) > 1e-4


def test_teacher_embeddings_are_kept_only_where_pictures_repeat(start, images):
    run = start(steps=4)
    assert run.learner.teacher.known is None
    images.augment = Augment(1.0, flip=True)
    run = start(steps=4)
    calls = []
    run.learner.teacher._embed = lambda picture, embed=run.learner.teacher._embed: (
        calls.append(len(picture)) or embed(picture)
    )
    cached = finished(run)
    assert sum(calls) <= 24
    assert sum(calls) == int(run.learner.teacher.known.sum())
    run = start(steps=4)
    run.learner.teacher.known = None
    assert distance(cached, finished(run)) < 1e-9


def test_fine_tuning_teaches_to_read_noise(start):
    """On pictures of coarse patches, noisy embeddings come to match the clean ones."""
    progress = list(start(steps=40, batch_size=12, learning_rate=3e-3, timesteps="angle").steps())
    assert sum(p.loss for p in progress[-5:]) < 0.6 * sum(p.loss for p in progress[:5])
    assert progress[-1].seconds_left == 0


# The command, in processes of its own


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Twenty-four pictures, one of them transparent, in two folders."""
    place, numbers = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    (place / "more").mkdir()
    for i in range(24):
        pixels = numbers.integers(0, 256, (4, 4, 3 + (i == 0)), dtype=np.uint8).repeat(10, 0).repeat(12, 1)
        Image.fromarray(pixels).save(place / ("more" if i % 2 else ".") / f"{i:02d}.png")
    return place


@pytest.fixture(scope="module")
def vit_file(tmp_path_factory) -> Path:
    """Random weights of the smallest ViT that open_clip knows."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file({k: v.clone() for k, v in open_clip.create_model(VIT).state_dict().items()}, path)
    return path


def arguments(folder: Path, out: Path, *more: str) -> list[str]:
    usual = ["--arch", "avatars", "--steps", "6", "--batch-size", "8", "--held-out", "4", "--workers", "0"]
    return ["finetune", "--images", str(folder), "--out", str(out), "--save-every", "2", *usual, *more]


def launch(command: list[str], processes: int = 1) -> subprocess.Popen:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = [sys.executable, "-m", "sdg_core"]
    several = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_addr=127.0.0.1",
        f"--master_port={port}", "-m", "sdg_core",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*(several if processes > 1 else alone), *command],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def completed(process: subprocess.Popen) -> str:
    out = process.communicate(timeout=300)[0]
    assert process.returncode == 0, out
    return out


def wait_for_state(process: subprocess.Popen, out: Path) -> None:
    """Until the run has written its first complete state."""
    end = time.monotonic() + 120
    while not list(out.with_suffix(".training").glob("step-????????")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("tower", ["resnet", "vit"])
def test_two_processes_are_one_with_the_doubled_batch(folder, vit_file, tmp_path, tower):
    weights = [] if tower == "resnet" else ["--arch", VIT, "--pretrained", str(vit_file)]
    more = ["--steps", "3", "--learning-rate", "1e-3", "--ema", "0", "--precision", "fp64", *weights]
    for name, processes in (("one", 1), ("two", 2)):
        completed(launch(arguments(folder, tmp_path / f"{name}.safetensors", *more), processes))
    one, two = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    off = distance(one, two)
    numbers = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two")]
    losses = [n["losses"] for n in numbers]
    assert [n["processes"] for n in numbers] == [1, 2]
    print(f"{tower}: weights {off:.1e}, losses {max(abs(a - b) / a for a, b in zip(*losses, strict=True)):.1e} apart")
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert off < 1e-9


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_an_ended_run_resumes_to_the_uninterrupted_result(folder, tmp_path, capsys, kind):
    more = ["--crop", "1", "--learning-rate", "1e-3"]  # few versions of a picture: the teacher's memory, too, resumes
    completed(launch(arguments(folder, tmp_path / "whole.safetensors", *more)))
    out = tmp_path / "ended.safetensors"
    process = launch(arguments(folder, out, *more))
    wait_for_state(process, out)
    process.send_signal(kind)
    said = process.communicate(timeout=120)[0]
    assert not out.exists()
    if kind == signal.SIGINT:
        assert process.returncode == 130
        assert "--resume" in said
    assert main(arguments(folder, out, *more)) == 2
    assert "Continue it with --resume" in capsys.readouterr().err
    completed(launch(arguments(folder, out, *more, "--resume")))
    off = distance(load_file(tmp_path / "whole.safetensors"), load_file(out))
    print(f"weights {off:.1e} apart")
    assert off < 1e-6
    assert not out.with_suffix(".training").exists()


def test_shards_are_trained_on(folder, tmp_path, capsys):
    for shard in range(2):
        with tarfile.open(tmp_path / f"data-{shard}.tar", "w") as tar:
            for file in sorted(folder.rglob("*.png"))[shard::2]:
                tar.add(file, file.name)
    out = tmp_path / "out.safetensors"
    pattern = str(tmp_path / "data-{0..1}.tar")
    completed(launch([*arguments(folder, out, "--images", pattern, "--precision", "bf16"), "--workers", "2"]))
    config = load_noisy_clip(out).config
    assert config.retrieval == ()
    assert len(json.loads(out.with_suffix(".json").read_text())["losses"]) == 6
    refused(capsys, arguments(folder, tmp_path / "b.safetensors", "--images", str(tmp_path / "data-9.tar")), "no shard")


def test_the_file_says_what_it_is(folder, tmp_path):
    out = tmp_path / "mine.safetensors"
    more = ["--view", "linear:avatars", "--vae", "avatars", "--size", "16", "--dataset-name", "patches"]
    assert main(arguments(folder, out, *more, "--licence", "CC0", "--steps", "1", "--half")) == 0
    config = load_noisy_clip(out).config
    assert (config.view, config.noise_size, config.notes["dataset"], config.notes["licence"]) == (
        "linear:avatars", 16, "patches", "CC0",
    )  # fmt: skip
    assert config.notes["base"] == "avatars"
    assert [row[0] for row in config.retrieval] == [0, 100, 200, 300, 400, 500, 600, 700, 800, 900, 999]
    assert Image.open(out.with_suffix(".png")).size[0] > 400


# Bad input


def refused(capsys, command: list[str], wanted: str) -> None:
    assert main(command) == 2
    said = capsys.readouterr().err
    assert wanted in said, said


def test_folders_without_pictures_are_refused(tmp_path, capsys):
    out, empty = tmp_path / "out.safetensors", tmp_path / "empty"
    refused(capsys, arguments(empty, out), "There is no folder")
    empty.mkdir()
    refused(capsys, arguments(empty, out), "holds no files")
    (empty / "words.txt").write_text("words")
    refused(capsys, arguments(empty, out), "1 files, but none is a picture")
    (empty / "broken.png").write_bytes(b"no picture at all")
    refused(capsys, arguments(empty, out, "--batch-size", "2"), "wanted at least as many")
    assert not out.exists()


def test_unreadable_pictures_are_named_once_and_skipped(folder, tmp_path, capsys, caplog):
    place, out = tmp_path / "pictures", tmp_path / "out.safetensors"
    place.mkdir()
    for i, file in enumerate(sorted(folder.rglob("*.png"))):
        data = file.read_bytes()
        (place / f"{i}.png").write_bytes(data[: len(data) // 2] if i == 3 else data)
    assert main(arguments(place, out, "--held-out", "0", "--steps", "9")) == 0
    named = [r.getMessage() for r in caplog.records if "can't read" in r.getMessage()]
    assert len(named) == 1
    assert "3.png" in named[0]
    assert "1 pictures could not be read" in capsys.readouterr().err


def test_all_unreadable_pictures_end_the_run(tmp_path, capsys):
    for i in range(8):
        (tmp_path / f"{i}.png").write_bytes(b"no picture")
    refused(capsys, arguments(tmp_path, tmp_path / "out.safetensors", "--held-out", "0"), "can be read")


def test_settings_that_cannot_work_are_refused(folder, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    refused(capsys, arguments(folder, out, "--batch-size", "1"), "a batch of 1; wanted 2 or more")
    refused(capsys, arguments(folder, out, "--batch-size", "64"), "wanted at least as many")
    refused(capsys, arguments(folder, out, "--arch", "RN05"), "Nearest: RN50")
    refused(capsys, arguments(folder, out, "--view", "linear"), 'wanted "pixels" or "linear:"')
    refused(capsys, arguments(folder, out, "--resume"), "nothing to resume")


def test_outputs_that_cannot_be_written_are_refused_before_training(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    refused(capsys, arguments(folder, tmp_path / "file" / "out.safetensors"), "can't be written")
    refused(capsys, arguments(folder, tmp_path / "out.pt"), "ends in .safetensors")
    kept = tmp_path / "kept.safetensors"
    kept.write_bytes(b"precious")
    refused(capsys, arguments(folder, kept), "--force")
    assert kept.read_bytes() == b"precious"


class Harm:
    """A pickle that would write a file when opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "done"))


def test_foreign_weights_are_refused(folder, vit_file, tmp_path, capsys):
    out, base = tmp_path / "out.safetensors", tmp_path / "base.safetensors"
    base.write_bytes(vit_file.read_bytes()[:100_000])
    refused(capsys, arguments(folder, out, "--arch", VIT, "--pretrained", str(base)), f"not loaded as {VIT}")
    refused(
        capsys, arguments(folder, out, "--arch", "ViT-B-32", "--pretrained", str(vit_file)), "not loaded as ViT-B-32"
    )
    code = tmp_path / "code.pt"
    torch.save({"state_dict": Harm(tmp_path / "harm")}, code)
    refused(capsys, arguments(folder, out, "--arch", VIT, "--pretrained", str(code)), "could run code")
    assert not (tmp_path / "harm").exists()
    assert not out.exists()


def test_a_run_of_other_settings_is_not_resumed(folder, tmp_path, capsys, start):
    run = start()
    next(run.steps())
    run.save(tmp_path / "states")
    with pytest.raises(ValueError, match=r"learning_rate: 0\.001 then, 0\.002 now"):
        start(learning_rate=2e-3).resume(tmp_path / "states")
    again = start()
    assert again.resume(tmp_path / "states") == 1
    assert PLAIN.variants == 1
