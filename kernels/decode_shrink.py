"""h = coeff * scaling * (x A^T) of many rows, by the matrix unit: tiles of up to 16 entries of one slot, or more.

Stage: run time, the launch before decode_gemm.py's where rows are many, which runs beside it. Each A is read once for
each tile, and only if its adapter is in the batch. The in-features are split over programs, each of which leaves its
part of h; expand.py adds them in order. An entry's bits follow from its own x and adapter alone: all tiles of a launch
have one height, however many entries are in them.

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
from fxlora.kernels.shrink import adapter_of, factor_of
from fxlora.kernels.tiles import ShrinkTile
from fxlora.kernels.triton_helpers import dot, whole, whole_rows


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
def tile_ends(segments_ptr, num_entries, max_adapters, BM: tl.constexpr, BINS: tl.constexpr) -> tl.tensor:
    """[BINS]: tiles of BM entries of each slot and of all before it. BINS: a power of two above S."""
    slots = tl.arange(0, BINS)
    known = slots < max_adapters
    first = tl.load(segments_ptr + num_entries + slots, mask=known, other=0)
    end = tl.load(segments_ptr + num_entries + slots + 1, mask=known, other=0)
    return tl.cumsum((end - first + BM - 1) // BM, axis=0)


@triton.jit
def tall_tile_of(tile, ends, segments_ptr, num_entries, BM: tl.constexpr) -> tl.tensor:
    """As tile_of, for tiles of BM entries. ends: of tile_ends."""
    slot = tl.sum((ends <= tile).to(tl.int32), axis=0)
    index = tile - tl.max(tl.where(ends <= tile, ends, 0), axis=0)
    first = tl.load(segments_ptr + num_entries + slot) + index * BM
    return slot, first, tl.minimum(first + BM, tl.load(segments_ptr + num_entries + slot + 1))


@triton.jit
def shrink_products(
    x_at, a_at, x_col_stride, entry_mask, rank_mask, first, last, num_features, BM: tl.constexpr, BR: tl.constexpr,
    BK: tl.constexpr, SLICES: tl.constexpr, STAGES: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """[BM, BR] fp32: rows of x times ranks of A, over in-features first .. last.

    Warps multiply one of SLICES slices of every block of in-features each: 16 x 16 results are too few to share out
    otherwise, and all warps would compute the same.
    """
    if SLICES == 1:
        acc = tl.zeros([BM, BR], tl.float32)
        for block in tl.range(first, last, BK, num_stages=STAGES):
            ks = block + tl.arange(0, BK)[None, :]
            inside = ks < num_features
            x_tile = tl.load(x_at[:, None] + ks * x_col_stride, mask=entry_mask[:, None] & inside, other=0.0)
            a = tl.load(a_at[:, None] + ks, mask=rank_mask[:, None] & inside, other=0.0)  # [BR, BK]
            acc = dot(x_tile, a.T, acc, "ieee")
        return acc
    width: tl.constexpr = BK // SLICES
    sums = tl.zeros([SLICES, BM, BR], tl.float32)
    for block in tl.range(first, last, BK, num_stages=STAGES):
        # [SLICES, BM or BR, width] from here on
        ks = block + tl.arange(0, SLICES)[:, None, None] * width + tl.arange(0, width)[None, None, :]
        inside = ks < num_features
        x_tile = tl.load(x_at[None, :, None] + ks * x_col_stride, mask=entry_mask[None, :, None] & inside, other=0.0)
        a = tl.load(a_at[None, :, None] + ks, mask=rank_mask[None, :, None] & inside, other=0.0)
        sums = dot(x_tile, a.permute(0, 2, 1), sums, "ieee")
    return tl.sum(sums, axis=0)


@triton.jit
def shrink_tile(
    tile, part, share, x, h_ptr, h_stride, coeffs, segments_ptr, site, num_entries, num_features, J: tl.constexpr,
    PARTS: tl.constexpr, SHARES: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
    SLICES: tl.constexpr, STAGES: tl.constexpr, HAS_COEFFS: tl.constexpr,
) -> None:  # fmt: skip
    """A part of the in-features and a share of the ranks of one tile's h, whole groups of 16. tile: of tile_of."""
    slot, first_position, end = tile
    rank, start, scaling = adapter_of(slot, site)
    positions = first_position + tl.arange(0, BM)
    entry_mask = positions < end
    entries = tl.load(segments_ptr + positions, mask=entry_mask, other=0)
    factor = factor_of(entries, tl.zeros([BM], tl.float32) + scaling, coeffs, J, HAS_COEFFS)
    x_at = x[0] + (entries // J).to(tl.int64) * x[1]
    h_at = h_ptr + (part * num_entries + entries).to(tl.int64) * h_stride
    each = tl.cdiv(tl.cdiv(num_features, BK), PARTS) * BK
    for first in range(share * BR, rank, SHARES * BR):
        ranks = first + tl.arange(0, BR)
        a_at = site[0] + (start + ranks).to(tl.int64) * num_features
        acc = shrink_products(
            x_at, a_at, x[2], entry_mask, ranks < rank, part * each, tl.minimum(part * each + each, num_features),
            num_features, BM, BR, BK, SLICES, STAGES,
        )  # fmt: skip
        h = (acc * factor[:, None]).to(h_ptr.dtype.element_ty)  # zero beyond the rank
        mask = entry_mask[:, None] & (ranks < (rank + 15) // 16 * 16)[None, :]
        tl.store(h_at[:, None] + ranks[None, :], h, mask=mask)


@triton.jit(do_not_specialize=["num_entries", "max_adapters"])
def shrink_tiles_kernel(
    x,  # [T, K]: pointer, strides
    h_ptr,  # fp32 [members, PARTS, E, W]
    h_stride,  # W
    coeffs,  # fp32 [T, J]: pointer, strides
    segments_ptr,
    sites,  # of each member: A [P, K], start, rank, scaling
    num_entries,
    num_features,
    max_adapters,
    HAS_POOL: tl.constexpr,  # one flag for each member
    J: tl.constexpr,
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
    """Program (share of the work, member)."""
    wait_for_earlier(PDL)
    let_later_start(PDL)
    x, num_features = whole_rows(x, UNIT), whole(num_features, UNIT)
    for member in tl.static_range(len(HAS_POOL)):
        if HAS_POOL[member]:
            if tl.program_id(1) == member:
                h_at = h_ptr + member * num_entries.to(tl.int64) * h_stride * PARTS
                items = count_tiles(segments_ptr, num_entries, max_adapters) * (PARTS * SHARES)
                for item in tl.range(tl.program_id(0), items, tl.num_programs(0), num_stages=1):
                    tile = tile_of(item // (PARTS * SHARES), segments_ptr, num_entries, max_adapters)
                    shrink_tile(
                        tile, item % PARTS, item // PARTS % SHARES, x, h_at, h_stride, coeffs, segments_ptr,
                        sites[member], num_entries, num_features, J, PARTS, SHARES, 16, BR, BK, SLICES, STAGES,
                        HAS_COEFFS,
                    )  # fmt: skip


_launcher = Launcher(shrink_tiles_kernel)


def shrink_tiles(call: LinearCall, h: torch.Tensor, stride: int, tile: ShrinkTile) -> None:
    """Fills h, fp32 [members, parts, E, stride], as far as each entry's rank."""
    plan = call.plan(_launcher, tile, lambda: _plan(call, stride, tile))
    call.launch(
        plan,
        (call.x, *call.x.stride()),
        h,
        stride,
        call.coeffs,
        call.segments,
        call.members.a_pools,
        *plan.numbers,
    )


def _plan(call: LinearCall, stride: int, tile: ShrinkTile) -> Plan:
    members = call.members
    shares = tile.shares_of(members.h_width)
    items = min(call.entries, tile_bound(call.entries, members.max_adapters, TILE)) * tile.parts * shares
    return call.planned(
        _launcher,
        (min(items, tile.programs), len(call.widths)),
        (call.entries, call.features, members.max_adapters),
        tile.num_warps,
        HAS_POOL=members.has_pool,
        J=call.width,
        PARTS=tile.parts,
        SHARES=shares,
        BR=max(16, min(tile.BR, stride)),
        BK=tile.BK,
        SLICES=tile.slices,
        STAGES=tile.num_stages,
        HAS_COEFFS=call.has_coeffs,
        UNIT=call.units[0],
        PDL=call.overlap,
    )
