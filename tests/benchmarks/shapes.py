"""Layers of real models, one token to a prefill: does any shape cost far more beside torch.mm than the others do?

`python -m tests.benchmarks.shapes [--cases REGEX] [--precompile N] ...`, options as of `tests.benchmarks.linear`.

`linear` measures few shapes closely; here are those that models have, each once. Tiles follow from shapes by rules, and
a rule that fits the shapes it was made for can fail at another one: a kernel that spills there costs ten times as much.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from tests.benchmarks import driver, linear_report
from tests.benchmarks.driver import Row, Suite
from tests.benchmarks.gpu_timing import Clock, Rates
from tests.benchmarks.linear_cases import Case, Target, suffix
from tests.benchmarks.linear_run import run_case, warm_case

# Hidden size, columns of q and of k, inner size.
MODELS: dict[str, tuple[int, int, int, int]] = {
    "qwen2.5-0.5b": (896, 896, 128, 4864),
    "qwen2.5-1.5b": (1536, 1536, 256, 8960),
    "llama-3.2-1b": (2048, 2048, 512, 8192),
    "qwen3-4b": (2560, 4096, 1024, 9728),
    "llama-3.2-3b": (3072, 3072, 1024, 8192),
    "gemma-2-9b": (3584, 4096, 2048, 14336),
    "qwen2.5-7b": (3584, 3584, 512, 18944),
    "llama-2-7b": (4096, 4096, 4096, 11008),
    "qwen3-8b": (4096, 4096, 1024, 12288),
    "llama-2-13b": (5120, 5120, 5120, 13824),
    "qwen2.5-32b": (5120, 5120, 1024, 27648),
    "llama-3-70b": (8192, 8192, 1024, 28672),
}
BATCHES = ((1, 1), (4, 4), (16, 16), (64, 8), (256, 64), (2048, 8))


def _cases() -> Iterator[Case]:
    for model, (hidden, query, key, inner) in MODELS.items():
        layers = {
            "qkv": (hidden, (query, key, key)),
            "o": (query, (hidden,)),
            "gate_up": (hidden, (inner, inner)),
            "down": (inner, (hidden,)),
        }
        for layer, (features, outs) in layers.items():
            for rows, adapters in BATCHES:
                name = f"{model}-{layer}-{suffix(rows, adapters, 16)}"
                yield Case(name, "linear", rows, features, outs, 16, adapters, in_table=False)


CASES: dict[str, Case] = {case.name: case for case in _cases()}

TARGETS: Sequence[Target] = (
    Target(r".*-M(1|4|16)-.*", "base", 1.5),
    Target(r".*-M64-.*", "base", 2.0),
    Target(r".*-M256-.*", "base", 2.5),
    Target(r".*-M2048-.*", "base", 1.5),
)
"""Wide of what `linear` asks for: only a shape that its tiles do not fit is outside."""


REPORT = replace(linear_report.REPORT, width=max(map(len, CASES)), targets=TARGETS)


def run_one(name: str, clock: Clock, rates: Rates, peers: Any, rounds: int) -> Row:
    """The result row of a case."""
    return run_case(CASES[name], clock, rates, peers=peers, rounds=rounds)


def warm_one(name: str, peers: Any) -> None:
    """Run everything of a case once, so that its kernels are compiled."""
    warm_case(CASES[name], peers)


SUITE = Suite("tests.benchmarks.shapes", __doc__ or "", list(CASES), TARGETS, REPORT, run_one, warm_one)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments and run. -> exit code: 1 where a case was wrong or broke, 2 where nothing could run."""
    return driver.main(SUITE, arguments)


if __name__ == "__main__":
    sys.exit(main())
