"""The launch before fused.py's and prefill.py's: groups of each row tile, h = coeff * scaling * (x A^T) of each entry.

Stage: run time, beside the base product of the launch after it. Groups are listed by groups.py (fused_hopper.py finds
them itself); h is made by the matrix unit, tiles of up to HEIGHT entries of one slot: each A is read once for each
tile, and only if its adapter is in the batch. An entry's bits follow from its own x and adapter alone.

Letters: T rows, J slots per row, E = T * J entries, K in-features, W words of an entry's h, S slots.
"""

# ruff: noqa: ANN001, SIM102 (pointers and blocks have no static type; a choice at compile time is an `if` of its own)

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fxlora.kernels.call import LinearCall, Plan
from fxlora.kernels.decode_shrink import count_tiles, shrink_tile, tall_tile_of, tile_ends, tile_of
from fxlora.kernels.groups import adapters_of, list_capacity, list_words, slots_of, write_groups
from fxlora.kernels.launch import Launcher
from fxlora.kernels.overlap import let_later_start, wait_for_earlier
from fxlora.kernels.segment_rows import TILE
from fxlora.kernels.segments import tile_bound
from fxlora.kernels.tiles import ShrinkTile
from fxlora.kernels.triton_helpers import cdiv, next_power_of_2, whole, whole_rows

EACH = tl.constexpr(3)
"""Most tiles of h for each program where few make all of them."""


class Scratch(NamedTuple):
    """What the two launches share, uninitialised, and the row map as they read it."""

    h: torch.Tensor  # [members, E, W], like x; of several parts [members, parts, E, W], fp32
    width: int  # W
    groups: torch.Tensor | None  # int32 [members, row tiles, list_words(capacity)], None where nobody reads lists
    capacity: int
    slots: torch.Tensor  # int32 [T, J], contiguous
    block_rows: int  # rows of a tile
    is_sorted: bool  # rows are taken in the order of their slots
    counts: torch.Tensor | None  # int32, which the first launch sets to zero


def scratch_of(
    call: LinearCall, block_rows: int, sorts: bool, parts: int = 1, lists: bool = True, counts: int = 0
) -> Scratch:
    """New scratch of a call. sorts: rows are taken in the order of their slots, where there are several tiles of rows,
    and each row has one slot. parts: of h, to be added up. lists: whether groups are to be listed. counts: how many
    there are."""
    width = max(16, next_power_of_2(call.members.h_width))
    capacity = list_capacity(call.members.max_adapters, block_rows * call.width, width)
    members = len(call.widths)
    h = call.new_scratch(members * parts, call.entries, width, dtype=call.x.dtype if parts == 1 else torch.float32)
    groups = None
    if lists:
        groups = call.new_scratch(members, cdiv(call.rows, block_rows), list_words(capacity), dtype=torch.int32)
    is_sorted = sorts and call.width == 1 and call.rows > block_rows
    zeros = call.new_scratch(counts, dtype=torch.int32) if counts else None
    return Scratch(h, width, groups, capacity, call.row_slots.contiguous(), block_rows, is_sorted, zeros)


