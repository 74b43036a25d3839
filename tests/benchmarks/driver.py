"""What the GPU benchmarks share: which cases run, in which order, what is printed and written.

A benchmark is a `Suite`. Its cases run one after another; one that is wrong or breaks gives a row that says so, and the
exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.gpu_timing import Clock, GraphClock, Rates, measure_rates
from tests.benchmarks.linear_cases import Target
from tests.benchmarks.linear_report import Report, failed, missing_lines
from tests.benchmarks.peers_adapter import load_peers
from tests.benchmarks.precompile import precompile

ROUNDS = 30
Row = dict[str, Any]


@dataclass(frozen=True)
class Suite:
    """One benchmark.

    module: its import path, by which other processes find it as `SUITE`. doc: what --help shows. names: of everything
    it can run. run_one: (name, clock, rates, peers, rounds) -> result row. warm_one: (name, peers), runs everything of
    a name once. plot: draws a record, if the benchmark has one.
    """

    module: str
    doc: str
    names: Sequence[str]
    targets: Sequence[Target]
    report: Report
    run_one: Callable[[str, Clock, Rates, Any, int], Row]
    warm_one: Callable[[str, Any], None]
    plot: Callable[[dict[str, Any], Path], None] | None = None

    @property
    def json_path(self) -> Path:
        return Path(f"build/benchmarks/{self.module.rsplit('.', 1)[1]}.json")


def arguments_parser(suite: Suite) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=suite.doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", metavar="REGEX", default="", help="only names in which this is found")
    parser.add_argument("--quick", action="store_true", help="only cases with a target other than the peers")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="at most; long cases take fewer")
    parser.add_argument("--peers", type=Path, metavar="DIR", help="folder with peers.py and what it imports")
    parser.add_argument("--json", type=Path, metavar="FILE", default=suite.json_path)
    if suite.plot:
        parser.add_argument("--plot", type=Path, metavar="FILE.png")
    parser.add_argument("--max-seconds", type=float, help="start no case after this; precompiling counts")
    parser.add_argument("--precompile", type=int, metavar="N", default=0, help="compile in N processes first")
    return parser


def selected(suite: Suite, pattern: str, quick: bool) -> list[str]:
    """Names to run, those with a target first."""
    wanted = [target for target in suite.targets if target.against != "peers"]
    names = [name for name in suite.names if re.search(pattern, name)]
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
def run(suite: Suite, names: Sequence[str], options: argparse.Namespace, deadline: float | None) -> dict[str, Any]:
    """Run the named cases one after the other, printing each; returns the record that the JSON file holds."""
    peers, clock, rates = load_peers(options.peers), GraphClock(), measure_rates()
    print(
        f"{torch.cuda.get_device_name()}, copy {rates.bytes_per_s / 1e12:.2f} TB/s, bf16 product "
        f"{rates.flops_per_s / 1e12:.0f} TFLOP/s, torch {torch.__version__}\n"
        f"{suite.report.legend}\n{suite.report.header()}",
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
        print(f"{name:{suite.report.width}} ", end="", flush=True)
        row = suite.run_one(name, clock, rates, peers, options.rounds)
        row["seconds"] = time.monotonic() - begin
        rows.append(row)
        print(suite.report.line(row)[suite.report.width + 1 :], flush=True)
        if row["status"] == "error" and not device_answers():
            stop = f"the device no longer answers after {name}"
            continue
        torch.cuda.empty_cache()
        record = write(options.json, rows, rates)
    if stop:
        print(f"{sum(row['status'] == 'skipped' for row in rows)} cases skipped: {stop}")
        record = write(options.json, rows, rates)
    return record


def main(suite: Suite, arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments and run. -> exit code: 1 where a case was wrong or broke, 2 where nothing could run."""
    options = arguments_parser(suite).parse_args(arguments)
    names = selected(suite, options.cases, options.quick)
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
        precompile(suite.module, names, options.precompile, options.peers, deadline)
    record = run(suite, names, options, deadline)
    rows = record["rows"]
    print("\n".join([*suite.report.target_lines(rows), *missing_lines(rows)]))
    if suite.plot and options.plot:
        suite.plot(record, options.plot)
    broken = failed(rows, suite.report)
    if broken:
        print("\n".join([f"{len(broken)} cases are wrong or broke", *broken]))
    return 1 if broken else 0
