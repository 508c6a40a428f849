"""Makes ``sdg_core`` importable without the repository on sys.path, where its ``nodes`` would hide ComfyUI's."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def load_package(name: str, folder: Path):
    """A package from its folder, under any name, as ComfyUI loads node packs."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


load_package("sdg_core", ROOT / "sdg_core")
