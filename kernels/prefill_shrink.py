"""First part of prefill.py: h of a tile of rows, for every adapter in it.

Stage: run time, below prefill.py. A group is 16 ranks of one slot (fewer, if the rank ends there); the groups of a row
tile are numbered slots ascending, and whoever needs several adapters at once, here or in the expand, reads them from
that list: their ranks lie side by side in one tile of A, h or B, whatever pool rows they come from.

Letters: T rows, J slots per row, K in-features, N out-features, S slots, P pool rows, W columns of h (highest rank of
the pool, rounded up to 16).
"""

# ruff: noqa: ANN001 (pointers and blocks of a Triton kernel have no static type)

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fxlora.kernels.registry import SitePool
from fxlora.kernels.tiles import Tile
from fxlora.kernels.triton_helpers import cdiv, check_pool, dot, next_slot

FIELDS = tl.constexpr(3)
"""int32 per group: slot, first pool row, first column of h + number of ranks - 1."""

MOST = tl.constexpr(8)
"""Groups that are read at once."""


class Adapters(NamedTuple):
    """What the kernel reads of a member's adapters and rows, and its scratch."""

    a: Any  # [P, K]
    b: Any  # [P, N]
    start: Any  # int32 [S]
    rank: Any  # int32 [S]
    scaling: Any  # fp32 [S]
    max_adapters: Any
    slots: Any  # int32 [T, J], contiguous
    coeffs: Any  # fp32 [T, J], contiguous; never read without HAS_COEFFS
    h: Any  # [T * J, W], like x
    width: Any  # W
    groups: Any  # int32 [row tiles, 3 * capacity + 1]: fields of each group, then their number
    capacity: Any


@triton.jit
def load_groups(row_tile, first_group, adapters, BR: tl.constexpr) -> tl.tensor:
    """The fields of a row tile's groups for BR columns, 16 for each group; slot -1 where there is no group."""
    at = adapters.groups + row_tile * (FIELDS * adapters.capacity + 1) + first_group + tl.arange(0, BR) // 16
    slots = tl.load(at, cache_modifier=".cg")
    pool_rows = tl.load(at + adapters.capacity, cache_modifier=".cg")
    ranks = tl.load(at + 2 * adapters.capacity, cache_modifier=".cg")
    return slots, pool_rows, ranks


@triton.jit
def spread(col_slots, ranks, BR: tl.constexpr) -> tl.tensor:
    """Slot and column of h for BR columns; the 16 of a group have one slot and lie side by side, says this in one."""
    h_cols = ranks - ranks % 16 + tl.arange(0, BR) % 16
    return tl.max_constancy(col_slots, 16), tl.max_contiguous(tl.multiple_of(h_cols, 16), 16)


@triton.jit
def write_groups(row_tile, slots, adapters) -> tl.tensor:
    """Lists the groups of a row tile's slots, ended by groups without a slot. Returns how many there are."""
    record = adapters.groups + row_tile * (FIELDS * adapters.capacity + 1)
    count = 0
    slot = next_slot(slots, -1, adapters.max_adapters)
    while slot < adapters.max_adapters:
        rank = tl.load(adapters.rank + slot)
        start = tl.load(adapters.start + slot)
        for first in range(0, rank, 16):
            tl.store(record + count, slot)
            tl.store(record + count + adapters.capacity, start + first)
            tl.store(record + count + 2 * adapters.capacity, first + tl.minimum(rank - first, 16) - 1)
            count += 1
        slot = next_slot(slots, slot, adapters.max_adapters)
    tl.store(record + count + tl.arange(0, MOST), tl.full([MOST], -1, tl.int32))
    tl.store(record + FIELDS * adapters.capacity, count)
    return count


@triton.jit
def slots_of(rows, j, adapters, num_rows, J: tl.constexpr) -> tl.tensor:
    """Slot j of each row; -1 past the last row or slot."""
    return tl.load(adapters.slots + rows * J + j, mask=(rows < num_rows) & (j < J), other=-1)


@triton.jit
def shrink_row_tile(
    row_tile,
    x_desc,  # [T, K]
    adapters,
    num_rows,
    num_features,
    J: tl.constexpr,
    JP: tl.constexpr,  # power of two >= J
    BM: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_COEFFS: tl.constexpr,
) -> None:
    """Groups of one row tile, and h of its rows: whole groups, zero beyond the rank."""
    entries = tl.arange(0, BM * JP)
    entry_slots = slots_of((row_tile * BM + entries // JP).to(tl.int64), entries % JP, adapters, num_rows, J)
    count = write_groups(row_tile, entry_slots, adapters)
    tl.debug_barrier()
    rows = (row_tile * BM + tl.arange(0, BM)).to(tl.int64)
    lanes = tl.arange(0, BR) % 16
    for first_group in tl.range(0, count, BR // 16, num_stages=1):
        col_slots, pool_rows, ranks = load_groups(row_tile, first_group, adapters, BR)
        is_rank = (col_slots >= 0) & (lanes <= ranks % 16)
        a_at = adapters.a + (pool_rows + lanes).to(tl.int64)[:, None] * num_features
        acc = tl.zeros([BM, BR], tl.float32)
        for first_k in tl.range(0, num_features, BK, num_stages=STAGES):
            ks = first_k + tl.arange(0, BK)
            x_tile = x_desc.load([row_tile * BM, first_k])  # [BM, BK]
            a_mask = is_rank[:, None] & (ks < num_features)[None, :]
            a_tile = tl.load(a_at + ks[None, :], mask=a_mask, other=0.0)  # [BR, BK]
            acc = dot(x_tile, a_tile.T, acc, "ieee")
        acc *= tl.load(adapters.scaling + col_slots, mask=col_slots >= 0, other=0.0)[None, :]
        col_slots, h_cols = spread(col_slots, ranks, BR)
        for j in tl.static_range(J):
            own = (col_slots >= 0)[None, :] & (slots_of(rows, j, adapters, num_rows, J)[:, None] == col_slots[None, :])
            value = acc
            if HAS_COEFFS:
                value = acc * tl.load(adapters.coeffs + rows * J + j, mask=rows < num_rows, other=0.0)[:, None]
            value = tl.where(is_rank[None, :], value, 0.0).to(adapters.h.dtype.element_ty)
            tl.store(adapters.h + ((rows * J + j) * adapters.width)[:, None] + h_cols[None, :], value, mask=own)


def adapters_of(
    x_TK: torch.Tensor,
    row_slots: torch.Tensor,
    row_coeffs: torch.Tensor | None,
    pool: SitePool,
    segments: torch.Tensor,
    tile: Tile,
) -> Adapters:
    """The kernel's view of a pool and a row map, with new scratch."""
    num_rows, num_slots = row_slots.shape
    max_adapters = check_pool(pool, segments, num_rows * num_slots)
    width = cdiv(pool.rank_bound, 16) * 16
    h_EW = torch.empty(num_rows * num_slots, width, dtype=x_TK.dtype, device=x_TK.device)
    most_groups = min(max_adapters, tile.BM * num_slots) * (width // 16)
    capacity = cdiv(most_groups + MOST.value, 16) * 16
    record = FIELDS.value * capacity + 1
    groups = torch.empty(cdiv(num_rows, tile.BM), record, dtype=torch.int32, device=x_TK.device)
    slots = row_slots.contiguous()
    rows = (slots, slots if row_coeffs is None else row_coeffs.contiguous())
    table = (pool.start, pool.rank, pool.scaling)
    return Adapters(pool.a, pool.b, *table, max_adapters, *rows, h_EW, width, groups, capacity)
