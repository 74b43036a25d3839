"""Tests of fxlora/: what a caller sees."""

from __future__ import annotations
