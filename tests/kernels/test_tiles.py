"""Tile choices: what a Triton dot accepts, and that they follow from shapes alone."""

from __future__ import annotations

import itertools

import pytest
import torch

from fxlora.kernels.expert_segments import HIGH, tile_height
from fxlora.kernels.expert_tiles import expert_decode_tiles, expert_prefill_tile
from fxlora.kernels.prefill_tiles import many_fused_tiles, prefers_many_tiles, prefers_prefill, prefill_tile
from fxlora.kernels.tiles import (
    VectorTile,
    decode_tiles,
    embedding_tile,
    fused_tiles,
    gemv_tile,
    general_tiles,
    single_tiles,
)
from fxlora.kernels.triton_helpers import unit_of

WIDTHS = (1, 3, 64, 2048, 4096, 14336, 28672, 151936)
DTYPES = (torch.float32, torch.bfloat16)


def power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


@pytest.mark.parametrize("rows", [1, 16, 17, 64, 65, 256])
def test_sides_of_the_decode_tiles_are_what_a_dot_accepts(rows: int) -> None:
    for features, columns, ranks in itertools.product(WIDTHS, WIDTHS, (16, 64)):
        tiles = decode_tiles(rows, features, columns, ranks, features % 2 == 1)
        sides = (tiles.gemm.BM, tiles.gemm.BN, tiles.gemm.BK, tiles.expand.BR, tiles.expand.BN)
        assert all(power_of_two(side) and side >= 16 for side in sides)
        assert power_of_two(tiles.shrink.BR)
        assert power_of_two(tiles.shrink.BK)
        assert isinstance(tiles.shrink, VectorTile) or (tiles.shrink.BR >= 16 and tiles.shrink.BK >= 16)


@pytest.mark.parametrize("rows", [1, 16, 17, 64, 65, 256])
def test_sides_of_the_fused_tiles_are_what_a_dot_accepts(rows: int) -> None:
    shapes = itertools.product(WIDTHS, WIDTHS, (16, 64), (True, False))
    found = [fused_tiles(rows, features, (n, n), ranks, aligned) for features, n, ranks, aligned in shapes]
    assert any(found)
    for tiles in filter(None, found):
        sides = (tiles.gemm.BM, tiles.gemm.BN, tiles.gemm.BK, tiles.BR, tiles.shrink.BR, tiles.shrink.BK)
        assert all(power_of_two(side) and side >= 16 for side in sides)
        assert tiles.gemm.SPLIT == tiles.shrink.parts == 1
        assert tiles.BR <= 128  # groups.MOST of them


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sides_of_the_tiles_of_experts_are_what_a_dot_accepts(dtype: torch.dtype) -> None:
    for entries, features, columns in itertools.product((1, 32, 33, 4096), WIDTHS, WIDTHS):
        tiles = expert_decode_tiles(entries, features, columns, dtype)
        shrink, delta, gemm = tiles.shrink, tiles.delta, tiles.gemm
        assert all(power_of_two(side) and side >= 16 for side in (gemm.BN, gemm.BK))
        assert all(power_of_two(side) for side in (delta.BR, delta.BK, delta.BN))
        assert max(64, 2 * features) > delta.BK
        assert max(64, 2 * columns) > delta.BN
        assert shrink is None or (power_of_two(shrink.BR) and max(64, 2 * features) > shrink.BK)
    shapes = itertools.product((2000, 4096, 10000), (20, 32, 64), (False, True), (2048, 4096), (1536, 4096))
    for shape, ranks in itertools.product(shapes, (16, 64)):
        tile = expert_prefill_tile(*shape, dtype, ranks)
        sides = (tile.BM, tile.BN, tile.BK, tile.BR, tile.shrink.BM, tile.shrink.BR, tile.shrink.BK)
        assert all(power_of_two(side) and side >= 16 for side in sides)
        assert tile.BM + tile.TAIL in (tile_height(*shape[:2]), HIGH)
        assert tile.BR <= 128  # groups.MOST of them


def test_tiles_of_experts_with_a_tail() -> None:
    def rows(rows: int, simple: bool, features: int, ranks: int = 16) -> tuple[int, int]:
        tile = expert_prefill_tile(rows, 32, simple, features, 4096, torch.bfloat16, ranks)
        return tile.BM, tile.TAIL

    assert rows(4096, True, 4096) == (128, 32)
    assert rows(5000, True, 4096) == rows(4096, False, 4096) == rows(4096, True, 2048) == (64, 0)
    assert rows(4096, True, 4096, 64) == (64, 0)


def test_products_of_experts_start_early_where_few_programs_share_what_they_read() -> None:
    def early(rows: int, experts: int, features: int, ranks: int = 16) -> bool:
        return expert_prefill_tile(rows, experts, True, features, 4096, torch.bfloat16, ranks).early

    assert early(4096, 32, 2880)
    assert early(4096, 8, 14336)
    assert not early(16384, 128, 2048)
    assert not early(4096, 8, 14336, 64)


def test_few_rows_of_experts_shrink_deep_where_the_way_is_long() -> None:
    def deep(rows: int, experts: int, features: int, ranks: int = 16) -> int:
        return expert_prefill_tile(rows, experts, True, features, 4096, torch.bfloat16, ranks).shrink.BK

    assert deep(4096, 8, 14336) == deep(4096, 32, 4096) == deep(1024, 16, 8192) == 128
    assert expert_prefill_tile(4096, 8, False, 14336, 4096, torch.bfloat16, 16).shrink.BK == 64
    assert deep(16384, 8, 14336) == deep(4096, 32, 2880) == deep(4096, 8, 14336, 64) == 64


