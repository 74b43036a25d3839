"""Triton body of `segment_experts`: one launch, no host sync, no atomics on global memory.

Stage: run time, once per row map and routing. A program counts the rows of every expert: those of lower experts say
where its own rows and tiles begin. It then writes both; the program of the rows without an expert also writes what is
left. Where rows came in place, several programs share the tiles of an expert. Layout and letters: expert_segments.py.
"""

# ruff: noqa: ANN001 (pointers and blocks of a Triton kernel have no static type)

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from fxlora.kernels import expert_segments as layout
from fxlora.kernels.call import Plan
from fxlora.kernels.launch import Launcher
from fxlora.kernels.segment_rows import fill_tiles
from fxlora.kernels.triton_helpers import cdiv, device_of, next_power_of_2, next_slot, strided


@triton.jit
def load_experts(ids, rows, num_rows, num_experts) -> tl.tensor:
    """Expert of each row, E for none, E + 1 beyond the last row. ids: pointer, stride."""
    inside = rows < num_rows
    expert = tl.load(ids[0] + rows.to(tl.int64) * ids[1], mask=inside, other=0).to(tl.int64)
    expert = tl.where((expert >= 0) & (expert < num_experts), expert, num_experts).to(tl.int32)
    return tl.where(inside, expert, num_experts + 1)


@triton.jit
def load_end(offsets, experts, num_rows, num_experts) -> tl.tensor:
    """Where the rows of each expert end; 0 before the first, T from E on. offsets: pointer, stride."""
    known = (experts >= 0) & (experts < num_experts)
    end = tl.load(offsets[0] + experts.to(tl.int64) * offsets[1], mask=known, other=0).to(tl.int64)
    end = tl.minimum(tl.maximum(end, 0), num_rows).to(tl.int32)
    return tl.where(experts >= num_experts, num_rows, end)


@triton.jit
def write_rows(order_ptr, experts_ptr, expert, begin, end, step, BLOCK: tl.constexpr) -> None:
    """Rows that came in place: every step-th block of begin .. end."""
    for first in range(begin, end, step):
        rows = first + tl.arange(0, BLOCK)
        mask = rows < end
        tl.store(order_ptr + rows, rows, mask=mask)
        tl.store(experts_ptr + rows, tl.full([BLOCK], 0, tl.int32) + expert, mask=mask)


