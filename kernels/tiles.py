"""The one table of tile choices of the Triton bodies.

Stage: run time, read at each launch. A choice may depend on the batch shape, on widths and on the dtype; never on
what the batch holds, or the bits of one request would depend on the others. BM rows, BN out-features, BK in-features,
BR ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import TypeVar

import torch

from fxlora.kernels.triton_helpers import next_power_of_2


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
    """Of decode_shrink.py: `parts` programs share the in-features of a tile; at most `programs` of each member. A block
    of in-features is cut into `slices`. registers: most of a thread, where the launch after it shall fit beside it."""

    BR: int
    BK: int
    parts: int
    programs: int
    num_warps: int
    num_stages: int
    slices: int
    registers: int | None = None


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
class DecodeTiles:
    """The launches of a linear over few rows: a VectorTile shares the product's launch, a ShrinkTile has its own."""

    shrink: VectorTile | ShrinkTile
    expand: ExpandTile
    gemm: GemmTile


@dataclass(frozen=True)
class FusedTiles:
    """The two launches of fused.py; BR ranks are expanded at once, in a loop of so many stages."""

    shrink: ShrinkTile
    gemm: GemmTile
    BR: int
    stages: int


@dataclass(frozen=True)
class PrefillTile:
    """Of prefill.py: BR ranks are expanded with the base product, the others later[0] at once in later[1] stages.
    registers: as in ShrinkTile."""

    BM: int
    BN: int
    BK: int
    BR: int
    num_warps: int
    num_stages: int
    later: tuple[int, int]
    shrink: ShrinkTile
    registers: int | None = None


@dataclass(frozen=True)
class GemvTile:
    """Of gemv.py; a program asks for so many blocks [BN, BK] of W at once."""

    BN: int
    BK: int
    num_warps: int
    blocks: int
    shrink: VectorTile


@dataclass(frozen=True)
class DeltaTile:
    """Of the adapters' part in expert_decode.py. Where each warp has its own columns (256 of them for half precision),
    a thread has all BR ranks of its own and adds them up alone. BK: where no launch before it makes h."""

    BR: int
    BK: int
    BN: int
    programs: int
    num_warps: int


@dataclass(frozen=True)
class ExpertGemmTile:
    """Of the base product of expert_decode.py: so many programs share the tiles of the batch, `first` of them start
    beside those of the adapters' part; SWAP as in GemmTile."""

    BN: int
    BK: int
    SWAP: bool
    programs: int
    first: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ExpertDecodeTiles:
    """The launches of experts over few rows each; without `shrink`, h is made where it is needed."""

    shrink: VectorTile | None
    delta: DeltaTile
    gemm: ExpertGemmTile


@dataclass(frozen=True)
class ExpertPrefillTile:
    """Of expert_prefill.py and its shrink, which takes shrink_BM rows and shrink_BR ranks at once."""

    BN: int
    BK: int
    BR: int
    programs: int
    num_warps: int
    num_stages: int
    w_tma: bool
    x_tma: bool
    shrink_BM: int
    shrink_BR: int
    shrink_BK: int
    shrink_programs: int
    shrink_warps: int
    shrink_stages: int


