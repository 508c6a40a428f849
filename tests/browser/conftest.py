"""A real ComfyUI with this pack, and a headless Chromium that drives its frontend: the newest, and an older one."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
PLACE = Path.home() / "comfy"
SCREENSHOTS = Path(__file__).parent / "screenshots"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 60_000
"""Milliseconds that anything on a page may take: the machine may be busy."""
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False, "Comfy.Workflow.Persist": True}
RENDERERS = {"classic": False, "nodes2": True}
"""The frontend's two ways to draw nodes: on a canvas, and as elements (Nodes 2.0)."""


def load_tools() -> ModuleType:
    """tests/host/server.py."""
    spec = importlib.util.spec_from_file_location("sdg_test_server_browser", ROOT / "tests/host/server.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


tools = load_tools()


def newest() -> tuple[Path, list[str]]:
    """The host of this run with its own frontend."""
    host = Path(os.environ.get("COMFYUI_PATH") or PLACE / "ComfyUI")
    if not (host / "main.py").is_file():
        pytest.skip(f"No ComfyUI at {host}. Install one there, or set COMFYUI_PATH to its folder, to run these tests.")
    return host, []


def older() -> tuple[Path, list[str]]:
    """The older host with the frontend that it asks for, which can't be in one environment with the newest."""
    host = Path(os.environ.get("COMFYUI_PATH_OLD") or PLACE / "ComfyUI-0.8")
    if not (host / "main.py").is_file():
        pytest.skip(f"No older ComfyUI at {host}. Set COMFYUI_PATH_OLD to the folder of one.")
    static = Path(f"{host}-frontend/comfyui_frontend_package/static")
    if not static.is_dir():
        wanted = next(line for line in (host / "requirements.txt").read_text().split() if "frontend-package" in line)
        pytest.skip(f"No frontend for it: `pip install --no-deps --target {host}-frontend {wanted}` brings one.")
    return host, ["--front-end-root", str(static)]


FRONTENDS: dict[str, Callable[[], tuple[Path, list[str]]]] = {"newest": newest, "older": older}


@pytest.fixture(scope="session")
def serve(chromium, tmp_path_factory) -> Iterator[Callable]:
    """serve(name) -> a server of that frontend, one at a time; skips where it is not at hand."""
    running = contextlib.ExitStack()

    @functools.lru_cache(maxsize=1)
    def start(name: str):
        running.close()
        host, arguments = FRONTENDS[name]()
        base = tmp_path_factory.mktemp("base")
        tools.install(base)
        return running.enter_context(tools.serve(host, base, arguments=arguments))

    with running:
        yield start


@pytest.fixture(scope="session")
def chromium() -> Iterator:
    """The browser; skips with a word where it, or what drives it, is not at hand."""
    sync = pytest.importorskip("playwright.sync_api", reason="Playwright is not here: `pip install playwright`.")
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("No Chromium is here: install one to run these tests.")
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, headless=True, args=FLAGS)
        yield browser
        browser.close()