@triton.jit
def sort_rows(ids, order_ptr, experts_ptr, expert, position, num_rows, num_experts, BLOCK: tl.constexpr) -> None:
    """The rows of one expert among all, ascending, from this position on."""
    for first in range(0, num_rows, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        own = (load_experts(ids, rows, num_rows, num_experts) == expert).to(tl.int32)
        tl.store(order_ptr + position + tl.cumsum(own, axis=0) - own, rows, mask=own != 0)
        tl.store(experts_ptr + rows, tl.full([BLOCK], 0, tl.int32) + expert, mask=own != 0)
        position += tl.sum(own, axis=0)
    tl.debug_barrier()


@triton.jit
def list_slots(
    list_ptr, row_ptr, first, end, slots, max_adapters, J: tl.constexpr, JP: tl.constexpr, SPAN: tl.constexpr,
    BLOCK: tl.constexpr, IN_PLACE: tl.constexpr,
) -> None:  # fmt: skip
    """The distinct slots of the up to SPAN rows at positions first .. end, ascending, then -1."""
    entries = tl.arange(0, SPAN * JP)
    positions = first + entries // JP
    inside = (positions < end) & (entries % JP < J)
    rows = positions if IN_PLACE else tl.load(row_ptr + positions, mask=inside, other=0, cache_modifier=".cg")
    at = slots[0] + rows.to(tl.int64) * slots[1] + (entries % JP).to(tl.int64) * slots[2]
    found = tl.load(at, mask=inside, other=-1)
    count = 0
    slot = next_slot(found, -1, max_adapters)
    while slot < max_adapters:
        tl.store(list_ptr + count, slot)
        count += 1
        slot = next_slot(found, slot, max_adapters)
    for offset in range(count, max_adapters, BLOCK):
        index = offset + tl.arange(0, BLOCK)
        tl.store(list_ptr + index, tl.full([BLOCK], -1, tl.int32), mask=index < max_adapters)


@triton.jit
def write_tiles(
    tiles_ptr, slots_ptr, table_ptr, bound, expert, part, parts, bins, counts, start, own_count, num_experts, slots,
    max_adapters, J: tl.constexpr, JP: tl.constexpr, HEIGHT: tl.constexpr, SPAN: tl.constexpr, TILES: tl.constexpr,
    IN_PLACE: tl.constexpr, LIST_SLOTS: tl.constexpr,
) -> None:  # fmt: skip
    """One expert's tiles in one list, whose count lies at tiles_ptr, and their slots."""
    first_tile = tl.sum(tl.where(bins < expert, (counts + (HEIGHT - 1)) // HEIGHT, 0), axis=0)
    own_tiles = (own_count + (HEIGHT - 1)) // HEIGHT
    firsts_ptr = tiles_ptr + 1 + bound
    if part == 0:
        fill_tiles(tiles_ptr + 1, firsts_ptr, first_tile, first_tile + own_tiles, expert, start, HEIGHT, TILES)
        if expert == num_experts:
            tl.store(tiles_ptr, first_tile + own_tiles)
            fill_tiles(tiles_ptr + 1, firsts_ptr, first_tile + own_tiles, bound, -1, -1, 0, TILES)
    if LIST_SLOTS:
        for tile in range(part, own_tiles, parts):
            first = start + tile * HEIGHT
            end = tl.where(expert < num_experts, tl.minimum(first + HEIGHT, start + own_count), first)
            list_ptr = slots_ptr + (first_tile + tile) * max_adapters
            list_slots(list_ptr, table_ptr, first, end, slots, max_adapters, J, JP, SPAN, TILES, IN_PLACE)


@triton.jit(
    do_not_specialize=[
        "num_rows",
        "num_experts",
        "max_adapters",
        "bound",
        "slots_at",
        "high_at",
        "high_bound",
        "high_slots_at",
    ]
)
def segment_experts_kernel(
    routing,  # offsets [E] (IN_PLACE) or expert_ids [T]: pointer, stride
    slots,  # int32 [T, J]: pointer, strides
    table_ptr,
    num_rows,
    num_experts,
    max_adapters,
    bound,  # TB
    slots_at,
    high_at,
    high_bound,  # HB
    high_slots_at,
    J: tl.constexpr,
    JP: tl.constexpr,  # power of two >= J
    HEIGHT: tl.constexpr,
    HIGH: tl.constexpr,  # of the tiles of the second list, 0 without one
    SPAN: tl.constexpr,  # power of two >= HIGH
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,  # power of two >= E + 2
    TILES: tl.constexpr,
    IN_PLACE: tl.constexpr,
    LIST_SLOTS: tl.constexpr,
) -> None:
    """Program (expert, share of its tiles)."""
    expert, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    bins = tl.arange(0, BINS)
    if IN_PLACE:
        counts = load_end(routing, bins, num_rows, num_experts) - load_end(routing, bins - 1, num_rows, num_experts)
        counts = tl.maximum(counts, 0)
    else:
        counts = tl.zeros([BINS], tl.int32)
        for first in range(0, num_rows, BLOCK):
            counts += tl.histogram(load_experts(routing, first + tl.arange(0, BLOCK), num_rows, num_experts), BINS)
    lower = bins < expert
    start = tl.sum(tl.where(lower, counts, 0), axis=0)
    own_count = tl.sum(tl.where(bins == expert, counts, 0), axis=0)

    if part == 0:
        tl.store(table_ptr + 2 * num_rows + expert, start)
        if expert == num_experts:
            tl.store(table_ptr + 2 * num_rows + expert + 1, num_rows)
    if IN_PLACE:
        write_rows(
            table_ptr, table_ptr + num_rows, expert, start + part * BLOCK, start + own_count, parts * BLOCK, BLOCK
        )
    elif own_count > 0:
        sort_rows(routing, table_ptr, table_ptr + num_rows, expert, start, num_rows, num_experts, BLOCK)
    tiles_ptr = table_ptr + 2 * num_rows + num_experts + 2
    write_tiles(
        tiles_ptr, table_ptr + slots_at, table_ptr, bound, expert, part, parts, bins, counts, start, own_count,
        num_experts, slots, max_adapters, J, JP, HEIGHT, HEIGHT, TILES, IN_PLACE, LIST_SLOTS,
    )  # fmt: skip
    if HIGH > 0:
        write_tiles(
            table_ptr + high_at, table_ptr + high_slots_at, table_ptr, high_bound, expert, part, parts, bins, counts,
            start, own_count, num_experts, slots, max_adapters, J, JP, HIGH, SPAN, TILES, IN_PLACE, True,
        )  # fmt: skip


_launcher = Launcher(segment_experts_kernel)

_MOST_PARTS = 8
"""Programs that share the tiles of one expert."""


def segment_experts(
    row_slots: torch.Tensor,
    offsets: torch.Tensor | None,
    expert_ids: torch.Tensor | None,
    num_experts: int,
    max_adapters: int,
) -> torch.Tensor:
    """See `ops.segment_experts`."""
    routing = layout.check_routing(row_slots, offsets, expert_ids, num_experts)
    rows, width = row_slots.shape
    height = layout.tile_height(rows, num_experts)
    shape = (rows, width, num_experts, max_adapters, expert_ids is None, height)
    size, plan = _planned(*shape, row_slots.get_device())
    table = torch.empty(size, dtype=torch.int32, device=row_slots.device)
    with device_of(row_slots):
        args = (strided(routing), strided(row_slots), table, rows, num_experts, max_adapters, *plan.numbers)
        plan.variant.launch(plan.grid, args)
    return table


@lru_cache(maxsize=4096)
def _planned(
    rows: int, width: int, num_experts: int, max_adapters: int, in_place: bool, height: int, device: int
) -> tuple[int, Plan]:
    """Elements of the table, and its launch."""
    block = min(2048, max(32, next_power_of_2(rows)))  # 32 or more: a full warp of keys to count
    block = min(block, 256) if in_place else block
    parts = min(_MOST_PARTS, max(1, cdiv(rows, height * (num_experts + 1)))) if in_place else 1
    constants: dict[str, object] = {
        "J": width,
        "JP": next_power_of_2(width),
        "HEIGHT": height,
        "HIGH": layout.HIGH if layout.has_high_tiles(rows, num_experts) else 0,
        "SPAN": next_power_of_2(layout.HIGH),
        "BLOCK": block,
        "BINS": max(32, next_power_of_2(num_experts + 2)),
        "TILES": min(block, 128),
        "IN_PLACE": in_place,
        "LIST_SLOTS": height >= layout.SLOTS_FROM,
    }
    numbers = (
        layout.tile_bound(rows, num_experts, 16),
        layout.tile_slots_at(rows, num_experts),
        layout.high_count_at(rows, num_experts),
        layout.tile_bound(rows, num_experts, layout.HIGH),
        layout.high_slots_at(rows, num_experts, max_adapters),
    )
    size = layout.expert_segments_size(rows, num_experts, max_adapters, in_place)
    num_warps = max(1, block // 256) if height < layout.SLOTS_FROM else 4
    variant = _launcher.variant(constants, device=device, num_warps=num_warps)
    return size, Plan(variant, (num_experts + 1, parts), numbers)
