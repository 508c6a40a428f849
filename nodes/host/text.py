"""What a node and the log say about a run."""

from __future__ import annotations

import logging
import sys
from typing import Any

from ...sdg_core.method import GuidanceRun

log = logging.getLogger(__name__)


def prompt_server() -> Any:
    """The host's server; None where its code is used without."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


class NodeText:
    """Words on a running node, as the host's own API nodes show them. ``hidden`` is the node's, with its unique_id."""

    def __init__(self, hidden: object) -> None:
        self.node_id = getattr(hidden, "unique_id", None)

    def say(self, text: str) -> None:
        """Shows the text; nothing where there is no server (the host's code can be used without)."""
        server = prompt_server()
        if server is not None and self.node_id is not None:
            server.send_progress_text(text, self.node_id)


def report(run: GuidanceRun) -> None:
    """One line in the log about a finished run, beside its warnings."""
    run.warn()
    capped = sum(int(step.capped.sum()) for step in run.trace)
    pictures = sum(len(step.capped) for step in run.trace)
    budget = "" if run.budget is None else f" Budget: {run.budget}."
    log.info("Guided %d model evaluations; the cap bound %d of %d shifts.%s", len(run.trace), capped, pictures, budget)
