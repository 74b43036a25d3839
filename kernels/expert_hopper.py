"""Experts over many rows on a Hopper GPU: h of a row tile is made by those who multiply its x anyway.

Stage: run time, in place of the two launches of expert_prefill.py, whose arithmetic and bits these are. One warp loads
(expert_hopper_loads.py), through a ring of blocks in shared memory, and two groups of four warps take tiles of y in
turn: one expands and stores while the other multiplies (`full`, `empty` and `turns` as in prefill_hopper.py). Some
programs make h of SHARE groups of 16 ranks (expert_order.py): their As come with the blocks of x and W, for one more
product of x. Who expands waits until the h of its rows is there (expert_hopper_h.py).

What is asked of global memory is asked for long before it is needed: a round trip takes as long as some steps.

Letters: T rows of one slot each, S slots, E experts, K in-features, N out-features.
"""

# ruff: noqa: ANN001, RUF005 (pointers and blocks have no static type; Gluon knows no unpacking inside a tuple)

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language import debug_barrier
from triton.language.extra.cuda import gdc_wait

from fxlora.kernels.call import Plan
from fxlora.kernels.expert_call import ExpertCall
from fxlora.kernels.expert_hopper_h import get_h, h_of_group, makers_groups, put_h, slots_of
from fxlora.kernels.expert_hopper_loads import BK, BN, load
from fxlora.kernels.expert_lists import list_slots
from fxlora.kernels.expert_order import BM, blocks_of, look, look_closer, record_of, share_of, steps_of
from fxlora.kernels.expert_segments import tile_bound
from fxlora.kernels.expert_tiles import ExpertHopperTile
from fxlora.kernels.gluon_names import store_block
from fxlora.kernels.launch import Launcher
from fxlora.kernels.prefill_hopper import PART, as_b, block_after, copy_b, describe, group_of
from fxlora.kernels.triton_helpers import cdiv, multiprocessors

LISTED = gl.constexpr(2)
"""Groups whose fields are known before B of them is asked for."""


@gluon.jit
def multiply(
    acc, h, stage, phase, steps, ring, WITH_W: gl.constexpr, WITH_A: gl.constexpr, STAGES: gl.constexpr,
    TRANSPOSED: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """acc + x W^T and h + x A^T over so many steps, of which the last is not awaited; the block that it reads, and the
    block and phase after it."""
    xs, ws, all_as, full, empty = ring
    held = gl.to_tensor(-1)
    for _ in range(steps):
        mbarrier.wait(full.index(stage), phase)
        x = xs.index(stage)
        if WITH_W:
            w = ws.index(stage).reshape([ws.shape[2], ws.shape[3]])
            acc = warpgroup_mma(x, w if TRANSPOSED else w.permute((1, 0)), acc, is_async=True)
        if WITH_A:
            h = warpgroup_mma(x, all_as.index(stage).permute((1, 0)), h, is_async=True)
        if WITH_W and WITH_A:
            acc, h = warpgroup_mma_wait(num_outstanding=2, deps=(acc, h))
        elif WITH_W:
            acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
        else:
            h = warpgroup_mma_wait(num_outstanding=1, deps=(h,))
        mbarrier.arrive(empty.index(gl.maximum(held, 0)), pred=held >= 0)
        held = stage
        stage, phase = block_after(stage, phase, STAGES)
    return acc, h, held, stage, phase


@gluon.jit
def ask(
    place, items, lists, SHARE: gl.constexpr, AHEAD: gl.constexpr, of_put: gl.constexpr, of_get: gl.constexpr
) -> gl.tensor:
    """What a tile needs of the lists, of which no load waits for another: its first groups, those whose h it makes, and
    rows and slots as `put_h` and `get_h` want them."""
    row_tile, _, first_row, end, _, _, _ = place
    record = (record_of(row_tile, lists), lists.capacity)
    groups = (group_of(record, 0),)
    for i in gl.static_range(1, AHEAD + LISTED):
        groups = groups + (group_of(record, i),)
    own = makers_groups(row_tile, share_of(place, items, SHARE)[0], lists, SHARE)
    to_put = slots_of(first_row, end, lists, gl.SliceLayout(1, of_put))
    rows, slots = slots_of(first_row, end, lists, gl.SliceLayout(1, of_get))
    ranks = gl.load(lists.ranks + rows, mask=rows < end, other=0, cache_modifier=".cg")
    return groups, own, to_put, (rows, slots, ranks)


@gluon.jit
def multiply_both(
    acc, stage, phase, steps, ring, next_turn, place, share, own, to_put, lists, coeffs_ptr, SHARE: gl.constexpr,
    CHUNKS: gl.constexpr, STAGES: gl.constexpr, TRANSPOSED: gl.constexpr, HAS_COEFFS: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """acc + x W^T; h of the item's groups is stored. own, to_put: of `ask`."""
    row_tile, _, _, end, _, _, groups = place
    first, apart, _ = share
    of_h: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16 * SHARE, 16])
    h = gl.zeros([BM, 16 * SHARE], gl.float32, of_h)
    acc, h, held, stage, phase = multiply(acc, h, stage, phase, steps, ring, True, True, STAGES, TRANSPOSED)
    for later in range(first + apart, groups, apart):
        acc, h = warpgroup_mma_wait(num_outstanding=0, deps=(acc, h))
        mbarrier.arrive(ring[4].index(held))
        put_h(h, own, 0, to_put, end, lists, coeffs_ptr, CHUNKS, HAS_COEFFS)
        own = makers_groups(row_tile, later, lists, SHARE)
        h = gl.zeros([BM, 16 * SHARE], gl.float32, of_h)
        acc, h, held, stage, phase = multiply(acc, h, stage, phase, steps, ring, False, True, STAGES, TRANSPOSED)
    mbarrier.arrive(next_turn)
    acc, h = warpgroup_mma_wait(num_outstanding=0, deps=(acc, h))
    mbarrier.arrive(ring[4].index(held))
    put_h(h, own, 0, to_put, end, lists, coeffs_ptr, CHUNKS, HAS_COEFFS)
    return acc


