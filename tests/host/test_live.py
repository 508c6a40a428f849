"""Curves of running nodes: what is told is what the report says, at a bounded pace and size, and changes nothing."""

from __future__ import annotations

import importlib
import itertools
import json
from types import SimpleNamespace

import pytest
import torch

WHOLE = {"start_percent": 0.0, "end_percent": 1.0}


class Listener:
    """What nodes use of the server, with a browser at the other end that hears everything."""

    def __init__(self, client: str | None = "browser", workflow: str | None = "graph") -> None:
        self.client_id, self.heard = client, []
        extra = {"extra_pnginfo": {"workflow": {"id": workflow}}} if workflow else {}
        queue = [(0, "prompt", {}, extra, [])], []
        self.prompt_queue = SimpleNamespace(get_current_queue_volatile=lambda: queue)

    def send_sync(self, event: str, data: dict, client: str) -> None:
        assert (event, client) == ("sdg.curve", self.client_id)
        self.heard.append(json.loads(json.dumps(data, allow_nan=False)))


@pytest.fixture
def listen(pack, monkeypatch):
    """listen(**settings) -> a Listener that Guided KSampler and Apply Guidance, as node 7, speak to from now on."""

    def start(**settings):
        listener = Listener(**settings)
        monkeypatch.setattr(pack.live, "prompt_server", lambda: listener)
        monkeypatch.setattr(pack.live, "curves", pack.live.Curves())
        for node in ("SDGGuidedKSampler", "SDGApplyGuidance"):
            monkeypatch.setattr(pack.nodes[node], "hidden", SimpleNamespace(unique_id="7"), raising=False)
        return listener

    return start


@pytest.fixture(scope="module")
def guidance(run, noisy_clip):
    """Text throughout, style in the second half of the run."""
    text = run("SDGTextGuidance", noisy_clip=noisy_clip, text="a red hat", scale=150.0, **WHOLE)
    image = torch.rand(1, 16, 16, 3, generator=torch.Generator().manual_seed(0))
    half = {"start_percent": 0.5, "end_percent": 1.0}
    style = run("SDGStyleGuidance", noisy_clip=noisy_clip, image=image, scale=90.0, layers="5", centred=False, **half)
    return run("SDGCombineGuidance", guidance_1=text, guidance_2=style)


@pytest.fixture(scope="module")
def sample(run, adm):
    """sample(guidance, ...) -> the LATENT of Guided KSampler."""

    def execute(guidance=None, **others):
        inputs = {
            "model": adm, "seed": 7, "steps": 6, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal",
            "latent_image": {"samples": torch.zeros(2, 3, 16, 16)}, "denoise": 1.0, "strength": "absolute",
            "cap": 0.2, "guidance": guidance,
        }  # fmt: skip
        return run("SDGGuidedKSampler", **inputs | others)

    return execute


def whole(heard: list[dict]) -> list[list]:
    """The points of one run's messages, in their places."""
    points: list[list] = []
    for message in heard:
        points[message["start"] :] = message["points"]
    return points


def report_of(pack, latent: dict) -> dict:
    with torch.inference_mode():
        return json.loads(pack.nodes["SDGGuidanceReport"].execute(latent=latent).args[3])


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m_sde"])
def test_what_is_told_is_what_the_report_says(pack, listen, sample, guidance, sampler):
    listener = listen()
    said = report_of(pack, sample(guidance, sampler_name=sampler))
    points = whole(listener.heard)
    assert [point[1] for point in points] == said["pull"]["mean"]
    assert [point[2] for point in points] == said["capped"]["mean"]
    for k, part in enumerate(said["guidances"]):
        assert [point[3 + k] for point in points] == part["score"]["mean"]
    assert points[0][4] is None
    assert points[-1][4] is not None
    assert listener.heard[-1]["lines"] == [part["name"] for part in said["guidances"]]
    assert [message["done"] for message in listener.heard[-2:]] == [False, True]


