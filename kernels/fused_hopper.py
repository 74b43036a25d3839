"""A linear of some rows on a Hopper GPU: y = x W^T + bias + h B, in which the ranks of adapters are in-features more.

Stage: run time, in place of the product of fused.py where its tiles are one wave; the arithmetic is that one's, but
for h where it comes in parts, which are added up in fp32 before it is rounded. group_shrink.py makes h beside this
launch, of which a program makes one tile of y. One warp brings blocks of x and W through TMA to a ring in shared memory
and another one the Bs of the row tile's groups behind them (fused_hopper_loads.py), four lay h where a block of x would
be (fused_hopper_h.py), and four multiply: blocks of W, then blocks of Bs.

Letters: T rows of one slot each, K in-features, N out-features, P pool rows, W columns of h.
"""

# ruff: noqa: ANN001, RUF005 (pointers and blocks have no static type; Gluon knows no unpacking inside a tuple)

from __future__ import annotations

from dataclasses import replace

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma_wait,
)
from triton.language import debug_barrier
from triton.language.extra.cuda import gdc_wait

from fxlora.kernels.call import MOST_MEMBERS, LinearCall, Plan
from fxlora.kernels.fused_hopper_h import make_h
from fxlora.kernels.fused_hopper_loads import ask_first, load, load_bs, number_of, tile_of
from fxlora.kernels.fused_hopper_parts import add_parts, part_of
from fxlora.kernels.gluon_names import viewed
from fxlora.kernels.group_shrink import Scratch, scratch_of, shrink_groups
from fxlora.kernels.launch import Launcher
from fxlora.kernels.prefill import lie_transposed
from fxlora.kernels.prefill_hopper import describe, multiply
from fxlora.kernels.triton_helpers import cdiv, next_power_of_2
from fxlora.kernels.wave_tiles import FusedHopperTiles


@gluon.jit
def clear_rest(b, ranks) -> None:
    """Zero beyond the ranks of each group of a block of Bs, where B of other adapters lies."""
    BN: gl.constexpr = b.shape[1]
    of_b: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BN, BN // 8], [4, 1], [1, 0])
    of_ranks: gl.constexpr = gl.BlockedLayout([1, 1], [2, 16], [4, 1], [1, 0])
    lanes = gl.arange(0, 16, layout=gl.SliceLayout(0, of_ranks))
    is_own = (lanes[None, :] < ranks.load(gl.SliceLayout(1, of_ranks))[:, None]).reshape([b.shape[0]])
    is_own = gl.convert_layout(is_own, gl.SliceLayout(1, of_b))
    value = b.load(of_b)
    b.store(gl.where(is_own[:, None], value, gl.zeros_like(value)))
    fence_async_shared()
    debug_barrier()


@gluon.jit
def expand(acc, held, stage, phase, listed, ring, STAGES: gl.constexpr, SHORT: gl.constexpr) -> gl.tensor:
    """acc + h B of all groups, behind the blocks of W; some may have less than 16 ranks (SHORT). ring: h and Bs lie in
    it as x and W do."""
    _, bs, full, _ = ring
    blocks = number_of(listed, 0, 4)
    if SHORT:
        for block in range(blocks):
            mbarrier.wait(full.index(stage), phase)
            clear_rest(bs.index(stage), listed[1].index(block))
            acc, held, stage, phase = multiply(acc, held, stage, phase, 1, ring, STAGES, True, -1)
    else:
        acc, held, stage, phase = multiply(acc, held, stage, phase, blocks, ring, STAGES, True, -1)
    return warpgroup_mma_wait(num_outstanding=0, deps=(acc,))


@gluon.jit
def settle(acc, held, ring) -> gl.tensor:
    """acc when all products are done, and the block that the last one read is free."""
    acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
    mbarrier.arrive(ring[3].index(gl.maximum(held, 0)), pred=held >= 0)
    return acc


