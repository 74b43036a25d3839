"""The arithmetic of the Triton bodies without a GPU: every test marked `interpreted`, again, in a second pytest."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest

from fxlora.kernels.ops import INTERPRET


def interpreter_works() -> bool:
    """The interpreter of triton 3.6 turns one-element arrays into ints, which numpy refuses since 2.4."""
    triton, refuses = metadata.version("triton").split("."), metadata.version("numpy").split(".")
    return (int(triton[0]), int(triton[1])) > (3, 6) or (int(refuses[0]), int(refuses[1])) < (2, 4)


@pytest.mark.skipif(INTERPRET, reason="this is the second pytest")
@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
@pytest.mark.long
@pytest.mark.parametrize("which", ["expert", "not expert"])
def test_triton_bodies_under_the_interpreter(which: str) -> None:
    if not interpreter_works():
        pytest.skip(f"the interpreter of triton {metadata.version('triton')} fails with this numpy")
    folder = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, "-m", "interpreted and not gpu", "-k", which, str(folder)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=folder.parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
