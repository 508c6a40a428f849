"""The command line: `sdg demo | sample | evaluate | finetune | convert`. Each module adds its parsers and runs them."""

from .main import main

__all__ = ["main"]
