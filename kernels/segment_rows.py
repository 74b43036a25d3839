"""Triton body of `segment_rows`: one launch, one program per slot, no host sync, no atomics on global memory.

Stage: run time, once per row map. Each program counts the entries of every slot: those of lower slots say where its own
entries and tiles begin. It then writes both; the last program, that of the entries without an adapter, also writes
what is left. Layout and letters: segments.py.
"""

# ruff: noqa: ANN001 (pointers and blocks of a Triton kernel have no static type)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fxlora.kernels import segments as layout
from fxlora.kernels.launch import Launcher
from fxlora.kernels.segments import segments_size, tile_bound, tile_count_at
from fxlora.kernels.triton_helpers import device_of, next_power_of_2

TILE = tl.constexpr(layout.TILE)


@triton.jit
def load_keys(slots_ptr, entries, num_entries, row_stride, j_stride, max_adapters, J: tl.constexpr) -> tl.tensor:
    """Slot of each entry, S for entries without an adapter, S + 1 beyond the last entry."""
    inside = entries < num_entries
    at = slots_ptr + (entries // J).to(tl.int64) * row_stride + (entries % J).to(tl.int64) * j_stride
    slots = tl.load(at, mask=inside, other=-1)
    keys = tl.where((slots >= 0) & (slots < max_adapters), slots, max_adapters)
    return tl.where(inside, keys, max_adapters + 1)


@triton.jit
def fill_tiles(tile_slots_ptr, tile_firsts_ptr, begin, end, slot, first, step, BLOCK: tl.constexpr) -> None:
    """Tiles begin .. end get this slot and the positions first, first + step, ..."""
    for offset in range(0, end - begin, BLOCK):
        index = offset + tl.arange(0, BLOCK)
        mask = index < end - begin
        tl.store(tile_slots_ptr + begin + index, tl.full([BLOCK], 0, tl.int32) + slot, mask=mask)
        tl.store(tile_firsts_ptr + begin + index, first + step * index, mask=mask)


@triton.jit(do_not_specialize=["num_entries", "row_stride", "j_stride", "max_adapters", "count_at", "bound"])
def segment_rows_kernel(
    slots_ptr,  # int32 [T, J]
    segments_ptr,
    num_entries,
    row_stride,
    j_stride,
    max_adapters,
    count_at,  # where tile_count lies
    bound,  # TB
    J: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,  # power of two >= S + 2
    TILES: tl.constexpr,
) -> None:
    """One slot: where its entries begin, the entries, its tiles."""
    slot = tl.program_id(0)
    bins = tl.arange(0, BINS)
    counts = tl.zeros([BINS], tl.int32)
    for first in range(0, num_entries, BLOCK):
        entries = first + tl.arange(0, BLOCK)
        keys = load_keys(slots_ptr, entries, num_entries, row_stride, j_stride, max_adapters, J)
        counts += tl.histogram(keys, BINS)
    lower = bins < slot
    start = tl.sum(tl.where(lower, counts, 0), axis=0)
    own_count = tl.sum(tl.where(bins == slot, counts, 0), axis=0)
    first_tile = tl.sum(tl.where(lower, (counts + (TILE - 1)) // TILE, 0), axis=0)

    tl.store(segments_ptr + num_entries + slot, start)
    tile_slots_ptr = segments_ptr + count_at + 1
    tile_firsts_ptr = tile_slots_ptr + bound
    if slot == max_adapters:
        tl.store(segments_ptr + count_at - 1, num_entries)
        tl.store(segments_ptr + count_at, first_tile)
        fill_tiles(tile_slots_ptr, tile_firsts_ptr, first_tile, bound, -1, -1, 0, TILES)
    else:
        end_tile = first_tile + (own_count + (TILE - 1)) // TILE
        fill_tiles(tile_slots_ptr, tile_firsts_ptr, first_tile, end_tile, slot, start, TILE, TILES)

    if own_count > 0:
        position = start
        for first in range(0, num_entries, BLOCK):
            entries = first + tl.arange(0, BLOCK)
            keys = load_keys(slots_ptr, entries, num_entries, row_stride, j_stride, max_adapters, J)
            own = (keys == slot).to(tl.int32)
            tl.store(segments_ptr + position + tl.cumsum(own, axis=0) - own, entries, mask=own != 0)
            position += tl.sum(own, axis=0)


_launcher = Launcher(segment_rows_kernel)


def segment_rows(row_slots: torch.Tensor, max_adapters: int) -> torch.Tensor:
    """See `ops.segment_rows`."""
    entries = row_slots.numel()
    segments = torch.empty(segments_size(entries, max_adapters), dtype=torch.int32, device=row_slots.device)
    block = min(2048, max(32, next_power_of_2(entries)))  # 32 or more: a full warp of keys to count
    args = (
        row_slots,
        segments,
        entries,
        row_slots.stride(0),
        row_slots.stride(1),
        max_adapters,
        tile_count_at(entries, max_adapters),
        tile_bound(entries, max_adapters, layout.TILE),
    )
    constants = {
        "J": row_slots.shape[1],
        "BLOCK": block,
        "BINS": max(32, next_power_of_2(max_adapters + 2)),
        "TILES": min(block, 128),
    }
    with device_of(row_slots):
        device = row_slots.get_device()
        _launcher.launch((max_adapters + 1,), args, constants, device=device, num_warps=max(1, block // 256))
    return segments
