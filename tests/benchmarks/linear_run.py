"""One case from its name to a result row: built, checked, timed, summarised.

A row is a dict, as the JSON holds it. Always: name, status (ok, red, error, skipped); reason unless ok. Cases: the
numbers of `Case`, error, bytes, flops, floor_us, sets, calls, rounds, tiny_us, us[implementation][form], ratio[form]
(ours over base), peers[peer][form] (peer over ours), best_peer[form], missing[peer]. Forms are chain and plain, see
`tests.benchmarks.linear`; every number of a form is a spread (median, p10, p90).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import closing
from dataclasses import asdict
from typing import Any

import torch

from tests.benchmarks.gpu_timing import Clock, Prepared, Rates, Step, less, ratios, repeats_of, spread
from tests.benchmarks.linear_build import Built, WrongResultError, build, check, judge_outputs
from tests.benchmarks.linear_cases import Case
from tests.benchmarks.peers_adapter import EAGER, build_peers, reason, time_peft

TINY, FORMS = "tiny", ("chain", "plain")
Row = dict[str, Any]


def after_tiny(step: Step, scratch: torch.Tensor) -> Step:
    """The step behind a kernel of one element, which nothing overlaps."""

    def run(i: int) -> Any:
        scratch.add_(1.0)
        return step(i)

    return run


def prepare_all(
    steps: dict[str, Step], clock: Clock, sets: int, repeats: int, missing: dict[str, str]
) -> dict[str, Prepared]:
    """Each step in both forms, and the tiny kernel alone; a peer that cannot be captured goes to `missing`."""
    scratch = torch.zeros(1, device=clock.device)
    prepared = {TINY: clock.prepare(lambda i: scratch.add_(1.0), sets, repeats)}
    for name, step in steps.items():
        try:
            chain = clock.prepare(step, sets, repeats)
            plain = clock.prepare(after_tiny(step, scratch), sets, repeats)
        except Exception as error:
            if name in ("base", "ours"):
                raise
            missing[name] = reason(error)
            continue
        prepared[f"{name} chain"], prepared[f"{name} plain"] = chain, plain
    return prepared


def summarise(times: dict[str, list[float]], others: Collection[str] = ()) -> Row:
    """Medians, spreads and ratios of the times of one case, by implementation and form. others: those that are neither
    ours nor base nor a peer."""
    tiny = times[TINY]
    names = [name.removesuffix(" chain") for name in times if name.endswith(" chain")]
    by_form = {name: {"chain": times[f"{name} chain"], "plain": less(times[f"{name} plain"], tiny)} for name in names}
    ours, base = by_form["ours"], by_form["base"]
    peers = {
        name: {form: ratios(found[form], ours[form]) for form in FORMS}
        for name, found in by_form.items()
        if name not in ("base", "ours", *others)
    }
    row: Row = {
        "tiny_us": spread(tiny),
        "us": {name: {form: spread(found[form]) for form in FORMS} for name, found in by_form.items()},
        "us_with_tiny": {name: spread(times[f"{name} plain"]) for name in names},
        "ratio": {form: ratios(ours[form], base[form]) for form in FORMS},
        "peers": peers,
        "rounds": len(tiny),
    }
    if peers:
        row["best_peer"] = {form: fastest(peers, form) for form in FORMS}
    return row


def fastest(peers: Row, form: str) -> Row:
    """Name of the fastest peer and its ratio to ours."""
    name = min(peers, key=lambda peer: peers[peer][form]["median"])
    return {"name": name, "ratio": peers[name][form]["median"]}


def measure(case: Case, built: Built, clock: Clock, rates: Rates, peers: Any, rounds: int) -> Row:
    """Check, then time. Raises WrongResultError where ours is wrong, eagerly or after the replays."""
    dtype, last = built.x.dtype, built.count - 1
    truth = built.reference(0)
    error = check(built.ours, 0, truth, dtype)
    error = max(error, check(built.ours, last, built.reference(last), dtype))
    total_bytes, flops = built.least()
    floor_us = rates.floor_us(total_bytes, flops)
    found = build_peers(peers, built, truth)
    peft, missing_peft = time_peft(peers, built, truth, clock.device)
    if missing_peft:
        found.missing[EAGER] = missing_peft
    del truth
    repeats = repeats_of(built.count, max(floor_us, 2.0))
    steps: dict[str, Step] = {"base": built.base, "ours": built.ours, **found.steps}
    prepared = prepare_all(steps, clock, built.count, repeats, found.missing)
    eager = [y.clone() for y in built.ours(last)]
    times = clock.rounds(prepared, rounds)
    for form in FORMS:
        judge_outputs(prepared[f"ours {form}"].result, eager, dtype, f"{form} after {len(times[TINY])} rounds")
    row = summarise(times)
    if peft:
        row["us"][EAGER] = {"eager": spread(peft)}
    row.update(
        error=error, bytes=total_bytes, flops=flops, floor_us=floor_us, sets=built.count,
        calls=prepared[TINY].calls, missing=found.missing,
    )  # fmt: skip
    row["floor_share"] = {form: floor_us / row["us"]["ours"][form]["median"] for form in FORMS}
    return row


def guarded(row: Row, work: Callable[[], Row]) -> Row:
    """The row with what `work` found; red where a result was wrong, an error where anything else went wrong."""
    try:
        return {**row, "status": "ok", **work()}
    except WrongResultError as error:
        return {**row, "status": "red", "reason": str(error)}
    except Exception as error:
        return {**row, "status": "error", "reason": reason(error)}


def run_case(
    case: Case, clock: Clock, rates: Rates, *, peers: Any = None, rounds: int = 30,
    dtype: torch.dtype = torch.bfloat16, sets: int | None = None, seed: int = 0,
) -> Row:  # fmt: skip
    """The result row of one case; a wrong result gives a red one, anything else that goes wrong an error."""

    def work() -> Row:
        with closing(build(case, clock.device, dtype, sets, seed)) as built:
            return measure(case, built, clock, rates, peers, rounds)

    return guarded({"name": case.name, **asdict(case)}, work)


def warm_case(case: Case, peers: Any) -> None:
    """Run everything of a case once, so that its kernels are compiled; weight sets that differ change no kernel."""
    built = build(case, "cuda", sets=1)
    try:
        built.ours(0)
        build_peers(peers, built, None)
        torch.cuda.synchronize()
    finally:
        built.close()
