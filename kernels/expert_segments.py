"""Rows sorted by expert: which rows each expert computes. Once per row map and routing, read by gate_up and down alike.

Stage: run time, the node before the first expert op of a layer. A row is one (token, expert) pair; E experts, J slots
per row, S slots. Rows come either in place (sorted by expert, `offsets` the end of each expert's rows; rows past the
last end belong to no expert) or in any order (`expert_ids`; a value outside 0 .. E - 1 means no expert).

Layout of the table, int32, its size even, or odd where the rows came in place:
    row_order      [T]      rows sorted by expert, rows without an expert last, ascending inside; in place 0 .. T - 1
    row_experts    [T]      expert of each row, E for none
    expert_starts  [E + 2]  expert e owns row_order[expert_starts[e] : expert_starts[e + 1]]; expert_starts[E] is where
                            the rows without an expert begin, expert_starts[E + 1] = T
    tile_count     [1]      tiles in use; a tile is a run of up to `tile_height(T, E)` sorted rows of one expert
    tile_experts   [TB]     expert of each tile, ascending; E for rows without an expert; -1 past tile_count
    tile_firsts    [TB]     tile t holds row_order[tile_firsts[t] : min(tile_firsts[t] + height, end of its expert)]
    high_count     [1], high_experts [HB], high_firsts [HB]
                            the same of tiles of HIGH rows; written only where has_high_tiles(T, E)
    tile_slots     [LB, S]  distinct slots of the tile's rows, ascending, then -1; written only where tiles are at
                            least SLOTS_FROM high
    high_slots     [HB, S]  the same of tiles of HIGH rows
with TB = tile_bound(T, E, 16), LB = tile_bound(T, E, SLOTS_FROM) and HB = tile_bound(T, E, HIGH).
"""

from __future__ import annotations

import torch

from fxlora.kernels.errors import OpInputError
from fxlora.kernels.segments import check_slots

SLOTS_FROM = 64
"""Tiles of at least this many rows list their slots."""

ONE_TILE = 112
"""Rows per expert on average, up to which most experts have a single tile."""

HIGH = 160
"""Rows of the tiles of the second list."""

_MOST_HIGH = 144
"""Rows per expert on average, up to which most experts have a single tile of HIGH rows."""

_HEIGHTS = ((4, 16), (16, 32), (ONE_TILE, 128), (192, 64))  # rows per expert on average, up to which tiles are so high


def tile_height(rows: int, num_experts: int) -> int:
    """Rows of a tile: few experts shall have several tiles, and little of the tiles be empty.

    Two tiles of an expert read the same weights, from L2 only if they do so at the same time. So experts that mostly
    fit 128 rows get one tile; those of some more waste less of tiles of 64.
    """
    return next((height for bound, height in _HEIGHTS if rows <= bound * num_experts), 128)


def has_high_tiles(rows: int, num_experts: int) -> bool:
    """Whether tiles of HIGH rows are listed, too: where experts mostly fit one of them, but not 128 rows."""
    return ONE_TILE * num_experts < rows <= _MOST_HIGH * num_experts


