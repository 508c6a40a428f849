"""A real host is posted mutated workflows, odd values and made-up graphs: it answers, lives on, and says what is wrong.

``make fuzz`` runs all cases and prints how many of which kind ended how; ``make test`` runs the first of them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="The odd nodes read /proc and limit memory by it.")

SEEDS = {1: 400, 2: 400, 3: 400}
"""Cases by Hypothesis' seed."""
FEW, FEWER = {4: 150}, {4: 60}
"""In every test run: on the newest host, and on older ones."""
NEWEST = (0, 33)
BATCH = 12


def sibling(name: str) -> ModuleType:
    """A module that lies beside this one."""
    full = f"sdg_test_{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, Path(__file__).with_name(f"{name}.py"))
        sys.modules[full] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[full])
    return sys.modules[full]


bases, fuzz, oracle = sibling("fuzz_bases"), sibling("fuzz_cases"), sibling("fuzz_oracle")


@pytest.fixture(scope="module")
def client(comfyui_path, tmp_path_factory) -> Iterator:
    with bases.serve_odd(comfyui_path, tmp_path_factory.mktemp("fuzz")) as server:
        yield oracle.Client(server.url, server.base / "server.log")


@pytest.fixture(scope="module")
def world(client):
    return bases.world(client.get("/object_info"))


def drawn(world, seeds: dict[int, int]) -> list:
    """Cases by seed, all different, and the same in every run."""
    found: dict[bytes, object] = {}
    for number, count in seeds.items():
        draw_some(world, number, count, found)
    return list(found.values())


def draw_some(world, number: int, count: int, found: dict[bytes, object]) -> None:
    """Adds ``count`` cases of a seed. Hypothesis only draws, and repeats itself now and then; batches are judged later,
    and it does not know of them."""
    wanted = len(found) + count

    @seed(number)
    @settings(
        max_examples=3 * count, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(fuzz.cases(world))
    def draw(case) -> None:
        if len(found) < wanted:
            found.setdefault(case.body, case)

    draw()


def run_all(client, cases: list):
    """Quick cases in batches, those that may take long one by one."""
    tally = oracle.Tally()
    quick = [case for case in cases if not case.slow]
    batches = [quick[at : at + BATCH] for at in range(0, len(quick), BATCH)]
    for batch in [*batches, *([case] for case in cases if case.slow)]:
        oracle.run_cases(client, batch, tally)
    assert client.get("/queue") == {"queue_running": [], "queue_pending": []}
    return tally


def test_a_failed_request_is_told_from_a_prompt_that_fails_meanwhile():
    log = """Traceback (most recent call last):
  File "/a/semantic-diffusion-guidance/nodes/loaders.py", line 61, in execute
ValueError: of a prompt
[ERROR] Error handling request from 127.0.0.1
Traceback (most recent call last):
  File "/comfy/server.py", line 1, in post_prompt
    json_data = await request.json()
TypeError: of the request
  File "/a/semantic-diffusion-guidance/nodes/loaders.py", line 61, in execute
"""
    assert oracle.request_traceback(log) == [("/comfy/server.py", "post_prompt")]
    assert oracle.request_traceback(log[:100]) == []


def test_unmutated_workflows_run(client, world):
    for name, prompt in world.bases.items():
        case = fuzz.made_case("none", name, prompt)
        tally = oracle.Tally()
        oracle.run_cases(client, [case], tally)
        assert tally.counts == {("none", "ran"): 1}, (name, tally.wrong)


def version(client) -> tuple[int, ...]:
    """Of the host, major and minor."""
    return tuple(map(int, client.get("/system_stats")["system"]["comfyui_version"].split(".")[:2]))


def test_a_mutated_workflow_is_answered_and_explained(client, world):
    tally = run_all(client, drawn(world, FEW if version(client) >= NEWEST else FEWER))
    print(tally.table())
    assert not tally.wrong, "\n".join(tally.wrong)


def measure_fuzz(client, world):
    begun = time.monotonic()
    seeds = json.loads(os.environ.get("SDG_FUZZ_SEEDS", "null")) or SEEDS
    tally = run_all(client, drawn(world, {int(k): v for k, v in seeds.items()}))
    print(f"\n{tally.table()}")
    total, kinds = sum(tally.counts.values()), {kind for kind, _ in tally.counts}
    print(f"\n{total} cases of {len(kinds)} kinds, seeds {seeds}, in {time.monotonic() - begun:.0f} s.")
    print(f"{len(tally.wrong)} violations.")
    assert not tally.wrong, "\n".join(tally.wrong)
