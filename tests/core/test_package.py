"""What is declared is what is needed: dependencies, extras, and the list that ComfyUI's Manager installs."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

from sdg_core.commands import main
from sdg_core.training import MissingExtra
from sdg_core.training.extras import extra

ROOT = Path(__file__).parents[2]
MODULES = {"open_clip": "open_clip_torch", "PIL": "pillow"}
"""Names of modules that differ from their library's."""
OF_THE_HOST = {"comfy", "comfy_api", "comfy_execution", "folder_paths", "latent_preview", "nodes", "server", "aiohttp"}


def declared(section: str) -> list[str]:
    """The names in a list of pyproject.toml (Python 3.10 has no tomllib)."""
    block = re.search(rf"^{section} = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert block
    return re.findall(r'"([^"]+)"', block[1])


def imported(folder: str) -> set[str]:
    """Top-level names of all modules from elsewhere that a folder's files import."""
    found = set[str]()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {name.name.split(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - OF_THE_HOST


def test_the_managers_list_is_the_packages_without_pins():
    dependencies = declared("dependencies")
    assert (ROOT / "requirements.txt").read_text().split() == dependencies
    assert all(re.fullmatch(r"[a-z_]+", name) for name in dependencies)


def test_what_is_imported_is_declared_and_nothing_else():
    needed = {MODULES.get(name, name) for name in imported("sdg_core") | imported("nodes")}
    apart = {"accelerate", "timm"}  # of annotations, as ``extra`` imports it; and what open_clip stands on
    assert needed - apart == set(declared("dependencies"))
    assert set(declared("train")) == {"accelerate", "webdataset"}


@pytest.mark.parametrize("name", declared("train"))
def test_what_only_training_needs_is_asked_for_where_it_is_missing(name, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtra, match=f"needs {name}.*pip install accelerate webdataset"):
        extra(name)
    monkeypatch.setattr("sdg_core.commands.bench.run", lambda args: extra(name))
    assert main(["bench"]) == 2
    assert capsys.readouterr().err.startswith(f"sdg: Fine-tuning needs {name}")


def test_errors_that_the_readme_explains_read_as_written():
    said = "".join(path.read_text() for room in ("nodes", "sdg_core") for path in (ROOT / room).rglob("*.py"))
    plain = re.sub(r'"\s*\n\s*f?[\'"]', "", re.sub(r"\{[^{}]*\}", "…", said))  # one string of several, values left out
    quoted = re.findall(r'^\| "(.+?)"', (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(quoted) >= 4
    for words in quoted:
        for part in filter(None, re.split(r"\s*…,?\s*", words)):
            assert part in plain, f"{part!r} of README.md is no error's wording"
