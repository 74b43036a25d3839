"""The commands of the `fxlora` tool, one file each; `fxlora.cli` is the way in."""

from __future__ import annotations
