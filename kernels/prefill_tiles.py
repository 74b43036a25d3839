"""Tile choices of linears over many rows.

Stage: run time, read at each launch. What holds for all choices, and what they were measured on, is in tiles.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

import torch

from fxlora.kernels.tiles import MULTIPROCESSORS, SHRINK_ALONE, TALL, FusedTiles, GemmTile, ShrinkTile, Tile, counter
from fxlora.kernels.triton_helpers import cdiv


@dataclass(frozen=True)
class BesideTile:
    """Of prefill_hopper_shrink.py: `few` programs make h while the product's run on the other multiprocessors, all of
    them where the batch has more than `most` tiles of BM entries."""

    few: int
    most: int
    BM: ClassVar[int] = 64


@dataclass(frozen=True)
class PrefillTile(Tile):
    """Of prefill.py: so many programs for each multiprocessor. BR ranks are expanded with the base product, the others
    later[0] at once in later[1] stages."""

    programs: int
    later: tuple[int, int]
    shrink: ShrinkTile | BesideTile


@dataclass(frozen=True)
class HopperTile:
    """Of prefill_hopper.py: two groups of warps take tiles in turn, or, `shared`, halves of each; so many row tiles
    follow each other; what the expand needs is asked for so many steps before the last."""

    BM: int
    BN: int
    BK: int
    num_stages: int
    shared: bool
    band: int
    ahead: int
    shrink: ShrinkTile | BesideTile
    programs: ClassVar[int] = 1


_SHRINK_TALL = ShrinkTile(64, 16, 64, 1, 264, 4, 5, 1)
_SHRINK_TALL_SHARED = ShrinkTile(64, 16, 128, 1, 264, 4, 4, 1, 16)
_SHRINK_TALL_RANKS = ShrinkTile(64, 64, 64, 1, 264, 4, 5, 1)
_SHRINK_ASIDE = ShrinkTile(64, 16, 128, 1, MULTIPROCESSORS, 4, 5, 1)
_SHRINK_ASIDE_TALL = ShrinkTile(128, 16, 128, 1, MULTIPROCESSORS, 8, 5, 1)
LONG, RATHER_LONG, SHORT = 35e10, 19e10, 3e10
"""Multiplications of a call: from LONG on (of a Hopper's own kernel, RATHER_LONG) power limits what it may read; below
SHORT, a program's last store and the wait for the shrink weigh most."""


@cache
def prefers_prefill(rows: int, features: int, widths: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether prefill serves 65 to 256 rows better, where TMA can read them: many tiles of many in-features."""
    many = cdiv(rows, 128) * cdiv(sum(widths), 128) > MULTIPROCESSORS // 2
    return dtype == torch.bfloat16 and features > TALL and many


@cache
def prefill_tile(rows: int, features: int, widths: tuple[int, ...], width: int) -> PrefillTile:
    """Tile of a linear of many rows. widths: N of each member. width: most ranks of a slot.

    128 x 256, which reads least, where a tile or the whole call takes long, unless much of the last wave would be idle;
    else two programs share a multiprocessor, and one multiplies while the other stores.
    """
    later, count = (32, 3), counter(rows, widths)
    large, medium = count(128, 256), count(128, 128)
    idle = -large % MULTIPROCESSORS
    aside = _shrink_aside(rows, features, large, idle) if len(widths) == 1 and width <= 16 else None
    shrink = _prefill_shrink(rows, len(widths), large, width)
    fills = large >= 120 and idle <= large * (0.4 if width > 16 and features >= TALL else 0.08)
    is_long = features > 3072 or rows * features * sum(widths) > LONG
    for columns in (32, 64):
        if count(64, columns) <= MULTIPROCESSORS:
            return PrefillTile(64, columns, 128, 16, 4, 4, 2, later, shrink)
    if is_long and (fills or (aside and features >= TALL)):
        return PrefillTile(128, 256, 64, 32, 8, 3, 1, later, aside or shrink)
    if medium > MULTIPROCESSORS:
        return PrefillTile(128, 128, 64, 16, 4, 3, 2, later, aside or shrink)
    if medium >= 100:
        return PrefillTile(128, 128, 64, 16, 4, 4, 1, later, shrink)
    if count(64, 128) <= MULTIPROCESSORS:
        return PrefillTile(64, 128, 64, 16, 4, 5, 1, later, shrink)
    return PrefillTile(64, 128, 64, 16, 4, 4, 2, later, shrink)


@cache
def hopper_tile(rows: int, features: int, widths: tuple[int, ...], width: int) -> PrefillTile | HopperTile:
    """As prefill_tile, for a GPU that prefill_hopper.py and prefill_hopper_shrink.py serve too."""
    tile = _hopper_product(rows, features, widths, width)
    shrink = _shrink_beside(rows, features, widths, width, tile)
    return tile if shrink is None else replace(tile, shrink=shrink)


def _hopper_product(rows: int, features: int, widths: tuple[int, ...], width: int) -> PrefillTile | HopperTile:
    """Turns take 128 x 128, which the last wave leaves less of the GPU idle for; a shared tile is 128 x 256, which
    reads less: over many in-features that is worth more than a little idleness. Times are counted in 128 x 128 of a
    multiprocessor. More than 16 ranks expand better in the other kernel, whose loads of them run further ahead.
    """
    plain = prefill_tile(rows, features, widths, width)
    count = counter(rows, widths)
    work = rows * features * sum(widths)
    by_turns, shared = cdiv(count(128, 128), MULTIPROCESSORS), 2 * cdiv(count(128, 256), MULTIPROCESSORS)
    as_planned = shared if plain.BN == 256 else 2 * cdiv(count(128, 128), 2 * MULTIPROCESSORS)
    turns = HopperTile(128, 128, 64, 5, False, 8, 0, _prefill_shrink(rows, len(widths), count(128, 256), width))
    pairs = HopperTile(128, 256, 64, 4, True, 16, 6, plain.shrink)
    has_time = _shrink_beside(rows, features, widths, width, turns) is not None
    pairs_have = _shrink_beside(rows, features, widths, width, pairs) is not None
    if by_turns <= 2:
        is_full = plain.BM == 128 and count(128, 128) >= (by_turns - 1 / 3) * MULTIPROCESSORS
        is_long = features >= (4096 if by_turns == 1 else TALL)
        return turns if is_long and is_full and has_time else plain
    if features >= TALL and by_turns <= 0.85 * shared:
        return turns
    if features < TALL and work < RATHER_LONG:
        is_short = features <= 1024 or (features < 3072 and rows <= 4096)
        even = by_turns == as_planned and ((is_short and (work >= SHORT or has_time)) or (has_time and not pairs_have))
        if by_turns <= 0.8 * as_planned or (width <= 16 and (by_turns < as_planned or even)):
            return turns
    return pairs if width <= 16 and shared <= as_planned and work >= SHORT else plain


def _shrink_beside(
    rows: int, features: int, widths: tuple[int, ...], width: int, tile: PrefillTile | HopperTile
) -> BesideTile | None:
    """On the multiprocessors that have a tile of the product less than others, or none, if it ends about when the first
    tile of the others does.

    A tile of 128 x 128 takes as long as three of h do. Where others follow there is time for a fourth, and
    where many do for more: turns that did not begin together, as behind a shrink on all multiprocessors, take longer.
    More than five tiles for each program, which only many adapters make, are for all programs.
    """
    tiles = counter(rows, widths)(tile.BM, tile.BN)
    waves, most = cdiv(tiles, MULTIPROCESSORS), cdiv(rows, BesideTile.BM) + 4  # of a batch of eight requests
    few = min(-tiles % MULTIPROCESSORS, most)
    if rows <= 256 or features < 1024 or width > 16 or few == 0 or tile.programs > 1 or min(tile.BM, tile.BN) < 128:
        return None
    in_time = 5.5 if tile.BN == 256 else 2 if waves == 1 else max(4, 2.5 + waves / 4)
    return BesideTile(few, 5 * few) if cdiv(most, few) * (4 + len(widths)) <= 5 * in_time else None


def _prefill_shrink(rows: int, members: int, tiles: int, width: int) -> ShrinkTile:
    """All multiprocessors for a short time where the product needs them all, few of them where others are left.

    tiles: of 128 x 256 of the product.
    """
    if width > 16:
        is_small = members == 1 and rows <= 4096 and tiles <= 4 * MULTIPROCESSORS
        return _SHRINK_TALL_SHARED if is_small else _SHRINK_TALL_RANKS
    return SHRINK_ALONE if members == 1 and rows <= 4096 else _SHRINK_TALL


def _shrink_aside(rows: int, features: int, tiles: int, idle: int) -> ShrinkTile | None:
    """For the programs that the last wave of the product has no tile for, where they are done before its first ends.

    tiles: of 128 x 256 of the product, which leave `idle` multiprocessors out in the end.
    """
    is_tall, is_single = features >= TALL, MULTIPROCESSORS // 2 < tiles <= MULTIPROCESSORS
    rows_each = 64 if not is_tall else 128 if is_single else 256  # of a program; uneven segments make more
    in_time = features > 3072 and rows <= rows_each * idle
    if rows <= 256 or not in_time or not (is_single or 5 * idle <= tiles):
        return None
    return replace(_SHRINK_ASIDE_TALL if is_tall else _SHRINK_ASIDE, few=min(idle, 64))


@cache
def prefers_many_tiles(rows: int, widths: tuple[int, ...], units: tuple[int, int]) -> bool:
    """Whether the tiles of many rows serve 65 to 256 bf16 rows better: where there are enough of them, and out-features
    lie alone, of which those of decode hold more than there are registers. units: as of `many_fused_tiles`."""
    return units[0] > 1 and units[1] == 1 and counter(rows, widths)(64, 64) >= MULTIPROCESSORS


@cache
def many_fused_tiles(rows: int, widths: tuple[int, ...], width: int, units: tuple[int, int]) -> FusedTiles:
    """Tiles of a bf16 linear of many rows that TMA cannot read.

    widths: N of each member. width: most ranks of a slot. units: elements that lie together in rows of x and of the
    weights, and in rows of y and of B, of the latter 2 at most where weights are transposed: both cost registers.
    """
    count = counter(rows, widths)
    if units[0] == 1:
        gemm = GemmTile(128, 64, 64, 1, False, 4, 4)
    elif count(64, 64) <= MULTIPROCESSORS or units[1] == 1:
        gemm = GemmTile(64, 64, 64, 1, False, 4, 4)
    elif count(64, 128) <= 2.25 * MULTIPROCESSORS and min(units) >= 4:
        gemm = GemmTile(64, 128, 64, 1, False, 4, 3)
    else:
        gemm = GemmTile(128, 128, 64, 1, False, 4 if min(units) >= 4 else 8, 3)
    return FusedTiles(_SHRINK_TALL if width <= 16 else _SHRINK_TALL_RANKS, gemm, 16, 3)
