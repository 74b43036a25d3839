"""Times of steps that take turns: CUDA-graph replays on a GPU, the wall clock on a CPU; and the best a GPU can do.

A step takes the number of a weight set. `Prepared` runs a step over all sets, `repeats` times. In a round every
prepared step runs once, in random order, so that a ratio of two of them is taken within a second of the card's clocks.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Step = Callable[[int], Any]
MIN_CALLS = 32  # of one step in one graph
GRAPH_US = 3000.0  # what a graph of more than `MIN_CALLS` calls may take
BUDGET_S = 2.0  # of all rounds of one case
MIN_ROUNDS = 7


@dataclass
class Prepared:
    """A step made ready: run() goes `calls` times through it; `result` is what the last call returned."""

    run: Callable[[], None]
    calls: int
    result: Any


class Clock(Protocol):
    """How steps become times."""

    device: str

    def prepare(self, step: Step, sets: int, repeats: int) -> Prepared: ...

    def rounds(self, prepared: Mapping[str, Prepared], rounds: int) -> dict[str, list[float]]: ...


def repeats_of(sets: int, call_us: float) -> int:
    """Times that one graph goes over all sets: `MIN_CALLS` calls at least, unless that takes too long."""
    return max(1, min(math.ceil(MIN_CALLS / sets), int(GRAPH_US / (call_us * sets))))


def rounds_within(round_s: float, rounds: int) -> int:
    """Rounds that fit the budget of one case."""
    return max(min(MIN_ROUNDS, rounds), min(rounds, int(BUDGET_S / max(round_s, 1e-9))))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return {
        "median": statistics.median(ordered),
        "p10": ordered[round(0.1 * last)],
        "p90": ordered[round(0.9 * last)],
    }


def ratios(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    """Spread of the ratios taken round by round."""
    return spread([a / b for a, b in zip(over, under, strict=True)])


def less(values: Sequence[float], tiny: Sequence[float]) -> list[float]:
    """Times of (tiny kernel, call) pairs less those of the tiny kernel alone, round by round; never below 10 ns."""
    return [max(a - b, 0.01) for a, b in zip(values, tiny, strict=True)]


def turns(names: Sequence[str], rng: random.Random) -> list[str]:
    shuffled = list(names)
    rng.shuffle(shuffled)
    return shuffled


class GraphClock:
    """CUDA graphs. All work, capture included, happens on one side stream: some steps keep state per stream."""

    device = "cuda"

    def __init__(self, seed: int = 0) -> None:
        self.stream = torch.cuda.Stream()
        self._rng = random.Random(seed)

    def prepare(self, step: Step, sets: int, repeats: int) -> Prepared:
        """Run the step on every set, then capture `repeats` passes over the sets in one graph."""
        with torch.cuda.stream(self.stream):
            for i in range(sets):
                step(i)
        torch.cuda.synchronize()
        graph, result, outside = torch.cuda.CUDAGraph(), None, torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                for _ in range(repeats):
                    for i in range(sets):
                        result = step(i)
        finally:
            torch.cuda.set_stream(outside)  # a capture that fails leaves its own stream current
        return Prepared(graph.replay, sets * repeats, result)

    def _round(self, prepared: Mapping[str, Prepared]) -> dict[str, float]:
        """Microseconds of a call of each. A graph is replayed twice in a row and only the second replay is timed: its
        launch then hides behind the first one."""
        marks = {}
        with torch.cuda.stream(self.stream):
            for name in turns(list(prepared), self._rng):
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                prepared[name].run()
                begin.record()
                prepared[name].run()
                end.record()
                marks[name] = begin, end
        torch.cuda.synchronize()
        return {name: begin.elapsed_time(end) * 1e3 / prepared[name].calls for name, (begin, end) in marks.items()}

    def rounds(self, prepared: Mapping[str, Prepared], rounds: int) -> dict[str, list[float]]:
        """Microseconds of a call of each, round by round; fewer rounds than asked where they take long."""
        self._round(prepared)
        begin = time.perf_counter()
        first = self._round(prepared)
        rounds = rounds_within(time.perf_counter() - begin, rounds)
        each = [first, *(self._round(prepared) for _ in range(rounds - 1))]
        return {name: [times[name] for times in each] for name in prepared}


class WallClock:
    """The clock on the wall: for the CPU, and for steps that no graph can hold."""

    def __init__(self, device: str = "cpu", seed: int = 0) -> None:
        self.device = device
        self._rng = random.Random(seed)

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def prepare(self, step: Step, sets: int, repeats: int) -> Prepared:
        """Run the step once on the last set."""

        def run() -> None:
            for _ in range(repeats):
                for i in range(sets):
                    step(i)

        return Prepared(run, sets * repeats, step(sets - 1))

    def rounds(self, prepared: Mapping[str, Prepared], rounds: int) -> dict[str, list[float]]:
        """Microseconds of a call of each, round by round."""
        times: dict[str, list[float]] = {name: [] for name in prepared}
        for _ in range(rounds):
            for name in turns(list(prepared), self._rng):
                self._synchronize()
                begin = time.perf_counter()
                prepared[name].run()
                self._synchronize()
                times[name].append((time.perf_counter() - begin) * 1e6 / prepared[name].calls)
        return times


@dataclass(frozen=True)
class Rates:
    """What the machine reaches at best: bytes and floating-point operations per second."""

    bytes_per_s: float
    flops_per_s: float

    def floor_us(self, total_bytes: int, flops: int) -> float:
        """The larger of the two least times."""
        return max(total_bytes / self.bytes_per_s, flops / self.flops_per_s) * 1e6


def _seconds(action: Callable[[], object], times: int) -> float:
    """Median seconds of a call on the device, by events."""
    for _ in range(3):
        action()
    found = []
    for _ in range(times):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        action()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) * 1e-3)
    return statistics.median(found)


def measure_rates() -> Rates:
    """A copy of 2 GiB, bytes read and written; a bf16 product of 8192^3."""
    source, target = torch.empty(2, 2 << 30, dtype=torch.uint8, device="cuda")
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    copied = 2 * source.numel() / _seconds(lambda: target.copy_(source), 10)
    flops = 2 * 8192**3 / _seconds(lambda: torch.mm(a, b), 20)
    return Rates(copied, flops)