@pytest.mark.parametrize("features", WIDTHS)
def test_blocks_of_a_vector_product_are_powers_of_two_no_wider_than_they_need(features: int) -> None:
    tile = gemv_tile(features)
    for block in (tile.BK, tile.shrink.BK):
        assert power_of_two(block)
        assert block < max(64, 2 * features)


@pytest.mark.parametrize("rows", [1, 16, 17, 64, 65, 8192])
def test_sides_of_all_other_tiles_are_what_a_dot_accepts(rows: int) -> None:
    general = general_tiles(rows, rows)
    for tile in (embedding_tile(rows), prefill_tile(rows, 4096, WIDTHS, 64), general.shrink, general.gemm):
        assert all(power_of_two(side) and side >= 16 for side in (tile.BM, tile.BN, tile.BK, tile.BR))
    for features in WIDTHS:
        shrink = single_tiles(rows, features).shrink
        assert power_of_two(shrink.BK)
        assert rows > 256 or max(64, 2 * features) > shrink.BK


def test_a_prefill_tile_shrinks_before_multiprocessors_idle() -> None:
    assert prefill_tile(8192, 4096, (4096,), 16).BN == prefill_tile(8192, 2560, (9728, 9728), 16).BN == 256
    assert prefill_tile(8192, 2048, (4096,), 16).BN == prefill_tile(512, 4096, (4096,), 16).BN == 128
    assert prefill_tile(300, 4096, (2048,), 16).BM == 64
    assert [prefill_tile(rows, 2048, (128,), 16).BN for rows in (2048, 4096, 8192)] == [32, 64, 128]


def test_a_last_wave_that_would_be_mostly_idle_is_shared() -> None:
    even, uneven, together = (prefill_tile(2048, 14336, n, 16) for n in ((4096,), (5120,), (4096, 1024, 1024)))
    assert (even.BN, even.programs) == (256, 1)
    assert (uneven.BN, uneven.programs) == (128, 2)
    assert (together.BN, together.programs) == (256, 1)  # 384 tiles of all members


def test_a_shrink_keeps_to_what_the_last_wave_leaves_idle() -> None:
    def few(rows: int, features: int, *widths: int, width: int = 16) -> int:
        return prefill_tile(rows, features, widths, width).shrink.few

    assert few(2048, 14336, 4096) == 8  # 256 tiles of two times 132
    assert few(2048, 4096, 3584) == 40
    assert few(2048, 8960, 1536) == 36  # one wave
    assert few(2048, 4096, 4096) == few(2048, 2048, 3584) == few(2048, 4096, 5120) == 0
    assert few(2048, 14336, 4096, width=64) == few(2048, 14336, 4096, 4096) == few(256, 14336, 28672) == 0


def test_many_rows_that_tma_cannot_read() -> None:
    def sides(rows: int, units: tuple[int, int], *widths: int) -> tuple[int, int, int]:
        gemm = many_fused_tiles(rows, widths, 16, units).gemm
        return gemm.BM, gemm.BN, gemm.num_warps

    assert sides(257, (4, 4), 24) == sides(257, (2, 2), 24) == (64, 64, 4)
    assert sides(300, (4, 4), 3420, 3420) == (64, 128, 4)
    assert sides(8192, (4, 4), 3420, 3420) == (128, 128, 4)
    assert sides(8192, (2, 2), 1030) == sides(8192, (16, 2), 4096) == (128, 128, 8)
    assert sides(8192, (16, 1), 50257) == (64, 64, 4)
    assert sides(257, (1, 16), 2048) == sides(8192, (1, 16), 2048) == (128, 64, 4)


def test_some_rows_of_single_elements_take_the_tiles_of_many() -> None:
    assert prefers_many_tiles(128, (50257,), (16, 1))
    assert not prefers_many_tiles(128, (775,), (16, 1))
    assert not prefers_many_tiles(256, (50258,), (16, 2))
    assert not prefers_many_tiles(256, (50257,), (1, 1))


def test_a_fused_tile_is_the_one_whose_waves_take_least() -> None:
    def sides(rows: int, features: int, *widths: int) -> tuple[int, int, int] | None:
        tiles = fused_tiles(rows, features, widths, 16, True)
        return (tiles.gemm.BM, tiles.gemm.BN, tiles.gemm.num_stages) if tiles else None

    assert sides(256, 2048, 2048) == (64, 64, 4)  # 128 tiles
    assert sides(256, 4096, 4096) == (64, 128, 5)  # 128 tiles
    assert sides(256, 8192, 8192) == (64, 256, 4)  # 128 tiles
    assert sides(256, 4096, 4096, 1024, 1024) == (64, 128, 4)  # 192 tiles, two to a multiprocessor
    assert sides(256, 2048, 8192, 8192) == (128, 256, 4)  # 128 tiles
    assert sides(256, 2048, 128) is sides(256, 14336, 4096) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_what_could_pass_the_range_of_half_precision_stays_in_decode(dtype: torch.dtype) -> None:
    shapes = itertools.product((65, 256), WIDTHS, WIDTHS)
    assert not any(prefers_prefill(rows, features, (columns,), dtype) for rows, features, columns in shapes)


def test_the_unit_of_numbers_divides_them_all() -> None:
    assert unit_of(3420, 6840) == 4
    assert unit_of(3000, 4096) == 8
    assert unit_of(3000, 4097) == unit_of(1) == 1
    assert unit_of(4096, 16) == unit_of() == unit_of(0) == 1  # what Triton sees by itself
