"""Second launch of a linear over few rows: delta = h B of every entry, beside the launch that streams W.

Stage: run time. A fixed number of programs shares whatever tiles the batch has (up to 16 entries of one slot each), so
every B is read once for each tile and only if its adapter is in the batch. An entry's bits follow from its own h and
adapter alone, and nothing of one slot ever meets another's.

Letters: T rows, J slots per row, E = T * J entries, N out-features, W words of an entry's h, S slots.
"""

# ruff: noqa: ANN001, SIM102 (pointers and blocks have no static type; a choice at compile time is an `if` of its own)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fxlora.kernels.call import LinearCall, Plan
from fxlora.kernels.launch import Launcher
from fxlora.kernels.overlap import let_later_start, wait_for_earlier
from fxlora.kernels.shrink import count_tiles, tile_of
from fxlora.kernels.tiles import ExpandTile
from fxlora.kernels.triton_helpers import dot


@triton.jit
def b_block(b_ptr, start, rank, first, cols, num_cols, BR: tl.constexpr) -> tl.tensor:
    """[BR, BN]: ranks first .. first + BR of B for these columns."""
    ranks = first + tl.arange(0, BR)
    at = b_ptr + (start + ranks)[:, None].to(tl.int64) * num_cols + cols[None, :]
    b = tl.load(at, mask=(ranks < rank)[:, None] & (cols < num_cols)[None, :], other=0.0)
    return b.to(tl.float32) if b.dtype == tl.float16 else b  # tf32 holds fp16's digits, and h may pass fp16's range


@triton.jit
def h_block(h_ptr, h_stride, entries, entry_mask, rank, first, dtype: tl.constexpr, BR: tl.constexpr) -> tl.tensor:
    """[16, BR]: ranks first .. first + BR of a tile's h, in the dtype of the dot."""
    ranks = first + tl.arange(0, BR)
    mask = entry_mask[:, None] & (ranks < rank)[None, :]
    at = h_ptr + entries[:, None].to(tl.int64) * h_stride + ranks[None, :]
    return tl.load(at, mask=mask, other=0.0, cache_modifier=".cg").to(dtype)


@triton.jit
def expand_share(
    program, programs, delta_ptr, h_ptr, h_stride, segments_ptr, site, b_ptr, num_entries, num_cols, max_adapters,
    BR: tl.constexpr, BN: tl.constexpr, ONE_CHUNK: tl.constexpr, PDL: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """One program's share of one member's delta: tiles are dealt out first, then the columns of each."""
    count = count_tiles(segments_ptr, num_entries, max_adapters)
    parts = tl.maximum(tl.minimum(programs // tl.maximum(count, 1), tl.cdiv(num_cols, BN)), 1)
    groups = programs // parts
    lanes = tl.arange(0, 16)
    for tile in tl.range(tl.where(program < groups * parts, program // parts, count), count, groups, num_stages=1):
        slot, first_position, end = tile_of(tile, segments_ptr, num_entries, max_adapters)
        rank = tl.load(site[2] + slot)
        start = tl.load(site[1] + slot)
        entry_mask = first_position + lanes < end
        entries = tl.load(segments_ptr + first_position + lanes, mask=entry_mask, other=0)
        cols = program % parts * BN + tl.arange(0, BN)
        b = b_block(b_ptr, start, rank, 0, cols, num_cols, BR)
        wait_for_earlier(PDL)
        if rank > 0:
            first_h = h_block(h_ptr, h_stride, entries, entry_mask, rank, 0, b.dtype, BR)
            for _ in tl.range(program % parts * BN, num_cols, parts * BN, num_stages=1):
                next_cols = cols + parts * BN
                next_b = b_block(b_ptr, start, rank, 0, next_cols, num_cols, BR)  # on its way during the dot
                acc = dot(first_h, b, tl.zeros([16, BN], tl.float32), PRECISION)
                if not ONE_CHUNK:
                    for first in range(BR, rank, BR):
                        h = h_block(h_ptr, h_stride, entries, entry_mask, rank, first, b.dtype, BR)
                        acc = dot(h, b_block(b_ptr, start, rank, first, cols, num_cols, BR), acc, PRECISION)
                at = delta_ptr + entries[:, None].to(tl.int64) * num_cols + cols[None, :]
                tl.store(at, acc, mask=entry_mask[:, None] & (cols < num_cols)[None, :])
                b = next_b
                cols = next_cols


@triton.jit(do_not_specialize=["num_entries", "max_adapters"])
def expand_kernel(
    delta_ptr,  # fp32, the members' [E, N] one after another
    h_ptr,  # fp32 [members, E, W]
    h_stride,  # W
    segments_ptr,
    sites,  # of each member: A [P, K], start, rank, scaling
    b_ptrs,  # of each member: B [P, N]
    widths,  # N of each member
    num_entries,
    max_adapters,
    HAS_POOL: tl.constexpr,  # one flag for each member
    BR: tl.constexpr,
    BN: tl.constexpr,
    ONE_CHUNK: tl.constexpr,  # no adapter has more than BR ranks
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Program (share of the work, member)."""
    let_later_start(PDL)
    width = 0
    for member in tl.static_range(len(HAS_POOL)):
        if HAS_POOL[member]:
            if tl.program_id(1) == member:
                expand_share(
                    tl.program_id(0), tl.num_programs(0), delta_ptr + width * num_entries,
                    h_ptr + member * num_entries.to(tl.int64) * h_stride, h_stride, segments_ptr, sites[member],
                    b_ptrs[member], num_entries, widths[member], max_adapters, BR, BN, ONE_CHUNK, PDL, PRECISION,
                )  # fmt: skip
        width += widths[member]
    wait_for_earlier(PDL)


_launcher = Launcher(expand_kernel)


def expand(call: LinearCall, delta: torch.Tensor, h: torch.Tensor, stride: int, tile: ExpandTile) -> None:
    """Fills delta, fp32, the members' [E, N] one after another, in the rows of entries that have an adapter."""
    members = call.members
    plan = call.plan(_launcher, tile, lambda: _plan(call, stride, tile))
    plan.launch(delta, h, stride, call.segments, members.a_pools, members.b_pools, call.widths, *plan.numbers)


def _plan(call: LinearCall, stride: int, tile: ExpandTile) -> Plan:
    block_ranks = max(16, min(tile.BR, stride))
    return call.planned(
        _launcher,
        (max(1, tile.programs // len(call.widths)), len(call.widths)),
        (call.entries, call.members.max_adapters),
        tile.num_warps,
        HAS_POOL=call.members.has_pool,
        BR=block_ranks,
        BN=tile.BN,
        ONE_CHUNK=stride <= block_ranks,
        PDL=call.overlap,
        PRECISION=call.precision,
    )