def test_steps_are_those_of_the_sampler(listen, sample, guidance):
    listener = listen()
    sample(guidance)
    assert [point[0] for point in whole(listener.heard)] == list(range(6))
    assert listener.heard[-1]["steps"] == 6
    listener = listen()
    sample(guidance, sampler_name="dpm_2")
    steps = [point[0] for point in whole(listener.heard)]
    assert steps[::2] == list(range(6))
    assert all(a < b < a + 1 for a, b in zip(steps[::2], steps[1::2], strict=False))


def test_the_picture_is_the_same_bit_for_bit_with_a_browser_without_and_without_a_server(listen, sample, guidance):
    alone = sample(guidance)["samples"]
    for settings in ({}, {"client": None}, {"client": None, "workflow": None}):
        listen(**settings)
        assert torch.equal(sample(guidance)["samples"], alone)


def test_what_a_budget_chose_is_said_at_the_end(listen, run, sample, guidance):
    listener = listen()
    sample(guidance)
    assert listener.heard[-1]["remark"] is None
    listener = listen()
    sample(run("SDGGuidanceBudget", guidance=guidance, percent=1.0), steps=8)
    assert [message["remark"] for message in listener.heard[:-1]] == [None] * (len(listener.heard) - 1)
    remark = listener.heard[-1]["remark"]
    assert remark["name"] == "budget 1 %"
    assert remark["value"].startswith("one every")
    assert "a gradient costs" in remark["title"].lower()


def test_without_a_browser_nothing_is_sent_and_all_is_kept(pack, listen, sample, guidance):
    listener = listen(client=None)
    sample(guidance)
    assert not listener.heard
    (kept,) = pack.live.curves.of("graph")
    assert len(kept["points"]) == 6
    assert kept["done"]
    assert not pack.live.curves.of("another graph")


def test_apply_guidance_tells_of_every_run_of_its_model_under_its_own_number(pack, comfy, listen, run, adm, guidance):
    listener = listen()
    model = run("SDGApplyGuidance", model=adm, guidance=guidance, strength="absolute", cap=1.0)
    for _ in range(2):
        with torch.inference_mode():
            latent = {"samples": torch.zeros(1, 3, 16, 16)}
            comfy.nodes.common_ksampler(model, 0, 3, 1.0, "euler", "normal", [[None, {}]], [[None, {}]], latent)
    runs = {message["run"] for message in listener.heard}
    assert len(runs) == 2
    assert {message["node"] for message in listener.heard} == {"7"}
    assert pack.live.curves.of("graph")[0]["run"] == listener.heard[-1]["run"]


def test_a_run_without_guidance_clears_the_curve(pack, listen, sample, guidance):
    listener = listen()
    sample(guidance)
    sample(None)
    assert listener.heard[-1]["points"] == []
    assert listener.heard[-1]["done"]
    assert len(pack.live.curves.of("graph")) == 1


def test_a_cancelled_run_tells_its_last_point(pack, comfy, listen, sample, guidance, monkeypatch):
    listener, shift, calls = listen(), pack.seam.guidance_shift, []

    def cancelled(*inputs):
        calls.append(1)
        if len(calls) == 4:
            raise comfy.model_management.InterruptProcessingException
        return shift(*inputs)

    monkeypatch.setattr(pack.seam, "guidance_shift", cancelled)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(guidance)
    assert listener.heard[-1]["done"]
    assert [point[0] for point in whole(listener.heard)] == [0, 1, 2]


@pytest.fixture
def previewed(comfy, monkeypatch):
    """previewed(then) -> a list of what the host's preview is given, x_0 by step; ``then(step)`` comes after each."""
    preview = importlib.import_module("latent_preview")

    def start(then=lambda step: None):
        seen: list[torch.Tensor] = []

        def callback(step, x0, x, steps):
            seen.append(x0.clone())
            then(step)

        monkeypatch.setattr(preview, "prepare_callback", lambda *inputs, **others: callback)
        return seen

    return start