# Chosen for bf16 by CUDA-graph replay over weights that do not fit L2, adapters of rank 16 (most rank 16), in
# microseconds behind a kernel that overlaps nothing, beside torch.mm in the same run; NVIDIA H200, torch 2.11.0,
# triton 3.6.0, 2026-11-29. fp32 tiles were not measured.
#     K x N            M 1           M 16, 16 adapters   M 64, 8       M 64, 64      M 256, 64     M 2048, 8
#     4096 x 4096      10.8 (12.4)   14.4 (13.6)         17.2 (12.0)   23.0 (12.3)   31.8 (16.7)   111 (93)
#     2048 x 4096       6.9 (6.6)     9.5 (7.3)          11.1 (7.3)                  21.6 (9.8)
#     14336 x 4096     31.1 (30.5)   37.7 (33.1)         45.2 (36.5)                 79.9 (49.2)
#     4096 x 28672     55.2 (54.4)   63.7 (57.6)         65.0 (62.4)                138.8 (92.7)   766 (678)
#     2048 x 128        3.5 (5.0)     5.1 (5.5)                                      10.5 (5.3)
# Experts beside torch._grouped_mm, 128 of them with 8 to a token, 8 adapters: 2048 x 1536 at 16 tokens 126 (175), at
# 2048 tokens 371 (383); 768 x 2048 at 16 tokens 70 (108), at 2048 tokens 219 (209). 8 experts with 2 to a token, 16
# adapters: 4096 x 28672 at 16 tokens 443 (704). 256 experts with 8 to a token: 7168 x 4096 at 16 tokens, 16 adapters
# 1343 (1950), at 2048 tokens, 8 adapters 4062 (4456). Vector products ask for eight blocks of W at most: unrolled
# further they spilled at some widths, 267 us at 11008 x 4096 where this takes 25.
_VECTOR = VectorTile(4, 2048, 16, 528, 4)
_SHRINK_ROWS = VectorTile(4, 2048, 16, 128, 4)
_SHRINK_SHORT = VectorTile(8, 1024, 16, 128, 4)
_SHRINK_TILES = ShrinkTile(64, 128, 4, 264, 4, 3, 4)
_SHRINK_TALL = ShrinkTile(64, 256, 4, 528, 4, 3, 4)
_SHRINK_ALONE = ShrinkTile(64, 256, 1, 264, 4, 4, 4)
_SHRINK_RANKS = ShrinkTile(64, 256, 1, 264, 4, 4, 1)
_SHRINK_BESIDE = ShrinkTile(16, 256, 1, 132, 4, 4, 4, 96)
_GEMV = {
    2048: GemvTile(4, 2048, 4, 8, _VECTOR),
    4096: GemvTile(4, 1024, 2, 8, _VECTOR),
    6144: GemvTile(2, 1024, 1, 8, _VECTOR),
    None: GemvTile(8, 512, 2, 8, _VECTOR),
}
_EXPAND, _EXPAND_MANY = ExpandTile(64, 256, 1056, 4), ExpandTile(64, 256, 528, 4)
_FP32 = {16: GemmTile(16, 64, 32, 1, False, 4, 3), None: GemmTile(64, 64, 32, 1, False, 4, 3)}
WIDE, TALL = 20000, 8192
"""Out-features from which every multiprocessor has tiles enough; in-features above which parts of them are long."""

# What the general body uses; not tuned.
_SHRINK = {16: Tile(16, 16, 128, 16, 4, 3), 64: Tile(32, 16, 128, 16, 4, 3), None: Tile(64, 16, 64, 16, 4, 3)}
_GEMM_HALF = {16: Tile(16, 64, 128, 16, 4, 4), 64: Tile(64, 64, 64, 16, 4, 4), None: Tile(128, 128, 64, 16, 8, 3)}
_GEMM_FP32 = {16: Tile(16, 64, 32, 16, 4, 2), 64: Tile(32, 64, 32, 16, 4, 2), None: Tile(64, 64, 32, 16, 4, 2)}
_EMBEDDING = {16: Tile(16, 128, 16, 16, 4, 2), None: Tile(32, 128, 16, 16, 4, 2)}
_PREFILL = ((128, 256, 8, 3), (128, 128, 4, 4), (64, 128, 4, 4))  # BM, BN, num_warps, num_stages

Choice = TypeVar("Choice")


def _pick(table: dict[int | None, Choice], rows: int) -> Choice:
    return next(choice for bound, choice in table.items() if bound is None or rows <= bound)


