"""Guidance sets as checked JSON: what pulls, how and where, without the encoders that it looks through.

``fields`` reads JSON field by field, ``pixels`` keeps pictures and masks in it bit for bit, ``preset`` knows what a
guidance is made of. Nothing in a file is ever run.
"""

from .preset import VERSION, Recipe, preset_text, read_preset

__all__ = ["VERSION", "Recipe", "preset_text", "read_preset"]
