"""Makes the encoders of the pack run out of memory: POST /odd/memory {"after": calls that succeed, "times": that fail}.

A hook of torch on all modules sees the calls, so nothing of the pack is patched. It goes once it has done its work, or
by ``times`` 0.
"""

from __future__ import annotations

import comfy.model_management as mm
import torch
from aiohttp import web
from server import PromptServer
from torch import nn

ENCODERS = ("CleanCLIP", "NoisyCLIP")


class Shortage:
    """What is left to do, and the hook while there is something."""

    def __init__(self) -> None:
        self.after, self.times, self.hit, self.hook = 0, 0, 0, None

    def begin(self, after: int, times: int) -> None:
        self.end()
        self.after, self.times, self.hit = after, times, 0
        if times:
            self.hook = nn.modules.module.register_module_forward_pre_hook(self.before)

    def end(self) -> None:
        if self.hook is not None:
            self.hook.remove()
            self.hook = None

    def before(self, module: nn.Module, args: tuple) -> None:
        if type(module).__name__ not in ENCODERS or any(isinstance(a, torch.Tensor) and a.is_meta for a in args):
            return
        if self.after > 0:
            self.after -= 1
            return
        self.times -= 1
        self.hit += 1
        if self.times <= 0:
            self.end()
        raise mm.OOM_EXCEPTION("Injected by the test: out of memory.")


SHORTAGE = Shortage()


def add_routes() -> None:
    @PromptServer.instance.routes.post("/odd/memory")
    async def begin(request: web.Request) -> web.Response:
        asked = await request.json()
        SHORTAGE.begin(asked.get("after", 0), asked["times"])
        return web.json_response({})

    @PromptServer.instance.routes.get("/odd/memory")
    async def hits(request: web.Request) -> web.Response:
        return web.json_response({"hit": SHORTAGE.hit, "armed": SHORTAGE.hook is not None})
