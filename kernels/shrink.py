"""h = coeff * scaling * (x A^T) of every entry of very few rows, by matrix-vector products.

Stage: run time, the launch before gemv.py's. No matrix unit: a program streams a few rank rows of A for
one entry. A row's bits follow from its own x and adapter alone.

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
from fxlora.kernels.tiles import VectorTile
from fxlora.kernels.triton_helpers import cdiv, whole, whole_rows


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
def add_products(acc, x_at, a_at, rank_mask, first_k, num_features, BK: tl.constexpr) -> tl.tensor:
    """acc [BR, BK] and the products of BK in-features."""
    ks = first_k + tl.arange(0, BK)
    inside = ks < num_features
    a = tl.load(a_at[:, None] + ks[None, :], mask=rank_mask[:, None] & inside[None, :], other=0.0)
    return acc + a.to(tl.float32) * tl.load(x_at + ks, mask=inside, other=0.0).to(tl.float32)[None, :]


@triton.jit
def rank_products(
    x_at, a_ptr, start, rank, first, num_features, K: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr
) -> tl.tensor:
    """[BR] fp32: a row of x times ranks first .. first + BR of an adapter's A.

    All loads are under way at once where registers can hold them beside acc, else several at a time: unrolled further
    they spill, and a program over 14336 in-features then takes 20 times as long.
    """
    PER_THREAD: tl.constexpr = max(1, BR * BK // 128)
    STEP: tl.constexpr = max(1, 2 * (192 - PER_THREAD) // PER_THREAD) * BK
    IN_STEPS: tl.constexpr = 0 if K * PER_THREAD <= 2 * (288 - PER_THREAD) * BK else K // STEP * STEP
    ranks = first + tl.arange(0, BR)
    rank_mask = ranks < rank
    a_at = a_ptr + (start + ranks).to(tl.int64) * num_features
    acc = tl.zeros([BR, BK], tl.float32)
    for begin in tl.range(0, IN_STEPS, STEP, num_stages=1):
        for at in tl.static_range(0, STEP, BK):
            acc = add_products(acc, x_at, a_at, rank_mask, begin + at, num_features, BK)
    for at in tl.static_range(IN_STEPS, K, BK):
        acc = add_products(acc, x_at, a_at, rank_mask, at, num_features, BK)
    return tl.sum(acc, axis=1)


@triton.jit
def shrink_entry(
    entry, part, parts, x, h_ptr, h_stride, slots, coeffs, site, num_features, max_adapters,
    J: tl.constexpr, K: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, HAS_COEFFS: tl.constexpr,
) -> None:  # fmt: skip
    """Part `part` of one entry's h: ranks part * BR .., (part + parts) * BR .., ... K is a multiple of BK."""
    rank, start, scaling = adapter_of(slot_of(entry, slots, max_adapters, J), site)
    factor = factor_of(entry, scaling, coeffs, J, HAS_COEFFS)
    x_at = x[0] + (entry // J).to(tl.int64) * x[1]
    for first in range(part * BR, rank, parts * BR):
        values = rank_products(x_at, site[0], start, rank, first, num_features, K, BR, BK) * factor
        ranks = first + tl.arange(0, BR)
        tl.store(h_ptr + entry.to(tl.int64) * h_stride + ranks, values, mask=ranks < rank)


@triton.jit(do_not_specialize=["num_entries", "max_adapters", "parts"])
def shrink_kernel(
    x,  # [T, K]: pointer, row stride
    h_ptr,  # fp32 [members, E, W]
    h_stride,  # W
    slots,  # int32 [T, J]: pointer, strides
    coeffs,  # fp32 [T, J]: pointer, strides
    sites,  # of each member: A [P, K], start, rank, scaling
    num_entries,
    num_features,
    max_adapters,
    parts,  # programs that share the ranks of one entry
    HAS_POOL: tl.constexpr,  # one flag for each member
    J: tl.constexpr,
    K: tl.constexpr,  # num_features rounded up to a multiple of BK
    BR: tl.constexpr,
    BK: tl.constexpr,
    HAS_COEFFS: tl.constexpr,
    UNIT: tl.constexpr,  # of in-features, as in triton_helpers.whole
    PDL: tl.constexpr,
) -> None:
    """Program (share of the work, member)."""
    x, num_features = whole_rows(x, UNIT), whole(num_features, UNIT)
    wait_for_earlier(PDL)
    let_later_start(PDL)
    for member in tl.static_range(len(HAS_POOL)):
        if HAS_POOL[member]:
            if tl.program_id(1) == member:
                h_at = h_ptr + member * num_entries.to(tl.int64) * h_stride
                for item in tl.range(tl.program_id(0), num_entries * parts, tl.num_programs(0), num_stages=1):
                    shrink_entry(
                        item // parts, item % parts, parts, x, h_at, h_stride, slots, coeffs, sites[member],
                        num_features, max_adapters, J, K, BR, BK, HAS_COEFFS,
                    )  # fmt: skip


_launcher = Launcher(shrink_kernel)


def shrink(call: LinearCall, h: torch.Tensor, stride: int, tile: VectorTile) -> None:
    """Fills h, fp32 [members, E, stride], as far as each entry's rank."""
    plan = call.plan(_launcher, tile, lambda: _plan(call, tile))
    call.launch(
        plan,
        (call.x, call.x.stride(0)),
        h,
        stride,
        call.slots,
        call.coeffs,
        call.members.a_pools,
        *plan.numbers,
    )


def _plan(call: LinearCall, tile: VectorTile) -> Plan:
    members = call.members
    parts = min(cdiv(members.h_width, tile.BR), tile.parts)
    return call.planned(
        _launcher,
        (min(call.entries * parts, tile.programs), len(call.widths)),
        (call.entries, call.features, members.max_adapters, parts),
        tile.num_warps,
        HAS_POOL=members.has_pool,
        J=call.width,
        K=cdiv(call.features, tile.BK) * tile.BK,
        BR=tile.BR,
        BK=tile.BK,
        HAS_COEFFS=call.has_coeffs,
        UNIT=call.units[0],
        PDL=call.overlap,
    )
