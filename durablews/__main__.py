"""``python -m durablews`` is the command ``durablews``."""

from __future__ import annotations

import sys

from durablews.cli import main

if __name__ == "__main__":
    sys.exit(main())
