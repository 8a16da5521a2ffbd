"""``python -m pybackdoor``, for torchrun."""

import sys

from .cli import main

sys.exit(main())
