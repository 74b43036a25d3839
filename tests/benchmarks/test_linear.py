"""The GPU benchmark of linears as far as a CPU can run it: its cases, targets and numbers, and tiny cases."""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks import driver, linear, linear_run, peers_adapter, plot
from tests.benchmarks.gpu_timing import Rates, WallClock, less, ratios, repeats_of, rounds_within, spread
from tests.benchmarks.linear_build import Built, build, relative_error
from tests.benchmarks.linear_cases import CASES, TARGETS, Case, judge, least_bytes, least_flops, set_count
from tests.benchmarks.linear_report import REPORT, missing_lines
from tests.benchmarks.linear_run import run_case, summarise
from tests.benchmarks.overheads import HOST_CASES, NAMES, run_overhead

RATES = Rates(bytes_per_s=1e10, flops_per_s=1e11)
# Rows, adapters and rank that the kernels were designed with, by shape; prefill has the last two of each.
DECODE = "1-1-16 1-1-64 4-4-16 16-16-16 16-16-64 64-8-16 64-8-64 64-64-16 64-64-64"
DESIGNED = {
    "4096x1024": "1-1-16 16-16-16 64-8-16 64-64-16",
    "2048x4096": "1-1-16 4-4-16 16-16-16 64-8-16 64-64-16",
    "4096x4096": f"{DECODE} 2-2-16 16-1-16 64-1-16 2048-8-16 2048-8-64 8192-16-16 8192-16-64",
    "14336x4096": DECODE,
    "4096x28672": f"{DECODE} 2048-8-16 2048-8-64 8192-16-16 8192-16-64",
    "2048x128": f"{DECODE} 4-4-64",
    "qkv": "1-1-16 16-16-16 64-8-16 64-64-16",
}
LATER = "4096x4096-M256-a64-r64 2048x4096-M256-a64-r16 lm_head-M1-a1-r16 lm_head-M16-a16-r16 lm_head-M64-a64-r16"


def tiny(name: str, **changes: Any) -> Case:
    case = CASES[name]
    features = 96
    return replace(case, features=features, outs=tuple(32 * (i + 1) for i in range(len(case.outs))), **changes)


def run(case: Case, **options: Any) -> dict[str, Any]:
    return run_case(case, WallClock(), RATES, rounds=3, dtype=torch.float32, sets=2, **options)


def test_every_designed_case_is_there() -> None:
    for shape, calls in DESIGNED.items():
        for call in calls.split():
            rows, adapters, rank = call.split("-")
            assert f"{shape}-M{rows}-a{adapters}-r{rank}" in CASES
    assert CASES.keys() >= set(LATER.split())
    assert len({*CASES, *NAMES}) == len(CASES) + len(NAMES)
    assert max(map(len, [*CASES, *NAMES])) <= REPORT.width


def test_every_target_speaks_of_a_case() -> None:
    for target in TARGETS:
        assert any(target.matches(name) for name in [*CASES, *NAMES]), target.pattern
    quick = driver.selected(linear.SUITE, "", quick=True)
    assert "4096x4096-M1-a1-r16" in quick
    assert "bare-M1-r16" not in quick
    everything = driver.selected(linear.SUITE, "", quick=False)
    assert everything[: len(quick)] == quick
    assert sorted(everything) == sorted([*CASES, *NAMES])
    assert driver.selected(linear.SUITE, "^qkv-M1-", quick=False) == ["qkv-M1-a1-r16"]


def test_least_work_and_weight_sets() -> None:
    case = CASES["qkv-M16-a16-r16"]
    pairs = 16 * 16 * (3 * 4096 + 6144)
    assert least_bytes(case, 16 * 16) == 2 * (4096 * 6144 + 16 * 4096 + 16 * 6144 + pairs)
    assert least_flops(case, 16 * 16) == 2 * 16 * 4096 * 6144 + 2 * pairs
    assert set_count(CASES["4096x28672-M1-a1-r16"]) == 2
    assert set_count(CASES["4096x4096-M1-a1-r16"]) == 12
    assert set_count(CASES["2048x128-M1-a1-r16"]) == 128
    assert RATES.floor_us(10**6, 10**5) == pytest.approx(100)


