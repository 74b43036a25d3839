"""Tile choices of fused_hopper.py: linears whose tiles are one wave on a Hopper GPU.

Stage: run time, read at each launch; see tiles.py. A program has a multiprocessor to itself, so there are enough of
them to bring W, and not more than there are multiprocessors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

from fxlora.kernels.tiles import (
    MULTIPROCESSORS,
    SHRINK_ALONE,
    SHRINK_SHARED_RANKS,
    TALL,
    ShrinkTile,
    counter,
)


@dataclass(frozen=True)
class FusedHopperTiles:
    """The two launches of fused_hopper.py: tiles of BM rows, 16, 32 or 64, by BN columns, a ring of so many stages of
    BK in-features. apart: the programs of both are a wave together, so that a ring may fill before the shrink begins.
    split: programs that share the in-features of a tile.
    """

    shrink: ShrinkTile
    BM: int
    BN: int
    BK: int
    stages: int
    apart: bool = False
    split: int = 1


MOST_RANKS = 64
"""Of a slot, for which the shrinks were measured."""

_SHRINK_APART = replace(SHRINK_ALONE, num_stages=6)
_SHRINK_APART_RANKS = ShrinkTile(16, 32, 256, 1, 264, 4, 5, 4, 2)
_SHRINK_BESIDE_RANKS = replace(_SHRINK_APART_RANKS, num_stages=3)


@cache
def fused_hopper_tiles(rows: int, features: int, widths: tuple[int, ...], width: int) -> FusedHopperTiles | None:
    """Tiles of a bf16 linear of up to 256 rows of one slot each on a Hopper GPU, None where others serve it better.

    widths: N of each member. width: most ranks of a slot. Where tiles and those of the shrink are a wave together, both
    take so much memory that none share a multiprocessor, which would make the shrink late; where they are more, rings
    leave it room.
    """
    if width > MOST_RANKS:
        return None
    in_parts = _in_parts(rows, features, widths, width <= 16)
    if in_parts is not None:
        return in_parts
    if rows <= 16:
        return _of_16_rows(rows, features, widths, width <= 16)
    if rows <= 64:
        return _of_64_rows(rows, features, widths, width <= 16)
    return _of_more_rows(rows, features, widths, width <= 16)


def _in_parts(rows: int, features: int, widths: tuple[int, ...], few_ranks: bool) -> FusedHopperTiles | None:
    """Few tiles of many in-features each, up to 128 rows: programs share a tile, and those of the shrink share h, which
    then is there as early. None where one program a tile is as fast: what parts leave for each other takes 2 us."""
    tiles, members = counter(max(rows, 64), widths)(64, 64), len(widths)
    if sum(widths) < 768 or rows > 128:
        return None
    apart = _SHRINK_APART if few_ranks else _SHRINK_APART_RANKS
    halves, quarters = replace(apart, parts=2), replace(apart, parts=4)
    if rows <= 16:
        tall = features > 4096 or (features == 4096 and not few_ranks)
        if not tall or tiles >= 44 or 2 * (rows * members + tiles) > MULTIPROCESSORS:
            return None
        if few_ranks and tiles <= 16 and members == 1:
            return FusedHopperTiles(quarters, 16, 64, 128, 9, apart=True, split=3)
        shrink = halves if few_ranks or members > 1 else quarters
        return FusedHopperTiles(shrink, 16, 64, 128, 9 if few_ranks else 8, apart=True, split=2)
    if rows <= 32:
        is_one = members == 1 and tiles <= 40 and features >= (3072 if few_ranks else 4104)
        return FusedHopperTiles(halves, 32, 64, 128, 8, apart=True, split=2) if is_one else None
    if features <= 4096 or not few_ranks or tiles > (44 if rows <= 64 else 48) or (rows > 64 and members > 1):
        return None
    split = 3 if rows <= 64 and tiles <= 32 else 2
    return FusedHopperTiles(halves, 64, 64, 128, 6, apart=True, split=split)


def _of_16_rows(rows: int, features: int, widths: tuple[int, ...], few_ranks: bool) -> FusedHopperTiles | None:
    """Blocks of x are small: the ring holds more of W."""
    count, shrinks = counter(1, widths), rows * len(widths)
    small, large = count(1, 64), count(1, 128)
    if features < 768 or small < (24 if features <= 2048 else 36 if features <= 4096 else 44):
        return None
    if few_ranks and small + shrinks <= (MULTIPROCESSORS if len(widths) == 1 or features <= 2048 else 116):
        return FusedHopperTiles(_SHRINK_APART, 16, 64, 128, 9, apart=True)
    if small + shrinks <= 104:
        return FusedHopperTiles(_SHRINK_APART_RANKS, 16, 64, 128, 8, apart=True)
    beside = SHRINK_ALONE if few_ranks else SHRINK_SHARED_RANKS
    if small <= MULTIPROCESSORS:
        return FusedHopperTiles(beside, 16, 64, 128, 6)
    if few_ranks and large + shrinks <= 108:
        return FusedHopperTiles(_SHRINK_APART, 16, 128, 128, 5, apart=True)
    return FusedHopperTiles(beside, 16, 128, 128, 4) if large <= MULTIPROCESSORS else None


def _of_64_rows(rows: int, features: int, widths: tuple[int, ...], few_ranks: bool) -> FusedHopperTiles | None:
    """17 to 64 rows, which are one tile."""
    count, shrinks = counter(1, widths), rows * len(widths)
    small, large = count(1, 64), count(1, 128)
    height, apart = 32 if rows <= 32 else 64, _SHRINK_APART if few_ranks else _SHRINK_APART_RANKS
    least = 1024
    if few_ranks and rows > 32 and features <= 3072:
        least = 512
    elif 3072 < features <= 4096 and (len(widths) == 1 or not few_ranks):
        least = 2048
    if features < 768 or sum(widths) < least:
        return None
    is_small = small < 48 and (few_ranks or features <= 2048)  # most multiprocessors are left to the shrink's
    if is_small or small + shrinks <= MULTIPROCESSORS:
        return FusedHopperTiles(apart, height, 64, 128, 8 if height == 32 else 6, apart=True)
    beside = SHRINK_ALONE if few_ranks else SHRINK_SHARED_RANKS
    if small <= MULTIPROCESSORS:
        return FusedHopperTiles(beside, 64, 64, 128, 5) if small >= 48 else None
    if large > MULTIPROCESSORS:
        return None
    if height == 64:
        return FusedHopperTiles(beside, 64, 128, 64, 6)
    if few_ranks and large + shrinks <= 108:
        return FusedHopperTiles(_SHRINK_APART, 32, 128, 128, 5, apart=True)
    return FusedHopperTiles(beside, 32, 128, 128, 4)


def _of_more_rows(rows: int, features: int, widths: tuple[int, ...], few_ranks: bool) -> FusedHopperTiles | None:
    """65 to 256 rows, of several tiles of 64."""
    count, members = counter(rows, widths), len(widths)
    small, large = count(64, 64), count(64, 128)
    beside = _beside_more_rows(rows, members, few_ranks)
    if features < 768:
        return None
    are_few = small <= (84 if features > TALL and members == 1 else 68)
    if are_few and sum(widths) >= 768:
        return FusedHopperTiles(_SHRINK_APART if few_ranks else _SHRINK_APART_RANKS, 64, 64, 128, 6, apart=True)
    if beside is None:
        return None
    least = 64 if features < TALL else 96
    if least <= small <= MULTIPROCESSORS:
        return FusedHopperTiles(beside, 64, 64, 128, 5)
    if least <= large <= MULTIPROCESSORS:
        is_late = few_ranks and rows > 128 and members > 1
        return FusedHopperTiles(SHRINK_ALONE if is_late else beside, 64, 128, 64, 7)
    return None


def _beside_more_rows(rows: int, members: int, few_ranks: bool) -> ShrinkTile | None:
    """The shrink of 65 to 256 rows; None where other bodies serve them better."""
    if few_ranks:
        return replace(SHRINK_ALONE, parts=2, programs=MULTIPROCESSORS // members)
    if rows <= 128:
        return SHRINK_SHARED_RANKS
    return _SHRINK_BESIDE_RANKS if members == 1 else None
