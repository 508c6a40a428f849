"""States of an interrupted run on the disk: one complete state stays, whatever is killed meanwhile."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate import Accelerator


def kept_states(folder: Path) -> list[Path]:
    """The complete states of an interrupted run, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.suffix != ".partial")


def save_state(accelerator: Accelerator, folder: Path, identity: Mapping[str, Any], losses: Sequence[float]) -> None:
    """Writes all that ``load_state`` needs into ``folder``/step-N, N losses so far; older states go.

    ``identity``: what a run must have in common with the one that it continues.
    """
    done = folder / f"step-{len(losses):08d}"
    partial = done.with_suffix(".partial")
    accelerator.save_state(str(partial))
    if accelerator.is_main_process:
        (partial / "settings.json").write_text(json.dumps({**identity, "losses": list(losses)}))
        shutil.rmtree(done, ignore_errors=True)
        partial.rename(done)
        for other in folder.glob("step-*"):
            if other != done:
                shutil.rmtree(other)
    accelerator.wait_for_everyone()


def load_state(accelerator: Accelerator, folder: Path, identity: Mapping[str, Any]) -> list[float]:
    """Restores the newest complete state in ``folder``; its losses, one for each step.

    Raises FileNotFoundError where there is none, ValueError where it belongs to another identity.
    """
    states = kept_states(folder)
    if not states:
        raise FileNotFoundError(f"There is nothing to resume in {folder}. Start without --resume.")
    kept = json.loads((states[-1] / "settings.json").read_text())
    losses: list[float] = kept.pop("losses")
    other = [
        f"{name}: {value} then, {identity.get(name)} now" for name, value in kept.items() if identity.get(name) != value
    ]
    if other:
        raise ValueError(f"The run in {folder} had other settings ({'; '.join(other)}). Resume with the same ones.")
    accelerator.load_state(str(states[-1]))
    return losses
