"""A decode step of a whole model, in a CUDA graph: no LoRA, ours, and what others do; and prefill.

`python -m tests.benchmarks.decode [--model qwen3-8b] [--batch 16,64,1] [--variants a,b] ...`, or `fxlora bench decode`.

    a  base    the model under torch.compile, no LoRA
    b  ours    the same with `fxlora.attach`, once with an adapter for each request and once with none (ours_none)
    c  vllm    vLLM's fused projections and LoRA ops in the same compiled step (needs --peers)
    d  peft    PEFT's mixed batch, eager
    e  merged  one adapter merged by PEFT, under torch.compile

Models have random weights; every linear and lm_head, and every expert weight of a mixture, has an adapter, one per
request, rank 16. A step takes one token of each request over a static cache of --context tokens. Prefill takes prompts
of --request-tokens each, one adapter each, without a CUDA graph. What a variant computes is compared first with plain
arithmetic on the eager model; a red one has no time. Variants of one batch take turns in random order, and ratios to
`base` are taken round by round.

Results are added to the JSON file; what is there is not run again (--again runs it). --max-seconds starts no
measurement, and no further variant, that would end later. --jobs N runs measurements in N processes at once, of which
one has the GPU and the others compile: memory for N models is needed.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch

from tests.benchmarks.decode_models import PRESETS, build_model, make_bank
from tests.benchmarks.decode_report import draw, table
from tests.benchmarks.decode_run import Measurement, Row, make_work, release, run_measurement
from tests.benchmarks.decode_timing import Turn
from tests.benchmarks.decode_variants import LETTERS
from tests.benchmarks.peers_adapter import load_peers, reason

BUILD_S, COMPILE_S, PEFT_S = 20.0, 45.0, 60.0  # on one H200
LAST_S = 80.0  # one more variant, and the times of all


def arguments_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-8b,llama-3.1-8b", help=f"of {', '.join(PRESETS)}")
    parser.add_argument("--batch", default="16,64,1", help="requests of a decode step; empty for none")
    parser.add_argument("--prefill", default="", help="tokens of a prefill, as 2048,8192")
    parser.add_argument("--variants", default="a,b", help="letters or names, see above")
    parser.add_argument("--layers", type=int, help="fewer than the model has, to try things out")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--request-tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--compiler", default="inductor", help="of every compiled variant")
    parser.add_argument("--peers", type=Path, metavar="DIR", help="folder with peers.py and what it imports")
    parser.add_argument("--json", type=Path, metavar="FILE", default=Path("build/benchmarks/decode.json"))
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    parser.add_argument("--table", action="store_true", help="print the table of the JSON file and run nothing")
    parser.add_argument("--list", action="store_true", help="print what would run and stop")
    parser.add_argument("--again", action="store_true", help="run what the JSON file has already")
    parser.add_argument("--max-seconds", type=float)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--lock", type=Path, help=argparse.SUPPRESS)
    return parser


def measurements_of(options: argparse.Namespace) -> list[Measurement]:
    found = []
    for model in filter(None, options.model.split(",")):
        if model not in PRESETS:
            raise SystemExit(f"no model {model!r}; there are {', '.join(PRESETS)}")
        layers = options.layers or PRESETS[model].layers
        for kind, sizes in (("decode", options.batch), ("prefill", options.prefill)):
            for size in filter(None, sizes.split(",")):
                found.append(Measurement(model, layers, kind, int(size), options.context, options.request_tokens))
    return found


def variants_of(options: argparse.Namespace) -> list[str]:
    chosen = [LETTERS.get(word, word) for word in filter(None, options.variants.split(","))]
    unknown = [name for name in chosen if name not in LETTERS.values()]
    if unknown:
        raise SystemExit(f"no variant {unknown[0]!r}; there are {LETTERS}")
    return chosen


def read_rows(path: Path) -> dict[str, Row]:
    return {row["name"]: row for row in json.loads(path.read_text())["rows"]} if path.is_file() else {}


def add_rows(path: Path, rows: Sequence[Row]) -> dict[str, Any]:
    """Put rows into the file, which other processes may be writing to; returns all that it holds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kept = read_rows(path)
        for row in rows:
            if row["status"] == "ok" or kept.get(row["name"], {}).get("status") != "ok":
                kept[row["name"]] = row
        record = {
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none, a CPU",
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "versions": {name: metadata.version(name) for name in ("torch", "transformers", "peft", "triton")},
            "rows": list(kept.values()),
        }
        path.write_text(json.dumps(record, indent=1) + "\n")
    return record


def missing(given: Measurement, variants: Sequence[str], known: dict[str, Row]) -> list[str]:
    """Variants that have no right result yet."""
    return [name for name in variants if known.get(given.name(name), {}).get("status") != "ok"]


