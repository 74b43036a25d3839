"""Which ranks of which adapters meet a tile of rows, listed so that one matrix product serves them all.

Stage: run time, below the bodies whose expand is a matrix product over all adapters of a row tile. A group is 16 ranks
of one slot (fewer, if the rank ends there); the groups of a row tile are numbered slots ascending, and whoever needs
several adapters at once reads them from that list: their ranks lie side by side in one tile of A, h or B, whatever
pool rows they come from. A row of another slot meets zeros in h, which leave its fp32 sum as it is.

Letters: T rows, J slots per row, N out-features, S slots, P pool rows, W columns of h (highest rank of the pool,
rounded up to 16 at least).
"""

# ruff: noqa: ANN001, SIM108 (pointers and blocks have no static type; a choice at compile time is a statement)

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fxlora.kernels.triton_helpers import dot

FIELDS = tl.constexpr(3)
"""int32 per group: slot, first pool row, first column of h + number of ranks - 1."""

CHUNK = tl.constexpr(32)
"""Groups whose fields are read at once; a multiple of MOST."""

MOST = tl.constexpr(8)
"""Groups that are read at once."""


class Adapters(NamedTuple):
    """What a kernel reads of a member's adapters and rows, and its scratch."""

    b: Any  # [P, N]
    start: Any  # int32 [S]
    rank: Any  # int32 [S]
    max_adapters: Any
    slots: Any  # int32 [T, J], contiguous
    h: Any  # [T * J, W], like x
    width: Any  # W
    groups: Any  # int32 [row tiles, 3 * capacity + 1]: fields of each group, then their number
    capacity: Any


