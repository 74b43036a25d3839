"""The demo: a small model, three adapters, and the table that proves the routing. `DATA` is where they lie."""

from __future__ import annotations

from pathlib import Path

DATA = Path(__file__).parent / "data"
