"""What the pack costs a host that starts: processor time to import it and ask for its nodes, and what it pulls in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEAVY = {"open_clip", "timm", "torchvision.models", "accelerate", "matplotlib", "webdataset"}
SECONDS = 0.5

SCRIPT = """
import asyncio, importlib.util, json, sys, time
sys.path.insert(0, sys.argv[1])
import comfy.cli_args
comfy.cli_args.args.cpu = True
import nodes, latent_preview, comfy.sample
from comfy_api.latest import io
before, start = set(sys.modules), time.process_time()
path = sys.argv[2]
spec = importlib.util.spec_from_file_location("pack", path + "/__init__.py", submodule_search_locations=[path])
pack = importlib.util.module_from_spec(spec)
sys.modules["pack"] = pack
spec.loader.exec_module(pack)
found = asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())
for node in found:
    node.GET_SCHEMA()
seconds = time.process_time() - start
print(json.dumps({"seconds": seconds, "nodes": len(found), "new": sorted(set(sys.modules) - before)}))
"""


def test_the_pack_starts_in_half_a_second_and_leaves_heavy_packages_for_later(comfyui_path, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(comfyui_path), str(ROOT)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    print(f"{seen['nodes']} nodes in {seen['seconds']:.2f} s")
    assert seen["nodes"] > 10
    assert not HEAVY & set(seen["new"])
    assert seen["seconds"] <= SECONDS