def list_capacity(max_adapters: int, entries: int, width: int) -> int:
    """Groups that the list of a row tile of so many entries has to hold, those without a slot at its end included."""
    most = min(max_adapters, entries) * (width // 16)
    return -(-(most + MOST.value) // 16) * 16


def list_words(capacity: int) -> int:
    """int32 of a row tile's list."""
    return FIELDS.value * capacity + 1


@triton.jit
def adapters_of(
    member, b_ptr, site, max_adapters, slots_ptr, h_ptr, h_width, groups_ptr, capacity, num_entries, tiles_m
) -> Adapters:
    """One member's, of tensors that hold all members'. site: A, start, rank, scaling. tiles_m: its row tiles."""
    return Adapters(
        b_ptr, site[1], site[2], max_adapters, slots_ptr, h_ptr + member * num_entries.to(tl.int64) * h_width, h_width,
        groups_ptr + member * tiles_m * (FIELDS * capacity + 1), capacity,
    )  # fmt: skip


@triton.jit
def slots_of(rows, j, adapters, num_rows, J: tl.constexpr) -> tl.tensor:
    """Slot j of each row; -1 past the last row or slot."""
    return tl.load(adapters.slots + rows * J + j, mask=(rows < num_rows) & (j < J), other=-1)


@triton.jit
def write_groups(row_tile, slots, adapters, BINS: tl.constexpr) -> tl.tensor:
    """Lists the groups of a row tile's slots, ended by groups without a slot. Returns how many there are.

    slots: of all entries of the tile. BINS: a power of two above S.
    """
    record = adapters.groups + row_tile * (FIELDS * adapters.capacity + 1)
    bins = tl.arange(0, BINS)
    known = (slots >= 0) & (slots < adapters.max_adapters)
    present = (tl.histogram(tl.where(known, slots, BINS - 1), BINS) > 0) & (bins < adapters.max_adapters)
    rank = tl.load(adapters.rank + bins, mask=present, other=0)
    start = tl.load(adapters.start + bins, mask=present, other=0)
    own = (rank + 15) // 16
    first = tl.cumsum(own, axis=0) - own
    for i in range(adapters.width // 16):
        at = record + first + i
        tl.store(at, bins, mask=i < own)
        tl.store(at + adapters.capacity, start + 16 * i, mask=i < own)
        tl.store(at + 2 * adapters.capacity, 16 * i + tl.minimum(rank - 16 * i, 16) - 1, mask=i < own)
    count = tl.sum(own, axis=0)
    tl.store(record + count + tl.arange(0, MOST), tl.full([MOST], -1, tl.int32))
    tl.store(record + FIELDS * adapters.capacity, count)
    return count


@triton.jit
def count_groups(row_tile, adapters) -> tl.tensor:
    """Groups of a row tile."""
    record = adapters.groups + row_tile * (FIELDS * adapters.capacity + 1)
    return tl.load(record + FIELDS * adapters.capacity, cache_modifier=".cg")


@triton.jit
def load_groups(row_tile, first_group, adapters, BR: tl.constexpr) -> tl.tensor:
    """The fields of a row tile's groups for BR columns, 16 for each group; slot -1 where there is no group."""
    at = adapters.groups + row_tile * (FIELDS * adapters.capacity + 1) + first_group + tl.arange(0, BR) // 16
    slots = tl.load(at, cache_modifier=".cg")
    pool_rows = tl.load(at + adapters.capacity, cache_modifier=".cg")
    ranks = tl.load(at + 2 * adapters.capacity, cache_modifier=".cg")
    return slots, pool_rows, ranks


@triton.jit
def load_chunk(row_tile, first_group, count, adapters) -> tl.tensor:
    """The fields of CHUNK groups, slot -1 past the last."""
    groups = first_group + tl.arange(0, CHUNK)
    at = adapters.groups + row_tile * (FIELDS * adapters.capacity + 1) + groups
    inside = groups < count
    slots = tl.load(at, mask=inside, other=-1, cache_modifier=".cg")
    pool_rows = tl.load(at + adapters.capacity, mask=inside, other=0, cache_modifier=".cg")
    ranks = tl.load(at + 2 * adapters.capacity, mask=inside, other=0, cache_modifier=".cg")
    return slots, pool_rows, ranks


@triton.jit
def columns_of(listed, group, BR: tl.constexpr) -> tl.tensor:
    """As load_groups, from the fields of a chunk. group: counted from the first of the chunk."""
    index = (group + tl.arange(0, BR) // 16) % CHUNK  # loads run ahead of the last group
    return tl.gather(listed[0], index, 0), tl.gather(listed[1], index, 0), tl.gather(listed[2], index, 0)


@triton.jit
def spread(col_slots, ranks, BR: tl.constexpr) -> tl.tensor:
    """Slot and column of h for BR columns; the 16 of a group have one slot and lie side by side, says this in one."""
    h_cols = ranks - ranks % 16 + tl.arange(0, BR) % 16
    col_slots = tl.minimum(col_slots, 1 << 30)  # changes nothing; hints on what a gather gives are lost
    return tl.max_constancy(col_slots, 16), tl.max_contiguous(tl.multiple_of(h_cols, 16), 16)


@triton.jit
def load_h(rows, columns, adapters, num_rows, J: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr) -> tl.tensor:
    """h of these rows, [BM, BR]; zero in the columns of slots that a row does not use, and past the last row."""
    return h_of(rows, slots_of(rows, 0, adapters, num_rows, J), columns, adapters, num_rows, J, BM, BR)


@triton.jit
def h_of(
    rows, row_slots, columns, adapters, num_rows, J: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr
) -> tl.tensor:
    """load_h where the first slot of each row is at hand."""
    col_slots, _, ranks = columns
    col_slots, h_cols = spread(col_slots, ranks, BR)
    h_tile = tl.zeros([BM, BR], adapters.h.dtype.element_ty)
    for j in tl.static_range(J):
        slots = row_slots
        if j > 0:
            slots = slots_of(rows, j, adapters, num_rows, J)
        own = (col_slots >= 0)[None, :] & (slots[:, None] == col_slots[None, :])
        h_at = adapters.h + ((rows * J + j) * adapters.width)[:, None] + h_cols[None, :]
        part = tl.load(h_at, mask=own, other=0.0, cache_modifier=".cg")
        if J == 1:
            h_tile = part
        else:
            h_tile = (h_tile.to(tl.float32) + part.to(tl.float32)).to(part.dtype)
    return h_tile


@triton.jit
def load_b(cols, columns, adapters, num_cols, BR: tl.constexpr) -> tl.tensor:
    """B of a row tile's groups, [BR, BN]; zero beyond the rank and without a slot."""
    col_slots, pool_rows, ranks = columns
    lanes = tl.arange(0, BR) % 16
    b_at = adapters.b + (pool_rows + lanes).to(tl.int64)[:, None] * num_cols + cols[None, :]
    mask = ((col_slots >= 0) & (lanes <= ranks % 16))[:, None] & (cols < num_cols)[None, :]
    return tl.load(b_at, mask=mask, other=0.0)


@triton.jit
def add_groups(
    acc, row_tile, first, count, rows, cols, adapters, num_rows, num_cols, J: tl.constexpr, BM: tl.constexpr,
    BR: tl.constexpr, SWAP: tl.constexpr, STAGES: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """acc [BM, BN] (SWAP: [BN, BM]) + h B of groups first .. count of a row tile, BR ranks at a time; loads run ahead.

    What is listed is read for CHUNK groups before the loop over them: loads whose addresses come from loads of the same
    loop run half as far ahead.
    """
    row_slots = slots_of(rows, 0, adapters, num_rows, J)
    for chunk in tl.range(first, count, CHUNK, num_stages=1):
        listed = load_chunk(row_tile, chunk, count, adapters)
        for group in tl.range(0, tl.minimum(count - chunk, CHUNK), BR // 16, num_stages=STAGES):
            columns = columns_of(listed, group, BR)
            h = h_of(rows, row_slots, columns, adapters, num_rows, J, BM, BR)
            b = load_b(cols, columns, adapters, num_cols, BR)
            acc = dot(b.T, h.T, acc, "ieee") if SWAP else dot(h, b, acc, "ieee")
    return acc


@triton.jit
def add_groups_to_both(
    acc, tail, row_tile, count, rows, tail_rows, cols, adapters, num_rows, num_cols, J: tl.constexpr, BM: tl.constexpr,
    TAIL: tl.constexpr, BR: tl.constexpr, STAGES: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """As add_groups with SWAP, onto BM rows and TAIL more of one row tile, which share B."""
    row_slots = slots_of(rows, 0, adapters, num_rows, J)
    tail_slots = slots_of(tail_rows, 0, adapters, num_rows, J)
    for chunk in tl.range(0, count, CHUNK, num_stages=1):
        listed = load_chunk(row_tile, chunk, count, adapters)
        for group in tl.range(0, tl.minimum(count - chunk, CHUNK), BR // 16, num_stages=STAGES):
            columns = columns_of(listed, group, BR)
            b = load_b(cols, columns, adapters, num_cols, BR)
            acc = dot(b.T, h_of(rows, row_slots, columns, adapters, num_rows, J, BM, BR).T, acc, "ieee")
            tail = dot(b.T, h_of(tail_rows, tail_slots, columns, adapters, num_rows, J, TAIL, BR).T, tail, "ieee")
    return acc, tail
