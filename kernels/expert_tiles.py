"""Tile choices of the Triton bodies of experts; those of linears, and what holds for both, are in tiles.py.

Stage: run time, read at each launch. BM rows, BN out-features, BK in-features, BR ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

from fxlora.kernels.expert_segments import HIGH, ONE_TILE, has_high_tiles, tile_height
from fxlora.kernels.tiles import MULTIPROCESSORS, VectorTile, narrowed
from fxlora.kernels.triton_helpers import cdiv, next_power_of_2


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
class ExpertShrinkTile:
    """Of expert_prefill_shrink.py: BM rows and BR ranks at once, in so many programs for each multiprocessor; at most
    `shares` of them share a row tile's ranks.
    x_tma: x comes through TMA where that can read it, else only rows of the ranks at hand are read."""

    BM: int
    BR: int
    BK: int
    programs: int
    num_warps: int
    num_stages: int
    x_tma: bool
    shares: int


@dataclass(frozen=True)
class ExpertBesideTile:
    """Of expert_hopper_shrink.py: `few` programs make h while the product's run on the other multiprocessors, all of
    them where that takes more than `most` rounds of a row tile."""

    few: int
    most: int


@dataclass(frozen=True)
class ExpertHopperTile:
    """Of expert_hopper.py: so many blocks of shared memory; Bs of `ahead` slots are on their way at a time, and h of
    `share` slots is made beside a tile of y."""

    stages: int
    ahead: int
    share: int


@dataclass(frozen=True)
class ExpertPrefillTile:
    """Of expert_prefill.py: so many programs for each multiprocessor, but for those of a shrink beside them. BR ranks
    are expanded at once, in a loop of so many stages. With a TAIL, tiles are the table's of HIGH rows, BM and TAIL
    together, and W is laid along wgmma's A operand. early: programs start beside the last ones of the shrink."""

    BM: int
    TAIL: int
    BN: int
    BK: int
    BR: int
    programs: int
    num_warps: int
    num_stages: int
    expand_stages: int
    w_tma: bool
    x_tma: bool
    shrink: ExpertShrinkTile | ExpertBesideTile
    early: bool = False


# Chosen as those of linears. Microseconds beside torch._grouped_mm, 128 experts with 8 to a token, 8 adapters:
# 2048 x 1536 at 16 tokens 126 (175), at 2048 tokens 291 (379); 768 x 2048 at 16 tokens 70 (108), at 2048 tokens
# 166 (209). 8 experts with 2 to a token: 4096 x 28672 at 16 tokens, 16 adapters 443 (704), at 2048 tokens, 8 adapters
# 1566 (1747). 256 experts with 8 to a token: 7168 x 4096 at 16 tokens, 16 adapters 1343 (1950), at 2048 tokens,
# 8 adapters 4134 (4648). 32 experts with 4 to a token, 8 adapters, weights transposed: 2880 x 5760 at 1024 tokens
# 369 (492), 64 rows high 421 (515).

FEW_RANKS = 32
"""Up to so many ranks of each adapter, expert_hopper.py is faster whatever the number of adapters in a tile."""

_SHRINK_ALONE = ExpertShrinkTile(64, 128, 64, 3, 4, 3, True, 1)
_SHRINK_DEEP = ExpertShrinkTile(64, 64, 128, 3, 4, 4, True, 2)  # of few rows, each a long way
_SHRINK_DEEPEST = ExpertShrinkTile(64, 32, 128, 3, 4, 4, True, 4)
_SHRINK_SHARED = ExpertShrinkTile(64, 64, 64, 3, 4, 4, False, 8)
_SHRINK_WIDE = ExpertShrinkTile(64, 64, 64, 2, 4, 5, True, 1)


