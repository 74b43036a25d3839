"""The sweep over layers of real models as far as a CPU can run it: its cases, its targets, one tiny case."""

from __future__ import annotations

from dataclasses import replace

import torch

from tests.benchmarks import driver, shapes
from tests.benchmarks.gpu_timing import Rates, WallClock
from tests.benchmarks.linear_run import run_case


def test_every_layer_of_every_model_has_one_target_at_every_batch() -> None:
    assert len(shapes.CASES) == len(shapes.MODELS) * 4 * len(shapes.BATCHES)
    for name in shapes.CASES:
        assert sum(target.matches(name) for target in shapes.TARGETS) == 1, name
    assert shapes.CASES["llama-2-7b-down-M1-a1-r16"].features == 11008
    names = driver.selected(shapes.SUITE, "down-M1-", quick=True)
    assert len(names) == len(shapes.MODELS)
    assert max(map(len, shapes.CASES)) <= shapes.REPORT.width


def test_a_tiny_group_runs_under_the_clock_on_the_wall() -> None:
    case = replace(shapes.CASES["llama-3.2-1b-qkv-M4-a4-r16"], features=32, outs=(24, 8, 8))
    rates = Rates(bytes_per_s=1e10, flops_per_s=1e11)
    row = run_case(case, WallClock(), rates, peers=None, rounds=3, dtype=torch.float32, sets=2)
    assert row["status"] == "ok", row
    assert row["error"] < 1e-5
