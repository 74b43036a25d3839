"""First launch of experts over many rows: h of every row tile, and the list of rank groups that the GEMM expands.

Stage: run time, below expert_prefill.py. A tile's rows are of one expert and of the few slots its table lists; their
ranks, 16 to a group, lie side by side in one tile of A, h or B (as in groups.py), so the tensor cores compute h of all
of them at once and a row keeps what is its own.

Letters: T rows, J slots per row, K in-features, N out-features, S slots, W columns of h, L slots of a row tile.
"""

# ruff: noqa: ANN001 (pointers and blocks of a Triton kernel have no static type)

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fxlora.kernels.call import Plan
from fxlora.kernels.expert_call import ExpertCall, load_x, rows_of, tile_record, tiles_in_use
from fxlora.kernels.expert_tiles import ExpertShrinkTile
from fxlora.kernels.groups import FIELDS, MOST, list_capacity, list_words, slots_of, spread
from fxlora.kernels.launch import Described, Launcher
from fxlora.kernels.overlap import let_later_start, wait_for_earlier
from fxlora.kernels.triton_helpers import cdiv, dot, multiprocessors, next_power_of_2

_REGISTERS = 168  # of a thread, so that three programs share a multiprocessor


class ExpertAdapters(NamedTuple):
    """What the kernels read of the adapters and rows, and their scratch."""

    a: Any  # [PA, K]
    b: Any  # [PB, N]
    a_start: Any  # int32 [S]
    a_step: Any  # int32 [S]
    b_start: Any  # int32 [S]
    b_step: Any  # int32 [S]
    rank: Any  # int32 [S]
    scaling: Any  # fp32 [S]
    max_adapters: Any
    slots: Any  # int32 [T, J], contiguous
    coeffs: Any  # fp32 [T, J], contiguous; never read without HAS_COEFFS
    h: Any  # [T * J, W], like x
    width: Any  # W
    groups: Any  # int32 [row tiles, 3 * capacity + 1]: fields of each group, then their number
    capacity: Any
    ready: Any  # int32 [row tiles]: 1 where h and groups are there; None where the launch before has ended


def adapters_of(call: ExpertCall, beside: bool = False) -> ExpertAdapters:
    """The kernels' view of the call's pool and row map, with new scratch. beside: the product runs beside it."""
    pool = call.site.pool
    assert pool is not None
    width = cdiv(pool.rank_bound, 16) * 16
    h_EW = call.new_scratch(call.entries, width, dtype=call.x.dtype)
    capacity = list_capacity(call.site.max_adapters, call.height * call.width, width)
    groups = call.new_scratch(call.tiles, list_words(capacity), dtype=torch.int32)
    slots = call.row_slots.contiguous()
    rows = (slots, slots if call.row_coeffs is None else call.row_coeffs.contiguous())
    a, b, a_start, a_step, b_start, b_step, rank, scaling = call.site.fixed
    return ExpertAdapters(
        a, b, a_start, a_step, b_start, b_step, rank, scaling, call.site.max_adapters, *rows, h_EW, width, groups,
        capacity, call.new_scratch(call.tiles, dtype=torch.int32) if beside else None,
    )  # fmt: skip


