"""A linear of some rows on a Hopper GPU: y = x W^T + bias + h B, in which the ranks of adapters are in-features more.

Stage: run time, in place of the product of fused.py where its tiles are one wave; the arithmetic is that one's, but
for h where it comes in parts, which are added up in fp32 before it is rounded. group_shrink.py makes h beside this
launch, and lists the groups of each row tile, of which little is left to ask when it ends: they follow from the row map
and are numbered here too. One warp brings blocks of x and W through TMA to a ring in shared memory, and behind the last
of them another one the Bs of the row tile's groups, so that these are there when they are needed
(fused_hopper_loads.py); four warps multiply. A program makes one tile of y.

Letters: T rows of one slot each, K in-features, N out-features, P pool rows, W columns of h.
"""

# ruff: noqa: ANN001, RUF005 (pointers and blocks have no static type; Gluon knows no unpacking inside a tuple)

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language import debug_barrier
from triton.language.extra.cuda import gdc_wait

from fxlora.kernels.call import MOST_MEMBERS, LinearCall, Plan
from fxlora.kernels.fused_hopper_loads import BM, groups_in, list_of, load, load_bs, tile_of
from fxlora.kernels.group_shrink import Scratch, scratch_of, shrink_groups
from fxlora.kernels.launch import Launcher
from fxlora.kernels.prefill import lie_transposed
from fxlora.kernels.prefill_hopper import block_after, describe, multiply
from fxlora.kernels.tiles import FusedHopperTiles
from fxlora.kernels.triton_helpers import cdiv, next_power_of_2

AHEAD = gl.constexpr(512)
"""In-features before the last at which h is asked for."""


@gluon.jit
def load_h(rows, h, num_rows, dtype: gl.constexpr, CHUNKS: gl.constexpr, PARTS: gl.constexpr) -> gl.tensor:
    """h of these rows, [BM, 16] for each 16 columns; anything beyond a row's ranks. h: pointer to the member's, W."""
    lanes = gl.arange(0, 16, layout=gl.SliceLayout(0, rows.type.layout.parent))
    at = h[0] + (rows.to(gl.int64) * h[1])[:, None] + lanes[None, :]
    inside = (rows < num_rows)[:, None]
    size = num_rows.to(gl.int64) * h[1]
    hs = ()
    for i in gl.static_range(CHUNKS):
        value = gl.load(at + 16 * i, mask=inside, other=0.0, cache_modifier=".cg")
        for part in gl.static_range(1, PARTS):
            value += gl.load(at + 16 * i + part * size, mask=inside, other=0.0, cache_modifier=".cg")
        hs = hs + (value.to(dtype),)
    return hs


@gluon.jit
def places_of(rows, row_tile, slots_ptr, site, max_adapters, num_rows, SLOTS: gl.constexpr) -> gl.tensor:
    """Of each row: which of a tile's groups is the first of its slot, and how many there are, none without a slot. How
    many the tile has, and whether any has less than 16 ranks.

    To look a group up for every product would take longer than the product.
    """
    _, first, end, rank, count = groups_in(row_tile, slots_ptr, site, max_adapters, num_rows, SLOTS, 4)
    slots = gl.load(slots_ptr + rows, mask=rows < num_rows, other=-1)
    known = (slots >= 0) & (slots < max_adapters)
    own = gl.where(known, slots, 0)
    place = gl.gather(first, own, 0)
    return place, gl.where(known, gl.gather(end, own, 0) - place, 0), count, gl.max(rank % 16, axis=0) > 0


@gluon.jit
def h_of(hs, group, places) -> gl.tensor:
    """What a group's ranks make of each row, [BM, 16]; zero for rows of other slots."""
    first, many, _, _ = places
    h = gl.where(((group == first) & (many > 0))[:, None], hs[0], gl.zeros_like(hs[0]))
    for i in gl.static_range(1, len(hs)):
        h = gl.where(((group == first + i) & (many > i))[:, None], hs[i], h)
    return h