def test_repeats_and_rounds_keep_within_their_budgets() -> None:
    assert repeats_of(12, 10.0) == 3
    assert repeats_of(2, 2800.0) == 1
    assert rounds_within(0.01, 30) == 30
    assert rounds_within(0.1, 30) == 20
    assert rounds_within(10.0, 30) == 7
    assert rounds_within(10.0, 3) == 3


def test_ratios_are_taken_round_by_round() -> None:
    base, ours = [10.0, 20.0, 40.0], [9.0, 18.0, 48.0]
    assert ratios(ours, base) == {"median": 0.9, "p10": 0.9, "p90": 1.2}
    assert spread(list(range(11))) == {"median": 5, "p10": 1, "p90": 9}
    assert less([3.0, 1.0], [1.0, 2.0]) == [2.0, 0.01]


def fake_times() -> dict[str, list[float]]:
    return {
        "tiny": [1.0, 2.0, 1.0],
        "base chain": [10.0, 10.0, 10.0], "base plain": [11.0, 12.0, 11.0],
        "ours chain": [8.0, 8.0, 8.0], "ours plain": [10.0, 11.0, 10.0],
        "vllm chain": [20.0, 20.0, 20.0], "vllm plain": [19.0, 20.0, 19.0],
        "sglang_v2 chain": [16.0, 16.0, 16.0], "sglang_v2 plain": [28.0, 29.0, 28.0],
    }  # fmt: skip


def fake_row(name: str = "4096x4096-M1-a1-r16", **changes: Any) -> dict[str, Any]:
    floor = {"floor_us": 6.0, "floor_share": {"plain": 6 / 9, "chain": 6 / 8}}
    return {"name": name, "status": "ok", "rows": 1, "adapters": 1, **floor, **summarise(fake_times()), **changes}


def test_the_tiny_kernel_is_taken_off_and_peers_are_compared_form_by_form() -> None:
    row = summarise(fake_times())
    assert row["ratio"]["chain"]["median"] == pytest.approx(0.8)
    assert row["ratio"]["plain"]["median"] == pytest.approx(0.9)
    assert row["us"]["ours"]["plain"]["median"] == 9
    assert row["us_with_tiny"]["ours"]["median"] == 10
    assert row["best_peer"]["plain"] == {"name": "vllm", "ratio": 2.0}
    assert row["best_peer"]["chain"] == {"name": "sglang_v2", "ratio": 2.0}


def test_targets_are_met_or_missed_by_the_plain_ratio() -> None:
    row = fake_row()
    verdicts = {verdict.target.against: verdict for verdict in judge([row])}
    assert verdicts["base"].value == pytest.approx(0.9)
    assert not verdicts["base"].met  # 0.85 is asked for
    assert verdicts["peers"].value == pytest.approx(0.5)
    assert verdicts["peers"].met
    assert {v.target.against: v.met for v in judge([row], "chain")}["base"]
    [floor] = [v for v in judge([fake_row("4096x4096-M64-a64-r16")]) if v.target.against == "floor"]
    assert floor.value == pytest.approx(9 / 6)
    assert not floor.met
    [host] = judge([{"name": "host-linear", "status": "ok", "host_us": 24.0}])
    assert host.met
    red = judge([{"name": "4096x4096-M1-a1-r16", "status": "red", "reason": "wrong"}])
    assert red
    assert not any(verdict.met for verdict in red)


def test_the_report_shows_every_state() -> None:
    rows = [
        fake_row(missing={"peft": "too slow"}),
        {"name": "4096x4096-M16-a16-r16", "status": "red", "reason": "set 0: relative error 1.0e+00"},
        {"name": "host-linear", "status": "ok", "host_us": 24.0, "base_host_us": 5.0},
    ]
    assert len(REPORT.line(rows[0])) <= len(REPORT.header()) + 2
    assert "RED: set 0" in REPORT.line(rows[1])
    text = "\n".join([*REPORT.target_lines(rows), *missing_lines(rows)])
    assert "targets: 2 of 3 met" in text
    assert "MISSED  4096x4096-M1-a1-r16          0.900 x base, at most 0.85 (chain 0.800)" in text
    assert "peft: n/a in 1 cases: too slow" in text


