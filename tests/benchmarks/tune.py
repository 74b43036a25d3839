"""Other tiles than the table's for a call of `lora_linear`, and what each costs on this GPU.

`python -m tests.benchmarks.tune --cases REGEX [--precompile N] [--max-seconds S]`: for each case of
`tests.benchmarks.linear`, the tiles that `kernels/tiles.py` picks, and all that differ from them in one number (half of
it, twice it, one stage more or fewer, or the other way to lay W). What compiles and agrees with float64 takes turns
with the table's tiles and `torch.mm`, behind a kernel that overlaps nothing; printed are medians, the fastest first.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch

from fxlora.kernels.call import LinearCall, Members
from fxlora.kernels.lora_linear import Body, body_of
from tests.benchmarks import linear_report
from tests.benchmarks.driver import Suite
from tests.benchmarks.gpu_timing import Clock, GraphClock, repeats_of, spread
from tests.benchmarks.linear_build import Built, Step, build, check
from tests.benchmarks.linear_cases import CASES
from tests.benchmarks.linear_run import after_tiny
from tests.benchmarks.peers_adapter import reason
from tests.benchmarks.precompile import precompile

MOST_VARIANTS = 48
TABLE, BASE, TINY = "the table's", "torch.mm", "tiny"


def neighbours(tiles: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(what differs, tiles) of all that differ from these in one number."""
    for field in fields(tiles):
        value, name = getattr(tiles, field.name), f"{path}{field.name}"
        if is_dataclass(value):
            yield from ((what, replace(tiles, **{field.name: inner})) for what, inner in neighbours(value, f"{name}."))
            continue
        others: tuple[Any, ...] = ()
        if isinstance(value, bool):
            others = (not value,)
        elif isinstance(value, int):
            near = (value - 1, value + 1) if "stages" in field.name else (value // 2, value * 2)
            others = tuple(other for other in near if other)
        yield from ((f"{name} {value} -> {other}", replace(tiles, **{field.name: other})) for other in others)


def calls_of(built: Built) -> list[LinearCall]:
    """The call of each weight set."""
    rows = (built.row_slots, built.row_coeffs, built.segments)
    return [
        LinearCall(
            built.x, [member.weight for member in members], [None] * len(members), *rows,
            Members(tuple(member.pool for member in members)),
        )
        for members in built.sets
    ]  # fmt: skip


def variants(built: Built) -> tuple[Body, dict[str, Any]]:
    """The body that serves a case, and tiles by what differs."""
    body, tiles = body_of(calls_of(built)[0])
    return body, {TABLE: tiles, **dict(list(neighbours(tiles))[:MOST_VARIANTS])}


def warm_one(name: str, peers: Any) -> None:
    """Compile one variant, named CASE#NUMBER, if the case has so many."""
    case, _, number = name.partition("#")
    with closing(build(CASES[case], "cuda", sets=1)) as built:
        body, tiles = variants(built)
        if int(number) < len(tiles):
            body(calls_of(built)[0], list(tiles.values())[int(number)])
            torch.cuda.synchronize()


def costs(name: str, clock: Clock, rounds: int, sets: int | None = None) -> tuple[dict[str, float], dict[str, str]]:
    """(microseconds of each variant and of the base, fastest first; why others have none)"""
    with closing(build(CASES[name], clock.device, sets=sets)) as built:
        calls, truth, dtype = calls_of(built), built.reference(0), built.x.dtype
        scratch = torch.zeros(1, device=clock.device)
        body, tiles = variants(built)
        steps: dict[str, Step] = {TINY: lambda i: scratch.add_(1.0), BASE: after_tiny(built.base, scratch)}
        prepared, failed, repeats = {}, {}, repeats_of(built.count, 20.0)
        for what, found in tiles.items():

            def step(i: int, found: Any = found) -> list[torch.Tensor]:
                calls[i].scratch.clear()  # a call keeps what it allocates
                return body(calls[i], found)

            try:
                check(step, 0, truth, dtype)
            except Exception as error:
                failed[what] = reason(error)
                continue
            steps[what] = after_tiny(step, scratch)
        prepared = {what: clock.prepare(step, built.count, repeats) for what, step in steps.items()}
        times = {what: spread(found)["median"] for what, found in clock.rounds(prepared, rounds).items()}
        tiny = times.pop(TINY)
        return {what: us - tiny for what, us in sorted(times.items(), key=lambda item: item[1])}, failed


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments and run. -> exit code: 2 where nothing could run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", metavar="REGEX", required=True)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--precompile", type=int, metavar="N", default=0, help="compile in N processes first")
    parser.add_argument("--max-seconds", type=float, help="start no case after this; precompiling counts")
    options = parser.parse_args(arguments)
    names = [name for name, case in CASES.items() if case.kind != "embedding" and re.search(options.cases, name)]
    if not names or not torch.cuda.is_available():
        print(f"no case is named like {options.cases!r}" if not names else "this needs a CUDA GPU", file=sys.stderr)
        return 2
    deadline = None if options.max_seconds is None else time.monotonic() + options.max_seconds
    if options.precompile:
        numbered = [f"{name}#{number}" for name in names for number in range(MOST_VARIANTS + 1)]
        precompile(SUITE.module, numbered, options.precompile, None, deadline)
    for name in names:
        if deadline is not None and time.monotonic() > deadline:
            print(f"out of time before {name}")
            break
        times, failed = costs(name, GraphClock(), options.rounds)
        print(
            f"{name}, {torch.cuda.get_device_name()}", *(f"  {us:9.2f}  {what}" for what, us in times.items()), sep="\n"
        )
        print(*(f"          -  {what}: {why}" for what, why in failed.items()), sep="\n", flush=True)
    return 0


SUITE = Suite(
    "tests.benchmarks.tune", __doc__ or "", list(CASES), (), linear_report.REPORT,
    lambda *_: {}, warm_one,
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
