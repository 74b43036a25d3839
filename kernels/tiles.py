"""Tile choices of the Triton bodies of linears; those of one wave are in wave_tiles.py, over many rows in
prefill_tiles.py, of experts in expert_tiles.py.

Stage: run time, read at each launch. A choice may depend on the batch shape, on widths and on the dtype; never on
what the batch holds, or the bits of one request would depend on the others. BM rows, BN out-features, BK in-features,
BR ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import TypeVar

from fxlora.kernels.triton_helpers import cdiv, next_power_of_2


@dataclass(frozen=True)
class Tile:
    """One launch's tile."""

    BM: int
    BN: int
    BK: int
    BR: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class GeneralTiles:
    """The two launches of general.py."""

    shrink: Tile
    gemm: Tile


@dataclass(frozen=True)
class VectorTile:
    """Of shrink.py: at most `parts` programs share the ranks of an entry, at most `programs` those of a member.

    num_warps counts where the shrink is a launch of its own.
    """

    BR: int
    BK: int
    parts: int
    programs: int
    num_warps: int


@dataclass(frozen=True)
class ShrinkTile:
    """Of decode_shrink.py and group_shrink.py: tiles of BM entries of one slot, 16 for the former; `parts` programs
    share the in-features of a tile, at most `shares` its ranks, BR at once; at most `programs` of each member, of which
    `few` (0: all) do it alone where the batch has few tiles. A block of in-features is cut into `slices`."""

    BM: int
    BR: int
    BK: int
    parts: int
    programs: int
    num_warps: int
    num_stages: int
    slices: int
    shares: int = 1
    few: int = 0

    def shares_of(self, width: int) -> int:
        """Programs that share the ranks of a tile, of which a slot has `width` at most."""
        return min(self.shares, cdiv(width, self.BR))


@dataclass(frozen=True)
class ExpandTile:
    """Of expand.py: at most so many programs of a member share all tiles of the batch."""

    BR: int
    BN: int
    programs: int
    num_warps: int


@dataclass(frozen=True)
class GemmTile:
    """Of decode_gemm.py: SPLIT programs share the in-features of a tile; SWAP lays W along wgmma's A operand."""

    BM: int
    BN: int
    BK: int
    SPLIT: int
    SWAP: bool
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class SingleTiles:
    """The launches of single.py, beside the library's product."""

    shrink: VectorTile | ShrinkTile
    expand: ExpandTile

    @property
    def split(self) -> int:
        """Parts of the base product, to be added up."""
        return 1

    @property
    def h_parts(self) -> int:
        """Parts of h, to be added up."""
        return self.shrink.parts if isinstance(self.shrink, ShrinkTile) else 1


@dataclass(frozen=True)
class DecodeTiles(SingleTiles):
    """The launches of a linear over few rows: a VectorTile shares the product's launch, a ShrinkTile has its own."""

    gemm: GemmTile

    @property
    def split(self) -> int:
        return self.gemm.SPLIT


@dataclass(frozen=True)
class FusedTiles:
    """The two launches of fused.py; BR ranks are expanded at once, in a loop of so many stages. w_tma: W is read by
    TMA, where that can read it."""

    shrink: ShrinkTile
    gemm: GemmTile
    BR: int
    stages: int
    w_tma: bool = False


@dataclass(frozen=True)
class GemvTile:
    """Of gemv.py; a program asks for so many blocks [BN, BK] of W at once."""

    BN: int
    BK: int
    num_warps: int
    blocks: int
    shrink: VectorTile


# Chosen for bf16 by CUDA-graph replay over weights that do not fit L2, adapters of rank 16 (most rank 16), in
# microseconds behind a kernel that overlaps nothing, beside torch.mm in the same run; NVIDIA H200, torch 2.11.0,
# triton 3.6.0, 2026-12-01.
#     K x N            M 1           M 16, 16 adapters   M 64, 8       M 64, 64      M 256, 64     M 2048, 8
#     4096 x 4096      10.8 (12.4)   12.5 (12.7)         13.1 (11.6)   16.8 (11.5)   19.9 (16.8)    99 (93)
#     2048 x 4096       7.8 (7.2)     8.1 (6.8)           8.2 (6.7)    11.7 (7.3)    13.2 (9.2)     53 (47)
#     14336 x 4096     31.8 (32.3)   33.0 (32.3)         35.0 (36.1)   41.8 (36.2)   54.6 (48.1)   337 (330)
#     4096 x 28672     56.6 (60.1)   63.3 (61.3)         64.5 (65.1)   81.6 (64.3)  128.3 (91.1)   698 (675)
#     2048 x 128        3.5 (4.9)     5.0 (5.5)           6.7 (5.7)     7.3 (5.5)     9.6 (5.8)     10 (5.9)
# Vector products ask for eight blocks of W at most: unrolled further they spilled at some widths, 267 us at
# 11008 x 4096 where this takes 25.

MULTIPROCESSORS = 132
"""Of the GPU the tables were made on: tiles of a wave where one program fills a multiprocessor."""

