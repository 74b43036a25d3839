"""The adapters' part of a linear over few rows, beside the launch that streams W: delta = coeff * scaling * (x A^T) B.

Stage: run time. Some programs shrink, the others expand: a fixed number of programs shares whatever tiles the batch has
(up to 16 entries of one slot each), so every B is read once for each tile and only if its adapter is in the batch. An
entry's bits follow from its own x and adapter alone, and nothing of one slot ever meets another's.

FUSED, both in one launch: h goes tagged from one to the other, and an expanding program that has waited too long
computes it itself, to the same bits. Else two launches.

Letters: T rows, J slots per row, E = T * J entries, K in-features, N out-features, W words of an entry's h, S slots.
"""

# ruff: noqa: ANN001 (pointers and blocks of a Triton kernel have no static type)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fxlora.kernels.call import LinearCall
from fxlora.kernels.launch import Launcher
from fxlora.kernels.overlap import await_tagged, enter, launch_number, leave, let_later_start, untag, wait_for_earlier
from fxlora.kernels.segments import TILE, tile_bound
from fxlora.kernels.shrink import shrink_entry, shrink_share, tile_of
from fxlora.kernels.tiles import DeltaTile, ShrinkTile
from fxlora.kernels.triton_helpers import cdiv, dot, next_power_of_2
from fxlora.kernels.workspace import sync


@triton.jit
def b_block(b_ptr, start, rank, first, cols, num_cols, BR: tl.constexpr) -> tl.tensor:
    """[BR, BN]: ranks first .. first + BR of B for these columns."""
    ranks = first + tl.arange(0, BR)
    at = b_ptr + (start + ranks)[:, None].to(tl.int64) * num_cols + cols[None, :]
    return tl.load(at, mask=(ranks < rank)[:, None] & (cols < num_cols)[None, :], other=0.0)


