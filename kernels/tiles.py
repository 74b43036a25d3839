"""The one table of tile choices of the Triton bodies.

Stage: run time, read at each launch. A choice may depend on the batch shape, on widths and on the dtype; never on
what the batch holds, or the bits of one request would depend on the others. BM rows, BN out-features, BK in-features,
BR ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


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
class ShrinkTile:
    """Of shrink.py: TM (1 or 4) entries share one read of A, `parts` programs an entry; `programs` of each member."""

    TM: int
    BR: int
    BK: int
    parts: int
    programs: int
    num_warps: int


@dataclass(frozen=True)
class ExpandTile:
    """Of expand.py: so many programs share all tiles of the batch."""

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
    """The three launches of a linear over few rows."""

    shrink: ShrinkTile
    expand: ExpandTile
    gemm: GemmTile


@dataclass(frozen=True)
class GemvTile:
    """Of gemv.py. num_stages 0: a program asks for all of its W at once."""

    BN: int
    BK: int
    num_warps: int
    num_stages: int
    shrink: ShrinkTile


# Keys are the most rows a choice serves. First choices, not yet tuned. Microseconds of op (beside F.linear) for bf16
# linears of rank 16, shrink and GEMM together; NVIDIA H100 80GB HBM3, torch 2.11.0, triton 3.6.0, 2026-11-24:
#     rows  adapters   4096x4096       4096x14336      14336x4096      2048x128 (K x N)
#        1         1    23.8 (9.9)      58.7 (41.8)     95.6 (44.8)    13.1 (5.1)
#       16        16    39.2 (9.3)      72.9 (42.7)    108.3 (45.3)    21.0 (5.1)
#       64         8    40.3 (8.7)      75.1 (44.4)    132.2 (47.6)    25.0 (5.3)
#     2048         8   176.8 (89.7)    567.3 (354.8)   577.3 (336.1)   26.6 (6.7)
_SHRINK = {16: Tile(16, 16, 128, 16, 4, 3), 64: Tile(32, 16, 128, 16, 4, 3), None: Tile(64, 16, 64, 16, 4, 3)}
_GEMM_HALF = {16: Tile(16, 64, 128, 16, 4, 4), 64: Tile(64, 64, 64, 16, 4, 4), None: Tile(128, 128, 64, 16, 8, 3)}
# Not measured.
_GEMM_FP32 = {16: Tile(16, 64, 32, 16, 4, 2), 64: Tile(32, 64, 32, 16, 4, 2), None: Tile(64, 64, 32, 16, 4, 2)}
_EMBEDDING = {16: Tile(16, 128, 16, 16, 4, 2), None: Tile(32, 128, 16, 16, 4, 2)}


def _pick(table: dict[int | None, Tile], rows: int) -> Tile:
    return next(tile for bound, tile in table.items() if bound is None or rows <= bound)


def shrink_tile(rows: int) -> Tile:
    """Tile of the shrink for this many rows."""
    return _pick(_SHRINK, rows)


def gemm_tile(rows: int, dtype: torch.dtype) -> Tile:
    """Tile of the base GEMM with the expand in its epilogue."""
    return _pick(_GEMM_FP32 if dtype == torch.float32 else _GEMM_HALF, rows)


def logits_tile(rows: int, dtype: torch.dtype) -> Tile:
    """As `gemm_tile`, where N is a vocabulary."""
    return gemm_tile(rows, dtype)


def embedding_tile(rows: int) -> Tile:
    """Tile of the embedding lookup."""
    return _pick(_EMBEDDING, rows)
