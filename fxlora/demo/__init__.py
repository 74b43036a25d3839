"""The demo: a small model, three adapters, and the table that proves the routing. `DATA` is where they lie."""

from __future__ import annotations

import os
from pathlib import Path

DATA = Path(__file__).parent / "data"


def cache_folder() -> Path:
    """Return the folder that demos keep what they make in: $XDG_CACHE_HOME/fxlora, or ~/.cache/fxlora."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fxlora"
