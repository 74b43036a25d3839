"""Sorted form of a row map: which rows use which slot. Computed once per row map and forward, read by every op on it.

Stage: run time, the node before the first op of a row map. A row map is `row_slots` int32 [T, J]; its E = T * J
entries are numbered row-major, entry = row * J + j. Slots outside 0 .. S - 1 mean no adapter (the CPU body refuses
all of them but -1).

Layout of `segments`, int32 [E + S + 2 + 1 + 2 * TB] with TB = tile_bound(E, S, TILE):
    order        [E]      entries sorted by slot, entries without an adapter last, equal slots in entry order
    slot_starts  [S + 2]  slot s owns order[slot_starts[s] : slot_starts[s + 1]]; slot_starts[S] is where the entries
                          without an adapter begin, slot_starts[S + 1] = E
    tile_count   [1]      tiles in use; a tile is a run of up to TILE sorted entries of one slot
    tile_slots   [TB]     slot of each tile, ascending
    tile_firsts  [TB]     tile t holds order[tile_firsts[t] : min(tile_firsts[t] + TILE, slot_starts[slot + 1])]
Entries without an adapter have no tile. What lies past tile_count in the two tables is -1.

Tiles of another height H need no table: slot s owns the tiles from `slot_starts[s] // H + s` on, as many as its
entries fill, and the next slot's tiles never begin earlier (floor(a) + ceil(b) <= floor(a + b) + 1). A grid of
`tile_bound(E, S, H)` programs covers every batch of that shape; a program whose tile is unused returns.
"""

from __future__ import annotations

import torch

from fxlora.kernels.errors import OpInputError

TILE = 16
"""Entries of a tile in the tables."""


def tile_bound(entries: int, max_adapters: int, height: int) -> int:
    """Tiles of `height` entries that always suffice for E entries over S slots."""
    return -(-entries // height) + max_adapters


def slot_starts_at(entries: int) -> int:
    """Where slot_starts begins."""
    return entries


def tile_count_at(entries: int, max_adapters: int) -> int:
    """Where tile_count lies."""
    return entries + max_adapters + 2


def tile_slots_at(entries: int, max_adapters: int) -> int:
    """Where tile_slots begins."""
    return entries + max_adapters + 3


def tile_firsts_at(entries: int, max_adapters: int) -> int:
    """Where tile_firsts begins."""
    return tile_slots_at(entries, max_adapters) + tile_bound(entries, max_adapters, TILE)


def segments_size(entries: int, max_adapters: int) -> int:
    """Elements of `segments` for E entries and S slots (either may be symbolic)."""
    return tile_slots_at(entries, max_adapters) + 2 * tile_bound(entries, max_adapters, TILE)


def slots_of(size: int, entries: int) -> int:
    """S of a `segments` of this size for E entries; -1 when no S gives that size."""
    max_adapters, rest = divmod(size - segments_size(entries, 0), 3)
    return -1 if rest else max_adapters


def check_slots(row_slots: torch.Tensor, max_adapters: int) -> None:
    """Raises OpInputError on a slot that is neither -1 nor in 0 .. S - 1. Reads the values: for tensors on the CPU."""
    if row_slots.numel():
        low, high = (int(bound) for bound in row_slots.aminmax())
        if low < -1 or high >= max_adapters:
            raise OpInputError(f"row_slots hold values from {low} to {high}; expected -1 to {max_adapters - 1}")


def segment_rows_torch(row_slots: torch.Tensor, max_adapters: int) -> torch.Tensor:
    """CPU body of `segment_rows`. Raises OpInputError on a slot that is neither -1 nor in 0 .. S - 1."""
    check_slots(row_slots, max_adapters)
    slots_E = row_slots.reshape(-1)
    entries = slots_E.numel()
    keys_E = torch.where(slots_E < 0, max_adapters, slots_E)
    sorted_E, order_E = keys_E.sort(stable=True)
    bounds = torch.arange(max_adapters + 2, dtype=sorted_E.dtype, device=sorted_E.device)
    starts = torch.searchsorted(sorted_E, bounds, out_int32=True)
    slots, firsts = _tiles(starts[:-1])
    segments = torch.full((segments_size(entries, max_adapters),), -1, dtype=torch.int32, device=row_slots.device)
    segments[:entries] = order_E
    segments[slot_starts_at(entries) : tile_count_at(entries, max_adapters)] = starts
    segments[tile_count_at(entries, max_adapters)] = slots.numel()
    for at, table in ((tile_slots_at, slots), (tile_firsts_at, firsts)):
        segments[at(entries, max_adapters) :][: table.numel()] = table
    return segments


def _tiles(starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """tile_slots and tile_firsts of the tiles in use. starts: int32 [S + 1], the last one where slot S - 1 ends."""
    counts_S = (starts.diff() + TILE - 1) // TILE
    slots = torch.repeat_interleave(counts_S)
    index_in_slot = torch.arange(slots.numel(), device=starts.device) - (counts_S.cumsum(0) - counts_S)[slots]
    return slots, starts[slots] + TILE * index_in_slot
