"""`sdg bench`: the peers in closed form, rows as they are promised. Its figures are measured elsewhere."""

from __future__ import annotations

import json
import time

import pytest
import torch
import torch.nn.functional as F

from sdg_core.bench import as_json, compiled, machine, peers, rows, steps, training, world
from sdg_core.bench.peers import METHODS, Peer
from sdg_core.commands import main
from sdg_core.encoders import CleanCLIP, build_clip
from sdg_core.method import TextGuidance, expand, rms

SIGMA = 2.0


@pytest.fixture
def peer(tiny_encoder, draw, monkeypatch):
    """Makes peers of a model whose estimate is x / (1 + sigma^2), that see the whole picture as it is."""
    monkeypatch.setattr(peers.Augment, "crops", lambda self, size, generator: [lambda picture: picture])
    clip = tiny_encoder()
    clip.reads = "denoised"
    wanted = TextGuidance(F.normalize(draw(1, 5, seed=3), dim=-1))
    return lambda method, scale=3.0: Peer(
        method, lambda x, sigma: x / expand(1 + sigma.square(), x), lambda x: x, clip, wanted, scale, (clip,)
    )


@pytest.fixture
def step(draw):
    return SIGMA * draw(2, 3, 8, 8), torch.full((2,), SIGMA)


def gradient(peer: Peer, at):
    """grad F at a picture, written out."""
    leaf = at.clone().requires_grad_(True)
    embed = F.normalize(peer.clip(leaf, torch.zeros(1), 3).embed, dim=1)
    return torch.autograd.grad((embed @ peer.text.embed.T).sum(), leaf)[0]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", METHODS)
def test_peers_shift_as_their_papers_say(method, peer, step):
    """Of a linear model the gradient through it is the gradient of what is seen, times a number."""
    x, sigma = step
    power = 1 + SIGMA**2
    made, denoised = peer(method), x / power
    shift = made(x, sigma) - denoised
    wanted = gradient(made, denoised)
    if method == "universal":
        wanted = 3 * SIGMA**2 / power * wanted
    elif method == "freedom":
        size = 3 * SIGMA * rms((x - denoised) / SIGMA)
        wanted = expand(size / rms(wanted), x) * wanted
    elif method == "mpgd":
        wanted = 3 * wanted
    else:
        share = (1 - 1 / power) ** 0.5
        seen = share * denoised + (1 - share) * x / power**0.5
        wanted = 3 * SIGMA**2 * (share / power + (1 - share) / power**0.5) * gradient(made, seen)
    torch.testing.assert_close(shift, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "freedom"])
def test_a_peer_scores_where_its_picture_is(method, peer):
    """The text's embedding lies on the CPU; on the meta device nothing mixes with it."""
    made = peer(method)
    made.clip.to("meta")
    score = made._score(torch.zeros(2, 3, 8, 8, device="meta"))
    assert (score.device.type, score.shape) == ("meta", (2,))


def test_tasks_take_turns_and_medians_count(monkeypatch):
    now, order = [0.0], []
    monkeypatch.setattr(rows.time, "perf_counter", lambda: now[0])

    def task(name, spans):
        spans = iter(spans)

        def run():
            order.append(name)
            now[0] += next(spans)

        return run

    took = rows.by_turns({"a": task("a", [50, 1, 9, 2]), "b": task("b", [70, 5, 4, 30])}, 3)
    assert took == {"a": 2, "b": 5}
    assert order == ["a", "b"] * 4


def test_peak_memory_sees_what_is_taken_and_given_back():
    with rows.peak_memory() as peak:
        taken = torch.ones(64 * rows.MB // 4)
        taken += 1
        time.sleep(0.2)  # a busy machine looks late
        del taken
    assert 50 * rows.MB < peak.taken < 200 * rows.MB


@pytest.fixture
def small(monkeypatch):
    from sdg_core.avatars import load_bundled_clip
    from sdg_core.encoders import from_clean

    monkeypatch.setattr(steps, "noisy_clip", lambda architecture: from_clean(load_bundled_clip()).requires_grad_(False))
    monkeypatch.setattr(steps, "SIDE", 32)


def test_step_rows_have_the_promised_names(small):
    names = {row.name: row for row in steps.step_rows(1, batches=(1, 2))}
    assert {"four_over_one", "four_over_one_first_run", "style_over_text", "batch_2_per_picture"} <= set(names)
    assert {"bf16_over_fp32", "bf16_degrees"} <= set(names)
    assert all(row.value > 0 for row in names.values())


def test_compiled_rows_have_the_promised_names(small, monkeypatch):
    """Compiling itself is tested elsewhere, and takes long."""
    monkeypatch.setattr(compiled, "noisy_clip", steps.noisy_clip)
    compiling = []
    monkeypatch.setattr(CleanCLIP, "compile_tower", lambda self: compiling.append(self))
    names = {row.name for row in compiled.compiled_rows(1)}
    assert names == {"text_compiled_over_text", "style_compiled_over_style", "compile_seconds"}
    assert len(compiling) == 1


def test_first_runs_pay_for_references_and_others_do_not(small):
    """By the passes of the encoder, whatever the machine does."""
    encoder, calls = steps.noisy_clip("RN50"), []
    encoder.register_forward_hook(lambda *_: calls.append(1))
    bed, counted = steps.Bed.of(encoder, side=32), []
    for task in (bed.step(*steps.four(encoder)), bed.step(*steps.four(encoder), first=True)):
        task()
        calls.clear()
        task()
        counted.append(len(calls))
    assert counted == [1, 2]


def test_world_rows_compare_at_equal_time(monkeypatch):
    monkeypatch.setitem(world.STEPS, "latents", 4)
    rows = world.world_rows(1, 1, only=("mpgd", "clean_decoded"), progress=lambda what: None)
    found = {row.name: row.value for row in rows}
    ways = {name.split("/")[0] for name in found}
    assert ways == {"noisy_clip", "clean_decoded", "mpgd"}
    for way in ways:
        equal = found[f"{way}/steps_equal_time"]
        assert equal == max(1, round(4 * found["noisy_clip/seconds"] / found[f"{way}/seconds"]))
        assert 0 <= found[f"{way}/accuracy_equal_time"] <= 1


def test_training_rows_have_the_promised_names(monkeypatch):
    from sdg_core.avatars import load_bundled_clip

    clean = load_bundled_clip()
    monkeypatch.setattr(training, "clean_clip", lambda arch: (clean, build_clip(clean.build)))
    found = {row.name for row in training.training_rows(1, batch=4)}
    assert {"finetune_over_open_clip", "finetune_over_image_tower"} <= found


def test_bench_prints_one_json_object(small, capsys):
    assert main(["bench", "--suite", "steps", "--rounds", "1", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert set(said) == {"machine", "rows"}
    assert set(said["rows"][0]) == {"name", "value", "unit", "n"}
    assert {"processor", "threads", "device", "torch"} <= set(said["machine"])


def test_bench_prints_a_table(small, capsys):
    assert main(["bench", "--suite", "steps", "--rounds", "1"]) == 0
    assert "four_over_one " in capsys.readouterr().out
    assert as_json([], machine())["rows"] == []


def test_bench_says_in_markdown_what_rows_are(small, capsys):
    """Every row of the suites has words."""
    assert main(["bench", "--suite", "steps", "--rounds", "1", "--markdown"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[2:4] == ["| row | | what |", "|---|---|---|"]
    assert len(lines) > 20
    assert all(line.count("|") == 4 and len(line.split("|")[3].strip()) > 8 for line in lines[4:])
