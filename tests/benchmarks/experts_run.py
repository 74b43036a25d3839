"""One case of expert weights from its name to a result row: built, checked, timed, summarised.

Rows are those of `linear_run`. `base` is the fastest of three grouped GEMMs without adapters, named by base_name:
torch's (grouped_mm), ours (bare), and that of the peers (triton).
"""

from __future__ import annotations

import statistics
from contextlib import closing
from dataclasses import asdict
from typing import Any

import torch

from tests.benchmarks.experts_build import Built, build
from tests.benchmarks.experts_cases import ExpertCase
from tests.benchmarks.experts_peers import BASE, build_peers
from tests.benchmarks.gpu_timing import Clock, Rates, Step, repeats_of
from tests.benchmarks.linear_build import check, judge_outputs
from tests.benchmarks.linear_run import FORMS, TINY, Row, guarded, prepare_all, summarise

BASES = ("grouped_mm", "bare", BASE)


def with_base(times: dict[str, list[float]]) -> tuple[str, dict[str, list[float]]]:
    """Name of the fastest base, and the times with it as `base` beside its own name."""
    medians = {name: statistics.median(times[f"{name} plain"]) for name in BASES if f"{name} plain" in times}
    best = min(medians, key=medians.__getitem__)
    return best, times | {f"base {form}": times[f"{best} {form}"] for form in FORMS}


def measure(case: ExpertCase, built: Built, clock: Clock, rates: Rates, peers: Any, rounds: int) -> Row:
    """Check, then time. Raises WrongResultError where ours is wrong, eagerly or after the replays."""
    dtype, last = built.x.dtype, built.count - 1
    truth = built.reference(0)
    error = check(built.ours, 0, truth, dtype)
    error = max(error, check(built.ours, last, built.reference(last), dtype))
    total_bytes, flops = built.least()
    floor_us = rates.floor_us(total_bytes, flops)
    base_truth = built.reference(0, adapters=False)
    found = build_peers(peers, built, truth, base_truth)
    steps: dict[str, Step] = {"ours": built.ours, "bare": built.bare}
    if case.in_place:
        steps["grouped_mm"] = built.base
    for name in steps.keys() - {"ours"}:
        check(steps[name], 0, base_truth, dtype)
    del truth, base_truth
    repeats = repeats_of(built.count, max(floor_us, 2.0))
    prepared = prepare_all({**steps, **found.steps}, clock, built.count, repeats, found.missing)
    eager = [y.clone() for y in built.ours(last)]
    times = clock.rounds(prepared, rounds)
    for form in FORMS:
        judge_outputs(prepared[f"ours {form}"].result, eager, dtype, f"{form} after {len(times[TINY])} rounds")
    base_name, times = with_base(times)
    row = summarise(times, BASES)
    row.update(
        error=error, bytes=total_bytes, flops=flops, floor_us=floor_us, base_name=base_name, sets=built.count,
        calls=prepared[TINY].calls, missing=found.missing,
    )  # fmt: skip
    row["floor_share"] = {form: floor_us / row["us"]["ours"][form]["median"] for form in FORMS}
    return row


def run_case(
    case: ExpertCase, clock: Clock, rates: Rates, *, peers: Any = None, rounds: int = 30,
    dtype: torch.dtype = torch.bfloat16, sets: int | None = None, seed: int = 0,
) -> Row:  # fmt: skip
    """The result row of one case; a wrong result gives a red one, anything else that goes wrong an error."""

    def work() -> Row:
        with closing(build(case, clock.device, dtype, sets, seed)) as built:
            return measure(case, built, clock, rates, peers, rounds)

    return guarded({"name": case.name, **asdict(case)}, work)


def warm_case(case: ExpertCase, peers: Any) -> None:
    """Run everything of a case once, so that its kernels are compiled."""
    with closing(build(case, "cuda", sets=1)) as built:
        for step in (built.ours, built.bare, built.base):
            step(0)
        build_peers(peers, built, None, None)
        torch.cuda.synchronize()