@triton.jit
def h_block(
    x, h_ptr, h_stride, entries, entry_mask, positions, slots, coeffs, segments_ptr, site, number, rank, first,
    num_features, max_adapters, J: tl.constexpr, BR: tl.constexpr, SHRINK: tl.constexpr, HAS_COEFFS: tl.constexpr,
    FUSED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """[16, BR] fp32: ranks first .. first + BR of the tile's h, zero where there is none."""
    ranks = first + tl.arange(0, BR)
    mask = entry_mask[:, None] & (ranks < rank)[None, :]
    at = h_ptr + entries[:, None].to(tl.int64) * h_stride + ranks[None, :]
    if FUSED:
        h, came = await_tagged(at, mask, number)
        if not came:
            for position in range(positions[0], positions[1]):
                shrink_entry(
                    tl.load(segments_ptr + position), 0, 1, x, h_ptr, h_stride, slots, coeffs, site, number,
                    num_features, max_adapters, J, SHRINK, HAS_COEFFS, True,
                )  # fmt: skip
            tl.debug_barrier()
            h, _ = untag(tl.load(at, mask=mask, other=0, volatile=True))
        return h
    else:
        return tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def expand_share(
    program, programs, delta_ptr, x, h_ptr, h_stride, slots, coeffs, segments_ptr, site, b_ptr, sync_ptr, num_entries,
    num_features, num_cols, max_adapters, J: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr,
    ONE_CHUNK: tl.constexpr, SHRINK: tl.constexpr, HAS_COEFFS: tl.constexpr, FUSED: tl.constexpr,
    PDL: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """One program's share of one member's delta: tiles are dealt out first, then the columns of each."""
    count = tl.load(segments_ptr + num_entries + max_adapters + 2)
    blocks = tl.cdiv(num_cols, BN)
    parts = tl.maximum(tl.minimum(programs // tl.maximum(count, 1), blocks), 1)
    groups = programs // parts
    begin = tl.where(program < groups * parts, program // parts, count)
    lanes = tl.arange(0, 16)
    for tile in tl.range(begin, count, groups, num_stages=1):
        slot, first_position, end = tile_of(tile, segments_ptr, num_entries, max_adapters)
        rank = tl.load(site[2] + slot)
        start = tl.load(site[1] + slot)
        entry_mask = first_position + lanes < end
        entries = tl.load(segments_ptr + first_position + lanes, mask=entry_mask, other=0)
        cols = program % parts * BN + tl.arange(0, BN)
        b = b_block(b_ptr, start, rank, 0, cols, num_cols, BR)
        wait_for_earlier(PDL)
        number = launch_number(enter(sync_ptr)) if FUSED else 0
        if rank > 0:
            first_h = h_block(
                x, h_ptr, h_stride, entries, entry_mask, (first_position, end), slots, coeffs, segments_ptr, site,
                number, rank, 0, num_features, max_adapters, J, BR, SHRINK, HAS_COEFFS, FUSED,
            ).to(b.dtype)  # fmt: skip
            for _ in tl.range(program % parts * BN, num_cols, parts * BN, num_stages=1):
                next_cols = cols + parts * BN
                next_b = b_block(b_ptr, start, rank, 0, next_cols, num_cols, BR)  # on its way during the dot
                acc = dot(first_h, b, tl.zeros([16, BN], tl.float32), PRECISION)
                if not ONE_CHUNK:
                    for first in range(BR, rank, BR):
                        h = h_block(
                            x, h_ptr, h_stride, entries, entry_mask, (first_position, end), slots, coeffs,
                            segments_ptr, site, number, rank, first, num_features, max_adapters, J, BR, SHRINK,
                            HAS_COEFFS, FUSED,
                        ).to(b.dtype)  # fmt: skip
                        acc = dot(h, b_block(b_ptr, start, rank, first, cols, num_cols, BR), acc, PRECISION)
                at = delta_ptr + entries[:, None].to(tl.int64) * num_cols + cols[None, :]
                tl.store(at, acc, mask=entry_mask[:, None] & (cols < num_cols)[None, :])
                b = next_b
                cols = next_cols


@triton.jit(do_not_specialize=["num_entries", "max_adapters", "parts", "shrinkers", "expanders"])
def delta_kernel(
    delta_ptr,  # fp32, the members' [E, N] one after another
    x,  # [T, K]: pointer, row stride
    h_ptr,  # [members, E, W]: tagged words if FUSED, else fp32
    h_stride,  # W
    slots,  # int32 [T, J]: pointer, strides
    coeffs,  # fp32 [T, J]: pointer, strides
    segments_ptr,
    sites,  # of each member: A [P, K], start, rank, scaling
    b_ptrs,  # of each member: B [P, N]
    widths,  # N of each member
    sync_ptr,  # see overlap.py
    num_entries,
    num_features,
    max_adapters,
    parts,  # programs that share the shrink of one entry
    shrinkers,
    expanders,
    HAS_POOL: tl.constexpr,  # one flag for each member
    J: tl.constexpr,
    SHRINK: tl.constexpr,  # see shrink_share
    BR: tl.constexpr,
    BN: tl.constexpr,
    ONE_CHUNK: tl.constexpr,  # no adapter has more than BR ranks
    HAS_COEFFS: tl.constexpr,
    FUSED: tl.constexpr,
    FIRST: tl.constexpr,  # this launch is the first of its op
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Program (shrinkers first, then expanders; member)."""
    if FIRST:
        wait_for_earlier(PDL)
    let_later_start(PDL)
    program = tl.program_id(0)
    width = 0
    for member in tl.static_range(len(HAS_POOL)):
        if HAS_POOL[member]:
            if tl.program_id(1) == member:
                h_at = h_ptr + member * num_entries.to(tl.int64) * h_stride
                if program < shrinkers:
                    number = launch_number(enter(sync_ptr)) if FUSED else 0
                    shrink_share(
                        program, shrinkers, x, h_at, h_stride, slots, coeffs, segments_ptr, sites[member], number,
                        num_entries, num_features, max_adapters, parts, J, SHRINK, HAS_COEFFS, FUSED,
                    )  # fmt: skip
                else:
                    expand_share(
                        program - shrinkers, expanders, delta_ptr + width * num_entries, x, h_at, h_stride, slots,
                        coeffs, segments_ptr, sites[member], b_ptrs[member], sync_ptr, num_entries, num_features,
                        widths[member], max_adapters, J, BR, BN, ONE_CHUNK, SHRINK, HAS_COEFFS, FUSED, PDL, PRECISION,
                    )  # fmt: skip
        width += widths[member]
    wait_for_earlier(PDL)
    if FUSED:
        leave(sync_ptr)


_launcher = Launcher(delta_kernel)


def compute_delta(call: LinearCall, delta: torch.Tensor, tile: DeltaTile) -> None:
    """Fills delta, fp32, the members' [E, N] one after another, in the rows of entries that have an adapter."""
    members = call.members
    count = len(call.widths)
    stride = max(16, next_power_of_2(members.h_width))
    parts = min(cdiv(members.h_width, tile.shrink.BR), tile.shrink.parts)
    shrinkers = min(shrink_items(call, tile.shrink) * parts, tile.shrinkers)
    if tile.fused:
        programs = (shrinkers + tile.expanders) * count
        counts, words = sync(programs, count * call.entries * stride, call.x.device, call.stream)
        _launch(call, delta, words, stride, counts, parts, shrinkers, tile.expanders, tile, first=True)
    else:
        h = delta.new_empty(count * call.entries * stride)
        _launch(call, delta, h, stride, call.segments, parts, shrinkers, 0, tile, first=True)
        _launch(call, delta, h, stride, call.segments, parts, 0, tile.expanders, tile, first=False)


def compute_h(call: LinearCall, h: torch.Tensor, stride: int, tile: DeltaTile) -> None:
    """Fills h, fp32 [members, E, stride], as far as each entry's rank."""
    parts = min(cdiv(call.members.h_width, tile.shrink.BR), tile.shrink.parts)
    shrinkers = min(shrink_items(call, tile.shrink) * parts, tile.shrinkers)
    _launch(call, h, h, stride, call.segments, parts, shrinkers, 0, tile, first=True)


def shrink_items(call: LinearCall, tile: ShrinkTile) -> int:
    """What shrinking programs share: entries, or as many tiles of the table as a batch of this shape may have."""
    return call.entries if tile.TM == 1 else min(call.entries, tile_bound(call.entries, call.members.max_adapters, TILE))


def _launch(
    call: LinearCall,
    delta: torch.Tensor,
    h: torch.Tensor,
    stride: int,
    counts: torch.Tensor,
    parts: int,
    shrinkers: int,
    expanders: int,
    tile: DeltaTile,
    *,
    first: bool,
) -> None:
    members = call.members
    shrink = tile.shrink
    block_ranks = max(16, min(tile.BR, stride))
    call.launch(
        _launcher,
        (shrinkers + expanders, len(call.widths)),
        (
            delta,
            (call.x, call.x.stride(0)),
            h,
            stride,
            call.slots,
            call.coeffs,
            call.segments,
            members.a_pools,
            members.b_pools,
            call.widths,
            counts,
            call.entries,
            call.features,
            members.max_adapters,
            parts,
            shrinkers,
            expanders,
        ),
        tile.num_warps,
        HAS_POOL=members.has_pool,
        J=call.width,
        SHRINK=(cdiv(call.features, shrink.BK) * shrink.BK, shrink.BR, shrink.BK, shrink.TM),
        BR=block_ranks,
        BN=tile.BN,
        ONE_CHUNK=stride <= block_ranks,
        HAS_COEFFS=call.has_coeffs,
        FUSED=bool(shrinkers and expanders),
        FIRST=first,
        PDL=call.overlap,
        PRECISION=call.precision,
    )
