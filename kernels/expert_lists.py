"""First launch of experts over many rows on a Hopper GPU: its row tiles, and the slots that each of them meets.

Stage: run time, ahead of expert_hopper.py. Tiles have HEIGHT rows, whatever those of the table of expert_segments.py
have. Lists of groups are those of groups.py, with the first row of A and the scaling of each beside that of B.
"""

# ruff: noqa: ANN001 (pointers and blocks of a Triton kernel have no static type)

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fxlora.kernels.call import Plan
from fxlora.kernels.expert_call import ExpertCall
from fxlora.kernels.expert_segments import tile_bound
from fxlora.kernels.groups import FIELDS, MOST, list_capacity, list_words
from fxlora.kernels.launch import Launcher
from fxlora.kernels.overlap import let_later_start, wait_for_earlier
from fxlora.kernels.triton_helpers import cdiv, multiprocessors, next_power_of_2, next_slot

HEIGHT = tl.constexpr(64)
"""Rows of a tile."""

MISSING = tl.constexpr(-1)
"""The bits of h that is not there, a NaN that no conversion makes."""

_PROGRAMS = 4  # for each multiprocessor
_CLEARED = tl.constexpr(1024)  # elements at once


class Lists(NamedTuple):
    """What this launch writes."""

    tiles: Any  # int32 [1 + row tiles, 4]: their number; expert, its first row tile, where its rows begin and end
    groups: Any  # int32 [row tiles, 3 * capacity + 1]
    a_rows: Any  # int32 [row tiles, capacity]: first pool row of A of each group
    capacity: Any
    h: Any  # [T, W], like x: MISSING
    scalings: Any  # fp32 [row tiles, capacity]: of each group
    slots: Any  # int32 [T]: of rows that an adapter adds to, -1 of others
    ranks: Any  # int32 [T]: of those slots, 0 of others
    width: Any  # W


@triton.jit
def clear(h_ptr, count) -> None:
    """Nothing of h is there."""
    for first in range(tl.program_id(0) * _CLEARED, count, tl.num_programs(0) * _CLEARED):
        at = first + tl.arange(0, _CLEARED).to(tl.int64)
        missing = tl.full([_CLEARED], MISSING, tl.int16).to(h_ptr.dtype.element_ty, bitcast=True)
        tl.store(h_ptr + at, missing, mask=at < count)


@triton.jit
def find_slots(found, max_adapters, L: tl.constexpr) -> tl.tensor:
    """The distinct slots of some rows, ascending, then -1, [L]."""
    index, count = tl.arange(0, L), 0
    slots = tl.full([L], -1, tl.int32)
    slot = next_slot(found, -1, max_adapters)
    while slot < max_adapters:
        slots = tl.where(index == count, slot, slots)
        count += 1
        slot = next_slot(found, slot, max_adapters)
    return slots