_VECTOR = VectorTile(4, 2048, 16, 528, 4)
_SHRINK_ROWS = VectorTile(4, 2048, 16, 128, 4)
_SHRINK_SHORT = VectorTile(8, 1024, 16, 128, 4)
_SHRINK_SINGLE = VectorTile(4, 1024, 16, 1056, 4)
_SHRINK_SINGLE_TILES = ShrinkTile(16, 16, 64, 8, 1056, 4, 3, 1)
_SHRINK_HALVES = ShrinkTile(16, 64, 256, 2, 264, 4, 3, 4)
_SHRINK_HALVES_RANKS = ShrinkTile(16, 64, 256, 2, 264, 4, 3, 1)
_SHRINK_QUARTERS_RANKS = ShrinkTile(16, 64, 128, 4, 264, 4, 3, 1)
SHRINK_ALONE = ShrinkTile(16, 64, 256, 1, 264, 4, 4, 4)
_SHRINK_ALONE_RANKS = ShrinkTile(16, 32, 256, 1, 264, 4, 3, 4, 16)
SHRINK_SHARED_RANKS = ShrinkTile(16, 16, 256, 1, 528, 4, 4, 4, 16)
_GEMV_SHORT, _GEMV_ODD = GemvTile(4, 512, 1, 8, _VECTOR), GemvTile(8, 512, 2, 8, _VECTOR)
_GEMV = {
    2048: GemvTile(4, 2048, 4, 8, _VECTOR),
    4096: GemvTile(4, 1024, 2, 8, _VECTOR),
    6144: GemvTile(2, 1024, 1, 8, _VECTOR),
    16384: GemvTile(2, 1024, 2, 8, _VECTOR),
    None: GemvTile(4, 1024, 2, 8, _VECTOR),
}
_EXPAND, _EXPAND_MANY = ExpandTile(64, 256, 1056, 4), ExpandTile(64, 256, 528, 4)
WIDE, TALL = 20000, 8192
"""Out-features from which every multiprocessor has tiles enough; in-features above which parts of them are long."""

# What the general body uses; not tuned.
_SHRINK = {16: Tile(16, 16, 128, 16, 4, 3), 64: Tile(32, 16, 128, 16, 4, 3), None: Tile(64, 16, 64, 16, 4, 3)}
_GEMM = {16: Tile(16, 64, 128, 16, 4, 4), 64: Tile(64, 64, 64, 16, 4, 4), None: Tile(128, 128, 64, 16, 8, 3)}
_EMBEDDING = {16: Tile(16, 128, 16, 16, 4, 2), None: Tile(32, 128, 16, 16, 4, 2)}

Choice = TypeVar("Choice")


def _pick(table: dict[int | None, Choice], rows: int) -> Choice:
    return next(choice for bound, choice in table.items() if bound is None or rows <= bound)


def counter(rows: int, widths: tuple[int, ...]) -> Callable[[int, int], int]:
    """(BM, BN) -> tiles of all members."""
    return lambda block_m, block_n: cdiv(rows, block_m) * sum([cdiv(n, block_n) for n in widths])


