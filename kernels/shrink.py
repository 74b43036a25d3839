"""First launch of a linear over few rows: h = coeff * scaling * (x A^T) of every entry, by matrix-vector products.

Stage: run time. No matrix unit: a program streams a few rank rows of A once, for one entry or for up to four entries
of the same slot. A row's bits follow from its own x and adapter alone.

Letters: T rows, J slots per row, E = T * J entries, K in-features, W words of an entry's h, S slots.
"""

# ruff: noqa: ANN001, SIM102 (pointers and blocks have no static type; a choice at compile time is an `if` of its own)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fxlora.kernels.call import LinearCall, Plan
from fxlora.kernels.launch import Launcher
from fxlora.kernels.overlap import let_later_start, wait_for_earlier
from fxlora.kernels.segments import TILE, tile_bound
from fxlora.kernels.tiles import ShrinkTile
from fxlora.kernels.triton_helpers import cdiv


@triton.jit
def slot_of(entry, slots, max_adapters, J: tl.constexpr) -> tl.tensor:
    """Slot of an entry, -1 for none."""
    slot = tl.load(slots[0] + (entry // J).to(tl.int64) * slots[1] + (entry % J) * slots[2])
    return tl.where((slot >= 0) & (slot < max_adapters), slot, -1)


@triton.jit
def adapter_of(slot, site) -> tl.tensor:
    """Rank (0 without an adapter), first pool row and scaling at this site: A, start, rank, scaling."""
    known = slot >= 0
    rank = tl.load(site[2] + slot, mask=known, other=0)
    return rank, tl.load(site[1] + slot, mask=known, other=0), tl.load(site[3] + slot, mask=known, other=0.0)


@triton.jit
def factor_of(entry, scaling, coeffs, J: tl.constexpr, HAS_COEFFS: tl.constexpr) -> tl.tensor:
    """What an entry's h is multiplied with."""
    if HAS_COEFFS:
        scaling *= tl.load(coeffs[0] + (entry // J).to(tl.int64) * coeffs[1] + (entry % J) * coeffs[2])
    return scaling


@triton.jit
def rank_products(
    x_at, a_ptr, start, rank, first, num_features, K: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr
) -> tl.tensor:
    """[BR] fp32: a row of x times ranks first .. first + BR of an adapter's A."""
    ranks = first + tl.arange(0, BR)
    ks = tl.arange(0, BK)
    a_at = a_ptr + (start + ranks).to(tl.int64) * num_features
    acc = tl.zeros([BR, BK], tl.float32)
    for at in tl.static_range(0, K, BK):
        inside = at + ks < num_features
        a = tl.load(a_at[:, None] + (at + ks)[None, :], mask=(ranks < rank)[:, None] & inside[None, :], other=0.0)
        acc += a.to(tl.float32) * tl.load(x_at + at + ks, mask=inside, other=0.0).to(tl.float32)[None, :]
    return tl.sum(acc, axis=1)


@triton.jit
def shrink_entry(
    entry, part, parts, x, h_ptr, h_stride, slots, coeffs, site, num_features, max_adapters,
    J: tl.constexpr, SHRINK: tl.constexpr, HAS_COEFFS: tl.constexpr,
) -> None:  # fmt: skip
    """Part `part` of one entry's h: ranks part * BR .., (part + parts) * BR .., ..."""
    K: tl.constexpr = SHRINK[0]
    BR: tl.constexpr = SHRINK[1]
    BK: tl.constexpr = SHRINK[2]
    rank, start, scaling = adapter_of(slot_of(entry, slots, max_adapters, J), site)
    factor = factor_of(entry, scaling, coeffs, J, HAS_COEFFS)
    x_at = x[0] + (entry // J).to(tl.int64) * x[1]
    for first in range(part * BR, rank, parts * BR):
        values = rank_products(x_at, site[0], start, rank, first, num_features, K, BR, BK) * factor
        ranks = first + tl.arange(0, BR)
        tl.store(h_ptr + entry.to(tl.int64) * h_stride + ranks, values, mask=ranks < rank)


@triton.jit
def count_tiles(segments_ptr, num_entries, max_adapters) -> tl.tensor:
    """Tiles in use of the table (segments.py)."""
    return tl.load(segments_ptr + num_entries + max_adapters + 2)


@triton.jit
def tile_of(tile, segments_ptr, num_entries, max_adapters) -> tl.tensor:
    """Slot of a tile of the table (segments.py), and the positions [first, end) of its up to 16 entries."""
    table_ptr = segments_ptr + num_entries + max_adapters + 3
    bound = tl.cdiv(num_entries, 16) + max_adapters
    slot = tl.load(table_ptr + tile)
    first = tl.load(table_ptr + bound + tile)
    return slot, first, tl.minimum(first + 16, tl.load(segments_ptr + num_entries + slot + 1))


@triton.jit
def neighbour(
    position, end, x, h_ptr, h_stride, scaling, coeffs, segments_ptr, rank, num_features, J: tl.constexpr,
    HAS_COEFFS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Of the entry at a position of the sorted order: its x, h and factor, and K and rank (0 past the end)."""
    inside = position < end
    entry = tl.load(segments_ptr + position, mask=inside, other=0)
    factor = factor_of(entry, scaling, coeffs, J, HAS_COEFFS)
    x_at = x[0] + (entry // J).to(tl.int64) * x[1]
    h_at = h_ptr + entry.to(tl.int64) * h_stride
    return x_at, h_at, factor, tl.where(inside, num_features, 0), tl.where(inside, rank, 0)


@triton.jit
def shrink_quarters(
    tile, part, parts, x, h_ptr, h_stride, coeffs, segments_ptr, site, num_entries, num_features,
    max_adapters, J: tl.constexpr, SHRINK: tl.constexpr, HAS_COEFFS: tl.constexpr,
) -> None:  # fmt: skip
    """As shrink_entry for all entries of a tile of the table, four at a time: A is loaded once for the four."""
    K: tl.constexpr = SHRINK[0]
    BR: tl.constexpr = SHRINK[1]
    BK: tl.constexpr = SHRINK[2]
    slot, first_position, end = tile_of(tile, segments_ptr, num_entries, max_adapters)
    rank, start, scaling = adapter_of(slot, site)
    ks = tl.arange(0, BK)
    for at in range(first_position, end, 4):
        x0, h0, f0, n0, r0 = neighbour(
            at, end, x, h_ptr, h_stride, scaling, coeffs, segments_ptr, rank, num_features, J, HAS_COEFFS
        )
        x1, h1, f1, n1, r1 = neighbour(
            at + 1, end, x, h_ptr, h_stride, scaling, coeffs, segments_ptr, rank, num_features, J, HAS_COEFFS
        )
        x2, h2, f2, n2, r2 = neighbour(
            at + 2, end, x, h_ptr, h_stride, scaling, coeffs, segments_ptr, rank, num_features, J, HAS_COEFFS
        )
        x3, h3, f3, n3, r3 = neighbour(
            at + 3, end, x, h_ptr, h_stride, scaling, coeffs, segments_ptr, rank, num_features, J, HAS_COEFFS
        )
        for first in range(part * BR, rank, parts * BR):
            ranks = first + tl.arange(0, BR)
            a_at = site[0] + (start + ranks).to(tl.int64) * num_features
            acc0 = tl.zeros([BR, BK], tl.float32)
            acc1 = tl.zeros([BR, BK], tl.float32)
            acc2 = tl.zeros([BR, BK], tl.float32)
            acc3 = tl.zeros([BR, BK], tl.float32)
            for block in tl.static_range(0, K, BK):
                k = block + ks
                mask = (ranks < rank)[:, None] & (k < num_features)[None, :]
                a = tl.load(a_at[:, None] + k[None, :], mask=mask, other=0.0).to(tl.float32)
                acc0 += a * tl.load(x0 + k, mask=k < n0, other=0.0).to(tl.float32)[None, :]
                acc1 += a * tl.load(x1 + k, mask=k < n1, other=0.0).to(tl.float32)[None, :]
                acc2 += a * tl.load(x2 + k, mask=k < n2, other=0.0).to(tl.float32)[None, :]
                acc3 += a * tl.load(x3 + k, mask=k < n3, other=0.0).to(tl.float32)[None, :]
            tl.store(h0 + ranks, tl.sum(acc0, axis=1) * f0, mask=ranks < r0)
            tl.store(h1 + ranks, tl.sum(acc1, axis=1) * f1, mask=ranks < r1)
            tl.store(h2 + ranks, tl.sum(acc2, axis=1) * f2, mask=ranks < r2)
            tl.store(h3 + ranks, tl.sum(acc3, axis=1) * f3, mask=ranks < r3)


@triton.jit
def shrink_share(
    program, programs, x, h_ptr, h_stride, slots, coeffs, segments_ptr, site, num_entries, num_features,
    max_adapters, parts, J: tl.constexpr, SHRINK: tl.constexpr, HAS_COEFFS: tl.constexpr,
) -> None:  # fmt: skip
    """One program's share of one member's h. SHRINK: K rounded up to multiples of BK, BR, BK, entries per read of A."""
    if SHRINK[3] == 1:
        for item in tl.range(program, num_entries * parts, programs, num_stages=1):
            shrink_entry(
                item // parts, item % parts, parts, x, h_ptr, h_stride, slots, coeffs, site, num_features,
                max_adapters, J, SHRINK, HAS_COEFFS,
            )  # fmt: skip
    else:
        count = count_tiles(segments_ptr, num_entries, max_adapters)
        for item in tl.range(program, count * parts, programs, num_stages=1):
            shrink_quarters(
                item // parts, item % parts, parts, x, h_ptr, h_stride, coeffs, segments_ptr, site, num_entries,
                num_features, max_adapters, J, SHRINK, HAS_COEFFS,
            )  # fmt: skip


@triton.jit(do_not_specialize=["num_entries", "max_adapters", "parts"])
def shrink_kernel(
    x,  # [T, K]: pointer, row stride
    h_ptr,  # fp32 [members, E, W]
    h_stride,  # W
    slots,  # int32 [T, J]: pointer, strides
    coeffs,  # fp32 [T, J]: pointer, strides
    segments_ptr,
    sites,  # of each member: A [P, K], start, rank, scaling
    num_entries,
    num_features,
    max_adapters,
    parts,  # programs that share the ranks of one entry
    HAS_POOL: tl.constexpr,  # one flag for each member
    J: tl.constexpr,
    SHRINK: tl.constexpr,
    HAS_COEFFS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Program (share of the work, member)."""
    wait_for_earlier(PDL)
    let_later_start(PDL)
    for member in tl.static_range(len(HAS_POOL)):
        if HAS_POOL[member]:
            if tl.program_id(1) == member:
                shrink_share(
                    tl.program_id(0), tl.num_programs(0), x, h_ptr + member * num_entries.to(tl.int64) * h_stride,
                    h_stride, slots, coeffs, segments_ptr, sites[member], num_entries, num_features, max_adapters,
                    parts, J, SHRINK, HAS_COEFFS,
                )  # fmt: skip


_launcher = Launcher(shrink_kernel)


def shrink(call: LinearCall, h: torch.Tensor, stride: int, tile: ShrinkTile) -> None:
    """Fills h, fp32 [members, E, stride], as far as each entry's rank."""
    plan = call.plan(_launcher, tile, lambda: _plan(call, tile))
    plan.launch(
        (call.x, call.x.stride(0)),
        h,
        stride,
        call.slots,
        call.coeffs,
        call.segments,
        call.members.a_pools,
        *plan.numbers,
    )


def _plan(call: LinearCall, tile: ShrinkTile) -> Plan:
    members = call.members
    items = call.entries if tile.TM == 1 else min(call.entries, tile_bound(call.entries, members.max_adapters, TILE))
    parts = min(cdiv(members.h_width, tile.BR), tile.parts)
    return call.planned(
        _launcher,
        (min(items * parts, tile.programs), len(call.widths)),
        (call.entries, call.features, members.max_adapters, parts),
        tile.num_warps,
        HAS_POOL=members.has_pool,
        J=call.width,
        SHRINK=(cdiv(call.features, tile.BK) * tile.BK, tile.BR, tile.BK, tile.TM),
        HAS_COEFFS=call.has_coeffs,
        PDL=call.overlap,
    )