@cache
def expert_decode_tiles(entries: int, features: int, columns: int, dtype: torch.dtype) -> ExpertDecodeTiles:
    """Tiles of experts over few rows each. entries: T * J."""
    alone = entries <= 8 and (features <= 512 or 1024 < features <= 4096)
    shrink = None if alone else narrowed(VectorTile(4, 1024, 16, 4224, 4), features)
    block_k = min(512, max(32, next_power_of_2(features)))
    block_n = min(1024 if entries > 8 or features <= 512 else 512 if alone else 256, max(32, next_power_of_2(columns)))
    delta = DeltaTile(16, block_k, block_n, 2112, 4 if alone else max(1, block_n // 256))
    if dtype == torch.float32:
        return ExpertDecodeTiles(shrink, delta, ExpertGemmTile(64, 32, False, 1056, 264, 4, 3))
    even = features % 128 == 0
    gemm = ExpertGemmTile(64, 128 if even else 64, True, 1056, 264, 4, 4 if even else 6)
    return ExpertDecodeTiles(shrink, delta, gemm)


@cache
def expert_prefill_tile(
    rows: int, num_experts: int, simple: bool, features: int, columns: int, dtype: torch.dtype, width: int
) -> ExpertPrefillTile:
    """Tile of experts over many rows each, for the tiles that the table lists of T rows and E experts.

    simple: rows come in place and have one slot each; else so many ranks at once would spill. width: most ranks of a
    slot. Of 128 x 128 two programs share a multiprocessor: one multiplies while the other expands and stores.
    """
    height = tile_height(rows, num_experts)
    if dtype == torch.float32:
        shrink = ExpertShrinkTile(32, 16, 32, 4, 4, 2, False, 1)
        return ExpertPrefillTile(height, 0, 64, 32, 16, 2, 8, 2, 2, False, False, shrink)
    few_ranks, ranks = width <= 16, 64 if simple else 32
    alone, deep = _SHRINK_SHARED, False
    if few_ranks and simple:
        alone, deep = _SHRINK_ALONE, features >= 4096 and rows <= 32 * MULTIPROCESSORS
    if deep:
        alone = _SHRINK_DEEPEST if rows <= 8 * MULTIPROCESSORS else _SHRINK_DEEP
    if has_high_tiles(rows, num_experts) and few_ranks and simple and features > 2560:
        return ExpertPrefillTile(128, HIGH - 128, 128, 64, 32, 2, 4, 3, 3, True, True, alone, early=True)
    if rows <= ONE_TILE * num_experts or (height >= 128 and few_ranks and features <= 3072):
        return ExpertPrefillTile(height, 0, 128, 64, ranks, 2, 4, 3, 3, True, True, alone)
    if height < 128:
        if few_ranks or columns < 4096:
            shrink = alone if columns < 4096 or deep else _SHRINK_SHARED
            return ExpertPrefillTile(height, 0, 128, 64, 64, 3, 4, 3, 3, True, True, shrink)
        return ExpertPrefillTile(height, 0, 256, 64, 64, 1, 8, 4, 5, True, True, _SHRINK_SHARED)
    shrink = alone if deep else replace(_SHRINK_WIDE, x_tma=few_ranks, shares=1 if few_ranks else 8)
    ranks = 32 if few_ranks else ranks
    return ExpertPrefillTile(height, 0, 256, 64, ranks, 1, 8, 4, 3, True, True, shrink, early=few_ranks)


@cache
def expert_hopper_tile(
    rows: int, num_experts: int, features: int, columns: int, highest_rank: int, max_adapters: int
) -> ExpertHopperTile | None:
    """Tile of expert_hopper.py, where that is the faster one: experts that mostly need several tiles of any kernel, or
    few steps for each, not so many that they would better be higher, and enough to keep all multiprocessors busy.

    highest_rank: of any adapter loaded; above FEW_RANKS, adapters must not take turns within a tile. h of eight groups
    of ranks takes one pass over x; more of it is made beside a tile where a pool has slots for far more.
    """
    tiles = (cdiv(rows, 64) + num_experts // 2) * cdiv(columns, 256)
    least = 32 if 512 < features <= 2048 else ONE_TILE
    is_measured = features >= 512 and columns >= 1024 and least * num_experts < rows <= 1024 * num_experts
    if not is_measured or tiles < 4 * MULTIPROCESSORS:
        return None
    if highest_rank > FEW_RANKS and rows < 256 * num_experts:
        return None
    return ExpertHopperTile(4, 2, 4) if max_adapters > 32 else ExpertHopperTile(4, 3, 2)


@cache
def expert_beside_tile(
    rows: int, num_experts: int, simple: bool, features: int, columns: int, dtype: torch.dtype, width: int
) -> ExpertPrefillTile:
    """As expert_prefill_tile, for a GPU that expert_hopper_shrink.py serves too, where TMA can read x and A.

    h costs as much as 128 more columns of y would, so as many multiprocessors make it while the others make y, if a
    tile takes about one round, as eight slots do; more rounds are for all of them. Over many columns, or many rows of
    each expert, h costs less than the multiprocessors that y would lose.
    """
    tile = expert_prefill_tile(rows, num_experts, simple, features, columns, dtype, width)
    is_measured = features >= 512 and 1024 <= columns <= 5120 and 32 * num_experts <= rows <= 448 * num_experts
    if dtype == torch.float32 or not simple or width > 16 or tile.TAIL or not is_measured:
        return tile
    few = round(MULTIPROCESSORS / (columns / 128 + 1))
    most = cdiv(rows, tile.BM) + 3 * num_experts // 4
    return replace(tile, shrink=ExpertBesideTile(few, most), early=True)