@gluon.jit
def add_bias(acc, bias, FEW: gl.constexpr) -> gl.tensor:
    """acc and the bias, which is in its place before adapters are. bias: pointer, stride, first column, N. FEW: acc is
    [BN, BM]."""
    ptr, stride, first_col, num_cols = bias
    AXIS: gl.constexpr = 0 if FEW else 1
    cols = first_col + gl.arange(0, acc.shape[AXIS], layout=gl.SliceLayout(1 - AXIS, acc.type.layout))
    values = gl.load(ptr + cols * stride, mask=cols < num_cols, other=0.0).to(gl.float32)
    return acc + gl.expand_dims(values, 1 - AXIS)


@gluon.jit
def store(acc, row_tile, col_tile, y_ptr, num_rows, num_cols, tile) -> None:
    """A tile of y. tile: shared memory [BM, BN] that nobody uses any more."""
    BM: gl.constexpr = tile.shape[0]
    BN: gl.constexpr = tile.shape[1]
    of_y: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BN, BN // 8], [4, 1], [1, 0])
    if BM < 64:
        tile.permute((1, 0)).store(acc.to(y_ptr.dtype.element_ty))
    else:
        tile.store(acc.to(y_ptr.dtype.element_ty))
    y = tile.load(of_y)
    rows = row_tile * BM + gl.arange(0, BM, layout=gl.SliceLayout(1, of_y))
    cols = col_tile * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, of_y))
    at = y_ptr + rows.to(gl.int64)[:, None] * num_cols + cols[None, :]
    gl.store(at, y, mask=(rows < num_rows)[:, None] & (cols < num_cols)[None, :])


@gluon.jit
def add_rest(acc, held, stage, phase, b_ring, listed, ring, bias, HAS_BIAS: gl.constexpr, HAS_POOL: gl.constexpr,
             STAGES: gl.constexpr) -> gl.tensor:  # fmt: skip
    """acc, bias and adapters, behind the product. bias: as of `add_bias`."""
    FEW: gl.constexpr = ring[0].shape[1] < 64
    if HAS_BIAS:
        acc, held = settle(acc, held, ring), gl.to_tensor(-1)
        acc = add_bias(acc, bias, FEW)
    if HAS_POOL:
        mbarrier.wait(b_ring[2], 0)
        h_ring = (ring[0], b_ring[0], ring[2], ring[3])
        if number_of(listed, 1, 4) < 16:
            acc = expand(acc, held, stage, phase, listed, h_ring, STAGES, True)
        else:
            acc = expand(acc, held, stage, phase, listed, h_ring, STAGES, False)
    return warpgroup_mma_wait(num_outstanding=0, deps=(acc,))