def _warps(elements: int, most: int) -> int:
    """Warps for a block: none whose threads would only repeat what others hold (16 bytes a thread)."""
    return max(1, min(most, elements // 256))


def narrowed(tile: VectorTile, features: int) -> VectorTile:
    """The tile with BK no wider than the in-features."""
    width = min(tile.BK, max(32, next_power_of_2(features)))
    return replace(tile, BK=width, num_warps=_warps(tile.BR * width, tile.num_warps))


@cache
def gemv_tile(features: int) -> GemvTile:
    """Tile of matrix-vector products. Blocks that divide the in-features need no mask."""
    tile = _pick(_GEMV, features)
    if features % 1024:
        tile = _GEMV_SHORT if features < 3072 else _GEMV_ODD if features % 512 == 0 else tile
    width = min(tile.BK, max(32, next_power_of_2(features)))
    warps = _warps(tile.BN * width, tile.num_warps)
    return replace(tile, BK=width, num_warps=warps, shrink=narrowed(tile.shrink, features))


@cache
def decode_tiles(rows: int, features: int, columns: int, width: int, odd: bool) -> DecodeTiles:
    """Tiles of a linear of few rows over N columns in all, in half precision. width: most ranks of a slot. odd: nor
    two in-features lie together, which takes registers from the tile."""
    shrink = narrowed(_SHRINK_ROWS if features > 2048 else _SHRINK_SHORT, features)
    tall, wide = features > TALL, columns > WIDE
    if rows <= 16:
        gemm = GemmTile(16, 128, 128, 1, True, 4, 3) if wide else GemmTile(16, 64, 128, 1, True, 4, 6)
        if not wide and features > 2048:
            parts = 4 if columns <= 2560 or (tall and rows > 8) else 2
            gemm = GemmTile(16, 64, 128, parts, True, 4, 4 if columns <= 4096 or parts == 4 else 3)
        return DecodeTiles(shrink, _EXPAND, gemm)
    if rows <= 64:
        gemm = GemmTile(64, 128, 64, 1, False, 4, 4) if wide else GemmTile(64, 64, 64, 4, True, 4, 4)
        if not wide and features > 2048 and columns > 2560 and (not tall or width > 16):
            gemm = GemmTile(64, 64, 128, 2, True, 4, 3)
        return DecodeTiles(_decode_shrink(features, columns, width) or shrink, _EXPAND, gemm)
    tiles = cdiv(rows, 128) * cdiv(columns, 128)
    parts = next((parts for parts in (4, 2) if parts * tiles <= MULTIPROCESSORS), 1)
    gemm = GemmTile(128, 64, 64, 4, False, 4, 4) if columns <= 2048 else GemmTile(128, 128, 64, parts, False, 8, 4)
    if odd:
        gemm = GemmTile(64, 64, 64, parts, True, 4, 4)
    return DecodeTiles(_SHRINK_HALVES if width <= 16 else _SHRINK_HALVES_RANKS, _EXPAND_MANY, gemm)


def _decode_shrink(features: int, columns: int, width: int) -> ShrinkTile | None:
    """Of 17 to 64 rows: the matrix unit, where vectors would read the As once too often."""
    if width <= 16:
        return _SHRINK_HALVES if features > TALL or columns > 4096 else None
    return _SHRINK_QUARTERS_RANKS if columns <= 2560 else SHRINK_SHARED_RANKS


@cache
def fused_tiles(rows: int, features: int, widths: tuple[int, ...], width: int, aligned: bool) -> FusedTiles | None:
    """Tiles of a bf16 linear of few rows, None where decode_tiles serve it better.

    widths: N of each member. width: most ranks of a slot. aligned: rows of B lie 16 bytes apart; else B comes through
    registers, a few ranks at once.
    """
    shrink = SHRINK_ALONE if width <= 16 else _SHRINK_ALONE_RANKS
    ranks, columns = 64 if aligned else 16, sum(widths)
    if rows <= 16:
        wide = GemmTile(16, 128, 128, 1, True, 4, 3)
        return None if columns <= 64 * MULTIPROCESSORS else FusedTiles(shrink, wide, ranks, 3)
    if rows <= 64:
        gemm = _fused_gemm_of_64(columns)
        stages = 3 if width <= 16 or columns <= WIDE else 4
        return None if gemm is None else FusedTiles(shrink, gemm, ranks, stages, w_tma=columns > WIDE)
    gemm = _fused_gemm(rows, features, widths, width) if aligned else None
    return None if gemm is None else FusedTiles(shrink, gemm, ranks, 3, w_tma=not gemm.SWAP)


def _fused_gemm_of_64(columns: int) -> GemmTile | None:
    """Of 17 to 64 rows."""
    if columns < 6144:
        return None
    if columns <= 64 * MULTIPROCESSORS:
        return GemmTile(64, 64, 128, 1, True, 4, 4)
    if columns <= 128 * MULTIPROCESSORS:
        return GemmTile(64, 128, 64, 1, False, 4, 5) if columns >= 12288 else GemmTile(64, 64, 64, 1, True, 4, 6)
    return GemmTile(64, 64, 64, 1, True, 4, 4) if columns <= WIDE else GemmTile(64, 128, 64, 1, False, 4, 4)


def _fused_gemm(rows: int, features: int, widths: tuple[int, ...], width: int) -> GemmTile | None:
    """Of 65 to 256 rows: the tile whose waves take least together.

    A wave of one program a multiprocessor is the unit for 64 x 256, of two for 64 x 128; one of 128 x 256 takes 1.75.
    """
    if sum(widths) <= 512 or features > TALL:
        return None
    count = counter(rows, widths)
    small, medium, large = count(64, 64), count(64, 128), count(64, 256)
    if small <= MULTIPROCESSORS:
        fills = small > (90 if len(widths) == 1 else 60) and features < TALL and width <= 16
        return GemmTile(64, 64, 128, 1, True, 4, 4) if fills else None
    if medium <= MULTIPROCESSORS:
        return GemmTile(64, 128, 64, 1, False, 4, 5) if features < TALL or medium > 105 else None
    pairs, single = cdiv(medium, 2 * MULTIPROCESSORS), cdiv(large, MULTIPROCESSORS)
    tall = 1.75 * cdiv(count(128, 256), MULTIPROCESSORS)
    if features > 1024 and tall < min(pairs, single):
        return GemmTile(128, 256, 64, 1, False, 8, 4)
    if pairs < single or features <= 2048 or large <= 105:
        return GemmTile(64, 128, 64, 1, False, 4, 4)
    return GemmTile(64, 256, 64, 1, False, 8, 4)


@cache
def single_tiles(rows: int, features: int) -> SingleTiles:
    """Tiles of a linear in fp32."""
    return SingleTiles(narrowed(_SHRINK_SINGLE, features) if rows <= 256 else _SHRINK_SINGLE_TILES, _EXPAND)


@cache
def general_tiles(rows: int, entries: int) -> GeneralTiles:
    """Tiles of the general body. entries: T * J."""
    return GeneralTiles(_pick(_SHRINK, entries), _pick(_GEMM, rows))


def embedding_tile(rows: int) -> Tile:
    """Tile of the embedding lookup."""
    return _pick(_EMBEDDING, rows)
