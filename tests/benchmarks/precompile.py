"""Compiles the kernels of many cases in several processes that share Triton's cache on disk.

Triton compiles on one core. Each process takes the next case, builds it with one weight set and runs everything once on
the GPU, so that the process that times finds every kernel compiled.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.peers_adapter import load_peers, reason


@cache
def _peers(folder: Path | None) -> Any:
    return load_peers(folder)


def warm(job: tuple[str, str, Path | None]) -> tuple[str, str | None]:
    """Run one name of a benchmark once in this process. -> (name, why it failed or None)"""
    module, name, folder = job
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            import_module(module).SUITE.warm_one(name, _peers(folder))
        torch.cuda.empty_cache()
    except Exception as error:
        return name, reason(error)
    return name, None


def precompile(module: str, names: Sequence[str], processes: int, folder: Path | None, deadline: float | None) -> None:
    """Warm every name of a benchmark in `processes` spawned processes; starts none after the deadline.

    deadline: of time.monotonic.
    """
    begin = time.monotonic()
    done = 0
    with ProcessPoolExecutor(min(processes, len(names)), mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(warm, (module, name, folder)) for name in names]
        try:
            for future in as_completed(futures, None if deadline is None else max(deadline - begin, 0.0)):
                name, why = future.result()
                if why:
                    print(f"precompile: {name}: {why}", file=sys.stderr, flush=True)
                done += not why
        except (TimeoutError, BrokenProcessPool) as error:
            print(f"precompile stopped: {reason(error)}", file=sys.stderr, flush=True)
            pool.shutdown(wait=False, cancel_futures=True)
    print(
        f"compiled {done} of {len(names)} cases in {time.monotonic() - begin:.0f} s, {processes} processes", flush=True
    )
