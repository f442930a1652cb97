"""``python -m rnnkeys``: see ``python -m rnnkeys --help``."""

from __future__ import annotations

import sys

from .doctor.command_line import main

if __name__ == "__main__":
    sys.exit(main())
