"""`fxlora::lora_experts` on one GPU, beside plain grouped GEMMs and other multi-LoRA implementations.

`python -m tests.benchmarks.experts [--cases REGEX] [--peers DIR] [--json FILE] ...`, or `fxlora bench experts ...`.

The method is that of `tests.benchmarks.linear`: each case first has to agree with float64, then everything is captured
in CUDA graphs that take turns; forms chain and plain, targets judged by plain. What differs: one weight serves all
calls of a graph, which rotates over draws of the routing instead (an expert weight is far larger than L2). Rows of
ours and of torch's grouped GEMM come sorted by expert (names with `ids`: in any order); peers gather and scatter rows
by themselves. `segment_experts`, shared by the expert weights of a layer, is left out (`segments-*` rows have its
time), as are the tables that peers make for each layer.

The base is the fastest of torch's grouped GEMM, ours without adapters, and the Triton one that the peers start from.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fxlora.kernels import ops
from fxlora.kernels.expert_segments import segment_experts_torch
from tests.benchmarks import driver
from tests.benchmarks.driver import Suite
from tests.benchmarks.experts_cases import CASES, MODELS, SLOTS, TARGETS, shapes
from tests.benchmarks.experts_peers import PEERS
from tests.benchmarks.experts_run import BASES, run_case, warm_case
from tests.benchmarks.gpu_timing import Clock, GraphClock, Rates, spread
from tests.benchmarks.linear_build import WrongResultError
from tests.benchmarks.linear_report import Report
from tests.benchmarks.linear_run import Row, guarded

SEGMENT_ROWS = (1, 16, 64, 2048)
SEGMENT_NAMES = [
    f"segments-{form}-{model}-M{rows}" for form in ("offsets", "ids") for model in MODELS for rows in SEGMENT_ROWS
]
DRAWS = 4


def time_segments(name: str, clock: Clock, rounds: int) -> Row:
    """`segment_experts` on random routings that take turns, each compared with the torch body first."""
    found = re.fullmatch(r"segments-(offsets|ids)-(\w+)-M(\d+)", name)
    if found is None:
        raise ValueError(f"{name} is no segments-<form>-<model>-M<rows>")
    experts, top_k, *_ = MODELS[found[2]]
    pairs = int(found[3]) * top_k
    g = torch.Generator(device=clock.device).manual_seed(0)
    draws: list[tuple[Any, ...]] = []
    for _ in range(DRAWS):
        slots = torch.randint(-1, SLOTS, (pairs, 1), generator=g, device=clock.device, dtype=torch.int32)
        ids = torch.randint(0, experts, (pairs,), generator=g, device=clock.device)
        offsets = torch.bincount(ids, minlength=experts).cumsum(0).to(torch.int32)
        draws.append((slots, *((offsets, None) if found[1] == "offsets" else (None, ids)), experts, SLOTS))
    for args in draws:
        on_cpu = [arg.cpu() if isinstance(arg, torch.Tensor) else arg for arg in args]
        expected = segment_experts_torch(*on_cpu)
        written = expected >= 0
        if not torch.equal(ops.segment_experts(*args).cpu()[written], expected[written]):
            raise WrongResultError(f"{name}: not the table of the torch body")
    prepared = {"ours": clock.prepare(lambda i: ops.segment_experts(*draws[i]), DRAWS, 8)}
    return {"us": {"ours": {"chain": spread(clock.rounds(prepared, rounds)["ours"])}}}


def run_one(name: str, clock: Clock, rates: Rates, peers: Any, rounds: int) -> Row:
    """The result row of a case or a table."""
    if name in CASES:
        return run_case(CASES[name], clock, rates, peers=peers, rounds=rounds)
    return guarded({"name": name, "kind": "segments"}, lambda: time_segments(name, clock, rounds))


def warm_one(name: str, peers: Any) -> None:
    """Run everything of a name once, so that its kernels are compiled."""
    if name in CASES:
        warm_case(CASES[name], peers)
    else:
        time_segments(name, GraphClock(), 1)


def draw(record: dict[str, Any], path: Path) -> None:
    """Write the plot of a record."""
    from tests.benchmarks import plot

    plot.draw(record, path, [name for name, *_ in shapes()], "LoRA on experts", "grouped GEMM")


REPORT = Report(
    width=34,
    legend=(
        "us, medians, behind a tiny kernel whose own time is taken off (plain); chain: back to back; ratio: ours/base, "
        "round by round, with p10-p90; best: fastest peer/ours, plain; floor%: floor/ours, plain; base: the fastest of "
        + ", ".join(BASES)
    ),
    beside=(*PEERS, *BASES),
    targets=TARGETS,
    base_name=True,
)
SUITE = Suite(
    "tests.benchmarks.experts", __doc__ or "", [*CASES, *SEGMENT_NAMES], TARGETS, REPORT, run_one, warm_one, draw
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments and run. -> exit code: 1 where a case was wrong or broke, 2 where nothing could run."""
    return driver.main(SUITE, arguments)


if __name__ == "__main__":
    sys.exit(main())
