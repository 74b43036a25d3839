"""The kernel that a Hopper GPU has for prefill gives the bits of the other one, which test_prefill.py holds to the
reference; its tiles keep to what serves them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from fxlora.kernels.prefill_tiles import BesideTile, HopperTile, PrefillTile, hopper_tile
from fxlora.kernels.tiles import ShrinkTile
from tests.kernels.cases import Case, equal_bits, linear_call, make_case

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
RANKS = (1, 8, 0, 16, 40, 100)
SHRINK = ShrinkTile(16, 64, 256, 1, 264, 4, 4, 4)
PLAIN = PrefillTile(128, 256, 64, 16, 8, 3, 1, (32, 3), SHRINK)
TURNS, SHARED = HopperTile(128, 128, 64, 5, False, 8, 0, SHRINK), HopperTile(128, 256, 64, 4, True, 16, 6, SHRINK)


def of_every_tile(test: Callable[..., None]) -> Callable[..., None]:
    """A test on a GPU of compute capability 9, once for each kind of tile."""
    tiles = pytest.mark.parametrize("tile", [TURNS, SHARED, replace(TURNS, ahead=6)], ids=["turns", "shared", "ahead"])
    skip = pytest.mark.skipif(not IS_HOPPER, reason="needs a GPU of compute capability 9")
    return pytest.mark.gpu(skip(tiles(test)))


def large_case(**options: Any) -> Case:
    sizes = {"rows": 1100, "features": 1032, "outs": (776,), "ranks": RANKS, "dtype": torch.bfloat16, "device": "cuda"}
    return make_case(**{**sizes, **options})


def run(case: Case, tile: PrefillTile | HopperTile) -> list[torch.Tensor]:
    from fxlora.kernels.prefill import prefill

    return prefill(linear_call(case), tile)


def assert_same(case: Case, tile: HopperTile) -> None:
    assert equal_bits(run(case, PLAIN), run(case, tile), slice(None))


def assert_same_of_few_programs(case: Case, tile: HopperTile) -> None:
    """Three programs make all tiles, so that even a small call has turns."""
    from fxlora.kernels import prefill

    with mock.patch.object(prefill, "multiprocessors", return_value=3):
        assert_same(case, tile)


@of_every_tile
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("order", ["runs", "shuffled", "one"])
def test_orders_mixed_ranks_and_bias(order: str, dtype: torch.dtype, tile: HopperTile) -> None:
    assert_same(large_case(order=order, bias=order != "runs", dtype=dtype), tile)


@of_every_tile
@pytest.mark.parametrize("width", [2, 3])
def test_several_adapters_per_row_with_coefficients(width: int, tile: HopperTile) -> None:
    assert_same(large_case(width=width, order="shuffled"), tile)


@of_every_tile
@pytest.mark.parametrize("features", [8, 64, 200, 4104])
@pytest.mark.parametrize("rows", [1, 128, 129, 513])
def test_sizes_that_fit_no_tile(rows: int, features: int, tile: HopperTile) -> None:
    assert_same(large_case(rows=rows, features=features, outs=(8, 264), bias=True), tile)


@of_every_tile
@pytest.mark.parametrize("features", [64, 712])
def test_many_tiles_for_each_program(features: int, tile: HopperTile) -> None:
    """Rings and turns come round often, with members of odd and even numbers of tiles."""
    assert_same(large_case(rows=9000, features=features, outs=(776, 1032, 136), order="shuffled"), tile)


@of_every_tile
@pytest.mark.parametrize("none_members", [(), (1,), (0, 3), (0, 1, 2, 3)])
def test_members_share_a_launch(none_members: tuple[int, ...], tile: HopperTile) -> None:
    outs = (40, 8, 1160, 24)
    assert_same(large_case(outs=outs, none_members=none_members, bias=True, order="shuffled"), tile)


@of_every_tile
def test_transposed_weights(tile: HopperTile) -> None:
    case = large_case(outs=(776, 264))
    assert_same(replace(case, weights=[weight.t().contiguous().t() for weight in case.weights]), tile)


@of_every_tile
def test_no_slot_no_adapter(tile: HopperTile) -> None:
    case = large_case()
    assert_same(case.with_slots(torch.full_like(case.row_slots, -1)), tile)
    assert_same(case.with_slots(torch.full_like(case.row_slots, 2)), tile)  # rank 0


@of_every_tile
def test_what_is_wrong_with_one_adapter_stays_in_its_rows(tile: HopperTile) -> None:
    case = large_case(order="shuffled")
    clean, (pool,) = run(case, tile), case.pools
    assert pool is not None
    pool.a[int(pool.start[4])] = float("nan")
    pool.a[int(pool.start[4]) + 1] = float("inf")
    assert equal_bits(clean, run(case, tile), (case.row_slots != 4).all(dim=1))


@of_every_tile
def test_pool_rows_beyond_the_rank_are_not_read(tile: HopperTile) -> None:
    """B is copied 16 pool rows at a time, of which the last eight are another adapter's."""
    case = large_case(ranks=(8, 8))
    case = case.with_slots(torch.zeros_like(case.row_slots))
    clean, (pool,) = run(case, tile), case.pools
    assert pool is not None
    used = range(int(pool.start[0]), int(pool.start[0]) + 8)
    others = [row for row in range(len(pool.b)) if row not in used]
    assert others
    pool.b[others] = float("nan")
    assert equal_bits(clean, run(case, tile), slice(None))


def test_turns_where_they_leave_less_idle_a_shared_tile_where_reading_counts() -> None:
    def kind(rows: int, features: int, *widths: int, width: int = 16) -> str:
        tile = hopper_tile(rows, features, widths, width)
        return ("shared" if tile.shared else "turns") if isinstance(tile, HopperTile) else "plain"

    assert kind(1024, 5120, 5120) == kind(512, 4096, 14336, 14336) == kind(2048, 2048, 8192, 8192) == "turns"
    assert kind(2048, 4096, 4096) == kind(8192, 4096, 28672) == kind(2048, 14336, 4096) == "shared"
    assert kind(8192, 2048, 8192, 8192) == kind(8192, 9728, 2560) == "shared"  # as many of either, but long
    assert kind(2048, 9728, 2560) == kind(1024, 13824, 5120, width=64) == "turns"  # three for two twice as wide
    assert kind(8192, 8192, 256) == kind(512, 8192, 2048, 2048) == "plain"  # 128 at once
    assert kind(300, 4096, 4096) == kind(2048, 2048, 2048) == kind(8192, 1024, 1024) == "plain"
    assert kind(2048, 4096, 4096, width=64) == "plain"
    assert kind(1024, 5120, 5120, width=64) == "turns"


def test_turns_also_where_only_they_leave_time_for_the_shrink() -> None:
    def takes_turns(rows: int, features: int, *widths: int) -> bool:
        tile = hopper_tile(rows, features, widths, 16)
        return isinstance(tile, HopperTile) and not tile.shared and isinstance(tile.shrink, BesideTile)

    assert takes_turns(512, 18944, 3584)  # 112 at once
    assert takes_turns(512, 4096, 3584)
    assert not takes_turns(512, 2048, 3584)
    assert takes_turns(1024, 11008, 4096)  # 256, two for each multiprocessor
    assert not takes_turns(1024, 4096, 4096)
    assert takes_turns(8192, 3072, 3072)
    assert not takes_turns(8192, 4096, 4096)
    assert takes_turns(4096, 1024, 4096)
