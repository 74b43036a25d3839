"""Tests of passes/: sites, rows, plan and rewrites."""

from __future__ import annotations
