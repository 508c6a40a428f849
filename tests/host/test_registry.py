"""The registry's package: made of the files that `comfy node pack` takes; in a clean host it starts and draws."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MOST_BYTES = 40_000_000
TEMPLATES = ["text", "style_and_structure", "xy"]

spec = importlib.util.spec_from_file_location("sdg_registry_server", Path(__file__).with_name("server.py"))
tools = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = tools
spec.loader.exec_module(tools)


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """A zip of what git knows, without what .comfyignore names."""
    pathspec = pytest.importorskip("pathspec")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("Not a git repository, so what the package takes from it can't be listed.")
    ignored = pathspec.PathSpec.from_lines("gitwildmatch", (ROOT / ".comfyignore").read_text().splitlines())
    path = tmp_path_factory.mktemp("package") / "node.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as package:
        for name in listed.stdout.splitlines():
            if not ignored.match_file(name) and (ROOT / name).is_file():
                package.write(ROOT / name, name)
    return path


@pytest.fixture(scope="module")
def server(comfyui_path, package, tmp_path_factory):
    """A host with nothing but the package, under the name that the registry gives its folder."""
    base = tmp_path_factory.mktemp("base")
    for name in ("models", "input", "output", "temp", "user"):
        (base / name).mkdir()
    with zipfile.ZipFile(package) as files:
        files.extractall(base / "custom_nodes/semantic-diffusion-guidance")
    with tools.serve(comfyui_path, base) as server:
        yield server


def test_the_package_is_small_enough(package):
    with zipfile.ZipFile(package) as files:
        whole = sum(info.file_size for info in files.infolist())
    print(f"The registry's package: {package.stat().st_size / 1e6:.1f} MB, {whole / 1e6:.1f} MB unpacked.")
    assert package.stat().st_size <= MOST_BYTES
    assert whole <= MOST_BYTES


def test_every_node_is_there_and_no_widget_offers_what_is_not(server):
    info = server.get("/object_info")
    wanted = json.loads((ROOT / "locales/en/nodeDefs.json").read_text(encoding="utf-8"))
    assert {name for name in info if name.startswith("SDG")} == set(wanted)
    assert "avatars (bundled)" not in info["SDGLoadADM"]["input"]["required"]["adm_name"][1]["options"]


def test_its_templates_are_offered_and_draw(server):
    info, offered = server.get("/object_info"), server.get("/workflow_templates")["semantic-diffusion-guidance"]
    packed = server.base / "custom_nodes/semantic-diffusion-guidance/example_workflows"
    assert sorted(offered) == sorted(path.stem for path in packed.glob("*.json"))
    for name in TEMPLATES:
        entry = server.run(tools.to_prompt(json.loads((packed / f"{name}.json").read_text()), info))
        assert entry["status"]["status_str"] == "success", entry["status"]
        assert server.pictures(entry)