def tile_bound(rows: int, num_experts: int, height: int) -> int:
    """Tiles of `height` rows that always suffice."""
    return -(-rows // height) + num_experts + 1


def row_experts_at(rows: int) -> int:
    """Where row_experts begins."""
    return rows


def expert_starts_at(rows: int) -> int:
    """Where expert_starts begins."""
    return 2 * rows


def tile_count_at(rows: int, num_experts: int) -> int:
    """Where tile_count lies."""
    return expert_starts_at(rows) + num_experts + 2


def tile_experts_at(rows: int, num_experts: int) -> int:
    """Where tile_experts begins."""
    return tile_count_at(rows, num_experts) + 1


def tile_firsts_at(rows: int, num_experts: int) -> int:
    """Where tile_firsts begins."""
    return tile_experts_at(rows, num_experts) + tile_bound(rows, num_experts, 16)


def high_count_at(rows: int, num_experts: int) -> int:
    """Where high_count lies; high_experts and high_firsts follow."""
    return tile_firsts_at(rows, num_experts) + tile_bound(rows, num_experts, 16)


def tile_slots_at(rows: int, num_experts: int) -> int:
    """Where tile_slots begins."""
    return high_count_at(rows, num_experts) + 1 + 2 * tile_bound(rows, num_experts, HIGH)


def high_slots_at(rows: int, num_experts: int, max_adapters: int) -> int:
    """Where high_slots begins."""
    return tile_slots_at(rows, num_experts) + tile_bound(rows, num_experts, SLOTS_FROM) * max_adapters


def expert_segments_size(rows: int, num_experts: int, max_adapters: int, in_place: bool) -> int:
    """Elements of the table for T rows (may be symbolic), E experts and S slots."""
    high_slots = tile_bound(rows, num_experts, HIGH) * max_adapters
    needed = high_slots_at(rows, num_experts, max_adapters) + high_slots
    return -(-needed // 2) * 2 + int(in_place)


def is_in_place(size: int) -> bool:
    """Whether a table of this size was made for rows that came sorted by expert."""
    return size % 2 == 1


def check_routing(
    row_slots: torch.Tensor, offsets: torch.Tensor | None, expert_ids: torch.Tensor | None, num_experts: int
) -> torch.Tensor:
    """The one of offsets [E] and expert_ids [T] that is given.

    Raises OpInputError unless exactly one is, with row_slots int32 [T, J].
    """
    if row_slots.dim() != 2 or row_slots.dtype != torch.int32:
        raise OpInputError(f"row_slots is {row_slots.dtype} {tuple(row_slots.shape)}; expected int32 [T, J]")
    if (offsets is None) == (expert_ids is None):
        raise OpInputError(f"got {'neither' if offsets is None else 'both'} of offsets and expert_ids; expected one")
    name, given, length = (
        ("offsets", offsets, num_experts) if expert_ids is None else ("expert_ids", expert_ids, row_slots.shape[0])
    )
    assert given is not None
    if given.shape != (length,) or given.is_floating_point() or given.dtype == torch.bool:
        raise OpInputError(f"{name} is {given.dtype} {tuple(given.shape)}; expected integers [{length}]")
    return given


def segment_experts_torch(
    row_slots: torch.Tensor,
    offsets: torch.Tensor | None,
    expert_ids: torch.Tensor | None,
    num_experts: int,
    max_adapters: int,
) -> torch.Tensor:
    """CPU body of `segment_experts`. Raises OpInputError on a slot that is neither -1 nor in 0 .. S - 1."""
    check_routing(row_slots, offsets, expert_ids, num_experts)
    check_slots(row_slots, max_adapters)
    rows = row_slots.shape[0]
    if expert_ids is None:
        assert offsets is not None
        ends_E = offsets.long().clamp(0, rows)
        experts_T = torch.searchsorted(ends_E, torch.arange(rows), right=True)
        order_T = torch.arange(rows)
    else:
        ids_T = expert_ids.long()
        experts_T = torch.where((ids_T >= 0) & (ids_T < num_experts), ids_T, num_experts)
        order_T = experts_T.argsort(stable=True)
    starts = torch.searchsorted(experts_T[order_T], torch.arange(num_experts + 2))
    size = expert_segments_size(rows, num_experts, max_adapters, expert_ids is None)
    table = torch.full((size,), -1, dtype=torch.int32)
    table[:rows] = order_T
    table[row_experts_at(rows) : expert_starts_at(rows)] = experts_T
    table[expert_starts_at(rows) : tile_count_at(rows, num_experts)] = starts
    slots = row_slots[order_T]
    tiles, tile_slots = table[tile_count_at(rows, num_experts) :], table[tile_slots_at(rows, num_experts) :]
    height, bound = tile_height(rows, num_experts), tile_bound(rows, num_experts, 16)
    _write_tiles(tiles, tile_slots, bound, height, starts, slots, max_adapters)
    if has_high_tiles(rows, num_experts):
        tiles = table[high_count_at(rows, num_experts) :]
        tile_slots = table[high_slots_at(rows, num_experts, max_adapters) :]
        bound = tile_bound(rows, num_experts, HIGH)
        _write_tiles(tiles, tile_slots, bound, HIGH, starts, slots, max_adapters)
    return table


def _write_tiles(
    tiles: torch.Tensor, tile_slots: torch.Tensor, bound: int, height: int, starts: torch.Tensor, slots: torch.Tensor,
    max_adapters: int,
) -> None:  # fmt: skip
    """One list of tiles, from its count on, and their slots. starts: [E + 2]. slots: [T, J], rows sorted by expert."""
    num_experts = starts.numel() - 2
    counts = (starts.diff() + height - 1) // height
    tile_experts = torch.repeat_interleave(counts)
    index = torch.arange(tile_experts.numel()) - (counts.cumsum(0) - counts)[tile_experts]
    firsts = starts[tile_experts] + height * index
    tiles[0] = tile_experts.numel()
    tiles[1:][: tile_experts.numel()] = tile_experts
    tiles[1 + bound :][: tile_experts.numel()] = firsts
    if height < SLOTS_FROM:
        return
    ends = torch.minimum(firsts + height, starts[tile_experts + 1])
    for tile, (expert, first, end) in enumerate(zip(*(t.tolist() for t in (tile_experts, firsts, ends)), strict=True)):
        used = slots[first:end].unique() if expert < num_experts else slots[:0]
        used = used[used >= 0]
        tile_slots[tile * max_adapters :][: used.numel()] = used
