"""Bars whose length is known late."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm


def advance(bar: tqdm[Any], done: int, total: int, name: str = "") -> None:
    """Sets the bar to ``done`` of ``total``, and what it says."""
    if name:
        bar.set_description(name)
    bar.total, bar.n = total, done
    bar.refresh()
