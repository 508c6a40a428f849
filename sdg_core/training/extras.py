"""Libraries that only training needs: an extra, imported at first use."""

from __future__ import annotations

import importlib
from typing import Any


class MissingExtra(ImportError):
    """A library that is not installed, and how to get it."""


def extra(name: str) -> Any:
    """The library. Raises MissingExtra, saying how to get it, where it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise MissingExtra(
            f"Fine-tuning needs {name}, which is not installed; the other parts of the pack do without. In the Python "
            "that runs this: pip install accelerate webdataset"
        ) from error
