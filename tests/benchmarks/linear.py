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

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.gpu_timing import GraphClock, Rates, measure_rates
from tests.benchmarks.linear_cases import CASES, TARGETS
from tests.benchmarks.linear_report import LEGEND, WIDTH, failed, header, line, missing_lines, target_lines
from tests.benchmarks.linear_run import run_case
from tests.benchmarks.overheads import NAMES, run_overhead
from tests.benchmarks.peers_adapter import load_peers
from tests.benchmarks.precompile import precompile

ROUNDS = 30
Row = dict[str, Any]


def arguments_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", metavar="REGEX", default="", help="only names in which this is found")
    parser.add_argument("--quick", action="store_true", help="only cases with a target other than the peers")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="at most; long cases take fewer")
    parser.add_argument("--peers", type=Path, metavar="DIR", help="folder with peers.py and what it imports")
    parser.add_argument("--json", type=Path, metavar="FILE", default=Path("build/benchmarks/linear.json"))
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    parser.add_argument("--max-seconds", type=float, help="start no case after this; precompiling counts")
    parser.add_argument("--precompile", type=int, metavar="N", default=0, help="compile in N processes first")
    return parser


def selected(pattern: str, quick: bool) -> list[str]:
    """Names of cases and overheads to run, those with a target first."""
    wanted = [target for target in TARGETS if target.against != "peers"]
    names = [name for name in [*CASES, *NAMES] if re.search(pattern, name)]
    first = [name for name in names if any(target.matches(name) for target in wanted)]
    return first if quick else [*first, *(name for name in names if name not in first)]


def device_answers() -> bool:
    try:
        torch.cuda.synchronize()
    except Exception:
        return False
    return True


def write(path: Path, rows: Sequence[Row], rates: Rates) -> dict[str, Any]:
    """Write what is known so far; returns it."""
    record = {
        "gpu": torch.cuda.get_device_name(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": {name: metadata.version(name) for name in ("torch", "triton")},
        "bytes_per_s": rates.bytes_per_s,
        "flops_per_s": rates.flops_per_s,
        "rows": list(rows),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return record


@torch.no_grad()
def run(names: Sequence[str], options: argparse.Namespace, deadline: float | None) -> dict[str, Any]:
    """Run the named cases one after the other, printing each; returns the record that the JSON file holds."""
    peers, clock, rates = load_peers(options.peers), GraphClock(), measure_rates()
    print(
        f"{torch.cuda.get_device_name()}, copy {rates.bytes_per_s / 1e12:.2f} TB/s, bf16 product "
        f"{rates.flops_per_s / 1e12:.0f} TFLOP/s, torch {torch.__version__}\n{LEGEND}\n{header()}",
        flush=True,
    )
    rows: list[Row] = []
    record: dict[str, Any] = {}
    stop = ""
    for name in names:
        if not stop and deadline is not None and time.monotonic() > deadline:
            stop = "out of time"
        if stop:
            rows.append({"name": name, "status": "skipped", "reason": stop})
            continue
        begin = time.monotonic()
        print(f"{name:{WIDTH}} ", end="", flush=True)
        if name in CASES:
            row = run_case(CASES[name], clock, rates, peers=peers, rounds=options.rounds)
        else:
            row = run_overhead(name, clock, options.rounds)
        row["seconds"] = time.monotonic() - begin
        rows.append(row)
        print(line(row)[WIDTH + 1 :], flush=True)
        if row["status"] == "error" and not device_answers():
            stop = f"the device no longer answers after {name}"
            continue
        torch.cuda.empty_cache()
        record = write(options.json, rows, rates)
    if stop:
        print(f"{sum(row['status'] == 'skipped' for row in rows)} cases skipped: {stop}")
        record = write(options.json, rows, rates)
    return record


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments and run. -> exit code: 1 where a case was wrong or broke, 2 where nothing could run."""
    options = arguments_parser().parse_args(arguments)
    names = selected(options.cases, options.quick)
    if options.list:
        print("\n".join(names))
        return 0
    if not names:
        print(f"no case is named like {options.cases!r}; --list shows the names", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("this benchmark needs a CUDA GPU; `python -m tests.benchmarks.cpu` runs without", file=sys.stderr)
        return 2
    deadline = None if options.max_seconds is None else time.monotonic() + options.max_seconds
    if options.precompile:
        precompile(names, options.precompile, options.peers, deadline)
    record = run(names, options, deadline)
    rows = record["rows"]
    print("\n".join([*target_lines(rows), *missing_lines(rows)]))
    if options.plot:
        from tests.benchmarks.plot import draw

        draw(record, options.plot)
    broken = failed(rows)
    if broken:
        print("\n".join([f"{len(broken)} cases are wrong or broke", *broken]))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
