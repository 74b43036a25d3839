"""Benchmarks. Each checks its answers first and prints no number when they are wrong."""

from __future__ import annotations