@triton.jit
def write_groups(tile, expert, slots, lists, pool) -> None:
    """The groups of a row tile's slots, of which each has ranks, ended by groups without a slot. pool: starts and steps
    of A and B, ranks, scaling."""
    a_start_ptr, a_step_ptr, b_start_ptr, b_step_ptr, rank_ptr, scaling_ptr = pool
    record, first = lists.groups + tile * (FIELDS * lists.capacity + 1), tile * lists.capacity
    known = slots >= 0
    a_row = tl.load(a_start_ptr + slots, mask=known, other=0) + expert * tl.load(a_step_ptr + slots, known, other=0)
    b_row = tl.load(b_start_ptr + slots, mask=known, other=0) + expert * tl.load(b_step_ptr + slots, known, other=0)
    rank = tl.load(rank_ptr + slots, mask=known, other=0)
    scaling = tl.load(scaling_ptr + slots, mask=known, other=0.0)
    own = (rank + 15) // 16
    begins = tl.cumsum(own, axis=0) - own
    for i in range(lists.width // 16):
        number, is_own = begins + i, i < own
        tl.store(record + number, slots, mask=is_own)
        tl.store(record + lists.capacity + number, b_row + 16 * i, mask=is_own)
        last = 16 * i + tl.minimum(rank - 16 * i, 16) - 1
        tl.store(record + 2 * lists.capacity + number, last, mask=is_own)
        tl.store(lists.a_rows + first + number, a_row + 16 * i, mask=is_own)
        tl.store(lists.scalings + first + number, scaling, mask=is_own)
    count = tl.sum(own, axis=0)
    after = count + tl.arange(0, MOST)
    tl.store(record + after, tl.full([MOST], -1, tl.int32))
    tl.store(lists.a_rows + first + after, tl.full([MOST], 0, tl.int32))
    tl.store(record + FIELDS * lists.capacity, count)


@triton.jit(do_not_specialize=["num_rows"])
def expert_lists_kernel(
    lists,
    pool,
    slots_ptr,  # int32 [T], contiguous
    table_ptr,
    num_rows,
    num_experts,
    max_adapters,
    L: tl.constexpr,  # power of two, at least the slots of a tile
    BINS: tl.constexpr,  # power of two above E
    PDL: tl.constexpr,
) -> None:
    """Row tiles of the batch and their groups, of whose h nothing is there yet."""
    wait_for_earlier(PDL)
    let_later_start(PDL)
    clear(lists.h, num_rows * lists.width.to(tl.int64))
    bins = tl.arange(0, BINS)
    starts_ptr = table_ptr + 2 * num_rows + bins
    starts = tl.load(starts_ptr, mask=bins <= num_experts, other=0)
    counts = tl.load(starts_ptr + 1, mask=bins <= num_experts, other=0) - starts
    own_tiles = (counts + (HEIGHT - 1)) // HEIGHT
    ends = tl.cumsum(own_tiles, axis=0)
    total = tl.sum(own_tiles, axis=0)
    if tl.program_id(0) == 0:
        tl.store(lists.tiles, total)
    for tile in tl.range(tl.program_id(0), total, tl.num_programs(0), num_stages=1):
        expert = tl.sum((ends <= tile).to(tl.int32), axis=0)
        mine = bins == expert
        first_tile = tl.sum(tl.where(mine, ends - own_tiles, 0), axis=0)
        start = tl.sum(tl.where(mine, starts, 0), axis=0)
        end = start + tl.sum(tl.where(mine, counts, 0), axis=0)
        at = lists.tiles + 4 * (tile + 1)
        tl.store(at, expert)
        tl.store(at + 1, first_tile)
        tl.store(at + 2, start)
        tl.store(at + 3, end)
        rows = start + HEIGHT * (tile - first_tile) + tl.arange(0, HEIGHT)
        found = tl.load(slots_ptr + rows, mask=rows < end, other=-1)
        known = (found >= 0) & (found < max_adapters) & (expert < num_experts)
        rank = tl.load(pool[4] + found, mask=known, other=0)
        found = tl.where(rank > 0, found, -1)
        tl.store(lists.slots + rows, found, mask=rows < end)
        tl.store(lists.ranks + rows, rank, mask=rows < end)
        write_groups(tile, expert, find_slots(found, max_adapters, L), lists, pool)


_launcher = Launcher(expert_lists_kernel)


def list_slots(call: ExpertCall) -> Lists:
    """The lists of a call with one slot for each row."""
    width = cdiv(call.site.h_width, 16) * 16
    capacity = list_capacity(call.site.max_adapters, HEIGHT.value, width)
    bound = tile_bound(call.rows, call.num_experts, HEIGHT.value)
    ints = {"dtype": torch.int32}
    lists = Lists(
        call.new_scratch(bound + 1, 4, **ints), call.new_scratch(bound, list_words(capacity), **ints),
        call.new_scratch(bound, capacity, **ints), capacity, call.new_scratch(call.rows, width, dtype=call.x.dtype),
        call.new_scratch(bound, capacity, dtype=torch.float32), call.new_scratch(call.rows, **ints),
        call.new_scratch(call.rows, **ints), width,
    )  # fmt: skip
    plan = call.plan(_launcher, None, lambda: _plan(call, bound))
    call.launch(plan, lists, call.site.fixed[2:8], call.row_slots.contiguous(), call.segments, *plan.numbers)
    return lists


def _plan(call: ExpertCall, bound: int) -> Plan:
    return call.planned(
        _launcher,
        (min(bound, _PROGRAMS * multiprocessors(call.x.device)),),
        (call.rows, call.num_experts, call.site.max_adapters),
        1,
        L=next_power_of_2(min(call.site.max_adapters, HEIGHT.value)),
        BINS=next_power_of_2(call.num_experts + 1),
        PDL=call.overlap,
    )
