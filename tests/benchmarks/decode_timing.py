"""Whole-model steps that take turns: CUDA-graph replays, eager calls or, on a CPU, plain calls.

In a round every step runs in turn, in random order, so that a ratio of two of them is taken within a second of the
card's clocks.
"""

from __future__ import annotations

import contextlib
import fcntl
import random
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.gpu_timing import turns

Around = Callable[[], AbstractContextManager[Any]]


@dataclass
class Timed:
    """A step made ready.

    run: one step. around: entered around the steps of a round (the batch with its adapters). before: what each round
    needs first. calls: steps of a round. result: where `run` leaves its logits.
    """

    run: Callable[[], Any]
    result: torch.Tensor
    around: Around = contextlib.nullcontext
    before: Callable[[], None] = lambda: None
    calls: int = 8
    facts: dict[str, Any] = field(default_factory=dict)

    def once(self) -> torch.Tensor:
        """Run one step by itself. -> a copy of its logits"""
        self.before()
        with self.around():
            result = self.run()
        return (self.result if result is None else result).clone()


class Turn:
    """The right to use the GPU, where several processes share it: a lock on a file, free while a process compiles."""

    def __init__(self, path: Path | None) -> None:
        self._file = None if path is None else path.open("a")
        self._held = False

    @property
    def shared(self) -> bool:
        return self._file is not None

    def acquire(self) -> None:
        if self._file is not None and not self._held:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            self._held = True

    def release(self) -> None:
        if self._file is not None and self._held:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            fcntl.flock(self._file, fcntl.LOCK_UN)
            self._held = False

    def compiler(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        """A compiler during which others have the GPU, from the call that leads to it (`compiling`) on."""

        def compile_graph(gm: Any, example_inputs: Any) -> Any:
            compiled = inner(gm, example_inputs)
            self.acquire()
            return compiled

        return compile_graph

    @contextlib.contextmanager
    def compiling(self) -> Any:
        self.release()
        try:
            yield
        finally:
            self.acquire()


def captured(step: Callable[[], torch.Tensor], before: Callable[[], None]) -> tuple[Callable[[], None], torch.Tensor]:
    """(replay, logits): the step in a CUDA graph; without a GPU the step itself."""
    if not torch.cuda.is_available():
        before()
        result = step()

        def call() -> None:
            result.copy_(step())

        return call, result
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            before()
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph, outside = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    before()
    try:
        with torch.cuda.graph(graph):
            result = step()
    finally:
        torch.cuda.set_stream(outside)  # a capture that fails leaves its own stream current
    return graph.replay, result


def time_rounds(steps: Mapping[str, Timed], rounds: int, seed: int = 0) -> dict[str, dict[str, list[float]]]:
    """By name, milliseconds of a step on the device (`ms`) and microseconds until its call returned (`host_us`)."""
    rng = random.Random(seed)
    found: dict[str, dict[str, list[float]]] = {name: {"ms": [], "host_us": []} for name in steps}
    for turn in range(rounds + 1):
        for name in turns(list(steps), rng):
            ms, host_us = _time_one(steps[name])
            if turn:  # the first one warms up
                found[name]["ms"].append(ms)
                found[name]["host_us"].append(host_us)
    return found


def _time_one(timed: Timed) -> tuple[float, float]:
    timed.before()
    with timed.around():
        if not torch.cuda.is_available():
            begin = time.perf_counter()
            for _ in range(timed.calls):
                timed.run()
            each = (time.perf_counter() - begin) / timed.calls
            return each * 1e3, each * 1e6
        timed.run()
        torch.cuda.synchronize()
        timed.run()  # hides the launch of what is timed
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        begin = time.perf_counter()
        for _ in range(timed.calls):
            timed.run()
        host = time.perf_counter() - begin
        end.record()
        torch.cuda.synchronize()
    return start.elapsed_time(end) / timed.calls, host * 1e6 / timed.calls
