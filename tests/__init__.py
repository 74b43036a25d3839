"""The tests, room by room as the sources."""

from __future__ import annotations
