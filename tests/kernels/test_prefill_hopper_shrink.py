"""The shrink that a Hopper GPU runs beside large prefills gives the bits of the plain one, which test_prefill.py holds
to the reference, however many programs make it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fxlora.kernels.prefill_tiles import BesideTile, HopperTile, hopper_tile, prefill_tile
from fxlora.kernels.tiles import ShrinkTile
from tests.kernels.cases import Case, equal_bits
from tests.kernels.test_prefill_hopper import IS_HOPPER, TURNS, large_case, run

PLAIN = ShrinkTile(64, 16, 64, 1, 264, 4, 4, 1)
BOUND = 18 + 6
"""Tiles of 1100 rows of any six adapters, at most."""


def of_every_share(test: Callable[..., None]) -> Callable[..., None]:
    """A test on a GPU of compute capability 9: few programs of a small grid, few of a large one, all of it."""
    shares = [BesideTile(3, 1000), BesideTile(1, BOUND - 1), BesideTile(1, 1)]
    marked = pytest.mark.parametrize("shrink", shares, ids=["few", "few of many", "all"])(test)
    return pytest.mark.gpu(pytest.mark.skipif(not IS_HOPPER, reason="needs a GPU of compute capability 9")(marked))


def assert_same(case: Case, shrink: BesideTile) -> None:
    plain, beside = replace(TURNS, shrink=PLAIN), replace(TURNS, shrink=shrink)
    assert equal_bits(run(case, plain), run(case, beside), slice(None))


@of_every_share
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("order", ["runs", "shuffled", "one"])
def test_orders_and_mixed_ranks(order: str, dtype: torch.dtype, shrink: BesideTile) -> None:
    assert_same(large_case(order=order, dtype=dtype), shrink)


@of_every_share
@pytest.mark.parametrize("width", [2, 3])
def test_several_adapters_per_row_with_coefficients(width: int, shrink: BesideTile) -> None:
    assert_same(large_case(width=width, order="shuffled"), shrink)


@of_every_share
@pytest.mark.parametrize("features", [8, 64, 200, 4104])
@pytest.mark.parametrize("rows", [1, 64, 129, 1025])
def test_sizes_that_fit_no_tile(rows: int, features: int, shrink: BesideTile) -> None:
    for order in ("runs", "shuffled"):
        assert_same(large_case(rows=rows, features=features, outs=(8, 264), order=order), shrink)


@of_every_share
@pytest.mark.parametrize("outs", [(8,), (8, 16), (8, 16, 24), (8, 16, 24, 32)])
@pytest.mark.parametrize("none_members", [(), (0,), (1, 2)])
def test_members_share_x(none_members: tuple[int, ...], outs: tuple[int, ...], shrink: BesideTile) -> None:
    if any(member not in none_members for member in range(len(outs))):
        for order in ("runs", "shuffled"):
            assert_same(large_case(outs=outs, none_members=none_members, order=order), shrink)


@of_every_share
def test_tiles_of_any_number_of_rows(shrink: BesideTile) -> None:
    """Parts of a block are loaded where a slot has no more rows."""
    case = large_case(rows=420, ranks=(8, 16, 3, 40, 5, 1))
    for counts in ((1, 15, 16, 17, 31, 340), (48, 49, 63, 64, 65, 131), (0, 33, 0, 47, 200, 80)):
        assert sum(counts) <= 420
        slots = torch.full((420, 1), -1, dtype=torch.int32, device="cuda")
        slots[: sum(counts), 0] = torch.arange(6, device="cuda").repeat_interleave(torch.tensor(counts, device="cuda"))
        assert_same(case.with_slots(slots), shrink)


@of_every_share
def test_no_slot_no_adapter(shrink: BesideTile) -> None:
    case = large_case()
    assert_same(case.with_slots(torch.full_like(case.row_slots, -1)), shrink)
    assert_same(case.with_slots(torch.full_like(case.row_slots, 2)), shrink)  # rank 0


@of_every_share
def test_many_slots(shrink: BesideTile) -> None:
    """More than a warp has lanes, or four of them."""
    for count in (40, 130, 300):
        assert_same(large_case(ranks=tuple(i % 17 for i in range(count)), order="shuffled"), shrink)


@of_every_share
def test_the_same_bits_beside_other_rows(shrink: BesideTile) -> None:
    """Rows of an adapter come by TMA where they lie together, each by itself where others lie between."""
    case = large_case(rows=512)
    together = torch.where(torch.arange(512, device="cuda") < 256, 1, 4)[:, None].to(torch.int32)
    between = torch.where(torch.arange(512, device="cuda") % 2 == 0, 1, 4)[:, None].to(torch.int32)
    same = (together == between).squeeze(1)
    tile = replace(TURNS, shrink=shrink)
    assert equal_bits(run(case.with_slots(together), tile), run(case.with_slots(between), tile), same)


@of_every_share
def test_what_is_wrong_with_one_adapter_stays_in_its_rows(shrink: BesideTile) -> None:
    case, tile = large_case(order="shuffled"), replace(TURNS, shrink=shrink)
    clean, (pool,) = run(case, tile), case.pools
    assert pool is not None
    pool.a[int(pool.start[4])] = float("nan")
    pool.a[int(pool.start[4]) + 1] = float("inf")
    assert equal_bits(clean, run(case, tile), (case.row_slots != 4).all(dim=1))


def test_it_is_for_multiprocessors_that_have_time() -> None:
    def few(rows: int, features: int, *widths: int, width: int = 16) -> int:
        shrink = hopper_tile(rows, features, widths, width).shrink
        return shrink.few if isinstance(shrink, BesideTile) else 0

    assert few(2048, 4096, 4096) == 8  # 256 shared tiles
    assert few(2048, 5120, 5120) == 20  # 640 in turns
    assert few(2048, 4096, 4096, 1024, 1024) == 12
    assert few(2048, 4096, 12288, 12288) == 36  # of 48, one for each tile
    assert few(2048, 1536, 8960, 8960) == 0  # 4 would take too long
    assert few(4096, 1536, 8960, 8960) == 8  # as would 8, but there are 34 waves
    assert few(4096, 8192, 2048) == 0
    assert few(2048, 2048, 2048) == 0  # two programs a multiprocessor
    assert few(2048, 5120, 5120, width=64) == 0
    assert few(256, 14336, 4096) == few(2048, 896, 4864, 4864) == 0


@pytest.mark.parametrize("rows", [257, 300, 512, 1000, 2048, 8192, 100000])
def test_it_runs_beside_products_of_one_program_a_multiprocessor(rows: int) -> None:
    for features in (64, 2048, 4096, 14336):
        for widths in ((64,), (4096,), (28672,), (4096, 1024, 1024), (14336, 14336)):
            for width in (1, 16, 64):
                tile, plain = hopper_tile(rows, features, widths, width), prefill_tile(rows, features, widths, width)
                if isinstance(tile.shrink, BesideTile):
                    assert width <= 16
                    assert tile.programs == 1
                    assert 0 < tile.shrink.few <= tile.shrink.most
                elif isinstance(tile, HopperTile) and not tile.shared:
                    assert tile.shrink.few == 0  # few of the plain shrink would end after the first turn
                else:
                    assert tile.shrink == plain.shrink
