"""The shrink of experts that a Hopper GPU runs beside their product gives the bits of the plain one, which
test_lora_experts.py holds to the reference, however many programs make it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from fxlora.kernels.expert_tiles import ExpertBesideTile, expert_beside_tile, expert_prefill_tile
from tests.kernels.expert_cases import ExpertCase, make_expert_case
from tests.kernels.test_prefill_hopper import IS_HOPPER

ROWS = {"tiles of 64": 1000, "tiles of 128": 600}  # of seven experts
HANGS = """
import torch, triton
from fxlora.kernels.overlap import wait_until_ready
@triton.jit
def kernel(ready_ptr):
    wait_until_ready(ready_ptr)
kernel[(2,)](torch.zeros(1, dtype=torch.int32, device="cuda"))
torch.cuda.synchronize()
"""


def of_every_share(test: Callable[..., None]) -> Callable[..., None]:
    """A test on a GPU of compute capability 9: few programs beside the product, one of them, all before it."""
    shares = [ExpertBesideTile(3, 10000), ExpertBesideTile(1, 10000), ExpertBesideTile(1, 0)]
    marked = pytest.mark.parametrize("shrink", shares, ids=["few", "one", "all"])(test)
    return pytest.mark.gpu(pytest.mark.skipif(not IS_HOPPER, reason="needs a GPU of compute capability 9")(marked))


def large_case(**options: Any) -> ExpertCase:
    sizes = {"rows": 1000, "experts": 7, "features": 520, "out": 264, "ranks": (8, 16, 0, 3, 40)}
    return make_expert_case(**{**sizes, "dtype": torch.bfloat16, "device": "cuda", **options})


def call_of(case: ExpertCase) -> Any:
    from fxlora.kernels.expert_call import ExpertCall, ExpertSite

    rest = (case.row_slots, case.row_coeffs, case.segments(), ExpertSite(case.pool))
    return ExpertCall(case.x, case.weight, case.bias, *rest)


def run(case: ExpertCase, shrink: ExpertBesideTile | None = None) -> torch.Tensor:
    """Ten programs make the product, so that several tiles follow each other."""
    from fxlora.kernels import expert_prefill

    call = call_of(case)
    experts, columns, features = case.weight.shape
    sizes = (call.rows, experts, call.width == 1, features, columns, case.x.dtype, call.site.h_width)
    tile = replace(expert_prefill_tile(*sizes), programs=1, early=False)
    few = 0 if shrink is None else shrink.few
    with mock.patch.object(expert_prefill, "multiprocessors", return_value=10 + few):
        return expert_prefill.prefill(call, tile if shrink is None else replace(tile, shrink=shrink, early=True))


def assert_same(case: ExpertCase, shrink: ExpertBesideTile) -> None:
    assert torch.equal(run(case), run(case, shrink))


@of_every_share
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("slot_runs", [1, 30])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_orders_and_mixed_ranks(rows: int, slot_runs: int, dtype: torch.dtype, shrink: ExpertBesideTile) -> None:
    assert_same(large_case(rows=rows, slot_runs=slot_runs, dtype=dtype, bias=True), shrink)


@of_every_share
@pytest.mark.parametrize("width", [2, 3])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_several_adapters_per_row_with_coefficients(rows: int, width: int, shrink: ExpertBesideTile) -> None:
    assert_same(large_case(rows=rows, width=width), shrink)


@of_every_share
@pytest.mark.parametrize("features", [8, 64, 200, 4104])
@pytest.mark.parametrize("rows", [130, 600, 1000, 1344, 2500])
def test_sizes_that_fit_no_tile(rows: int, features: int, shrink: ExpertBesideTile) -> None:
    assert_same(large_case(rows=rows, features=features), shrink)


@of_every_share
@pytest.mark.parametrize("shared", [("A",), ("B",), ("AB", ""), ("", "A")], ids=str)
def test_matrices_that_experts_share(shared: tuple[str, ...], shrink: ExpertBesideTile) -> None:
    assert_same(large_case(shared=shared), shrink)


@of_every_share
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_experts_without_rows_and_rows_without_experts(rows: int, shrink: ExpertBesideTile) -> None:
    assert_same(large_case(rows=rows, empty=(0, 3, 4, 6)), shrink)
    case = large_case(rows=rows)
    assert case.offsets is not None
    for offsets in (torch.zeros(7), torch.full((7,), rows), torch.tensor([rows - 65] * 7)):
        assert_same(replace(case, offsets=offsets.to(case.offsets)), shrink)


@of_every_share
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_no_slot_no_adapter(rows: int, shrink: ExpertBesideTile) -> None:
    case = large_case(rows=rows)
    assert_same(case.with_slots(torch.full_like(case.row_slots, -1)), shrink)
    assert_same(case.with_slots(torch.full_like(case.row_slots, 2)), shrink)  # rank 0
    assert_same(case.with_slots(torch.full_like(case.row_slots, 1)), shrink)


@of_every_share
def test_many_slots_and_ranks(shrink: ExpertBesideTile) -> None:
    """More than one round of groups, more slots than a warp has lanes, or four of them."""
    for ranks in ((100, 256, 1), tuple(i % 17 for i in range(40)), tuple(i % 7 for i in range(300))):
        for rows in ROWS.values():
            assert_same(large_case(rows=rows, ranks=ranks, features=264), shrink)


@of_every_share
def test_what_is_wrong_with_one_adapter_stays_in_its_rows(shrink: ExpertBesideTile) -> None:
    case = large_case()
    clean, pool = run(case, shrink), case.pool
    assert pool is not None
    start, step = int(pool.a_start[4]), int(pool.a_step[4])
    for expert in range(7):
        pool.a[start + expert * step] = float("nan")
        pool.a[start + expert * step + 1] = float("inf")
    others = (case.row_slots != 4).all(1)
    assert torch.equal(clean[others], run(case, shrink)[others])


@of_every_share
def test_it_waits_for_what_comes_before_it(shrink: ExpertBesideTile) -> None:
    """x of a call is the output of the one before, again and again."""
    cases = [large_case(rows=1000, features=512, out=512) for _ in range(3)]
    cases = [replace(case, row_slots=cases[0].row_slots, offsets=cases[0].offsets) for case in cases]
    first = apart = cases[0].x
    for _ in range(20):
        x = apart = first
        for case in cases:
            x = run(replace(case, x=x), shrink)
        for case in cases:
            apart = run(replace(case, x=apart))
            torch.cuda.synchronize()
        assert torch.equal(x, apart)


@pytest.mark.gpu
@pytest.mark.skipif(not IS_HOPPER, reason="needs a GPU of compute capability 9")
def test_a_wait_in_vain_ends_with_an_error(tmp_path: Path) -> None:
    script = tmp_path / "hangs.py"
    script.write_text(HANGS)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "CUDA error" in done.stderr


def test_it_is_for_experts_that_it_makes_faster() -> None:
    def few(rows: int, experts: int, features: int, columns: int, width: int = 16, simple: bool = True) -> int:
        tile = expert_beside_tile(rows, experts, simple, features, columns, torch.bfloat16, width)
        return tile.shrink.few if isinstance(tile.shrink, ExpertBesideTile) else 0

    assert few(16384, 128, 2048, 1536) == 10
    assert few(16384, 128, 768, 2048) == few(16384, 64, 2048, 2048) == 8
    assert few(8192, 60, 2048, 2816) == 6
    assert few(16384, 40, 1536, 1024) == 15
    assert few(4096, 8, 14336, 4096) == 0  # many rows of an expert
    assert few(2048, 8, 4096, 28672) == 0  # many columns
    assert few(16384, 128, 2048, 1536, width=64) == few(16384, 128, 2048, 1536, simple=False) == 0
    assert few(4096, 32, 2880, 2880) == 0  # tiles with a tail
    tile = expert_beside_tile(16384, 128, True, 2048, 1536, torch.bfloat16, 16)
    assert (tile.programs, tile.early, tile.shrink) == (3, True, ExpertBesideTile(10, 256 + 96))
    assert not isinstance(expert_beside_tile(16384, 128, True, 2048, 1536, torch.float32, 16).shrink, ExpertBesideTile)


def test_it_is_for_rows_and_pools_that_it_can_read(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from fxlora.kernels import expert_call
    from fxlora.kernels.expert_prefill import MOST_COUNTED, shrinks_beside

    monkeypatch.setattr(expert_call, "can_overlap", lambda device: True)

    def serves(**options: Any) -> bool:
        sizes = {"rows": 60, "features": 64, "out": 32, "dtype": torch.bfloat16, "ranks": (8,) * MOST_COUNTED}
        return shrinks_beside(call_of(make_expert_case(**{**sizes, **options})))

    assert serves()
    assert not serves(ranks=(8,) * (MOST_COUNTED + 1))
    assert not serves(in_place=False)
    assert not serves(has_pool=False)
    assert not serves(dtype=torch.float32)
    assert not serves(features=60)  # rows that TMA cannot read
