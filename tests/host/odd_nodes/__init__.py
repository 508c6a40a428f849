"""A node pack for the fuzz and soak tests: it hands out what no sane node does, and reports what the process holds.

It also limits the memory of the process, so that a test can ask for a huge picture on a shared machine, and can make
an encoder run out of memory at a chosen call.
"""

from __future__ import annotations

import os
import resource
from pathlib import Path

from . import memory, report, values

SPARE = 2 * 1024**3
"""Bytes that the process may take on top of what it has when it starts."""


def limit_memory() -> None:
    """Allocations beyond the limit fail, as they would where the machine's memory ends."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (now,) = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:")]
    resource.setrlimit(resource.RLIMIT_DATA, (now + SPARE, now + SPARE))


if "SDG_ODD_UNLIMITED" not in os.environ:
    limit_memory()
memory.add_routes()
report.add_routes()

NODE_CLASS_MAPPINGS = values.NODES