@gluon.jit
def multiply_alone(
    acc, stage, phase, steps, ring, next_turn, STAGES: gl.constexpr, TRANSPOSED: gl.constexpr
) -> gl.tensor:
    """acc + x W^T, of no steps where the rows have no expert."""
    acc, _, held, _, _ = multiply(acc, 0, stage, phase, steps, ring, True, False, STAGES, TRANSPOSED)
    mbarrier.arrive(next_turn)
    acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
    mbarrier.arrive(ring[4].index(gl.maximum(held, 0)), pred=held >= 0)
    return acc


@gluon.jit
def prefetch_b(group, first_col, b_ptr, num_cols) -> None:
    """Brings B of a group to L2."""
    slot, pool_row, last = group
    of_lines: gl.constexpr = gl.BlockedLayout([1, 1], [8, 4], [4, 1], [1, 0])
    lanes = gl.arange(0, 16, layout=gl.SliceLayout(1, of_lines))
    cols = first_col + 64 * gl.arange(0, BN // 64, layout=gl.SliceLayout(0, of_lines))
    at = b_ptr + (pool_row + lanes).to(gl.int64)[:, None] * num_cols + cols[None, :]
    known = (slot >= 0) & (lanes <= last % 16)[:, None] & (cols < num_cols)[None, :]
    gl.inline_asm_elementwise(
        "{ .reg .pred known; setp.ne.s32 known, $2, 0; @known prefetch.global.L2 [$1]; mov.b32 $0, 0; }", "=r,l,r",
        [at.to(gl.int64), known.to(gl.int32)], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def expand(acc, groups, h, slots, record, bs, lanes, cols, count, b_ptr, num_cols, AHEAD: gl.constexpr) -> gl.tensor:
    """acc + h B, the Bs of AHEAD groups on their way at a time, LISTED more known. groups: the first of them. h: of
    `get_h`."""
    block = 0
    for number in range(count):
        async_copy.wait_group(AHEAD - 1)
        fence_async_shared()
        debug_barrier()
        acc = warpgroup_mma(h_of_group(h, slots, groups[0]), bs.index(block), acc, is_async=True)
        acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
        if number + AHEAD < count:
            debug_barrier()  # all have read it
            copy_b((groups[AHEAD],), lanes, cols, b_ptr, num_cols, bs, block, 1)
        else:
            async_copy.commit_group()
        groups = groups[1:] + (group_of(record, gl.minimum(number + AHEAD + LISTED, count)),)
        block = gl.where(block == AHEAD - 1, 0, block + 1)
    async_copy.wait_group(0)
    debug_barrier()
    return acc


@gluon.jit
def put(part, buffer, y, row, end, col, expert, bias, num_cols, HAS_BIAS: gl.constexpr) -> None:
    """Stores PART columns of a tile of y as soon as the buffer is free, through TMA where all rows are the tile's."""
    if HAS_BIAS:
        of_bias = col + gl.arange(0, PART, layout=gl.SliceLayout(0, part.type.layout))
        bias_at = bias[0] + expert.to(gl.int64) * bias[1] + of_bias.to(gl.int64) * bias[2]
        part += gl.load(bias_at, mask=(of_bias < num_cols) & (expert < bias[3]), other=0.0).to(gl.float32)[None, :]
    tma.store_wait(1)
    debug_barrier()
    buffer.store(part.to(y[0].dtype))
    if end - row >= BM:
        fence_async_shared()
        debug_barrier()
        store_block(y[0], [row, col], buffer)
    else:
        debug_barrier()
        by_rows: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        value = buffer.load(by_rows)
        rows = row + gl.arange(0, BM, layout=gl.SliceLayout(1, by_rows))
        cols = col + gl.arange(0, PART, layout=gl.SliceLayout(0, by_rows))
        at = y[1] + rows.to(gl.int64)[:, None] * num_cols + cols[None, :]
        gl.store(at, value, mask=(rows < end)[:, None] & (cols < num_cols)[None, :])


@gluon.jit
def store(acc, ys, y, row, end, col, expert, bias, num_cols, HAS_BIAS: gl.constexpr) -> None:
    """A tile of y, PART columns at a time."""
    left, right = gl.split(gl.permute(gl.reshape(acc, [BM, 2, acc.shape[1] // 2]), (0, 2, 1)))
    if acc.shape[1] > 2 * PART:
        store(left, ys, y, row, end, col, expert, bias, num_cols, HAS_BIAS)
        store(right, ys, y, row, end, col + acc.shape[1] // 2, expert, bias, num_cols, HAS_BIAS)
    else:
        put(left, ys.index(0), y, row, end, col, expert, bias, num_cols, HAS_BIAS)
        put(right, ys.index(1), y, row, end, col + PART, expert, bias, num_cols, HAS_BIAS)


@gluon.jit
def compute(
    GROUP: gl.constexpr, ring, ys, turns, y, bias, lists, coeffs_ptr, b_ptr, items, all_steps, num_cols,
    SHARE: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr, AHEAD: gl.constexpr, TRANSPOSED: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_COEFFS: gl.constexpr,
) -> None:  # fmt: skip
    """A group of warps: every other item of this program's."""
    of_acc: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    of_put: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16])
    of_get: gl.constexpr = gl.DotOperandLayout(0, of_acc, 2)
    of_b: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    lanes, bs = gl.arange(0, 16, layout=gl.SliceLayout(1, of_b)), as_b(ys, BN)
    item, programs = gl.program_id(0), gl.num_programs(0)
    done, turn = 0, 0  # blocks before the item, turns of this group
    place = look_closer(look(item, items), item, items, lists)
    if GROUP == 1:
        done += blocks_of(place, items, all_steps, SHARE)
        item += programs
        place = look_closer(look(item, items), item, items, lists)
    asked = ask(place, items, lists, SHARE, AHEAD, of_put, of_get)
    while item < items[1]:
        other, following = look(item + programs, items), look(item + 2 * programs, items)
        row_tile, col_tile, first_row, end, expert, _, count = place
        groups, own, to_put, to_get = asked
        share, steps = share_of(place, items, SHARE), steps_of(place, items, all_steps)
        record = (record_of(row_tile, lists), lists.capacity)
        cols = col_tile * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, of_b))
        tma.store_wait(0)  # y of the tile before has left the memory that B takes
        debug_barrier()
        for i in gl.static_range(AHEAD):
            copy_b((groups[i],), lanes, cols, b_ptr, num_cols, bs, i, 1)
        for i in gl.static_range(LISTED):
            prefetch_b(groups[AHEAD + i], col_tile * BN, b_ptr, num_cols)
        acc = gl.zeros([BM, BN], gl.float32, of_acc)
        stage, phase, next_turn = done % STAGES, done // STAGES & 1, turns.index(1 - GROUP)
        mbarrier.wait(turns.index(GROUP), (turn & 1) ^ (1 - GROUP))
        if share[2] > 0:
            acc = multiply_both(
                acc, stage, phase, steps, ring, next_turn, place, share, own, to_put, lists, coeffs_ptr, SHARE,
                CHUNKS, STAGES, TRANSPOSED, HAS_COEFFS,
            )  # fmt: skip
        else:
            acc = multiply_alone(acc, stage, phase, steps, ring, next_turn, STAGES, TRANSPOSED)
        done += blocks_of(place, items, all_steps, SHARE)
        other = look_closer(other, item + programs, items, lists)
        place = look_closer(following, item + 2 * programs, items, lists)
        h = get_h(to_get, lists, CHUNKS)
        acc = expand(acc, groups, h, to_get[1], record, bs, lanes, cols, count, b_ptr, num_cols, AHEAD)
        asked = ask(place, items, lists, SHARE, AHEAD, of_put, of_get)
        store(acc, ys, y, first_row, end, col_tile * BN, expert, bias, num_cols, HAS_BIAS)
        done += blocks_of(other, items, all_steps, SHARE)
        item += 2 * programs
        turn += 1
    tma.store_wait(0)


@gluon.jit
def expert_hopper_kernel(
    x_desc, w_desc, y_desc, a_desc, y_ptr, bias, lists, coeffs_ptr, b_ptr, num_experts, feature_octets, col_octets,
    SHARE: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr, AHEAD: gl.constexpr, TRANSPOSED: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_COEFFS: gl.constexpr, PDL: gl.constexpr,
) -> None:  # fmt: skip
    """Every tile of y; rows without an expert become zero.

    x_desc: x [T, K] in blocks [BM, BK]; y_desc: y [T, N] in blocks [BM, PART]; w_desc: W [E, N, K] in blocks [BN, BK],
    or [E, K, N] if TRANSPOSED; a_desc: A [PA, K] in blocks [16, BK]; bias [E, N]: pointer, strides, E; lists: of
    expert_lists.py; coeffs_ptr: [T, 1], contiguous.
    """
    if PDL:
        gdc_wait()
    dtype: gl.constexpr = x_desc.dtype
    of_as: gl.constexpr = gl.NVMMASharedLayout.get_default_for([16 * SHARE, BK], dtype)
    w_block: gl.constexpr = [STAGES, 1, BK if TRANSPOSED else BN, BN if TRANSPOSED else BK]
    xs = gl.allocate_shared_memory(dtype, [STAGES, BM, BK], x_desc.layout)
    ws = gl.allocate_shared_memory(dtype, w_block, w_desc.layout)
    all_as = gl.allocate_shared_memory(dtype, [STAGES, 16 * SHARE, BK], of_as)
    ys = gl.allocate_shared_memory(dtype, [AHEAD, BM, PART], y_desc.layout)
    other_ys = gl.allocate_shared_memory(dtype, [AHEAD, BM, PART], y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    for group in gl.static_range(2):
        mbarrier.init(turns.index(group), count=1)
    ring, descs, y = (xs, ws, all_as, full, empty), (x_desc, w_desc, a_desc), (y_desc, y_ptr)
    num_cols, steps = col_octets * 8, gl.cdiv(feature_octets * 8, BK)
    tiles_n = gl.cdiv(num_cols, BN)
    items = (lists.tiles, gl.load(lists.tiles) * tiles_n, tiles_n, num_experts)
    gl.warp_specialize(
        [
            (
                compute,
                (
                    0, ring, ys, turns, y, bias, lists, coeffs_ptr, b_ptr, items, steps, num_cols, SHARE, CHUNKS,
                    STAGES, AHEAD, TRANSPOSED, HAS_BIAS, HAS_COEFFS,
                ),
            ),
            (
                compute,
                (
                    1, ring, other_ys, turns, y, bias, lists, coeffs_ptr, b_ptr, items, steps, num_cols, SHARE,
                    CHUNKS, STAGES, AHEAD, TRANSPOSED, HAS_BIAS, HAS_COEFFS,
                ),
            ),
            (load, (ring, descs, lists, items, steps, SHARE, STAGES, TRANSPOSED)),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


_launcher = Launcher(expert_hopper_kernel)


def prefill(call: ExpertCall, tile: ExpertHopperTile) -> torch.Tensor:
    """y [T, N] for `call`, which has a pool and one slot for each row. TMA reads x, in place, W and A, and writes y."""
    pool = call.site.pool
    assert pool is not None
    lists = list_slots(call)
    y = call.x.new_empty(call.rows, call.columns)
    transposed = call.weight.stride(2) != 1
    w, w_block = (call.weight.mT, (1, BK.value, BN.value)) if transposed else (call.weight, (1, BN.value, BK.value))
    plan = call.plan(_launcher, tile, lambda: _plan(call, tile, transposed), step=transposed)
    call.launch(
        plan,
        describe(call.x, (BM.value, BK.value)),
        describe(w, w_block),
        describe(y, (BM.value, PART.value)),
        describe(pool.a, (16, BK.value)),
        y,
        (*call.strided_bias, call.num_experts),
        lists,
        None if call.row_coeffs is None else call.row_coeffs.contiguous(),
        call.site.fixed[1],
        *plan.numbers,
    )
    return y


def _plan(call: ExpertCall, tile: ExpertHopperTile, transposed: bool) -> Plan:
    tiles = tile_bound(call.rows, call.num_experts, BM.value) * cdiv(call.columns, BN.value)
    return call.planned(
        _launcher,
        (min(tiles, multiprocessors(call.x.device)),),
        (call.num_experts, call.features // 8, call.columns // 8),
        4,
        together=True,
        SHARE=tile.share,
        CHUNKS=cdiv(call.site.h_width, 16),
        STAGES=tile.stages,
        AHEAD=tile.ahead,
        TRANSPOSED=transposed,
        HAS_BIAS=call.has_bias,
        HAS_COEFFS=call.has_coeffs,
        PDL=call.overlap,
    )