def _warps(elements: int, most: int) -> int:
    """Warps for a block: none whose threads would only repeat what others hold (16 bytes a thread)."""
    return max(1, min(most, elements // 256))


def _narrow(tile: VectorTile, features: int) -> VectorTile:
    """The tile with BK no wider than the in-features."""
    width = min(tile.BK, max(32, next_power_of_2(features)))
    return replace(tile, BK=width, num_warps=_warps(tile.BR * width, tile.num_warps))


@cache
def gemv_tile(features: int) -> GemvTile:
    """Tile of matrix-vector products."""
    tile = _pick(_GEMV, features)
    width = min(tile.BK, max(32, next_power_of_2(features)))
    warps = _warps(tile.BN * width, tile.num_warps)
    return replace(tile, BK=width, num_warps=warps, shrink=_narrow(tile.shrink, features))


@cache
def decode_tiles(rows: int, features: int, columns: int, dtype: torch.dtype) -> DecodeTiles:
    """Tiles of a linear of few rows over N columns in all."""
    shrink = _narrow(_SHRINK_ROWS if features > 2048 else _SHRINK_SHORT, features)
    if dtype == torch.float32:
        return DecodeTiles(shrink, _EXPAND, _pick(_FP32, rows))
    tall, wide = features > TALL, columns > WIDE
    if rows <= 16:
        gemm = GemmTile(16, 128, 128, 1, True, 4, 3) if wide else GemmTile(16, 64, 128, 1, True, 4, 6)
        if not wide and features > 2048:
            gemm = GemmTile(16, 64, 128, 2, True, 4, 4 if columns <= 4096 else 3)
        return DecodeTiles(shrink, _EXPAND, gemm)
    if rows <= 64:
        gemm = GemmTile(64, 128, 64, 1, False, 4, 4) if wide else GemmTile(64, 64, 64, 4, True, 4, 4)
        if not wide and features > 2048:
            gemm = GemmTile(64, 64, 128, 2, True, 4, 3)
        return DecodeTiles(shrink, _EXPAND, gemm)
    gemm = GemmTile(128, 128, 64, 2, False, 8, 4) if tall or wide else GemmTile(128, 64, 64, 2, False, 4, 4)
    return DecodeTiles(_SHRINK_TALL if tall else _SHRINK_TILES, _EXPAND_MANY, gemm)


@cache
def fused_tiles(rows: int, features: int, columns: int, width: int) -> FusedTiles | None:
    """Tiles of a bf16 linear of few rows over N columns in all, None where decode_tiles serve it better.

    width: most ranks of a slot.
    """
    shrink = _SHRINK_ALONE if width <= 16 else _SHRINK_RANKS
    if rows <= 64:
        if columns > WIDE:
            gemm = GemmTile(16, 128, 128, 1, True, 4, 3) if rows <= 16 else GemmTile(64, 128, 64, 1, False, 4, 4)
            return FusedTiles(shrink, gemm, 128, 2)
        if rows <= 16 or columns < 6144:
            return None
        return FusedTiles(shrink, GemmTile(64, 64, 128, 1, True, 4, 4), 128, 3)
    if columns <= 512:
        return FusedTiles(shrink, GemmTile(16, 64, 128, 1, True, 4, 4), 128, 3)
    if columns > WIDE or columns <= 2048 or features > TALL:
        return None
    return FusedTiles(shrink, GemmTile(64, 128, 128, 1, True, 8, 3), 64, 3)


@cache
def prefill_tile(rows: int, columns: int, width: int) -> PrefillTile:
    """Tile of a linear of many rows: the largest that gives every multiprocessor work. width: most ranks of a slot.

    A multiprocessor has 65536 registers, a quarter for each fourth warp. The largest tile leaves room for a shrink of
    few registers, which then runs beside it; where it has several tiles for each program, it is faster alone.
    """
    fits = (t for t in _PREFILL if -(-rows // t[0]) * -(-columns // t[1]) >= 120)
    bm, bn, warps, stages = next(fits, _PREFILL[-1])
    if width > 16:
        return PrefillTile(bm, bn, 64, 32 if width <= 64 else 64, warps, stages, (32, 5), _SHRINK_RANKS)
    if warps < 8 or rows > 4096:
        return PrefillTile(bm, bn, 64, 32, warps, stages, (32, 5), _SHRINK_ALONE)
    return PrefillTile(bm, bn, 64, 32, warps, stages, (32, 5), _SHRINK_BESIDE, 208)


@cache
def expert_decode_tiles(entries: int, features: int, columns: int, dtype: torch.dtype) -> ExpertDecodeTiles:
    """Tiles of experts over few rows each. entries: T * J."""
    alone = entries <= 8 and 1024 < features <= 4096
    shrink = None if alone else _narrow(VectorTile(4, 1024, 16, 4224, 4), features)
    block_k = min(512, max(32, next_power_of_2(features)))
    block_n = min(1024 if entries > 8 else 512 if alone else 256, max(32, next_power_of_2(columns)))
    delta = DeltaTile(16, block_k, block_n, 2112, 4 if alone else max(1, block_n // 256))
    if dtype == torch.float32:
        return ExpertDecodeTiles(shrink, delta, ExpertGemmTile(64, 32, False, 1056, 264, 4, 3))
    even = features % 128 == 0
    gemm = ExpertGemmTile(64, 128 if even else 64, True, 1056, 264, 4, 4 if even else 6)
    return ExpertDecodeTiles(shrink, delta, gemm)


@cache
def expert_prefill_tile(height: int, columns: int, dtype: torch.dtype) -> ExpertPrefillTile:
    """Tile of experts over many rows each. height: rows of a tile, 64 or 128."""
    if dtype == torch.float32:
        return ExpertPrefillTile(64, 32, 16, 264, 8, 2, False, False, 32, 16, 32, 528, 4, 2)
    if height < 128 and columns < 4096:
        return ExpertPrefillTile(128, 64, 32, 396, 4, 3, True, True, 64, 128, 64, 396, 4, 3)
    if height < 128:
        return ExpertPrefillTile(256, 64, 64, 132, 8, 4, True, True, 64, 128, 64, 396, 4, 3)
    return ExpertPrefillTile(256, 64, 32, 132, 8, 3, True, True, 64, 64, 64, 264, 4, 5)


@cache
def general_tiles(rows: int, entries: int, dtype: torch.dtype) -> GeneralTiles:
    """Tiles of the general body. entries: T * J."""
    return GeneralTiles(_pick(_SHRINK, entries), _pick(_GEMM_FP32 if dtype == torch.float32 else _GEMM_HALF, rows))


def embedding_tile(rows: int) -> Tile:
    """Tile of the embedding lookup."""
    return _pick(_EMBEDDING, rows)
