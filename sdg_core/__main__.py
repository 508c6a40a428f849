"""`python -m sdg_core` is `sdg`."""

import sys

from .cli import main

sys.exit(main())
