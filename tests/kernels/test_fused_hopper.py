"""The kernel that a Hopper GPU has for some rows gives the bits of fused.py where both add in one order, which
test_lora_linear.py holds to the reference; its tiles keep to what it serves best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fxlora.kernels.tiles import (
    MULTIPROCESSORS,
    SHRINK_ALONE,
    FusedTiles,
    GemmTile,
)
from fxlora.kernels.wave_tiles import FusedHopperTiles, fused_hopper_tiles
from tests.kernels.cases import Case, assert_near, assert_right, draw_slots, equal_bits, linear_call, make_case
from tests.kernels.test_prefill_hopper import IS_HOPPER

PLAIN = FusedTiles(SHRINK_ALONE, GemmTile(64, 64, 64, 1, False, 4, 4), 16, 3)
RANKS = (1, 8, 0, 16, 40, 64)
FORMS = {
    "narrow": FusedHopperTiles(SHRINK_ALONE, 64, 64, 128, 5),
    "wide": FusedHopperTiles(SHRINK_ALONE, 64, 128, 64, 7),
    "shrink in parts": FusedHopperTiles(replace(SHRINK_ALONE, parts=3), 64, 64, 128, 5),
    "few rows": FusedHopperTiles(SHRINK_ALONE, 16, 64, 128, 9),
    "narrow, early": FusedHopperTiles(SHRINK_ALONE, 64, 64, 128, 5, apart=True),
    "few rows, wide, early": FusedHopperTiles(SHRINK_ALONE, 16, 256, 64, 4, apart=True),
    "32 rows, shrink in parts": FusedHopperTiles(replace(SHRINK_ALONE, parts=2), 32, 128, 128, 4),
    "in-features in parts": FusedHopperTiles(SHRINK_ALONE, 64, 64, 128, 6, apart=True, split=3),
    "few rows, all in parts": FusedHopperTiles(replace(SHRINK_ALONE, parts=2), 16, 64, 128, 6, split=4),
}


def of_every_tile(test: Callable[..., None]) -> Callable[..., None]:
    """A test on a GPU of compute capability 9, once for each form of a tile."""
    marked = pytest.mark.parametrize("tiles", FORMS.values(), ids=FORMS)(test)
    return pytest.mark.gpu(pytest.mark.skipif(not IS_HOPPER, reason="needs a GPU of compute capability 9")(marked))


def some_rows(**options: Any) -> Case:
    sizes = {"rows": 150, "features": 1032, "outs": (776,), "ranks": RANKS, "dtype": torch.bfloat16, "device": "cuda"}
    return make_case(**{**sizes, **options})


def run(case: Case, tiles: FusedHopperTiles) -> list[torch.Tensor]:
    from fxlora.kernels.fused_hopper import fused_hopper

    return fused_hopper(linear_call(case), tiles)


def assert_same(case: Case, tiles: FusedHopperTiles) -> None:
    """Parts of h are added up in another order, which only rows with an adapter may notice; parts of y, too."""
    from fxlora.kernels.fused import fused

    expected, found = fused(linear_call(case), PLAIN), run(case, tiles)
    if tiles.split == 1:
        is_same = tiles.shrink.parts == 1
        assert equal_bits(expected, found, slice(None) if is_same else (case.row_slots < 0).all(dim=1))
    assert_near(found, expected, torch.bfloat16)


@of_every_tile
@pytest.mark.parametrize("rows", [9, 16, 17, 32, 64, 65, 200, 256])
@pytest.mark.parametrize("order", ["runs", "shuffled", "one"])
@pytest.mark.parametrize("most", [16, 64])
def test_orders_mixed_ranks_and_bias(most: int, order: str, rows: int, tiles: FusedHopperTiles) -> None:
    """Where no rank is above 16, h is kept in registers."""
    ranks = tuple(min(rank, most) for rank in RANKS)
    assert_same(some_rows(ranks=ranks, order=order, rows=rows, bias=order != "runs"), tiles)


@of_every_tile
@pytest.mark.parametrize("features", [8, 64, 200, 640, 4104])
def test_fewer_steps_than_blocks_and_more(features: int, tiles: FusedHopperTiles) -> None:
    assert_same(some_rows(features=features, outs=(8, 264), order="shuffled"), tiles)


@of_every_tile
@pytest.mark.parametrize("ranks", [(16,) * 100, tuple(i % 17 for i in range(300)), (48, 64, 0, 33) * 20], ids=len)
def test_many_groups(ranks: tuple[int, ...], tiles: FusedHopperTiles) -> None:
    """More than the ring has room for, of more slots than a warp has threads."""
    assert_same(some_rows(ranks=ranks, order="shuffled", rows=256, features=264), tiles)


@of_every_tile
@pytest.mark.parametrize("none_members", [(), (1,), (0, 3), (0, 1, 2, 3)])
def test_members_share_a_launch(none_members: tuple[int, ...], tiles: FusedHopperTiles) -> None:
    outs = (40, 8, 1160, 24)
    assert_same(some_rows(outs=outs, none_members=none_members, bias=True, order="shuffled"), tiles)


@of_every_tile
def test_transposed_weights(tiles: FusedHopperTiles) -> None:
    case = some_rows(outs=(776, 264))
    assert_same(replace(case, weights=[weight.t().contiguous().t() for weight in case.weights]), tiles)


@of_every_tile
def test_coefficients(tiles: FusedHopperTiles) -> None:
    case = some_rows(order="shuffled")
    coeffs = torch.rand(case.row_slots.shape, device="cuda")
    assert_same(replace(case, row_coeffs=coeffs), tiles)


@of_every_tile
def test_no_slot_no_adapter(tiles: FusedHopperTiles) -> None:
    case = some_rows(order="shuffled")
    none = case.with_slots(torch.full_like(case.row_slots, -1))
    assert_same(none, tiles)
    assert_same(case.with_slots(torch.full_like(case.row_slots, 2)), tiles)  # rank 0
    assert equal_bits(run(case, tiles), run(none, tiles), (case.row_slots[:, 0] == -1) | (case.row_slots[:, 0] == 2))


@of_every_tile
def test_a_row_keeps_its_bits_whatever_the_others_use(tiles: FusedHopperTiles) -> None:
    case = some_rows(order="shuffled")
    first, kept = run(case, tiles), torch.arange(0, len(case.row_slots), 9, device="cuda")
    for order in ("runs", "one", "shuffled"):
        slots = draw_slots(len(case.row_slots), 1, case.max_adapters, order).to("cuda")
        slots[kept] = case.row_slots[kept]
        assert equal_bits(run(case.with_slots(slots), tiles), first, kept)


@of_every_tile
def test_what_is_wrong_with_one_adapter_stays_in_its_rows(tiles: FusedHopperTiles) -> None:
    case = some_rows(order="shuffled")
    clean, (pool,) = run(case, tiles), case.pools
    assert pool is not None
    pool.a[int(pool.start[4])] = float("nan")
    pool.a[int(pool.start[4]) + 1] = float("inf")
    assert equal_bits(clean, run(case, tiles), (case.row_slots != 4).all(dim=1))


@of_every_tile
@pytest.mark.parametrize("rank", [3, 8, 24])
def test_pool_rows_beyond_the_rank_add_nothing(rank: int, tiles: FusedHopperTiles) -> None:
    """B is copied 16 pool rows at a time, of which some are another adapter's."""
    case = some_rows(ranks=(rank, 8))
    case = case.with_slots(torch.zeros_like(case.row_slots))
    clean, (pool,) = run(case, tiles), case.pools
    assert pool is not None
    used = range(int(pool.start[0]), int(pool.start[0]) + rank)
    others = [row for row in range(len(pool.b)) if row not in used]
    assert others
    pool.b[others] = float("nan")
    assert equal_bits(clean, run(case, tiles), slice(None))


