"""The kernels of large calls, compiled for a Hopper GPU that is not there: none spills, all fit its shared memory, and
those that should share a multiprocessor do, others do not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MOST_SHARED_BYTES = 227 << 10
MULTIPROCESSOR = {"shared_bytes": 228 << 10, "registers": 64 << 10}
RESERVED_BYTES = 1024  # of shared memory, for each program
MOST_STACK_BYTES = 64
"""A few addresses; a kernel that keeps its sums there takes several times as long."""


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_large_calls_compile_without_spills() -> None:
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compiled"]
    done = subprocess.run(command, cwd=ROOT, env=plain, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    launches = [json.loads(line) for line in done.stdout.splitlines()]
    kernels = {found["kernel"] for found in launches}
    assert {"gemv_kernel", "gemm_kernel", "fused_kernel", "fused_hopper_kernel", "prefill_kernel"} <= kernels
    assert {"prefill_hopper_kernel", "prefill_hopper_shrink_kernel", "expert_hopper_shrink_kernel"} <= kernels
    assert {"expert_lists_kernel", "expert_hopper_kernel"} <= kernels
    assert not [
        found
        for found in launches
        if found["stack_bytes"] > MOST_STACK_BYTES or found["shared_bytes"] > MOST_SHARED_BYTES
    ]
    waves = [pair for pair in pairwise(launches) if pair[1]["kernel"] == "fused_hopper_kernel"]
    assert len(waves) == 32
    for shrink, product in waves:
        shared = shrink["shared_bytes"] + product["shared_bytes"] + 2 * RESERVED_BYTES
        registers = sum(found["threads"] * found["registers"] for found in (shrink, product))
        fits = shared <= MULTIPROCESSOR["shared_bytes"] and registers <= MULTIPROCESSOR["registers"]
        assert fits == ("beside" in product["call"]), f"{shrink} and {product} share a multiprocessor: {fits}"
