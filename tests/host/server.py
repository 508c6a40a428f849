"""A real ComfyUI server with this pack installed, spoken to over HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACK = ["__init__.py", "nodes", "sdg_core", "web", "locales", "example_workflows", "pyproject.toml"]
NOTES = ("Note", "MarkdownNote")
VALUES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}


def install(base: Path) -> Path:
    """A copy of the pack in a new base directory of ComfyUI; gives the copy's folder."""
    for folder in ("models", "input", "output", "temp", "user", "custom_nodes"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    pack = base / "custom_nodes/semantic-diffusion-guidance"
    for name in PACK:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        pack.mkdir(exist_ok=True)
        copy(ROOT / name, pack / name)
    return pack


class Server:
    """One running server. ``run`` queues an API prompt and waits for its history entry."""

    def __init__(self, port: int, base: Path) -> None:
        self.url, self.base = f"http://127.0.0.1:{port}", base

    def get(self, path: str) -> dict:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return json.loads(answer.read())

    def queue(self, prompt: dict, metadata: dict | None = None) -> dict:
        """The server's answer: a prompt_id, or the errors of validation. ``metadata``: what saved pictures hold."""
        more = {} if metadata is None else {"extra_data": {"extra_pnginfo": metadata}}
        data = json.dumps({"prompt": prompt, **more}).encode()
        request = urllib.request.Request(self.url + "/prompt", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return json.loads(error.read())

    def run(self, prompt: dict, timeout: float = 3600, metadata: dict | None = None) -> dict:
        answer = self.queue(prompt, metadata)
        if "prompt_id" not in answer:
            raise RuntimeError(f"The prompt was rejected: {json.dumps(answer)}")
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            history = self.get(f"/history/{answer['prompt_id']}")
            if answer["prompt_id"] in history:
                return history[answer["prompt_id"]]
            time.sleep(0.2)
        raise TimeoutError(f"The prompt took longer than {timeout:.0f} s.")

    def pictures(self, entry: dict) -> list[bytes]:
        """The saved (not the merely previewed) pictures of a finished prompt, as files."""
        images = [i for output in entry["outputs"].values() for i in output.get("images", []) if i["type"] == "output"]
        paths = [f"/view?{urllib.parse.urlencode(image)}" for image in images]
        return [urllib.request.urlopen(self.url + path, timeout=60).read() for path in paths]


@contextlib.contextmanager
def serve(host: Path, base: Path, patience: float = 180, arguments: Sequence[str] = ()) -> Iterator[Server]:
    """Boots the ComfyUI at ``host`` on a free port, on the CPU, with more ``arguments``; always ends it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "main.py", "--cpu", "--port", str(port), "--base-directory", str(base)]
    command += ["--disable-auto-launch", "--disable-api-nodes", "--database-url", "sqlite:///:memory:", *arguments]
    log = base / "server.log"
    with log.open("w") as out:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, cwd=host, stdout=out, stderr=subprocess.STDOUT, env=environment)
        try:
            server = Server(port, base)
            _wait(server, process, log, patience)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(server: Server, process: subprocess.Popen, log: Path, patience: float) -> None:
    end = time.monotonic() + patience
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"ComfyUI ended at start:\n{log.read_text()[-3000:]}")
        try:
            server.get("/queue")
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise TimeoutError(f"ComfyUI did not answer within {patience:.0f} s:\n{log.read_text()[-3000:]}")


def to_prompt(workflow: dict, object_info: dict) -> dict:
    """The frontend's graph as the server's prompt: widget values by name, links as [node id, slot].

    Values stand in the order of the schema; a seed is followed by what to do with it after a run, an uploaded picture
    by its button. Inputs newer than the workflow get their defaults. Notes are left out.
    """
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in NOTES or node["mode"] != 0:
            continue
        info = object_info[node["type"]]
        inputs = _widget_inputs(info, node["widgets_values"])
        inputs |= {i["name"]: links[i["link"]] for i in node["inputs"] if i["link"] is not None}
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def models_of(node: dict) -> list[dict]:
    """The published files that a loader of a workflow needs: name, url and directory of each."""
    return node["properties"].get("models", [])


def needs_download(workflow: dict) -> bool:
    return any(models_of(node) for node in workflow["nodes"])


def _widget_inputs(info: dict, values: list) -> dict:
    inputs, rest = {}, list(values)
    for part in ("required", "optional"):
        for name in info["input_order"].get(part, []):
            kind, *options = info["input"][part][name]
            options = options[0] if options else {}
            if not (isinstance(kind, list) or kind in VALUES) or options.get("forceInput"):
                continue
            inputs[name] = rest.pop(0) if rest else options["default"]
            if options.get("control_after_generate") or options.get("image_upload"):
                rest.pop(0)
    if rest:
        raise ValueError(f"Widget values left over: {rest}.")
    return inputs