@of_every_tile
def test_the_same_bits_whoever_is_last(tiles: FusedHopperTiles) -> None:
    case = some_rows(features=4104, outs=(776, 264), bias=True, order="shuffled")
    first = run(case, tiles)
    assert all(equal_bits(first, run(case, tiles), slice(None)) for _ in range(50))


@pytest.mark.gpu
@pytest.mark.skipif(not IS_HOPPER, reason="needs a GPU of compute capability 9")
@pytest.mark.parametrize("most", [16, 64])
@pytest.mark.parametrize("rows", [3, 16, 24, 64, 100])
@pytest.mark.parametrize("outs", [(1000,), (776, 264)], ids=len)
def test_the_op_is_right_where_programs_share_tiles(outs: tuple[int, ...], rows: int, most: int) -> None:
    sizes = {"rows": rows, "features": 5128, "outs": outs, "ranks": (8, most, 0, 3)}
    assert_right(some_rows(**sizes, order="shuffled", bias=True))


@pytest.mark.gpu
@pytest.mark.skipif(not IS_HOPPER, reason="needs a GPU of compute capability 9")
@pytest.mark.parametrize("rows", [3, 12, 24, 64, 100, 200])
def test_the_op_is_right_where_these_tiles_serve_it(rows: int) -> None:
    assert fused_hopper_tiles(rows, 2056, (4096,), 16) is not None
    assert_right(some_rows(rows=rows, features=2056, outs=(4096,), ranks=(8, 16, 0, 3), order="shuffled", bias=True))


def kind(rows: int, features: int, *widths: int, width: int = 16) -> tuple[int, int, int] | None:
    tiles = fused_hopper_tiles(rows, features, widths, width)
    return (tiles.BM, tiles.BN, tiles.stages) if tiles else None


