"""Second launch of a linear over few rows: y = sums + bias + h B, each row with its own adapter.

Stage: run time. It is resident while the first launch streams W, and asks for B before it waits for that one. A tile
is up to 16 entries of one slot, or of none, so every B is read once for each tile and only if its adapter is in the
batch. An entry's bits follow from its own sums, h and adapter alone; nothing of one slot ever meets another's.

Letters: T rows, J slots per row, E = T * J entries, N out-features, W words of an entry's h, S slots.
"""

# ruff: noqa: ANN001, SIM102 (pointers and blocks have no static type; a choice at compile time is an `if` of its own)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fxlora.kernels.call import LinearCall, Plan
from fxlora.kernels.decode_shrink import count_tiles, tile_of
from fxlora.kernels.launch import Launcher
from fxlora.kernels.overlap import let_later_start, wait_for_earlier
from fxlora.kernels.segments import TILE, tile_bound
from fxlora.kernels.tiles import SingleTiles
from fxlora.kernels.triton_helpers import cdiv, dot, next_power_of_2, whole


@triton.jit
def b_block(b_ptr, start, rank, first, cols, num_cols, BR: tl.constexpr) -> tl.tensor:
    """[BR, BN]: ranks first .. first + BR of B for these columns."""
    ranks = first + tl.arange(0, BR)
    at = b_ptr + (start + ranks)[:, None].to(tl.int64) * num_cols + cols[None, :]
    b = tl.load(at, mask=(ranks < rank)[:, None] & (cols < num_cols)[None, :], other=0.0)
    return b.to(tl.float32) if b.dtype == tl.float16 else b  # tf32 holds fp16's digits, and h may pass fp16's range