@pytest.mark.parametrize(
    "case",
    [
        tiny("4096x4096-M16-a16-r16"),
        tiny("4096x4096-M2048-a8-r16", rows=300),
        tiny("qkv-M16-a16-r16"),
        tiny("mixed-M16-a16-r8,16,64"),
        tiny("two_slots-M16-a16-r16"),
        tiny("bare-M16-r16"),
        tiny("half_bare-M64-a8-r16"),
        tiny("lm_head-M16-a16-r16"),
        tiny("embedding-M16-a16-r16"),
    ],
    ids=lambda case: case.name,
)
def test_a_tiny_case_runs_under_the_clock_on_the_wall(case: Case) -> None:
    row = run(case)
    assert row["status"] == "ok", row
    assert row["error"] < 1e-5
    assert row["rounds"] == 3
    assert row["us"]["base"]["chain"]["median"] > 0
    assert row["missing"].keys() == set(peers_adapter.PEERS)
    json.dumps(row)


def test_rows_lie_in_runs_and_prefill_in_ragged_ones() -> None:
    built = build(tiny("4096x4096-M2048-a8-r16", rows=400), "cpu", torch.float32, sets=1)
    runs = built.row_slots[:, 0].unique_consecutive(return_counts=True)
    built.close()
    assert len(runs[0]) == len(runs[0].unique()) == 8
    assert len(runs[1].unique()) > 2
    half = build(tiny("half_bare-M64-a8-r16"), "cpu", torch.float32, sets=1)
    half.close()
    assert (half.row_slots[:, 0] == -1).nonzero()[:, 0].tolist() == list(range(32, 64))


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("spoil", [lambda y: y + 0.1 * y.norm() / y.numel() ** 0.5, lambda y: y * torch.nan])
def test_a_wrong_result_is_red_and_has_no_time(
    monkeypatch: pytest.MonkeyPatch, which: int, spoil: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    right = Built.ours

    def wrong(self: Built, i: int) -> list[torch.Tensor]:
        return [spoil(y) if i == which else y for y in right(self, i)]

    monkeypatch.setattr(Built, "ours", wrong)
    row = run(tiny("4096x4096-M16-a16-r16"))
    assert row["status"] == "red"
    assert "us" not in row
    assert row["name"] == "4096x4096-M16-a16-r16"


def test_a_result_that_goes_wrong_in_the_rounds_is_red() -> None:
    class Racing(WallClock):
        def rounds(self, prepared: Any, rounds: int) -> dict[str, list[float]]:
            prepared["ours chain"].result[0][3, 5] = 1e3
            return super().rounds(prepared, rounds)

    row = run_case(tiny("4096x4096-M16-a16-r16"), Racing(), RATES, rounds=2, dtype=torch.float32, sets=2)
    assert row["status"] == "red"
    assert "chain after 2 rounds" in row["reason"]


def test_a_case_that_breaks_is_an_error_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Built, i: int) -> list[torch.Tensor]:
        raise RuntimeError("no such\nkernel")

    monkeypatch.setattr(Built, "ours", broken)
    row = run(tiny("4096x4096-M16-a16-r16"))
    assert (row["status"], row["reason"]) == ("error", "RuntimeError: no such kernel")


def gathered(x: torch.Tensor, W: Any, A: Any, B: Any, ids: torch.Tensor, out: Any, ranks: Any) -> Callable[[int], None]:
    """A peer in plain torch, from the problem alone."""

    def step(i: int) -> None:
        delta = []
        for a_SRK, b_SNR in zip(A[i], B[i], strict=True):
            at, live = ids.long().clamp(min=0), (ids >= 0).to(x.dtype)[:, None]
            h = torch.einsum("trk,tk->tr", a_SRK[at], x) * live
            delta.append(torch.einsum("tnr,tr->tn", b_SNR[at], h))
        out[i].copy_(x @ W[i].t() + torch.cat(delta, dim=1))

    return step


def fake_peers() -> Any:
    def refuses(**problem: Any) -> None:
        raise ImportError("no module")

    def wrong(**problem: Any) -> Callable[[int], Any]:
        return lambda i: problem["out"][i].fill_(1.0)

    return types.SimpleNamespace(
        gathered_bmm=gathered, peft_mixed=gathered, vllm_linear=refuses, sglang_linear=wrong, sglang_csgmv_linear=wrong
    )


