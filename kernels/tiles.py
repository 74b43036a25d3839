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


_SHRINK = {16: Tile(16, 16, 128, 16, 4, 3), 64: Tile(32, 16, 128, 16, 4, 3), None: Tile(64, 16, 64, 16, 4, 3)}
_GEMM_HALF = {16: Tile(16, 64, 128, 16, 4, 4), 64: Tile(64, 64, 64, 16, 4, 4), None: Tile(128, 128, 64, 16, 8, 3)}
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
