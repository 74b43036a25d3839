"""`fxlora bench NAME`: runs `tests/benchmarks/NAME.py` of the clone the command is called in."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from fxlora.commands.errors import NoCloneError


def run_benchmark(name: str, options: Sequence[str] = ()) -> None:
    """Run one benchmark as `python -m tests.benchmarks.NAME OPTIONS` would; raises `NoCloneError` elsewhere."""
    clone = Path.cwd()
    if not (clone / "tests" / "benchmarks" / f"{name}.py").is_file():
        raise NoCloneError(f"fxlora bench {name} runs inside a clone of fxlora, and {clone} is none")
    sys.path.insert(0, str(clone))
    sys.argv = [f"tests.benchmarks.{name}", *options]
    runpy.run_module(f"tests.benchmarks.{name}", run_name="__main__", alter_sys=True)