def test_the_preview_is_of_the_guided_estimate(listen, sample, guidance, previewed):
    listener = listen()
    seen = previewed()
    guided = sample(guidance)["samples"]
    assert torch.allclose(seen[-1], guided, atol=1e-5)  # euler ends at the estimate
    assert whole(listener.heard)[0][1] > 0
    alone = previewed()
    sample(None)
    assert not torch.allclose(seen[0], alone[0], atol=1e-5)


def test_a_cancelled_run_does_no_further_step(comfy, listen, sample, guidance, previewed):
    listener, mm = listen(), comfy.model_management
    previewed(lambda step: mm.interrupt_current_processing() if step == 2 else None)
    with pytest.raises(mm.InterruptProcessingException):
        sample(guidance)
    assert [point[0] for point in whole(listener.heard)] == [0, 1, 2]


@pytest.fixture
def drawing(pack, listen):
    """A drawing of a loss, and what is heard of it."""
    listener = listen()
    node = pack.live.NodeCurve(SimpleNamespace(unique_id="7"))
    return node.begin(pack.live.Heading("loss", ("loss",), 10**6)), listener


def test_at_most_ten_messages_a_second_and_the_last_point_always(pack, drawing, monkeypatch):
    (drawn, listener), now = drawing, [0.0]
    monkeypatch.setattr(pack.live.time, "monotonic", lambda: now[0])
    drawn.next = 0.0
    for step in range(1000):
        now[0] += 0.003
        drawn.add(lambda step=step: (step, None, None, 1 / (step + 1)))
    drawn.end()
    assert len(listener.heard) <= 3 / 0.1 + 3
    assert whole(listener.heard)[-1] == [999, None, None, 0.001]


def test_points_are_computed_only_when_they_are_sent(drawing):
    drawn, _ = drawing
    computed = []
    for step in range(50):
        drawn.add(lambda step=step: computed.append(step) or (step, None, None, 0.0))
    assert len(computed) <= 1
    drawn.end()
    assert computed == list(range(50))


def test_a_long_run_keeps_a_bounded_number_of_points_from_first_to_last(pack, drawing):
    drawn, listener = drawing
    for step in range(20_000):
        drawn.add(lambda step=step: (step, None, None, float("nan") if step % 2 else 1.0))
        if step % 500 == 0:
            drawn.flush()
    drawn.end()
    (kept,) = pack.live.curves.of("graph")
    steps = [point[0] for point in kept["points"]]
    assert len(steps) <= pack.live.POINTS_KEPT + 1
    assert (steps[0], steps[-1]) == (0, 19_999)
    assert len({b - a for a, b in itertools.pairwise(steps[:-1])}) == 1
    assert whole(listener.heard) == [list(point) for point in kept["points"]]


def test_curves_of_many_nodes_are_bounded_the_oldest_go(pack):
    curves = pack.live.Curves()
    for number in range(pack.live.CURVES_KEPT + 5):
        curves.keep(pack.live.Curve(pack.live.Heading("guidance"), str(number), "graph"))
    nodes = [curve["node"] for curve in curves.of("graph")]
    assert nodes == [str(number) for number in range(5, pack.live.CURVES_KEPT + 5)]


def test_a_noisy_clips_file_says_what_it_is_for(pack, models_folder):
    about = pack.routes.about_noisy_clip(models_folder / "noisy_clip/latent.safetensors")
    assert about == {"view": "linear:made up", "size": 16, "text": True, "retrieval": []}
    bundled = pack.routes.about_noisy_clip(pack.files.BUNDLED / "latent/noisy_clip.safetensors")
    assert [len(row) for row in bundled["retrieval"]] == [3] * len(bundled["retrieval"])
    assert pack.routes.about_noisy_clip(models_folder / "noisy_clip/some.pt") == {"published": True}
    with pytest.raises(ValueError, match="does not hold a noisy CLIP"):
        pack.routes.about_noisy_clip(models_folder / "adm/random.safetensors")