@triton.jit
def slots_of_tile(tile, tile_slots_ptr, adapters, L: tl.constexpr) -> tl.tensor:
    """The slots of a row tile, the number of their first group and of the one after their last, [L] each."""
    index = tl.arange(0, L)
    slots = tl.load(tile_slots_ptr + tile * adapters.max_adapters + index, mask=index < adapters.max_adapters, other=-1)
    ranks = tl.load(adapters.rank + slots, mask=slots >= 0, other=0)
    ends = tl.cumsum((ranks + 15) // 16, axis=0)
    return slots, ends - (ranks + 15) // 16, ends


@triton.jit
def group_slots(numbers, slots, begins, ends) -> tl.tensor:
    """Slot of each group of these numbers, -1 where there is none, and its first rank."""
    owner = (begins[None, :] <= numbers[:, None]) & (numbers[:, None] < ends[None, :])
    slot = tl.max(tl.where(owner, slots[None, :], -1), axis=1)
    return slot, (numbers - tl.sum(tl.where(owner, begins[None, :], 0), axis=1)) * 16


@triton.jit
def write_groups(tile, expert, count, slots, begins, ends, adapters) -> None:
    """Lists the groups of a row tile for the expand, as load_groups reads them, ended by groups without a slot."""
    record = adapters.groups + tile * (FIELDS * adapters.capacity + 1)
    for first in range(0, count + MOST, 16):
        numbers = first + tl.arange(0, 16)
        slot, first_rank = group_slots(numbers, slots, begins, ends)
        known = slot >= 0
        rank = tl.load(adapters.rank + slot, mask=known, other=0)
        b_row = tl.load(adapters.b_start + slot, mask=known, other=0)
        b_row += expert * tl.load(adapters.b_step + slot, mask=known, other=0) + first_rank
        mask = numbers < adapters.capacity
        tl.store(record + numbers, slot, mask=mask)
        tl.store(record + numbers + adapters.capacity, b_row, mask=mask)
        last = first_rank + tl.minimum(rank - first_rank, 16) - 1
        tl.store(record + numbers + 2 * adapters.capacity, last, mask=mask)
    tl.store(record + FIELDS * adapters.capacity, count)


@triton.jit
def shrink_columns(
    first_group, expert, first, rows, row_mask, slots, begins, ends, x, x_desc, adapters, num_rows, num_features,
    J: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, EVEN_K: tl.constexpr,
    HAS_COEFFS: tl.constexpr,
) -> None:  # fmt: skip
    """h of these rows in the BR columns of the groups from first_group on: whole groups, zero beyond the rank.

    Without a descriptor only rows of those groups' slots are read.
    """
    lanes = tl.arange(0, BR) % 16
    col_slots, first_ranks = group_slots(first_group + tl.arange(0, BR) // 16, slots, begins, ends)
    known = col_slots >= 0
    ranks = tl.load(adapters.rank + col_slots, mask=known, other=0) - first_ranks
    a_rows = tl.load(adapters.a_start + col_slots, mask=known, other=0) + first_ranks + lanes
    a_rows += expert * tl.load(adapters.a_step + col_slots, mask=known, other=0)
    is_rank = known & (lanes < ranks)
    a_at = adapters.a + a_rows.to(tl.int64) * num_features
    needed = row_mask
    if x_desc is None:
        needed = tl.zeros([BM], tl.int1)
        for j in tl.static_range(J):
            own = slots_of(rows, j, adapters, num_rows, J)[:, None] == tl.where(known, col_slots, -2)[None, :]
            needed |= tl.max(own.to(tl.int32), axis=1) > 0
        needed &= row_mask
    acc = tl.zeros([BM, BR], tl.float32)
    for first_k in tl.range(0, num_features, BK, num_stages=STAGES):
        ks = first_k + tl.arange(0, BK)
        a_mask = is_rank[:, None] if EVEN_K else is_rank[:, None] & (ks < num_features)[None, :]
        x_tile = load_x(x, x_desc, first, rows, needed, first_k, num_features, BK, EVEN_K)  # [BM, BK]
        a_tile = tl.load(a_at[:, None] + ks[None, :], mask=a_mask, other=0.0)  # [BR, BK]
        acc = dot(x_tile, a_tile.T, acc, "ieee")
    acc *= tl.load(adapters.scaling + col_slots, mask=known, other=0.0)[None, :]
    col_slots, h_cols = spread(col_slots, first_ranks + lanes, BR)
    for j in tl.static_range(J):
        own = row_mask[:, None] & known[None, :] & (slots_of(rows, j, adapters, num_rows, J)[:, None] == col_slots)
        value = acc
        if HAS_COEFFS:
            value = acc * tl.load(adapters.coeffs + rows * J + j, mask=row_mask, other=0.0)[:, None]
        value = tl.where(is_rank[None, :], value, 0.0).to(adapters.h.dtype.element_ty)
        tl.store(adapters.h + ((rows * J + j) * adapters.width)[:, None] + h_cols[None, :], value, mask=own)


@triton.jit(do_not_specialize=["num_rows", "bound", "tiles_at", "tile_slots_at"])
def expert_shrink_tiles_kernel(
    x,  # [T, K]: pointer, row stride; columns adjacent
    x_desc,  # the same, or None
    adapters,
    table_ptr,
    num_rows,
    num_experts,
    bound,  # TB of the table
    tiles_at,
    tile_slots_at,
    num_features,
    J: tl.constexpr,
    L: tl.constexpr,
    HEIGHT: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN_K: tl.constexpr,
    IN_PLACE: tl.constexpr,
    X_TMA: tl.constexpr,  # x_desc is there
    HAS_COEFFS: tl.constexpr,
    SHARES: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Groups of all row tiles of the batch, and h of their rows, BM of them and a share of the groups at a time."""
    wait_for_earlier(PDL)
    let_later_start(PDL)
    table = (table_ptr, num_rows, num_experts, bound, tiles_at)
    PARTS: tl.constexpr = (HEIGHT + BM - 1) // BM
    parts = tiles_in_use(table) * PARTS
    for item in tl.range(tl.program_id(0), parts * SHARES, tl.num_programs(0), num_stages=1):
        tile, share = item % parts // PARTS, item // parts
        part = (item + tile * PARTS // tl.num_programs(0)) % PARTS  # the last ones, often empty, go to all programs
        expert, first, _, end = tile_record(tile, table)
        end = tl.minimum(first + HEIGHT, end)
        first += part * BM
        if (expert < num_experts) & (first < end):
            slots, begins, ends = slots_of_tile(tile, table_ptr + tile_slots_at, adapters, L)
            count = tl.max(ends, axis=0)
            if (part == 0) & (share == SHARES - 1):  # which has least else to do
                write_groups(tile, expert, count, slots, begins, ends, adapters)
            positions = first + tl.arange(0, BM)
            row_mask = positions < end
            rows = rows_of(positions, row_mask, table, IN_PLACE).to(tl.int64)
            for first_group in tl.range(share * (BR // 16), count, SHARES * (BR // 16), num_stages=1):
                shrink_columns(
                    first_group, expert, first, rows, row_mask, slots, begins, ends, x, x_desc, adapters, num_rows,
                    num_features, J, BM, BR, BK, STAGES, EVEN_K, HAS_COEFFS,
                )  # fmt: skip


_launcher = Launcher(expert_shrink_tiles_kernel)


def shrink_tiles(call: ExpertCall, adapters: ExpertAdapters, tile: ExpertShrinkTile, x_tma: bool, early: bool) -> None:
    """Fills h and the groups of `adapters`. x_tma: TMA can read x. early: the next launch need not wait."""
    plan = call.plan(_launcher, tile, lambda: _plan(call, tile, x_tma, early), step=(x_tma, early))
    call.launch(
        plan,
        (call.x, call.x.stride(0)),
        Described(call.x, (tile.BM, tile.BK)) if x_tma else None,
        adapters,
        call.segments,
        *plan.numbers,
    )


def _plan(call: ExpertCall, tile: ExpertShrinkTile, x_tma: bool, early: bool) -> Plan:
    most_slots = min(call.site.max_adapters, call.height * call.width)
    shares = min(tile.shares, cdiv(most_slots * cdiv(call.site.h_width, 16), tile.BR // 16))
    return call.planned(
        _launcher,
        (min(call.tiles * cdiv(call.height, tile.BM) * shares, tile.programs * multiprocessors(call.x.device)),),
        (call.rows, call.num_experts, call.bound, call.tiles_at, call.tile_slots_at, call.features),
        tile.num_warps,
        registers=_REGISTERS,
        J=call.width,
        L=next_power_of_2(most_slots),
        HEIGHT=call.height,
        BM=tile.BM,
        BR=tile.BR,
        BK=tile.BK,
        STAGES=tile.num_stages,
        EVEN_K=call.features % tile.BK == 0,
        IN_PLACE=call.in_place,
        X_TMA=x_tma,
        HAS_COEFFS=call.has_coeffs,
        SHARES=shares,
        PDL=call.overlap and early,
    )