@gluon.jit
def compute(
    ring, b_ring, listed, sums, ys, biases, num_rows, widths, steps, STAGES: gl.constexpr, TRANSPOSED: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_POOL: gl.constexpr, SPLIT: gl.constexpr, PDL: gl.constexpr,
) -> None:  # fmt: skip
    """Product, bias, adapters and store of this program's tile; all but the product in the first part of one."""
    bs = b_ring[0]
    BM: gl.constexpr = ring[0].shape[1]
    BN: gl.constexpr = bs.shape[2]
    shape: gl.constexpr = [BN, BM] if BM < 64 else [BM, BN]
    of_acc: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, shape[1], 16])
    of_tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BN], bs.dtype)
    tiles = viewed(bs, bs.dtype, [STAGES * bs.shape[1] // BM, BM, BN], of_tile)
    begin = 0
    for member in gl.static_range(len(HAS_POOL)):
        num_cols = widths[member]
        is_here, row_tile, col_tile, end = tile_of(begin, num_rows, num_cols, BM, BN)
        if is_here:
            acc = gl.zeros(shape, gl.float32, of_acc)
            none, zero = gl.to_tensor(-1), gl.to_tensor(0)
            acc, held, stage, phase = multiply(acc, none, zero, zero, steps, ring, STAGES, TRANSPOSED, -1)
            bias = (biases[member][0], biases[member][1], col_tile * BN, num_cols)
            if SPLIT == 1:
                acc = add_rest(
                    acc, held, stage, phase, b_ring, listed, ring, bias, HAS_BIAS[member], HAS_POOL[member], STAGES
                )
                store(acc, row_tile, col_tile, ys[member], num_rows, num_cols, tiles.index(0))
            else:
                acc = settle(acc, held, ring)
                if gl.program_id(1) == 0:
                    acc = add_rest(
                        acc, none, stage, phase, b_ring, listed, ring, bias, HAS_BIAS[member], HAS_POOL[member], STAGES
                    )
                if PDL:
                    gdc_wait()
                acc, is_last = add_parts(acc, sums[0], sums[1], SPLIT)
                if is_last:
                    store(acc, row_tile, col_tile, ys[member], num_rows, num_cols, tiles.index(0))
        begin = end


@gluon.jit(do_not_specialize=["num_rows", "max_adapters"])
def fused_hopper_kernel(
    x_desc, w0_desc, w1_desc, w2_desc, w3_desc, b0_desc, b1_desc, b2_desc, b3_desc, biases, ys, scratch, sums,
    sites, num_rows, feature_octets, col_octets, max_adapters,
    BM: gl.constexpr, BN: gl.constexpr, SPLIT: gl.constexpr, STAGES: gl.constexpr, CHUNKS: gl.constexpr,
    PARTS: gl.constexpr, TRANSPOSED: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_POOL: gl.constexpr,
    SLOTS: gl.constexpr, EARLY: gl.constexpr, HAS_X: gl.constexpr, PDL: gl.constexpr,
) -> None:  # fmt: skip
    """Program (tile, part of its in-features): the members' tiles, one after another; row tiles first.

    x_desc: x [T, K] in blocks of up to BM rows and BK in-features; w0_desc, ..: W [N, K] of each member in blocks
    [BN, BK], or [K, N] if TRANSPOSED, None past the last; b0_desc, ..: B [P, N] in blocks [16, BN or 64], None without
    a pool; biases: pointer to [N] and stride; ys: [T, N], contiguous; scratch: h [members, T, W] like x as int32, of
    several parts [members, PARTS, T, W] in fp32, W, int32 slots [T]; sums: as of `add_parts`, None if SPLIT is 1;
    sites: of each member A [P, K], start, rank, scaling. CHUNKS: 16 columns of h each. SLOTS: a power of two of at
    least 32 and max_adapters. EARLY: the ring is filled at once. HAS_X: x is there when this launch starts; else EARLY.
    """
    dtype: gl.constexpr = x_desc.dtype
    BK: gl.constexpr = x_desc.block_type.shape[1]
    PART: gl.constexpr = min(64, BN)
    of_x: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BK], dtype)
    of_b: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BK, BN], dtype)
    of_piece: gl.constexpr = gl.NVMMASharedLayout.get_default_for([16, PART], dtype)
    xs = gl.allocate_shared_memory(dtype, [STAGES, BM, BK], of_x)
    ws = gl.allocate_shared_memory(dtype, [STAGES, BK if TRANSPOSED else BN, BN if TRANSPOSED else BK], w0_desc.layout)
    bs = viewed(ws, dtype, [STAGES, BK, BN], of_b)
    pieces = viewed(ws, dtype, [STAGES * (BN // PART) * (BK // 16), 16, PART], of_piece)
    of_words: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BK // 2], gl.int32)
    of_list: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=2)  # x and W, h and Bs
        mbarrier.init(empty.index(stage), count=1)
    asked = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(asked, count=2)  # all of W; groups are listed
    EACH: gl.constexpr = BK // 16
    pool_rows = gl.allocate_shared_memory(gl.int32, [BM * CHUNKS // EACH, EACH], of_list)
    ranks = gl.allocate_shared_memory(gl.int32, [BM * CHUNKS // EACH, EACH], of_list)
    numbers = gl.allocate_shared_memory(gl.int32, [2, 1], of_list)
    ring, b_ring, listed = (xs, ws, full, empty), (bs, pieces, asked), (pool_rows, ranks, numbers)
    words = viewed(xs, gl.int32, [STAGES, BM, BK // 2], of_words)
    w_descs, b_descs = (w0_desc, w1_desc, w2_desc, w3_desc), (b0_desc, b1_desc, b2_desc, b3_desc)
    first, steps, widths = 0, gl.cdiv(feature_octets * 8, BK), ()
    if SPLIT > 1:
        first, steps = part_of(steps, SPLIT)
    for member in gl.static_range(len(HAS_POOL)):
        widths = widths + (col_octets[member] * 8,)
    if EARLY:
        ask_first(ring, x_desc, w_descs, num_rows, widths, first, steps, STAGES, TRANSPOSED, HAS_X)
    gl.warp_specialize(
        [
            (compute, (
                ring, b_ring, listed, sums, ys, biases, num_rows, widths, steps, STAGES, TRANSPOSED, HAS_BIAS, HAS_POOL,
                SPLIT, PDL,
            )),
            (load, (
                ring, b_ring, x_desc, w_descs, num_rows, widths, first, steps, STAGES, TRANSPOSED, EARLY, HAS_X, PDL,
            )),
            (load_bs, (ring, b_ring, listed, b_descs, num_rows, widths, steps, STAGES, HAS_POOL, PDL)),
            (make_h, (
                ring, b_ring, words, listed, scratch, sites, max_adapters, num_rows, widths, steps, CHUNKS, PARTS,
                STAGES, HAS_POOL, SLOTS, PDL,
            )),
        ],
        [1, 1, 4],
        [48, 48, 136],
    )  # fmt: skip


_launcher = Launcher(fused_hopper_kernel)


def fused_hopper(call: LinearCall, tiles: FusedHopperTiles) -> list[torch.Tensor]:
    """-> [..., N] of each member, for rows of one slot each. TMA reads x, the weights and every B."""
    outputs = tuple(call.new_outputs())
    sums, counts = None, 0
    if not call.members.has_pools:
        tiles = replace(tiles, split=1)  # no launch before it would clear its counts
    if tiles.split > 1:
        counts = sum([cdiv(n, tiles.BN) for n in call.widths]) * cdiv(call.rows, tiles.BM)
        sums = call.new_scratch(counts, tiles.split, tiles.BM * tiles.BN, dtype=torch.float32)
    scratch = scratch_of(call, tiles.BM, sorts=False, parts=tiles.shrink.parts, lists=False, counts=counts)
    if call.members.has_pools:
        shrink_groups(call, scratch, tiles.shrink)
    transposed = lie_transposed(call)
    plan = call.plan(_launcher, tiles, lambda: _plan(call, scratch, tiles, transposed), step=transposed)
    b_block = (16, min(64, tiles.BN))
    b_descs = [None if pool is None else describe(pool.b, b_block) for pool in call.members.pools]
    h = scratch.h.view(torch.int32) if tiles.shrink.parts == 1 else scratch.h
    call.launch(
        plan,
        describe(call.x, (_box_rows(call.rows, tiles.BM), tiles.BK)),
        *call.described_weights((tiles.BN, tiles.BK), transposed=transposed, describe=describe),
        *b_descs,
        *[None] * (MOST_MEMBERS - len(b_descs)),
        call.strided_biases,
        outputs,
        (h, scratch.width, scratch.slots),
        (sums, scratch.counts),
        call.members.a_pools,
        *plan.numbers,
    )
    return list(outputs)


def _box_rows(rows: int, block_rows: int) -> int:
    """Rows of x that are copied at once. What lies in the rest of a tile of BM rows is multiplied and never read."""
    return min(block_rows, max(16, next_power_of_2(rows)))


def _plan(call: LinearCall, scratch: Scratch, tiles: FusedHopperTiles, transposed: bool) -> Plan:
    has_x = call.members.has_pools or not call.overlap
    return call.planned(
        _launcher,
        (sum([cdiv(n, tiles.BN) for n in call.widths]) * cdiv(call.rows, tiles.BM), tiles.split),
        (call.rows, call.features // 8, tuple([n // 8 for n in call.widths]), call.members.max_adapters),
        4,
        registers=112,
        BM=tiles.BM,
        BN=tiles.BN,
        SPLIT=tiles.split,
        STAGES=tiles.stages,
        CHUNKS=scratch.width // 16,
        PARTS=tiles.shrink.parts,
        TRANSPOSED=transposed,
        HAS_BIAS=call.has_bias,
        HAS_POOL=call.members.has_pool,
        SLOTS=max(32, next_power_of_2(call.members.max_adapters)),
        EARLY=tiles.apart or not has_x,
        HAS_X=has_x,
        PDL=call.overlap,
    )