@triton.jit
def list_tile(
    row_tile, adapters, segments_ptr, num_rows, J: tl.constexpr, JP: tl.constexpr, BM: tl.constexpr,
    BINS: tl.constexpr, SORTED: tl.constexpr,
) -> None:  # fmt: skip
    """Lists the groups of one row tile."""
    index = tl.arange(0, BM * JP)
    rows = (row_tile * BM + index // JP).to(tl.int64)
    if SORTED:
        rows = tl.load(segments_ptr + rows, mask=rows < num_rows, other=num_rows).to(tl.int64)
    write_groups(row_tile, slots_of(rows, index % JP, adapters, num_rows, J), adapters, BINS)


@triton.jit
def share_of(items, few) -> tl.tensor:
    """First of the items that this program makes, and the step to its next; none where few programs make them all."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    if items <= few * EACH:
        programs = tl.minimum(few, programs)
    return tl.where(program < programs, program, items), programs


@triton.jit
def make_h(
    x, h_ptr, h_width, coeffs, segments_ptr, site, num_entries, num_features, max_adapters, few, J: tl.constexpr,
    BINS: tl.constexpr, HEIGHT: tl.constexpr, PARTS: tl.constexpr, SHARES: tl.constexpr, BR: tl.constexpr,
    BK: tl.constexpr, SLICES: tl.constexpr, STAGES: tl.constexpr, HAS_COEFFS: tl.constexpr,
) -> None:  # fmt: skip
    """This program's share of one member's h."""
    ends, count = None, count_tiles(segments_ptr, num_entries, max_adapters)
    if HEIGHT > TILE:
        ends = tile_ends(segments_ptr, num_entries, max_adapters, HEIGHT, BINS)
        count = tl.max(ends, axis=0)
    items = count * (PARTS * SHARES)
    begin, step = share_of(items, few)
    for item in tl.range(begin, items, step, num_stages=1):
        if HEIGHT == TILE:
            tile = tile_of(item // (PARTS * SHARES), segments_ptr, num_entries, max_adapters)
        else:
            tile = tall_tile_of(item // (PARTS * SHARES), ends, segments_ptr, num_entries, HEIGHT)
        shrink_tile(
            tile, item % PARTS, item // PARTS % SHARES, x, h_ptr, h_width, coeffs, segments_ptr, site, num_entries,
            num_features, J, PARTS, SHARES, HEIGHT, BR, BK, SLICES, STAGES, HAS_COEFFS,
        )  # fmt: skip


@triton.jit
def clear(counts_ptr, num_counts) -> None:
    """Zero to all of them, by one program."""
    if tl.program_id(0) + tl.program_id(1) == 0:
        for first in tl.range(0, num_counts, 128, num_stages=1):
            index = first + tl.arange(0, 128)
            tl.store(counts_ptr + index, tl.zeros([128], tl.int32), mask=index < num_counts)


@triton.jit(do_not_specialize=["num_rows", "max_adapters", "few", "num_counts"])
def group_shrink_kernel(
    x,  # [T, K]: pointer, strides
    h_ptr,  # [members, E, W], like x; of several parts [members, PARTS, E, W], fp32
    h_width,  # W
    groups_ptr,  # int32 [members, row tiles, list_words(capacity)], None for no lists
    capacity,
    coeffs,  # fp32 [T, J]: pointer, strides
    segments_ptr,
    slots_ptr,  # int32 [T, J], contiguous
    counts_ptr,  # int32, None for none
    num_counts,
    sites,  # of each member: A [P, K], start, rank, scaling
    num_rows,
    num_features,
    max_adapters,
    few,  # programs of a member that make h, unless it has more than EACH tiles for each of them
    HAS_POOL: tl.constexpr,  # one flag for each member
    J: tl.constexpr,
    JP: tl.constexpr,  # power of two >= J
    BM: tl.constexpr,
    BINS: tl.constexpr,  # power of two above S
    SORTED: tl.constexpr,
    HEIGHT: tl.constexpr,
    PARTS: tl.constexpr,  # programs that share the in-features of a tile
    SHARES: tl.constexpr,  # programs that share the ranks of a tile
    BR: tl.constexpr,
    BK: tl.constexpr,
    SLICES: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_COEFFS: tl.constexpr,
    UNIT: tl.constexpr,  # of in-features, as in triton_helpers.whole
    PDL: tl.constexpr,
) -> None:
    """Program (share of the tiles of h, member); the last ones, which have least to do, begin the lists."""
    wait_for_earlier(PDL)
    let_later_start(PDL)
    x, num_features = whole_rows(x, UNIT), whole(num_features, UNIT)
    if counts_ptr is not None:
        clear(counts_ptr, num_counts)
    tiles_m = tl.cdiv(num_rows, BM)
    num_entries = num_rows * J
    for member in tl.static_range(len(HAS_POOL)):
        if HAS_POOL[member]:
            if tl.program_id(1) == member:
                site = sites[member]
                h_at = h_ptr + member * num_entries.to(tl.int64) * h_width * PARTS
                if groups_ptr is not None:
                    adapters = adapters_of(  # A stands in for B, which nothing here reads
                        member, site[0], site, max_adapters, slots_ptr, h_ptr, h_width, groups_ptr, capacity,
                        num_entries, tiles_m,
                    )  # fmt: skip
                    first = tl.num_programs(0) - 1 - tl.program_id(0)
                    for row_tile in tl.range(first, tiles_m, tl.num_programs(0), num_stages=1):
                        list_tile(row_tile, adapters, segments_ptr, num_rows, J, JP, BM, BINS, SORTED)
                make_h(
                    x, h_at, h_width, coeffs, segments_ptr, site, num_entries, num_features, max_adapters, few, J, BINS,
                    HEIGHT, PARTS, SHARES, BR, BK, SLICES, STAGES, HAS_COEFFS,
                )  # fmt: skip


_launcher = Launcher(group_shrink_kernel)


def shrink_groups(call: LinearCall, scratch: Scratch, tile: ShrinkTile) -> None:
    """Fills the lists of groups, and h of each entry: whole groups, zero beyond the rank. tile: of as many parts as
    `scratch`."""
    plan = call.plan(_launcher, tile, lambda: _plan(call, scratch, tile), step=(scratch.block_rows, scratch.is_sorted))
    call.launch(
        plan,
        (call.x, *call.x.stride()),
        scratch.h,
        scratch.width,
        scratch.groups,
        scratch.capacity,
        call.coeffs,
        call.segments,
        scratch.slots,
        scratch.counts,
        0 if scratch.counts is None else len(scratch.counts),
        call.members.a_pools,
        *plan.numbers,
    )


def _plan(call: LinearCall, scratch: Scratch, tile: ShrinkTile) -> Plan:
    members = call.members
    shares = tile.shares_of(members.h_width)
    items = min(call.entries, tile_bound(call.entries, members.max_adapters, tile.BM)) * tile.parts * shares
    return call.planned(
        _launcher,
        (min(items, tile.programs), len(call.widths)),
        (call.rows, call.features, members.max_adapters, tile.few or tile.programs),
        tile.num_warps,
        HAS_POOL=members.has_pool,
        J=call.width,
        JP=next_power_of_2(call.width),
        BM=scratch.block_rows,
        BINS=max(32, next_power_of_2(members.max_adapters + 1)),
        SORTED=scratch.is_sorted,
        HEIGHT=tile.BM,
        PARTS=tile.parts,
        SHARES=shares,
        BR=max(16, min(tile.BR, scratch.width)),
        BK=tile.BK,
        SLICES=tile.slices,
        STAGES=tile.num_stages,
        HAS_COEFFS=call.has_coeffs,
        UNIT=call.units[0],
        PDL=call.overlap,
    )
