"""``python -m sqla_signals``, the same as the command ``sqla-signals``."""

import sys

from .cli import main

sys.exit(main())
