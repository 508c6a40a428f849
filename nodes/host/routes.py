"""What pages ask the host's server for, under the pack's own name. Nodes work the same where nobody asks."""

from __future__ import annotations

import json
from pathlib import Path

from aiohttp import web
from safetensors import SafetensorError, safe_open

from ...sdg_core.encoders import NoisyCLIPConfig
from .files import model_path
from .live import curves
from .text import prompt_server

PREFIX = "/semantic-diffusion-guidance"


def register_routes() -> None:
    """Adds the routes to the host's server, if there is one. Called before it starts, once."""
    server = prompt_server()
    if server is not None:
        server.routes.get(f"{PREFIX}/curves")(send_curves)
        server.routes.get(f"{PREFIX}/noisy_clip")(send_noisy_clip)


async def send_curves(request: web.Request) -> web.Response:
    """The latest curve of each node of ``?workflow=``, a graph's id; without it, of prompts without a graph."""
    return web.json_response({"curves": curves.of(request.query.get("workflow"))})


async def send_noisy_clip(request: web.Request) -> web.Response:
    """What a file of models/noisy_clip is for, by ``?name=`` as Load Noisy CLIP lists it."""
    try:
        return web.json_response(about_noisy_clip(model_path("noisy_clip", request.query.get("name", ""))))
    except (ValueError, FileNotFoundError) as error:
        return web.json_response({"error": str(error)}, status=404)


def about_noisy_clip(path: Path) -> dict:
    """View, side of its pictures in pixels or latent pixels, and retrieval@1 as rows [t, noisy, clean].

    From the metadata alone. A published file has none, and is for pixels: then only ``published`` is said. Raises
    ValueError for files of another kind.
    """
    if path.suffix != ".safetensors":
        return {"published": True}
    try:
        with safe_open(str(path), framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("sdg", "{}"))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path.name} is not a readable safetensors file ({error}).") from error
    if about.get("kind") != "noisy_clip":
        raise ValueError(f"{path.name} does not hold a noisy CLIP. Choose another file.")
    try:
        has_text = about["config"].pop("has_text")
        config = NoisyCLIPConfig.from_json(about["config"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path.name} does not say what it is for. Choose another file.") from error
    rows = [row[:3] for row in config.retrieval]
    return {"view": config.view, "size": config.noise_size or config.image_size, "text": has_text, "retrieval": rows}