@gluon.jit
def lasts_from(first, listed, ROWS: gl.constexpr, layout: gl.constexpr) -> gl.tensor:
    """Number of ranks - 1, over 16 the rest, of the groups from `first` on, for each row of their Bs."""
    rows = gl.arange(0, ROWS, layout=layout)
    return gl.load(listed[0] + 2 * listed[1] + first + rows // 16, cache_modifier=".cg") % 16


@gluon.jit
def clean(b, lasts) -> None:
    """Zero beyond the ranks of these groups, where B of others lies."""
    of_b: gl.constexpr = lasts.type.layout.parent
    value = b.load(of_b)
    own = gl.arange(0, b.shape[0], layout=lasts.type.layout) % 16 <= lasts
    b.store(gl.where(own[:, None], value, gl.zeros_like(value)))
    fence_async_shared()
    debug_barrier()


@gluon.jit
def expand(acc, stage, phase, hs, places, listed, ring, bs, STAGES: gl.constexpr, SHORT: gl.constexpr) -> gl.tensor:
    """acc + h B of all groups, some of which may have less than 16 ranks (SHORT)."""
    ROWS: gl.constexpr = bs.shape[1]
    EACH: gl.constexpr = ROWS // 16
    BN: gl.constexpr = bs.shape[2]
    of_b: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BN, BN // 8], [4, 1], [1, 0])
    full, empty, count = ring[2], ring[3], places[2]
    lasts = lasts_from(0, listed, ROWS, gl.SliceLayout(1, of_b)) if SHORT else 0
    for first in range(0, count, EACH):
        parts = (h_of(hs, first, places),)
        for i in gl.static_range(1, EACH):
            parts = parts + (h_of(hs, first + i, places),)
        mbarrier.wait(full.index(stage), phase)
        if SHORT:
            coming = lasts_from(gl.minimum(first + EACH, count), listed, ROWS, gl.SliceLayout(1, of_b))
            clean(bs.index(stage), lasts)
            lasts = coming
        for i in gl.static_range(EACH):
            acc = warpgroup_mma(parts[i], bs.index(stage).slice(16 * i, 16), acc, is_async=True)
        acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
        mbarrier.arrive(empty.index(stage))
        stage, phase = block_after(stage, phase, STAGES)
    return acc


@gluon.jit
def add_bias(acc, bias, HAS_BIAS: gl.constexpr) -> gl.tensor:
    """acc and the bias, which is in its place before adapters are. bias: pointer, stride, first column, N."""
    if HAS_BIAS:
        ptr, stride, first_col, num_cols = bias
        cols = first_col + gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, acc.type.layout))
        acc += gl.load(ptr + cols * stride, mask=cols < num_cols, other=0.0).to(gl.float32)[None, :]
    return acc


@gluon.jit
def adapted(
    acc, row_tile, member, steps, ring, bs, bias, lists, scratch, site, max_adapters, num_rows, CHUNKS: gl.constexpr,
    PARTS: gl.constexpr, STAGES: gl.constexpr, TRANSPOSED: gl.constexpr, HAS_BIAS: gl.constexpr, SLOTS: gl.constexpr,
    PDL: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """acc + x W^T + bias + h B. bias: of `add_bias`. scratch: h of all members, its width, the row map.

    Whatever does not come from the shrink is looked up while the first block of W is on its way.
    """
    h_ptr, h_width, slots_ptr = scratch
    of_h: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    rows = row_tile * BM + gl.arange(0, BM, layout=gl.SliceLayout(1, of_h))
    places = places_of(rows, row_tile, slots_ptr, site, max_adapters, num_rows, SLOTS)
    none, zero = gl.to_tensor(-1), gl.to_tensor(0)
    late = gl.minimum(steps, AHEAD // ring[0].shape[2])
    acc, held, stage, phase = multiply(acc, none, zero, zero, steps - late, ring, STAGES, TRANSPOSED, -1)
    if PDL:
        gdc_wait()
    h = (h_ptr + member * num_rows.to(gl.int64) * h_width * PARTS, h_width)
    hs = load_h(rows, h, num_rows, bs.dtype, CHUNKS, PARTS)
    acc, held, stage, phase = multiply(acc, held, stage, phase, late, ring, STAGES, TRANSPOSED, -1)
    acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
    mbarrier.arrive(ring[3].index(held))
    acc = add_bias(acc, bias, HAS_BIAS)
    listed = list_of(row_tile, member, lists, num_rows)
    if places[3]:
        acc = expand(acc, stage, phase, hs, places, listed, ring, bs, STAGES, True)
    else:
        acc = expand(acc, stage, phase, hs, places, listed, ring, bs, STAGES, False)
    return acc


@gluon.jit
def store(acc, row_tile, col_tile, y_ptr, num_rows, num_cols) -> None:
    """A tile of y."""
    BN: gl.constexpr = acc.shape[1]
    of_y: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BN, BN // 8], [4, 1], [1, 0])
    y = gl.convert_layout(acc.to(y_ptr.dtype.element_ty), of_y)
    rows = row_tile * BM + gl.arange(0, BM, layout=gl.SliceLayout(1, of_y))
    cols = col_tile * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, of_y))
    at = y_ptr + rows.to(gl.int64)[:, None] * num_cols + cols[None, :]
    gl.store(at, y, mask=(rows < num_rows)[:, None] & (cols < num_cols)[None, :])


