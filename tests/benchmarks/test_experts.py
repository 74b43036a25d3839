"""The GPU benchmark of expert weights as far as a CPU can run it: its cases, targets and numbers, and tiny cases."""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks import driver, experts
from tests.benchmarks.experts_build import Built, build
from tests.benchmarks.experts_cases import CASES, TARGETS, ExpertCase
from tests.benchmarks.experts_run import run_case, with_base
from tests.benchmarks.gpu_timing import Rates, WallClock

RATES = Rates(bytes_per_s=1e10, flops_per_s=1e11)


def tiny(name: str, **changes: Any) -> ExpertCase:
    return replace(CASES[name], **{"num_experts": 4, "top_k": 2, "features": 32, "out": 48, **changes})


def run(case: ExpertCase, **options: Any) -> dict[str, Any]:
    return run_case(case, WallClock(), RATES, rounds=3, dtype=torch.float32, sets=2, **options)


def test_every_asked_for_case_is_there() -> None:
    for model in ("qwen3", "mixtral", "deepseek"):
        for rows, adapters in ((1, 1), (16, 1), (16, 8), (16, 16), (64, 8), (2048, 1), (2048, 16)):
            for rank in (8, 16, 64):
                assert f"{model}-gate_up-M{rows}-a{adapters}-r{rank}" in CASES
                assert f"{model}-down-M{rows}-a{adapters}-r{rank}" in CASES
    assert CASES["qwen3-gate_up-M16-a8-r16"].features == 2048
    assert CASES["qwen3-gate_up-M16-a8-r16"].out == 2 * 768
    for target in TARGETS:
        assert any(target.matches(name) for name in CASES), target.pattern
    names = driver.selected(experts.SUITE, "", quick=False)
    assert sorted(names) == sorted([*CASES, *experts.SEGMENT_NAMES])
    assert max(map(len, names)) <= experts.REPORT.width


@pytest.mark.parametrize(
    "case",
    [
        tiny("qwen3-gate_up-M1-a1-r8"),
        tiny("qwen3-gate_up-M16-a8-r16"),
        tiny("qwen3-down-M64-a16-r8"),
        tiny("mixtral-gate_up-M2048-a8-r16", rows=300),
        tiny("qwen3-gate_up-ids-M16-a16-r16"),
    ],
    ids=lambda case: case.name,
)
def test_a_tiny_case_runs_under_the_clock_on_the_wall(case: ExpertCase) -> None:
    row = run(case)
    assert row["status"] == "ok", row
    assert row["error"] < 1e-5
    assert row["rounds"] == 3
    assert row["base_name"] in ("grouped_mm", "bare")
    assert row["us"]["base"] == row["us"][row["base_name"]]
    assert "best_peer" not in row
    assert row["missing"] == dict.fromkeys(("vllm", "sglang"), "no --peers folder")
    assert experts.REPORT.line(row).endswith(row["base_name"])
    json.dumps(row)


def test_ours_without_adapters_and_the_plain_grouped_gemm_agree() -> None:
    built = build(tiny("qwen3-gate_up-M16-a8-r16"), "cpu", torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(built.bare(1), built.base(1))
        assert not torch.allclose(built.ours(1)[0], built.base(1)[0])
    built.close()


def test_least_work() -> None:
    case = tiny("qwen3-gate_up-M1-a1-r16")
    built = build(case, "cpu", torch.float32)
    read = 2 * 32 * 48 + 2 * 16 * 80 + 2 * 80
    assert built.least() == (2 * read, 2 * 2 * (32 * 48 + 16 * 80))
    built.close()


@pytest.mark.parametrize("spoil", [lambda y: y + 0.1 * y.norm() / y.numel() ** 0.5, lambda y: y * torch.nan])
def test_a_wrong_result_is_red(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[torch.Tensor], torch.Tensor]) -> None:
    right = Built.ours
    monkeypatch.setattr(Built, "ours", lambda self, i: [spoil(y) if i else y for y in right(self, i)])
    row = run(tiny("qwen3-gate_up-M16-a8-r16"))
    assert row["status"] == "red"
    assert "us" not in row


def test_the_base_is_the_fastest_without_adapters() -> None:
    times = {"grouped_mm plain": [3.0], "bare plain": [2.0], "ours plain": [1.0]}
    times |= {name.replace("plain", "chain"): value for name, value in times.items()}
    name, found = with_base(times)
    assert (name, found["base plain"], found["base chain"]) == ("bare", [2.0], [2.0])


def plain_moe(
    x: torch.Tensor, W: Any, A: Any, B: Any, topk_ids: torch.Tensor, topk_weights: torch.Tensor, ids: torch.Tensor,
    out: Any, down: bool = False,
) -> Callable[[int], None]:  # fmt: skip
    """A peer in plain torch, from the problem alone."""

    def step(i: int) -> None:
        for token in range(len(topk_ids)):
            for k, expert in enumerate(topk_ids[token].tolist()):
                row, slot = x[token * topk_ids.shape[1] + k if down else token], int(ids[token])
                y = W[i][expert] @ row + B[i][0][slot, expert] @ (A[i][0][slot, expert] @ row)
                out[i][token, k] = y * (topk_weights[token, k] if down else 1)

    return step


def test_peers_get_the_same_problem_and_a_wrong_one_is_left_out() -> None:
    def wrong(**problem: Any) -> Callable[[int], Any]:
        return lambda i: problem["out"][i].fill_(1.0)

    def base(**problem: Any) -> Callable[[int], Any]:
        return plain_moe(**{**problem, "B": [[torch.zeros_like(b) for b in bs] for bs in problem["B"]]})

    peers = types.SimpleNamespace(moe_base=base, vllm_moe=plain_moe, sglang_moe=wrong)
    for name in ("qwen3-gate_up-M16-a8-r16", "qwen3-down-M16-a8-r16", "qwen3-gate_up-ids-M1-a1-r16"):
        row = run(tiny(name), peers=peers)
        assert row["status"] == "ok", row
        assert set(row["peers"]) == {"vllm"}
        assert row["missing"]["sglang"].startswith("wrong result")
        assert "triton" in row["us"]


@pytest.mark.parametrize("name", ["segments-offsets-mixtral-M16", "segments-ids-qwen3-M16"])
def test_tables_are_timed(name: str) -> None:
    row = experts.run_one(name, WallClock(), RATES, None, 2)
    assert row["status"] == "ok", row


def test_a_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [run(tiny("qwen3-gate_up-M16-a8-r16"))]
    experts.draw({"rows": rows, "gpu": "some GPU", "date": "2026-01-01"}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_without_a_gpu_it_lists_and_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert experts.main(["--list", "--cases", "^qwen3-down-M1-a1-r8"]) == 0
    assert capsys.readouterr().out == "qwen3-down-M1-a1-r8\n"
    assert experts.main([]) == 2
