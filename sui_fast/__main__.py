"""``python -m sui_fast``: the same as ``sui-fast``."""

import sys

from .cli import main

sys.exit(main())