@gluon.jit
def compute(
    ring, bs, ys, biases, lists, scratch, sites, max_adapters, num_rows, widths, steps, CHUNKS: gl.constexpr,
    PARTS: gl.constexpr, STAGES: gl.constexpr, TRANSPOSED: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_POOL: gl.constexpr, SLOTS: gl.constexpr, PDL: gl.constexpr,
) -> None:  # fmt: skip
    """Product, adapters, bias and store of this program's tile."""
    BN: gl.constexpr = bs.shape[2]
    of_acc: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    program, begin = gl.program_id(0), 0
    for member in gl.static_range(len(HAS_POOL)):
        num_cols = widths[member]
        end = begin + gl.cdiv(num_cols, BN) * gl.cdiv(num_rows, BM)
        if (program >= begin) & (program < end):
            row_tile, col_tile = tile_of(program - begin, num_rows)
            acc = gl.zeros([BM, BN], gl.float32, of_acc)
            bias = (biases[member][0], biases[member][1], col_tile * BN, num_cols)
            if HAS_POOL[member]:
                acc = adapted(
                    acc, row_tile, member, steps, ring, bs, bias, lists, scratch, sites[member], max_adapters, num_rows,
                    CHUNKS, PARTS, STAGES, TRANSPOSED, HAS_BIAS[member], SLOTS, PDL,
                )  # fmt: skip
            else:
                none, zero = gl.to_tensor(-1), gl.to_tensor(0)
                acc, _, _, _ = multiply(acc, none, zero, zero, steps, ring, STAGES, TRANSPOSED, -1)
                acc = add_bias(warpgroup_mma_wait(num_outstanding=0, deps=(acc,)), bias, HAS_BIAS[member])
                if PDL:
                    gdc_wait()
            store(acc, row_tile, col_tile, ys[member], num_rows, num_cols)
        begin = end