def test_peers_get_the_same_problem_and_a_wrong_one_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("4096x4096-M16-a16-r16", "qkv-M16-a16-r16", "mixed-M16-a16-r8,16,64", "half_bare-M64-a8-r16"):
        row = run(tiny(name), peers=fake_peers())
        assert row["status"] == "ok", row
        assert set(row["peers"]) == {"gathered_bmm"}
        assert row["best_peer"]["plain"]["name"] == "gathered_bmm"
        assert row["missing"]["vllm"] == "ImportError: no module"
        assert row["missing"]["sglang_v2"].startswith("wrong result, set 0: relative error")
    monkeypatch.setattr(peers_adapter, "PEFT_SHAPES", ((96, 32),))
    row = run(tiny("4096x4096-M16-a16-r16"), peers=fake_peers())
    assert row["us"]["peft"]["eager"]["median"] > 0
    assert "peft" not in row["missing"]


def test_peers_that_do_not_fit_say_why() -> None:
    assert peers_adapter.unfit(CASES["two_slots-M16-a16-r16"], "vllm")
    assert peers_adapter.unfit(CASES["embedding-M1-a1-r16"], "vllm")
    assert peers_adapter.unfit(CASES["2048x4096-M2048-a8-r16"], "gathered_bmm")
    assert peers_adapter.unfit(CASES["2048x4096-M2048-a8-r16"], "vllm") is None
    with pytest.raises(FileNotFoundError, match=r"no peers\.py"):
        peers_adapter.load_peers(Path("nowhere"))


@pytest.mark.parametrize("name", ["segments-T16-S64", "host-segment_rows", "host-group3"])
def test_overheads_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.benchmarks.overheads.HOST_CALLS", 2)
    assert "host-group3" in HOST_CASES
    row = run_overhead(name, WallClock(), 2)
    assert row["status"] == "ok", row
    assert REPORT.line(row).endswith("us") or "us a call" in REPORT.line(row)


def test_relative_error_refuses_shapes_and_infinities() -> None:
    truth = torch.ones(2, 3, dtype=torch.float64)
    assert relative_error(torch.ones(2, 3), truth) == 0
    assert relative_error(torch.ones(3, 2), truth) == float("inf")
    assert relative_error(torch.full((2, 3), float("inf")), truth) == float("inf")


def test_without_a_gpu_it_lists_and_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert linear.main(["--list", "--cases", "^qkv-M1-"]) == 0
    assert capsys.readouterr().out == "qkv-M1-a1-r16\n"
    assert linear.main(["--cases", "nothing like it"]) == 2
    assert linear.main([]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err


def test_curves_take_the_most_adapters_of_each_batch() -> None:
    rows = [fake_row("4096x4096-M64-a8-r16", rows=64, adapters=8), fake_row("4096x4096-M1-a1-r16")]
    rows.append({**fake_row("4096x4096-M64-a64-r16", rows=64, adapters=64), "us": fake_row()["us"]})
    rows[-1]["us"]["ours"]["plain"]["median"] = 20.0
    rows.append({"name": "4096x4096-M16-a16-r16", "status": "red", "reason": "wrong"})
    assert plot.curves(rows, "4096x4096")["ours"] == [(1, pytest.approx(0.9)), (64, pytest.approx(2.0))]
    merged = plot.merge([{"gpu": "a", "rows": rows[:1]}, {"gpu": "b", "rows": [{**rows[0], "rows": 5}]}])
    assert [row["rows"] for row in merged["rows"]] == [5]
    assert merged["gpu"] == "b"


def test_a_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot.draw({"rows": [fake_row()], "gpu": "some GPU", "date": "2026-01-01"}, tmp_path / "made" / "plot.png")
    assert (tmp_path / "made" / "plot.png").stat().st_size > 1000


def test_a_peer_that_cannot_be_captured_is_missing() -> None:
    class Refusing(WallClock):
        prepared = 0

        def prepare(self, step: Any, sets: int, repeats: int) -> Any:
            self.prepared += 1
            if self.prepared > 5:
                raise RuntimeError("not while capturing")
            return super().prepare(step, sets, repeats)

    missing: dict[str, str] = {}
    steps = dict.fromkeys(("base", "ours", "vllm"), lambda i: i)
    prepared = linear_run.prepare_all(steps, Refusing(), 1, 1, missing)
    assert list(prepared) == ["tiny", "base chain", "base plain", "ours chain", "ours plain"]
    assert missing == {"vllm": "RuntimeError: not while capturing"}