def planned(options: argparse.Namespace) -> list[tuple[Measurement, list[str]]]:
    known = {} if options.again else read_rows(options.json)
    pairs = [(given, missing(given, variants_of(options), known)) for given in measurements_of(options)]
    return [(given, variants) for given, variants in pairs if variants]


def guess_s(variants: Sequence[str]) -> float:
    """Seconds that a measurement takes, about."""
    compiled = len({"base", *variants} - {"peft"})
    return BUILD_S + COMPILE_S * compiled + PEFT_S * ("peft" in variants)


def run(options: argparse.Namespace, plan: Sequence[tuple[Measurement, list[str]]]) -> None:
    deadline = None if options.max_seconds is None else time.monotonic() + options.max_seconds
    torch._dynamo.config.recompile_limit = 64
    device = "cuda" if torch.cuda.is_available() else "cpu"
    turn, peers, model, built = Turn(options.lock), load_peers(options.peers), None, None
    for given, variants in plan:
        if deadline is not None and time.monotonic() + 0.5 * guess_s(variants) > deadline:
            print(f"out of time before {given.name('*')}", flush=True)
            continue
        turn.acquire()
        begin = time.monotonic()
        work = bank = None
        try:
            if built != (given.model, given.layers):
                model, built = None, None
                model = build_model(PRESETS[given.model], given.layers, device)
                built = given.model, given.layers
            bank = make_bank(model, given.requests, given.rank)
            with torch.no_grad():
                work = make_work(given, model, bank, options.compiler, turn, peers)
            last_build = None if deadline is None else deadline - LAST_S
            report = partial(print, flush=True)
            rows = run_measurement(given, work, variants, options.rounds, report, last_build)
        except Exception as error:
            rows = [given.row(name, "error", reason=reason(error)) for name in variants]
        if work is not None:
            release(work)
        work = bank = None
        turn.release()
        record = add_rows(options.json, rows)
        print(f"{given.name('*')}: {time.monotonic() - begin:.0f} s\n{table(record, given.model)}", flush=True)


def run_jobs(options: argparse.Namespace, plan: Sequence[tuple[Measurement, list[str]]]) -> None:
    """One process for each measurement, several at a time."""
    deadline = None if options.max_seconds is None else time.monotonic() + options.max_seconds
    options.json.parent.mkdir(parents=True, exist_ok=True)
    lock = options.json.with_suffix(".gpu.lock")
    waiting, running = list(plan), []
    while waiting or running:
        running = [process for process in running if process.poll() is None]
        while waiting and len(running) < options.jobs:
            given, variants = waiting.pop(0)
            if deadline is not None and time.monotonic() + 0.5 * guess_s(variants) > deadline:
                print(f"out of time before {given.name('*')}", flush=True)
                continue
            sizes = (
                ["--batch", str(given.size)]
                if given.kind == "decode"
                else ["--batch", "", "--prefill", str(given.size)]
            )
            command = [sys.executable, "-m", "tests.benchmarks.decode", "--model", given.model, *sizes]
            command += [
                "--layers",
                str(given.layers),
                "--context",
                str(given.context),
                "--variants",
                ",".join(variants),
            ]
            command += ["--request-tokens", str(given.request_tokens), "--rounds", str(options.rounds)]
            command += ["--compiler", options.compiler, "--json", str(options.json), "--lock", str(lock)]
            command += ["--again"] if options.again else []
            command += [] if deadline is None else ["--max-seconds", str(deadline - time.monotonic())]
            command += ["--peers", str(options.peers)] if options.peers else []
            running.append(subprocess.Popen(command))
        time.sleep(0.2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments and run. -> exit code: 1 where a variant was wrong or broke"""
    options = arguments_parser().parse_args(arguments)
    plan = [] if options.table else planned(options)
    wanted = [given.name(name) for given, variants in plan for name in variants]
    if plan and options.lock is None:
        total = sum(guess_s(variants) for _, variants in plan) / max(1, min(options.jobs, len(plan)))
        print(f"{len(plan)} measurements, on an H200 about {total / 60:.0f} minutes:")
        for given, variants in plan:
            print(f"  {given.name('')}{{{','.join(dict.fromkeys(['base', *variants]))}}}  {guess_s(variants):.0f} s")
    if options.list:
        return 0
    if options.jobs > 1 and len(plan) > 1:
        run_jobs(options, plan)
    else:
        run(options, plan)
    rows = read_rows(options.json)
    if options.lock is None and rows:
        record = json.loads(options.json.read_text())
        print(table(record))
        if options.plot:
            draw(record, options.plot)
    broken = [rows[name] for name in wanted if name in rows and rows[name]["status"] != "ok"]
    for row in broken:
        print(f"{row['name']} {row['status'].upper()}: {row['reason']}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
