"""`fxlora::lora_linear` and `lora_logits` on one GPU, beside plain torch and other multi-LoRA implementations.

`python -m tests.benchmarks.linear [--cases REGEX] [--peers DIR] [--json FILE] ...`, or `fxlora bench linear ...`.

Each case first has to agree with float64 (relative Frobenius error below 4e-3 in bf16, everything finite); a case that
does not is printed RED, without a time, and the exit code is 1. Then everything is captured in CUDA graphs over weight
sets that rotate beyond the L2 cache, and the graphs take turns, in random order, for some rounds. Reported are medians
over the rounds; a ratio is taken within each round, and its spread is that of the rounds. After the rounds what the
last replay of ours left has to equal what an eager call gives.

A call of ours may overlap its neighbours of the same kind (programmatic dependent launch), so two forms are measured,
for ours, the base and each peer alike:

    chain   calls follow one another directly: ours follows ours, base follows base
    plain   a kernel of one element, which nothing overlaps, stands before each call; its own time t0, measured the same
            way in the same round, is taken off: ratio_plain = (tiny + ours - t0) / (tiny + base - t0). Taking t0 off
            leaves the gap between two launches in the call's time, for all alike. The raw pair is in the JSON too.

Targets and peers are judged by plain. The base is `torch.mm` (a group: one for each member). The floor is the larger of
bytes over the bandwidth of a copy and operations over the speed of an 8192^3 product, both measured here. Peers are
timed without their metadata, ours without `segment_rows`, which all linears of a forward share: `segments-*` rows have
its time, `host-*` rows that of the host per eager call.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks import driver
from tests.benchmarks.driver import Row, Suite
from tests.benchmarks.gpu_timing import Clock, GraphClock, Rates
from tests.benchmarks.linear_cases import CASES, TARGETS
from tests.benchmarks.linear_report import REPORT
from tests.benchmarks.linear_run import run_case, warm_case
from tests.benchmarks.overheads import NAMES, run_overhead


def run_one(name: str, clock: Clock, rates: Rates, peers: Any, rounds: int) -> Row:
    """The result row of a case or an overhead."""
    if name in CASES:
        return run_case(CASES[name], clock, rates, peers=peers, rounds=rounds)
    return run_overhead(name, clock, rounds)


def warm_one(name: str, peers: Any) -> None:
    """Run everything of a case or an overhead once, so that its kernels are compiled."""
    if name in CASES:
        warm_case(CASES[name], peers)
    else:
        run_overhead(name, GraphClock(), 1)


def draw(record: dict[str, Any], path: Path) -> None:
    """Write the plot of a record."""
    from tests.benchmarks import plot

    plot.draw(record, path)


SUITE = Suite("tests.benchmarks.linear", __doc__ or "", [*CASES, *NAMES], TARGETS, REPORT, run_one, warm_one, draw)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments and run. -> exit code: 1 where a case was wrong or broke, 2 where nothing could run."""
    return driver.main(SUITE, arguments)


if __name__ == "__main__":
    sys.exit(main())