def test_they_are_for_one_wave_of_few_rows() -> None:
    # with the shrink's they are a wave
    assert kind(16, 4096, 4096) == kind(2, 8192, 8192) == kind(8, 1536, 1536, 256, 256) == (16, 64, 9)
    assert kind(24, 5120, 5120) == kind(20, 1536, 1536, 256, 256) == kind(20, 3072, 1024) == (32, 64, 8)
    assert kind(64, 4096, 4096) == kind(40, 1024, 4096) == (64, 64, 6)
    assert kind(16, 1536, 8960) == (16, 128, 5)
    assert kind(32, 1536, 8960) == (32, 128, 5)
    assert kind(16, 4096, 4096, width=64) == (16, 64, 8)
    assert kind(24, 4096, 4096, width=64) == (32, 64, 8)
    assert kind(64, 4096, 4096, width=64) == (64, 64, 6)
    # beside it
    assert kind(16, 4096, 4096, 1024, 1024) == kind(16, 4096, 4096, 1024, 1024, width=64) == (16, 64, 6)
    assert kind(64, 5120, 5120) == kind(64, 2048, 2048, 512, 512) == kind(32, 8192, 8192, width=64) == (64, 64, 5)
    assert kind(16, 4096, 14336) == kind(4, 1536, 8960, width=64) == (16, 128, 4)
    assert kind(32, 4096, 14336) == kind(24, 4096, 14336, width=64) == (32, 128, 4)
    assert kind(64, 4096, 14336) == kind(48, 2048, 6144, 6144, width=64) == (64, 128, 6)


def test_they_are_for_one_wave_of_more_rows() -> None:
    def parts(rows: int, *shape: int) -> int:
        tiles = fused_hopper_tiles(rows, shape[0], shape[1:], 16)
        assert tiles is not None
        return tiles.shrink.parts

    assert kind(128, 8192, 2048) == kind(128, 1536, 1536, 256, 256) == kind(256, 2048, 1024) == (64, 64, 6)
    assert kind(128, 4096, 4096) == kind(256, 2048, 2048) == kind(128, 4096, 4096, width=64) == (64, 64, 5)
    assert kind(128, 4096, 4096, 1024, 1024) == kind(256, 14336, 4096) == kind(128, 5120, 5120) == (64, 128, 7)
    assert kind(256, 2048, 2048, 512, 512) == kind(256, 4096, 4096, width=64) == (64, 128, 7)
    assert parts(128, 8192, 2048) == parts(256, 2048, 2048, 512, 512) == 1
    assert parts(128, 4096, 4096) == parts(128, 4096, 4096, 1024, 1024) == 2


def test_programs_share_tiles_that_are_few() -> None:
    def shares(rows: int, *shape: int, width: int = 16) -> tuple[int, int, int] | None:
        tiles = fused_hopper_tiles(rows, shape[0], shape[1:], width)
        return (tiles.BM, tiles.split, tiles.shrink.parts) if tiles else None

    assert shares(16, 8192, 1024) == shares(2, 5120, 1024) == (16, 3, 4)
    assert shares(16, 8960, 1536) == shares(4, 14336, 2048) == shares(16, 7168, 1536, 576) == (16, 2, 2)
    assert shares(16, 8960, 1536, width=64) == shares(8, 4096, 1024, width=64) == (16, 2, 4)
    assert shares(16, 7168, 1536, 576, width=64) == shares(16, 5120, 512, 512) == (16, 2, 2)
    assert shares(24, 4096, 1024) == shares(32, 9728, 2560) == shares(20, 8960, 1536, width=64) == (32, 2, 2)
    assert shares(64, 8192, 2048) == shares(48, 4864, 896) == (64, 3, 2)
    assert shares(64, 9728, 2560) == shares(64, 7168, 1536, 576) == shares(128, 8960, 1536) == (64, 2, 2)
    # one program a tile
    assert shares(16, 8192, 2816) == (16, 1, 1)
    assert shares(24, 7168, 1536, 576) == (32, 1, 1)
    assert shares(64, 4096, 1024, 256, 256) == shares(64, 2048, 2048) == shares(64, 3072, 512, 512) == (64, 1, 1)
    assert shares(64, 8960, 1536, width=64) == shares(128, 9728, 2560) == (64, 1, 1)
    assert shares(256, 4096, 1024) == shares(256, 8192, 1024) == shares(192, 3584, 512, 512) == (64, 1, 1)


def test_they_are_for_nothing_else() -> None:
    assert kind(64, 4096, 28672) is kind(256, 5120, 5120) is kind(16, 3584, 18944) is None  # more
    assert kind(64, 8192, 512) is kind(64, 1024, 384) is kind(256, 2048, 512) is None  # few to bring W
    assert (
        kind(64, 4096, 1024)
        is kind(24, 4096, 1024, width=64)
        is kind(64, 8192, 768, width=64)
        is kind(24, 2048, 512)
        is None
    )
    assert kind(8, 4096, 2048) is kind(16, 1024, 1024) is kind(128, 512, 8192) is None
    assert kind(256, 2048, 2048, 512, 512, width=64) is kind(64, 4096, 4096, width=65) is None


def test_programs_of_a_shrink_of_members_are_one_wave() -> None:
    tiles = fused_hopper_tiles(128, 4096, (4096, 1024, 1024), 16)
    assert tiles is not None
    assert tiles.shrink.programs == MULTIPROCESSORS // 3
