"""GET /odd/report: what the host's process holds. Garbage is collected and free memory is given back first.

malloc keeps freed pages for later; without malloc_trim its high-water mark would pass for growth.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import threading
from collections import Counter

import comfy.model_management as mm
import comfy.model_patcher
import psutil
import torch
from aiohttp import web
from server import PromptServer
from torch import nn

KEY = "sdg"
WATCHED = ("GuidanceRun", "CleanCLIP", "NoisyCLIP", "ADM", "HostGuidance", "Finetuning", "HostAutoencoder")


def add_routes() -> None:
    @PromptServer.instance.routes.get("/odd/report")
    async def report(request: web.Request) -> web.Response:
        return web.json_response(figures())


def figures() -> dict:
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)
    process = psutil.Process()
    return {
        "rss": process.memory_info().rss,
        "heap": heap(),
        "threads": process.num_threads(),
        "thread_names": sorted(thread.name for thread in threading.enumerate()),
        "handles": process.num_fds(),
        "handle_names": open_handles(),
        **models(),
        **hooks(),
    }


MALLINFO = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class MallInfo(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = [(name, ctypes.c_size_t) for name in MALLINFO]


def heap() -> int:
    """Bytes that the process has allocated and not freed, 0 where the C library does not tell.

    What a process holds of the system is more: pages stay where a single small thing on them does.
    """
    ask = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if ask is None:
        return 0
    ask.restype = MallInfo
    found = ask()
    return found.uordblks + found.hblkhd


def open_handles() -> list[str]:
    """Where the process's file descriptors lead. Sockets of those who ask come and go, so they count as one kind."""
    found = []
    for handle in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{handle}").split(":[")[0])
    return sorted(found)


def models() -> dict:
    """Live patchers, and what guidance and the host have put on them and left there.

    Types are compared, because ``isinstance`` asks an object's ``__class__``, and lazy imports answer by importing.
    """
    objects = gc.get_objects()
    patchers = [o for o in objects if issubclass(type(o), comfy.model_patcher.ModelPatcher)]
    names = Counter(type(o).__name__ for o in objects)
    return {
        "loaded": len(mm.current_loaded_models),
        "patchers": len(patchers),
        "wrapped": sum(any(KEY in kinds for kinds in p.wrappers.values()) for p in patchers),
        "additional": sum(bool(p.get_additional_models_with_key(KEY)) for p in patchers),
        "patches": sum(len(p.patches) + len(p.backup) + len(p.object_patches_backup) for p in patchers),
        "alive": {name: names[name] for name in WATCHED},
        "objects": len(objects),
        "tensors": sum(issubclass(type(o), torch.Tensor) for o in objects),
    }


def hooks() -> dict:
    """Forward and backward hooks of all modules, and of torch itself."""
    modules = [o for o in gc.get_objects() if issubclass(type(o), nn.Module)]
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    of_all = nn.modules.module
    own = sum(len(getattr(of_all, f"_global{name}", ())) for name in tables)
    return {"hooks": own + sum(len(getattr(module, name, ())) for module in modules for name in tables)}