@triton.jit
def h_block(
    h_ptr, h_stride, entries, entry_mask, rank, first, num_entries, dtype: tl.constexpr, BR: tl.constexpr,
    PARTS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """[16, BR]: ranks first .. first + BR of a tile's h, its parts added in order, in the dtype of the dot."""
    ranks = first + tl.arange(0, BR)
    mask = entry_mask[:, None] & (ranks < rank)[None, :]
    at = h_ptr + entries[:, None].to(tl.int64) * h_stride + ranks[None, :]
    h = tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
    for part in tl.static_range(1, PARTS):
        h += tl.load(at + part * num_entries.to(tl.int64) * h_stride, mask=mask, other=0.0, cache_modifier=".cg")
    return h.to(dtype)


@triton.jit
def any_tile_of(tile, count, bare, segments_ptr, num_entries, max_adapters) -> tl.tensor:
    """As tile_of; tiles from `count` on hold the entries without an adapter, which begin at `bare`, with slot -1."""
    slot = tl.full([], -1, tl.int32)
    first = bare + (tile - count) * 16
    end = tl.minimum(first + 16, num_entries)
    if tile < count:
        slot, first, end = tile_of(tile, segments_ptr, num_entries, max_adapters)
    return slot, first, end


@triton.jit
def base_sums(sums_ptr, at, mask, size, cols, bias, num_cols, PARTS: tl.constexpr, HAS_BIAS: tl.constexpr) -> tl.tensor:
    """[16, BN] fp32: the parts of the base product in order, and the bias."""
    acc = tl.load(sums_ptr + at, mask=mask, other=0.0, cache_modifier=".cg")
    for part in tl.static_range(1, PARTS):
        acc += tl.load(sums_ptr + part * size + at, mask=mask, other=0.0, cache_modifier=".cg")
    if HAS_BIAS:
        acc += tl.load(bias[0] + cols * bias[1], mask=cols < num_cols, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def expand_tile(
    slot, first_position, end, cols, y_ptr, sums_ptr, bias, h_ptr, h_stride, segments_ptr, site, b_ptr, num_entries,
    num_cols, j, J: tl.constexpr, PARTS: tl.constexpr, H_PARTS: tl.constexpr, LAST: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_POOL: tl.constexpr, BR: tl.constexpr, ONE_CHUNK: tl.constexpr, PDL: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """Columns `cols` of the rows whose entry j is in one tile."""
    positions = first_position + tl.arange(0, 16)
    entries = tl.load(segments_ptr + positions, mask=positions < end, other=0)
    entry_mask = (positions < end) & (entries % J == j)
    rank, start, b = 0, 0, cols
    if HAS_POOL:
        rank = tl.load(site[2] + slot, mask=slot >= 0, other=0)
        start = tl.load(site[1] + slot, mask=slot >= 0, other=0)
        b = b_block(b_ptr, start, rank, 0, cols, num_cols, BR)
    mask = entry_mask[:, None] & (cols < num_cols)[None, :]
    at = (entries // J)[:, None].to(tl.int64) * num_cols + cols[None, :]
    size = (num_entries // J).to(tl.int64) * num_cols
    wait_for_earlier(PDL)
    acc = base_sums(sums_ptr, at, mask, size, cols, bias, num_cols, PARTS, HAS_BIAS)
    if HAS_POOL:
        if rank > 0:
            h = h_block(h_ptr, h_stride, entries, entry_mask, rank, 0, num_entries, b.dtype, BR, H_PARTS)
            delta = dot(h, b, tl.zeros(acc.shape, tl.float32), PRECISION)
            if not ONE_CHUNK:
                for first in range(BR, rank, BR):
                    h = h_block(h_ptr, h_stride, entries, entry_mask, rank, first, num_entries, b.dtype, BR, H_PARTS)
                    delta = dot(h, b_block(b_ptr, start, rank, first, cols, num_cols, BR), delta, PRECISION)
            acc += delta
    if LAST:
        tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(sums_ptr + at, acc, mask=mask)


@triton.jit(do_not_specialize=["num_entries", "max_adapters", "j"])
def expand_kernel(
    ys,  # of each member: pointer to [T, N], contiguous
    sums_ptr,  # fp32, the members' [SPLIT, T, N] one after another
    biases,  # of each member: pointer to [N], stride
    h_ptr,  # fp32 [members, H_PARTS, E, W]
    h_stride,  # W
    segments_ptr,
    sites,  # of each member: A [P, K], start, rank, scaling
    b_ptrs,  # of each member: B [P, N]
    widths,  # N of each member
    num_entries,
    max_adapters,
    j,  # which of each row's entries
    J: tl.constexpr,
    SPLIT: tl.constexpr,
    H_PARTS: tl.constexpr,
    FIRST: tl.constexpr,  # j is 0: the parts have to be summed yet
    LAST: tl.constexpr,  # j is J - 1: the outputs are to be written
    HAS_BIAS: tl.constexpr,  # one flag for each member
    HAS_POOL: tl.constexpr,  # one flag for each member
    HAS_SUMS: tl.constexpr,  # one flag for each member
    BR: tl.constexpr,
    BN: tl.constexpr,
    ONE_CHUNK: tl.constexpr,  # no adapter has more than BR ranks
    COLS_UNIT: tl.constexpr,  # of out-features, as in triton_helpers.whole
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Program (share of the work, member). Columns of a tile go to neighbouring programs."""
    let_later_start(PDL)
    sums_at = sums_ptr
    for member in tl.static_range(len(HAS_POOL)):
        if HAS_SUMS[member]:
            num_cols = whole(widths[member], COLS_UNIT)
            if tl.program_id(1) == member:
                count, bare = 0, 0
                if HAS_POOL[member]:
                    count = count_tiles(segments_ptr, num_entries, max_adapters)
                    bare = tl.load(segments_ptr + num_entries + max_adapters)
                blocks = tl.cdiv(num_cols, BN)
                tiles = count + tl.cdiv(num_entries - bare, 16)
                for item in tl.range(tl.program_id(0), tiles * blocks, tl.num_programs(0), num_stages=1):
                    slot, first, end = any_tile_of(item // blocks, count, bare, segments_ptr, num_entries, max_adapters)
                    expand_tile(
                        slot, first, end, item % blocks * BN + tl.arange(0, BN), ys[member], sums_at, biases[member],
                        h_ptr + member * num_entries.to(tl.int64) * h_stride * H_PARTS, h_stride, segments_ptr,
                        sites[member], b_ptrs[member], num_entries, num_cols, j, J, SPLIT if FIRST else 1,
                        H_PARTS, LAST, HAS_BIAS[member] and FIRST, HAS_POOL[member], BR, ONE_CHUNK, PDL, PRECISION,
                    )  # fmt: skip
            sums_at += (num_entries // J).to(tl.int64) * SPLIT * num_cols
    wait_for_earlier(PDL)


_launcher = Launcher(expand_kernel)


def expand(
    call: LinearCall,
    outputs: tuple[torch.Tensor, ...],
    sums: torch.Tensor,
    h: torch.Tensor,
    stride: int,
    tiles: SingleTiles,
) -> None:
    """Fills the outputs of the members that have sums; one launch for each of a row's slots.

    sums: fp32, such members' [SPLIT, T, N] one after another; overwritten where a row has several slots. h: fp32
    [members, parts, E, stride], valid as far as each entry's rank.
    """
    members = call.members
    for j in range(call.width):
        plan = call.plan(_launcher, tiles, lambda j=j: _plan(call, stride, j, tiles), step=j)
        call.launch(
            plan,
            outputs,
            sums,
            call.strided_biases,
            h,
            stride,
            call.segments,
            members.a_pools,
            members.b_pools,
            call.widths,
            *plan.numbers,
        )


def has_sums(call: LinearCall, split: int) -> tuple[bool, ...]:
    """Of each member: whether its base product is left in scratch, to be finished here."""
    return tuple([has_pool or split > 1 for has_pool in call.members.has_pool])


def scratch_sizes(call: LinearCall, tiles: SingleTiles) -> tuple[int, int, list[int]]:
    """Stride of h, words of all of h, and of each member's sums, 0 where it has none; fp32."""
    stride = max(16, next_power_of_2(call.members.h_width))
    h_size = len(call.widths) * tiles.h_parts * call.entries * stride if call.members.has_pools else 0
    summed = zip(call.widths, has_sums(call, tiles.split), strict=True)
    return stride, h_size, [tiles.split * call.rows * n if kept else 0 for n, kept in summed]


def _plan(call: LinearCall, stride: int, j: int, tiles: SingleTiles) -> Plan:
    members, tile, split = call.members, tiles.expand, tiles.split
    block_ranks = max(16, min(tile.BR, stride))
    bound = min(call.entries, tile_bound(call.entries, members.max_adapters, TILE) + 1)
    return call.planned(
        _launcher,
        (min(bound * cdiv(max(call.widths), tile.BN), tile.programs), len(call.widths)),
        (call.entries, members.max_adapters, j),
        tile.num_warps,
        J=call.width,
        SPLIT=split,
        H_PARTS=tiles.h_parts,
        FIRST=j == 0,
        LAST=j == call.width - 1,
        HAS_BIAS=call.has_bias,
        HAS_POOL=members.has_pool,
        HAS_SUMS=has_sums(call, split),
        BR=block_ranks,
        BN=tile.BN,
        ONE_CHUNK=stride <= block_ranks,
        COLS_UNIT=call.units[1],
        PDL=call.overlap,
        PRECISION=call.precision,
    )
