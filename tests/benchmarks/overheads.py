"""What surrounds the linears: `segment_rows` on the device, and the time of the host for one eager call of each op."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial

import torch

from fxlora.kernels import ops
from fxlora.kernels.segments import segment_rows_torch
from tests.benchmarks.gpu_timing import Clock, spread
from tests.benchmarks.linear_build import Built, WrongResultError, build
from tests.benchmarks.linear_cases import Case
from tests.benchmarks.linear_run import Row, guarded

SEGMENT_ROWS, SEGMENT_SLOTS = (1, 16, 64, 256, 2048, 8192), (64, 256)
SEGMENT_MAPS = 4
HOST_CALLS, HOST_LOOPS = 200, 7
HOST_CASES = {
    "host-linear": Case("host-linear", "linear", 1, 1024, (1024,), 16, 1, slots=8),
    "host-group3": Case("host-group3", "linear", 1, 1024, (1024, 256, 256), 16, 1, slots=8),
    "host-group3-M16": Case("host-group3-M16", "linear", 16, 4096, (4096, 1024, 1024), 16, 16),
    "host-linear-M512": Case("host-linear-M512", "linear", 512, 1024, (1024,), 16, 8),
    "host-segment_rows": Case("host-segment_rows", "linear", 1, 1024, (1024,), 16, 1, slots=8),
    "host-embedding": Case("host-embedding", "embedding", 1, 1024, (1024,), 16, 1, slots=8),
}
NAMES = [*(f"segments-T{rows}-S{slots}" for slots in SEGMENT_SLOTS for rows in SEGMENT_ROWS), *HOST_CASES]


def time_segments(name: str, clock: Clock, rounds: int) -> Row:
    """`segment_rows` on random row maps that take turns, each compared with the torch body first."""
    found = re.fullmatch(r"segments-T(\d+)-S(\d+)", name)
    if found is None:
        raise ValueError(f"{name} is no segments-T<rows>-S<slots>")
    rows, slots = int(found[1]), int(found[2])
    g = torch.Generator(device=clock.device).manual_seed(0)
    maps = [
        torch.randint(-1, slots, (rows, 1), generator=g, device=clock.device, dtype=torch.int32)
        for _ in range(SEGMENT_MAPS)
    ]
    for row_slots in maps:
        if not torch.equal(ops.segment_rows(row_slots, slots).cpu(), segment_rows_torch(row_slots.cpu(), slots)):
            raise WrongResultError(f"{rows} rows, {slots} slots: not the stable sort")
    prepared = {"ours": clock.prepare(lambda i: ops.segment_rows(maps[i], slots), SEGMENT_MAPS, 8)}
    return {"us": {"ours": {"chain": spread(clock.rounds(prepared, rounds)["ours"])}}}


def host_us(call: Callable[[], object], device: str) -> float:
    """Microseconds of the host per call: loops of calls without a wait in between, median over the loops."""
    times = []
    for _ in range(HOST_LOOPS + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(HOST_CALLS):
            call()
        times.append((time.perf_counter() - begin) * 1e6 / HOST_CALLS)
    return statistics.median(times[1:])


def host_call(name: str, built: Built) -> Callable[[], object]:
    """The op alone: no list is made and no set is chosen within the call."""
    weights, rest = [member.weight for member in built.sets[0]], (built.row_slots, None, built.segments)
    if name == "host-segment_rows":
        return partial(ops.segment_rows, built.row_slots, built.case.slots)
    if built.case.kind == "embedding":
        return partial(ops.lora_embedding, built.ids[0], weights[0], *rest, built.handles[0])
    return partial(ops.lora_linear, built.x, weights, [None] * len(weights), *rest, built.handles[0])


@torch.no_grad()
def run_overhead(name: str, clock: Clock, rounds: int) -> Row:
    """The result row of one name of `NAMES`; us of the device, or host_us beside base_host_us of plain torch."""

    def work() -> Row:
        if name not in HOST_CASES:
            return time_segments(name, clock, rounds)
        with closing(build(HOST_CASES[name], clock.device, sets=1)) as built:
            ours, base = host_us(host_call(name, built), clock.device), host_us(partial(built.base, 0), clock.device)
            return {"host_us": ours, "base_host_us": base}

    return guarded({"name": name, "kind": name.split("-")[0]}, work)