@gluon.jit(do_not_specialize=["num_rows", "max_adapters"])
def fused_hopper_kernel(
    x_desc, w0_desc, w1_desc, w2_desc, w3_desc, b0_desc, b1_desc, b2_desc, b3_desc, biases, ys, lists, scratch,
    sites, num_rows, feature_octets, col_octets, max_adapters,
    BN: gl.constexpr, STAGES: gl.constexpr, CHUNKS: gl.constexpr, PARTS: gl.constexpr, TRANSPOSED: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_POOL: gl.constexpr, SLOTS: gl.constexpr, PDL: gl.constexpr, FIRST: gl.constexpr,
) -> None:  # fmt: skip
    """The members' tiles, one after another; row tiles first.

    x_desc: x [T, K] in blocks of up to BM rows and BK in-features; w0_desc, ..: W [N, K] of each member in blocks
    [BN, BK], or [K, N] if TRANSPOSED, None past the last; b0_desc, ..: B [P, N] in blocks [16, BN or 64], None without
    a pool; biases: pointer to [N] and stride; ys: [T, N], contiguous; lists: of group_shrink.py, with their capacity;
    scratch: h [members, T, W] like x, of several parts [members, PARTS, T, W] in fp32, W, int32 slots [T]; sites: of
    each member A [P, K], start, rank, scaling. SLOTS: a power of two of at least 32 and max_adapters.
    """
    dtype: gl.constexpr = x_desc.dtype
    BK: gl.constexpr = x_desc.block_type.shape[1]
    PART: gl.constexpr = min(64, BN)
    of_x: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BK], dtype)
    of_b: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BK, BN], dtype)
    of_piece: gl.constexpr = gl.NVMMASharedLayout.get_default_for([16, PART], dtype)
    xs = gl.allocate_shared_memory(dtype, [STAGES, BM, BK], of_x)
    ws = gl.allocate_shared_memory(dtype, [STAGES, BK if TRANSPOSED else BN, BN if TRANSPOSED else BK], w0_desc.layout)
    bs = ws._reinterpret(dtype, [STAGES, BK, BN], of_b)
    pieces = ws._reinterpret(dtype, [STAGES * (BN // PART) * (BK // 16), 16, PART], of_piece)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    asked = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(asked, count=1)
    ring, b_ring = (xs, ws, full, empty), (bs, pieces, asked)
    w_descs, b_descs = (w0_desc, w1_desc, w2_desc, w3_desc), (b0_desc, b1_desc, b2_desc, b3_desc)
    steps, widths = gl.cdiv(feature_octets * 8, BK), ()
    for member in gl.static_range(len(HAS_POOL)):
        widths = widths + (col_octets[member] * 8,)
    gl.warp_specialize(
        [
            (
                compute,
                (
                    ring, bs, ys, biases, lists, scratch, sites, max_adapters, num_rows, widths, steps, CHUNKS, PARTS,
                    STAGES, TRANSPOSED, HAS_BIAS, HAS_POOL, SLOTS, PDL,
                ),
            ),
            (
                load,
                (
                    ring, b_ring, x_desc, w_descs, num_rows, widths, steps, STAGES, TRANSPOSED, PDL, FIRST,
                ),
            ),
            (
                load_bs,
                (
                    ring, b_ring, b_descs, scratch[2], sites, max_adapters, num_rows, widths, steps, STAGES, HAS_POOL,
                    SLOTS, PDL,
                ),
            ),
        ],
        [1, 1],
        [48, 48],
    )  # fmt: skip


_launcher = Launcher(fused_hopper_kernel)


def fused_hopper(call: LinearCall, tiles: FusedHopperTiles) -> list[torch.Tensor]:
    """-> [..., N] of each member, for rows of one slot each. TMA reads x, the weights and every B."""
    outputs = tuple(call.new_outputs())
    scratch = scratch_of(call, BM.value, sorts=False, parts=tiles.shrink.parts)
    if call.members.has_pools:
        shrink_groups(call, scratch, tiles.shrink)
    transposed = lie_transposed(call)
    plan = call.plan(_launcher, tiles, lambda: _plan(call, scratch, tiles, transposed), step=transposed)
    b_block = (16, min(64, tiles.BN))
    b_descs = [None if pool is None else describe(pool.b, b_block) for pool in call.members.pools]
    call.launch(
        plan,
        describe(call.x, (_box_rows(call.rows), tiles.BK)),
        *call.described_weights((tiles.BN, tiles.BK), transposed=transposed, describe=describe),
        *b_descs,
        *[None] * (MOST_MEMBERS - len(b_descs)),
        call.strided_biases,
        outputs,
        (scratch.groups, scratch.capacity),
        (scratch.h, scratch.width, scratch.slots),
        call.members.a_pools,
        *plan.numbers,
    )
    return list(outputs)


def _box_rows(rows: int) -> int:
    """Rows of x that are copied at once. What lies in the rest of a tile of BM rows is multiplied and never read."""
    return min(BM.value, max(16, next_power_of_2(rows)))


def _plan(call: LinearCall, scratch: Scratch, tiles: FusedHopperTiles, transposed: bool) -> Plan:
    return call.planned(
        _launcher,
        (sum([cdiv(n, tiles.BN) for n in call.widths]) * cdiv(call.rows, BM.value),),
        (call.rows, call.features // 8, tuple([n // 8 for n in call.widths]), call.members.max_adapters),
        4,
        registers=128,
        BN=tiles.BN,
        STAGES=tiles.stages,
        CHUNKS=scratch.width // 16,
        PARTS=tiles.shrink.parts,
        TRANSPOSED=transposed,
        HAS_BIAS=call.has_bias,
        HAS_POOL=call.members.has_pool,
        SLOTS=max(32, next_power_of_2(call.members.max_adapters)),
        PDL=call.overlap,
        FIRST=not call.members.has_pools,
    )
