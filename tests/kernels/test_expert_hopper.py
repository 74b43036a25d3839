"""Experts over many rows on a Hopper GPU have the bits of expert_prefill.py, which test_lora_experts.py holds to the
reference, however many programs there are and however they share in making h."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from fxlora.kernels import ops
from fxlora.kernels.expert_tiles import ExpertHopperTile, expert_hopper_tile, expert_prefill_tile
from tests.kernels.expert_cases import ExpertCase, make_expert_case
from tests.kernels.test_expert_hopper_shrink import call_of
from tests.kernels.test_prefill_hopper import IS_HOPPER

ROWS = {"tiles of 64": 1000, "tiles of 128": 600}  # of seven experts
RANKS = (8, 16, 0, 3, 40)


def of_every_tile(test: Callable[..., None]) -> Callable[..., None]:
    """A test on a GPU of compute capability 9: h of two slots beside a tile or of four, few programs, many, one."""
    forms = [(ExpertHopperTile(4, 3, 2), 10), (ExpertHopperTile(4, 2, 4), 132), (ExpertHopperTile(4, 3, 2), 1)]
    marked = pytest.mark.parametrize("form", forms, ids=["two", "four", "alone"])(test)
    return pytest.mark.gpu(pytest.mark.skipif(not IS_HOPPER, reason="needs a GPU of compute capability 9")(marked))


def large_case(**options: Any) -> ExpertCase:
    sizes = {"rows": 1000, "experts": 7, "features": 520, "out": 1032, "ranks": RANKS}
    return make_expert_case(**{**sizes, "dtype": torch.bfloat16, "device": "cuda", **options})


def run_plain(case: ExpertCase) -> torch.Tensor:
    from fxlora.kernels.expert_prefill import prefill

    call = call_of(case)
    experts, columns, features = case.weight.shape
    return prefill(
        call, expert_prefill_tile(call.rows, experts, True, features, columns, case.x.dtype, call.site.h_width)
    )


def run(case: ExpertCase, form: tuple[ExpertHopperTile, int]) -> torch.Tensor:
    from fxlora.kernels import expert_hopper

    with mock.patch.object(expert_hopper, "multiprocessors", return_value=form[1]):
        return expert_hopper.prefill(call_of(case), form[0])


def assert_same(case: ExpertCase, form: tuple[ExpertHopperTile, int]) -> None:
    assert torch.equal(run_plain(case), run(case, form))


@of_every_tile
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("slot_runs", [1, 30])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_orders_and_mixed_ranks(rows: int, slot_runs: int, dtype: torch.dtype, form: Any) -> None:
    assert_same(large_case(rows=rows, slot_runs=slot_runs, dtype=dtype, bias=True), form)


@of_every_tile
@pytest.mark.parametrize("features", [8, 64, 200, 4104])
@pytest.mark.parametrize("rows", [130, 600, 1000, 1344, 2500])
def test_sizes_that_fit_no_tile(rows: int, features: int, form: Any) -> None:
    assert_same(large_case(rows=rows, features=features), form)


@of_every_tile
@pytest.mark.parametrize("out", [8, 264, 2048])
@pytest.mark.parametrize("transposed", [False, True])
def test_columns_and_strides(transposed: bool, out: int, form: Any) -> None:
    assert_same(large_case(out=out, transposed=transposed, bias=True), form)
    assert_same(large_case(out=out, transposed=transposed, experts=1, rows=3000), form)  # of many row tiles


@of_every_tile
@pytest.mark.parametrize("shared", [("A",), ("B",), ("AB", ""), ("", "A")], ids=str)
def test_matrices_that_experts_share(shared: tuple[str, ...], form: Any) -> None:
    assert_same(large_case(shared=shared), form)


@of_every_tile
def test_coefficients(form: Any) -> None:
    assert_same(large_case(coeffs=True), form)


@of_every_tile
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_experts_without_rows_and_rows_without_experts(rows: int, form: Any) -> None:
    assert_same(large_case(rows=rows, empty=(0, 3, 4, 6)), form)
    case = large_case(rows=rows)
    assert case.offsets is not None
    for offsets in (torch.zeros(7), torch.full((7,), rows), torch.tensor([rows - 65] * 7)):
        assert_same(replace(case, offsets=offsets.to(case.offsets)), form)


@of_every_tile
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_no_slot_no_adapter(rows: int, form: Any) -> None:
    case = large_case(rows=rows)
    for slot in (-1, 1, 2, 5):  # none, one, one of rank 0, one that the pool does not have
        assert_same(case.with_slots(torch.full_like(case.row_slots, slot)), form)


@of_every_tile
def test_many_slots(form: Any) -> None:
    """More than one pass over x, more slots than a warp has lanes, or than a tile has rows."""
    for count, most in ((24, 17), (40, 65), (300, 17), (100, 34)):
        for rows in ROWS.values():
            assert_same(large_case(rows=rows, ranks=tuple(i % most for i in range(count)), features=264), form)


@of_every_tile
def test_what_is_wrong_with_one_adapter_stays_in_its_rows(form: Any) -> None:
    case = large_case()
    clean, pool = run(case, form), case.pool
    assert pool is not None
    start, step = int(pool.a_start[4]), int(pool.a_step[4])
    for expert in range(7):
        pool.a[start + expert * step] = float("nan")
        pool.a[start + expert * step + 1] = float("inf")
        pool.a[start + expert * step + 2] = -float("inf")
    broken, others = run(case, form), (case.row_slots != 4).all(1)
    assert torch.equal(clean[others], broken[others])
    assert torch.equal(run_plain(case).isnan(), broken.isnan())


@of_every_tile
def test_it_waits_for_what_comes_before_it(form: Any) -> None:
    """x of a call is the output of the one before, again and again, and in a graph."""
    cases = [large_case(rows=1000, features=512, out=512) for _ in range(3)]
    cases = [replace(case, row_slots=cases[0].row_slots, offsets=cases[0].offsets) for case in cases]

    def chain(x: torch.Tensor, wait: bool) -> torch.Tensor:
        for case in cases:
            x = run(replace(case, x=x), form)
            if wait:
                torch.cuda.synchronize()
        return x

    apart = chain(cases[0].x, True)
    for _ in range(20):
        assert torch.equal(chain(cases[0].x, False), apart)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain(cases[0].x, False)
    for _ in range(20):
        graph.replay()
        assert torch.equal(captured, apart)


@of_every_tile
def test_calls_on_other_streams_end_too(form: Any) -> None:
    """Each needs all its programs at once, and both together more multiprocessors than there are."""
    cases, streams = [large_case(rows=3000) for _ in range(4)], [torch.cuda.Stream() for _ in range(4)]
    expected = [run(case, form) for case in cases]
    torch.cuda.synchronize()
    found = []
    for _ in range(20):
        for case, stream in zip(cases, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(run(case, form))
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected[i % 4]) for i, y in enumerate(found))


def test_it_is_for_experts_that_it_makes_faster() -> None:
    assert expert_hopper_tile(16384, 128, 2048, 1536, 16, 16) == ExpertHopperTile(4, 3, 2)
    assert expert_hopper_tile(16384, 128, 2048, 1536, 16, 64) == ExpertHopperTile(4, 2, 4)
    assert expert_hopper_tile(4096, 8, 4096, 28672, 16, 8) is not None
    assert expert_hopper_tile(8192, 128, 2048, 1536, 16, 16) is not None
    assert expert_hopper_tile(8192, 128, 4096, 1536, 16, 16) is None  # one tile of 128 rows holds most experts
    assert expert_hopper_tile(16384, 128, 2048, 1536, 64, 16) is None  # many ranks, several adapters in a tile
    assert expert_hopper_tile(4096, 8, 4096, 28672, 64, 8) is not None
    assert expert_hopper_tile(1024, 8, 14336, 4096, 16, 16) is None  # few tiles
    assert expert_hopper_tile(16384, 8, 14336, 4096, 16, 16) is None  # many for each expert
    assert expert_hopper_tile(16384, 128, 256, 1536, 16, 16) is None
    assert expert_hopper_tile(16384, 128, 2048, 512, 16, 16) is None


def test_it_is_for_rows_weights_and_pools_that_it_can_move(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from fxlora.kernels import expert_call
    from fxlora.kernels.expert_prefill import runs_in_one

    monkeypatch.setattr(expert_call, "can_overlap", lambda device: True)

    def serves(**options: Any) -> bool:
        sizes = {"rows": 60, "features": 64, "out": 32, "dtype": torch.bfloat16, "ranks": (8, 16)}
        return runs_in_one(call_of(make_expert_case(**{**sizes, **options})))

    assert serves()
    assert serves(transposed=True)
    assert serves(ranks=(8,) * 300)
    assert not serves(ranks=(8, 65))
    assert not serves(in_place=False)
    assert not serves(width=2)
    assert not serves(has_pool=False)
    assert not serves(dtype=torch.float32)
    assert not serves(features=60)  # rows that TMA cannot read
    assert not serves(out=36)


@pytest.mark.skipif(not ops.INTERPRET, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ranks", [(8, 16, 0, 3), (40, 0, 17, 64), tuple(i % 5 for i in range(20))], ids=str)
def test_lists_of_slots(ranks: tuple[int, ...], dtype: torch.dtype) -> None:
    from fxlora.kernels.expert_lists import HEIGHT, list_slots

    case = make_expert_case(
        rows=300, experts=4, features=16, out=8, ranks=ranks, dtype=dtype, empty=(2,), shared=("A", "")
    )
    case.row_slots[7] = len(ranks)  # not of the pool
    lists, pool = list_slots(call_of(case)), case.pool
    assert pool is not None
    assert (lists.h.view(torch.int16) == -1).all()
    experts = torch.tensor([4 if e is None else e for e in case.row_experts])
    tile = 0
    for expert in range(5):
        rows = (experts == expert).nonzero()[:, 0]
        first_tile = tile
        for first in range(0, len(rows), HEIGHT.value):
            start, end = int(rows[0]), int(rows[-1]) + 1
            assert lists.tiles[tile + 1].tolist() == [expert, first_tile, start, end]
            own = case.row_slots[rows[first : first + HEIGHT.value], 0].unique().tolist() if expert < 4 else []
            own = [slot for slot in own if 0 <= slot < len(ranks) and ranks[slot] > 0]
            groups = [(slot, first) for slot in own for first in range(0, ranks[slot], 16)]
            fields = lists.groups[tile, :-1].view(3, lists.capacity)[:, : len(groups)]
            b_rows = [int(pool.b_start[slot] + expert * pool.b_step[slot]) + first for slot, first in groups]
            lasts = [min(ranks[slot], first + 16) - 1 for slot, first in groups]
            assert fields.tolist() == [[slot for slot, _ in groups], b_rows, lasts]
            a_rows = [int(pool.a_start[slot] + expert * pool.a_step[slot]) + first for slot, first in groups]
            assert lists.a_rows[tile, : len(groups)].tolist() == a_rows
            assert lists.scalings[tile, : len(groups)].equal(pool.scaling[[slot for slot, _ in groups]])
            assert lists.groups[tile, -1] == len(groups)
            assert (lists.groups[tile, len(groups) : len(groups) + 8] == -1).all()
            tile += 1
    assert lists.tiles[0, 0] == tile
    known = [
        e is not None and slot < len(ranks) and ranks[slot] > 0
        for e, slot in zip(case.row_experts, case.row_slots[:, 0].tolist(), strict=True)
    ]
    of_row = torch.where(torch.tensor(known), case.row_slots[:, 0], -1).tolist()
    assert lists.slots.tolist() == of_row
    assert lists.ranks.tolist() == [ranks[slot] if slot >= 0 else 0 for slot in of_row]
