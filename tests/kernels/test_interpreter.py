"""The arithmetic of the Triton bodies without a GPU: every test marked `interpreted`, again, in a second pytest."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from fxlora.kernels.ops import INTERPRET


@pytest.mark.skipif(INTERPRET, reason="this is the second pytest")
@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_triton_bodies_under_the_interpreter() -> None:
    folder = Path(__file__).parent
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-m",
        "interpreted",
        str(folder),
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, cwd=folder.parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
