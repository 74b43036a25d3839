"""Triton body of `segment_rows`: one launch, one program per slot, no host sync, no atomics.

Stage: run time, once per row map. Each program counts the entries of lower slots, which is where its own begin, then
writes its own in entry order. Layout: segments.py.
"""

# ruff: noqa: ANN001 (pointers and blocks of a Triton kernel have no static type)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fxlora.kernels.segments import segments_size
from fxlora.kernels.triton_helpers import device_of


@triton.jit
def load_keys(slots_ptr, entries, num_entries, row_stride, j_stride, max_adapters, J: tl.constexpr) -> tl.tensor:
    """Slot of each entry, S for entries without an adapter, S + 1 beyond the last entry."""
    inside = entries < num_entries
    at = slots_ptr + (entries // J).to(tl.int64) * row_stride + (entries % J).to(tl.int64) * j_stride
    slots = tl.load(at, mask=inside, other=-1)
    keys = tl.where((slots >= 0) & (slots < max_adapters), slots, max_adapters)
    return tl.where(inside, keys, max_adapters + 1)


@triton.jit
def segment_rows_kernel(
    slots_ptr,  # int32 [T, J]
    segments_ptr,  # int32 [E + S + 2]
    num_entries,
    row_stride,
    j_stride,
    max_adapters,
    J: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One slot: where its entries begin, and the entries."""
    slot = tl.program_id(0)
    start = 0
    for first in range(0, num_entries, BLOCK):
        entries = first + tl.arange(0, BLOCK)
        keys = load_keys(slots_ptr, entries, num_entries, row_stride, j_stride, max_adapters, J)
        start += tl.sum((keys < slot).to(tl.int32), axis=0)
    tl.store(segments_ptr + num_entries + slot, start)
    if slot == max_adapters:
        tl.store(segments_ptr + num_entries + max_adapters + 1, num_entries)
    position = start
    for first in range(0, num_entries, BLOCK):
        entries = first + tl.arange(0, BLOCK)
        keys = load_keys(slots_ptr, entries, num_entries, row_stride, j_stride, max_adapters, J)
        own = (keys == slot).to(tl.int32)
        tl.store(segments_ptr + position + tl.cumsum(own, axis=0) - own, entries, mask=own != 0)
        position += tl.sum(own, axis=0)


def segment_rows(row_slots: torch.Tensor, max_adapters: int) -> torch.Tensor:
    """See `ops.segment_rows`."""
    entries = row_slots.numel()
    segments = torch.empty(segments_size(entries, max_adapters), dtype=torch.int32, device=row_slots.device)
    block = min(1024, triton.next_power_of_2(max(entries, 16)))
    with device_of(row_slots):
        segment_rows_kernel[(max_adapters + 1,)](
            row_slots,
            segments,
            entries,
            row_slots.stride(0),
            row_slots.stride(1),
            max_adapters,
            J=row_slots.shape[1],
            BLOCK=block,
        )
    return segments
