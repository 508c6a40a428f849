"""How word of a guided run gets to the node that shows it, and into saved pictures.

The report travels in the sampled LATENT, under a key of its own. That way the host's cache keeps the two together, no
state outlives a run in a MODEL, and the report's node waits for the sampler. Nodes of the host copy a LATENT with all
its keys, so the report names the tensor that it is about: after another sampler or an upscale it is about another, and
is refused rather than shown as that one's. A MODEL of Apply Guidance has no LATENT to put it in: its runs have none.

Pictures: the host gives all nodes of a prompt one ``extra_pnginfo``, which its Save Image writes out. What is put there
before that node runs is in its file; a prompt posted without any has none.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from torch import Tensor

from ...sdg_core.method import GuidanceReport
from ..inputs import shown
from .seam import Watch

KEY = "sdg_report"
"""Of a LATENT, and of a picture's metadata."""


@dataclass(frozen=True, eq=False)
class Carried:
    """A report, and the very tensor that its run gave."""

    report: GuidanceReport
    samples: Tensor


def with_report(latent: dict, watch: Watch) -> dict:
    """A LATENT with the report of the run that made it, the last one to end; without a run, of no guidance."""
    report = GuidanceReport.of(watch.finished[-1]) if watch.finished else GuidanceReport()
    return {**latent, KEY: Carried(report, latent["samples"])}


def report_of(latent: object) -> GuidanceReport:
    """The report of the run that made a LATENT. Raises ValueError where there is none, or one about another."""
    carried = latent.get(KEY) if isinstance(latent, dict) else None
    if not isinstance(latent, dict) or not isinstance(carried, Carried):
        got = "a LATENT without a report" if isinstance(latent, dict) else shown(latent)
        raise ValueError(
            f"The input latent got {got}; wanted one as Guided KSampler (SDG) gives it. Connect its output: other "
            "samplers report nothing."
        )
    if carried.samples is not latent.get("samples"):
        raise ValueError(
            "Got a LATENT that another node changed after its guided run; wanted it as Guided KSampler (SDG) gave it, "
            "because its report is about that. Connect Guided KSampler's own output."
        )
    return carried.report


def keep_with_pictures(hidden: object, report: GuidanceReport) -> None:
    """Puts a report into the metadata of pictures that are saved after this, by the number of the node that gives it.

    ``hidden`` is the node's, with its unique_id and extra_pnginfo.
    """
    metadata, number = getattr(hidden, "extra_pnginfo", None), getattr(hidden, "unique_id", None)
    if isinstance(metadata, dict):
        metadata.setdefault(KEY, {})[str(number)] = json.loads(report.to_json())
