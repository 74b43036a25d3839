"""The demo: a small model, three adapters, and the table that proves the routing."""

from __future__ import annotations
