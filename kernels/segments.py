"""Sorted form of a row map: which rows use which slot. Computed once per row map and forward, read by every op on it.

Stage: run time, the node before the first op of a row map. A row map is `row_slots` int32 [T, J]; its E = T * J
entries are numbered row-major, entry = row * J + j. Slots outside 0 .. S - 1 mean no adapter (the CPU body refuses
all of them but -1).

Layout of `segments`, int32 [E + S + 2]:
    order        [E]      entries sorted by slot, entries without an adapter last, equal slots in entry order
    slot_starts  [S + 2]  slot s owns order[slot_starts[s] : slot_starts[s + 1]]; slot_starts[S] is where the entries
                          without an adapter begin, slot_starts[S + 1] = E

Tiles of any height H need no table of their own: slot s owns the tiles from `slot_starts[s] // H + s` on, as many as
its entries fill, and the next slot's tiles never begin earlier (floor(a) + ceil(b) <= floor(a + b) + 1). A grid of
`tile_bound(E, S, H)` programs covers every batch of that shape; a program whose tile is unused returns.
"""

from __future__ import annotations

import torch

from fxlora.kernels.errors import OpInputError


def segments_size(entries: int, max_adapters: int) -> int:
    """Elements of `segments` for E entries and S slots (either may be symbolic)."""
    return entries + max_adapters + 2


def tile_bound(entries: int, max_adapters: int, height: int) -> int:
    """Tiles of `height` entries that always suffice for E entries over S slots."""
    return -(-entries // height) + max_adapters


def segment_rows_torch(row_slots: torch.Tensor, max_adapters: int) -> torch.Tensor:
    """CPU body of `segment_rows`. Raises OpInputError on a slot that is neither -1 nor in 0 .. S - 1."""
    slots_E = row_slots.reshape(-1)
    entries = slots_E.numel()
    if entries:
        low, high = (int(bound) for bound in slots_E.aminmax())
        if low < -1 or high >= max_adapters:
            raise OpInputError(f"row_slots hold values from {low} to {high}; expected -1 to {max_adapters - 1}")
    keys_E = torch.where(slots_E < 0, max_adapters, slots_E)
    sorted_E, order_E = keys_E.sort(stable=True)
    bounds = torch.arange(max_adapters + 2, dtype=sorted_E.dtype, device=sorted_E.device)
    starts = torch.searchsorted(sorted_E, bounds, out_int32=True)
    return torch.cat([order_E.to(torch.int32), starts])
