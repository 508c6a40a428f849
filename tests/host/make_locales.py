"""Writes locales/en/nodeDefs.json: names, descriptions and tooltips of every node, as the host itself gives them.

`python tests/host/make_locales.py [COMFYUI_FOLDER]`

Other languages are written by hand, with the same keys; test_words.py holds them to it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from server import ROOT, install, serve

AFTER = "control_after_generate"
"""The widget that the frontend sets behind a seed, and its name there."""


def node_words(info: dict) -> dict:
    """One node of /object_info -> its entry in nodeDefs.json, in the frontend's format: outputs by their number."""
    words = {"display_name": info["display_name"], "description": info["description"], "inputs": {}, "outputs": {}}
    for part in ("required", "optional"):
        for name in info["input_order"].get(part, []):
            options = info["input"][part][name][1]
            words["inputs"][name] = {"name": name, "tooltip": options["tooltip"]}
            if options.get(AFTER):
                words["inputs"][AFTER] = {"name": AFTER.replace("_", " ")}
    for number, (name, tooltip) in enumerate(zip(info["output_name"], info["output_tooltips"], strict=True)):
        words["outputs"][str(number)] = {"name": name, "tooltip": tooltip}
    return words


def english(object_info: dict) -> dict:
    """/object_info -> nodeDefs.json of this pack's nodes, in the order of their ids."""
    return {name: node_words(object_info[name]) for name in sorted(object_info) if name.startswith("SDG")}


def as_text(words: dict) -> str:
    return json.dumps(words, indent=2, ensure_ascii=False) + "\n"


def main(host: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        install(Path(folder))
        with serve(host, Path(folder)) as server:
            words = english(server.get("/object_info"))
    path = ROOT / "locales/en/nodeDefs.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_text(words), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path.home() / "comfy/ComfyUI")