class Frontend:
    """An open page of the frontend. Nodes are named by their class; where there are several, the last one is meant."""

    def __init__(self, page, server, name: str) -> None:
        self.page, self.server, self.name = page, server, name
        self.errors: list[str] = []
        page.add_init_script(path=Path(__file__).with_name("page.js"))
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def open(self) -> None:
        """Loads the page, or loads it again, until its graph and our part of it are there."""
        self.page.goto(self.server.url)
        self.page.wait_for_function(
            "window.app?.extensionManager && window.app.canvas?.graph"
            " && window.app.extensions.some(one => one.name === 'sdg.nodes')"
        )
        self.page.wait_for_timeout(500)

    def clear(self) -> None:
        """An empty canvas at full size."""
        self.page.evaluate("app.graph.clear()")
        self.look_at(0, 0, 1.0)

    def look_at(self, x: float, y: float, scale: float) -> None:
        """Puts a place of the graph into the top left corner."""
        self.ask("lookAt", x, y, scale)
        self.page.wait_for_timeout(300)

    def look_at_node(self, kind: str, scale: float = 1.0) -> None:
        x, y = self.of(kind, "[...node.pos]")
        self.look_at(x - 120 / scale, y - 110 / scale, scale)

    def ask(self, name: str, *arguments):
        """One of the functions of page.js."""
        return self.page.evaluate("([name, values]) => sdg[name](...values)", [name, list(arguments)])

    def of(self, kind: str, expression: str):
        """An expression about ``node``, of the page's JavaScript."""
        return self.page.evaluate(f"kind => {{ const node = sdg.node(kind); return {expression}; }}", kind)

    def place(self, words: str, x: float, y: float) -> None:
        """Double-clicks the canvas, searches, and puts the first node found there."""
        self._choose(words, x, y)
        self.page.mouse.move(x, y)
        self.page.wait_for_timeout(200)
        self.page.mouse.click(x, y)  # newer frontends hold the node at the pointer until then
        self.page.wait_for_timeout(200)

    def _choose(self, words: str, x: float, y: float) -> None:
        """A new node by the search; again where Enter came before its list was ready, as on a busy machine."""
        before = self.page.evaluate("app.graph.nodes.length")
        for _ in range(5):
            self._search(x, y)
            self.page.keyboard.type(words)
            self.page.get_by_text(f"{words} (SDG)").first.wait_for()
            self.page.keyboard.press("Enter")
            for _ in range(50):
                self.page.wait_for_timeout(100)
                if self.page.evaluate("app.graph.nodes.length") > before:
                    return
            self.page.keyboard.press("Escape")
        raise TimeoutError(f"The search for {words} gave no node.")

    def _search(self, x: float, y: float) -> None:
        """Opens the search by a double-click; again where the page was not ready for it."""
        for _ in range(10):
            self.page.mouse.dblclick(x, y)
            for _ in range(20):
                self.page.wait_for_timeout(100)
                if self.page.evaluate("document.activeElement?.matches('input[role=combobox]')"):
                    return
            self.page.keyboard.press("Escape")
        raise TimeoutError("The search for nodes did not open.")

    def wire(self, source: str, output: str, target: str, socket: str) -> None:
        """Drags a link from an output to an input."""
        start, end = self.ask("slot", source, output, False), self.ask("slot", target, socket, True)
        self.page.mouse.move(*start)
        self.page.mouse.down()
        self.page.mouse.move(*[(a + b) / 2 for a, b in zip(start, end, strict=True)], steps=3)
        self.page.mouse.move(*end, steps=5)
        self.page.wait_for_timeout(100)
        self.page.mouse.up()
        self.page.wait_for_timeout(200)

    def chart(self, kind: str, number: int = -1) -> dict:
        """What a node's chart shows: its words, the rows of its legend, and how many points its first line has."""
        return self.ask("chart", kind, number)

    def wait_for_chart(self, kind: str, condition: str, number: int = -1) -> dict:
        """Waits until a condition about ``chart`` (see ``chart``) and its ``title`` holds."""
        known = "const chart = sdg.chart(kind, number), title = chart?.rows[0]?.[1] ?? '';"
        script = f"([kind, number]) => {{ {known} return chart && ({condition}); }}"
        self.page.wait_for_function(script, arg=[kind, number])
        return self.chart(kind, number)

    def wait_until_idle(self) -> None:
        """Until the server has nothing to run: after its sampler a prompt decodes and saves."""
        while any(self.server.get("/queue").values()):
            self.page.wait_for_timeout(200)

    def shoot(self, what: str) -> None:
        """A screenshot: tests/browser/screenshots/<what>-<frontend>-<renderer>.png."""
        SCREENSHOTS.mkdir(exist_ok=True)
        self.page.screenshot(path=SCREENSHOTS / f"{what}-{self.name}.png")


CASES = [f"{frontend}-{renderer}" for frontend in FRONTENDS for renderer in RENDERERS]


@pytest.fixture(scope="session", params=CASES)
def frontend(request, serve, chromium) -> Iterator[Frontend]:
    """An open page of each frontend in each renderer, the same for all tests: opening one takes long."""
    name, renderer = request.param.split("-")
    server, page = serve(name), chromium.new_page(viewport={"width": 1500, "height": 950})
    page.set_default_timeout(PATIENCE)
    theme = "light" if (name == "newest") == (renderer == "nodes2") else "dark"
    settings = {**SETTINGS, "Comfy.VueNodes.Enabled": RENDERERS[renderer], "Comfy.ColorPalette": theme}
    for setting, value in settings.items():
        page.request.post(f"{server.url}/settings/{setting}", data=json.dumps(value))
    frontend = Frontend(page, server, f"{request.param}-{theme}")
    frontend.open()
    yield frontend
    page.close()
    # What our code or the frontend's threw on the way.
    assert not frontend.errors, frontend.errors
