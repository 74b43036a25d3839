"""The product of prefill.py on a Hopper GPU: one warp loads, two groups of four warps multiply.

Stage: run time, in place of `prefill_kernel`, from the same arguments. Triton gives all warps of a program one loop; in
Gluon, Triton's language of layouts and barriers, loads, products and stores need not wait for each other. Steps of x
and W pass through a ring of STAGES blocks in shared memory: `full` says that a block has come, `empty` that it has been
multiplied. The groups take tiles in turn, so that one expands and stores while the other multiplies (`turns` says that
the other has issued its last product), or, SHARED, halves of the rows of one tile, twice as wide, which reads less.
Who waits counts the same tiles and steps as who is waited for.

Arithmetic is that of prefill.py, and so are the bits. Letters as there.
"""

# ruff: noqa: ANN001, RUF005 (pointers and blocks have no static type; Gluon knows no unpacking inside a tuple)

from __future__ import annotations

from functools import cache

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
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fxlora.kernels.gluon_names import load_block, load_elements, store_block, viewed
from fxlora.kernels.groups import FIELDS, MOST
from fxlora.kernels.launch import Described, Launcher
from fxlora.kernels.prefill import next_member, place

PART = gl.constexpr(64)
"""Columns of y that are stored at once, through one of two buffers of each group."""


@gluon.jit
def block_after(stage, phase, STAGES: gl.constexpr) -> gl.tensor:
    """Block and phase of the step after this one."""
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def load(
    ring, x_desc, w_descs, num_rows, steps, col_octets, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    BAND: gl.constexpr, STAGES: gl.constexpr, TRANSPOSED: gl.constexpr, MEMBERS: gl.constexpr,
) -> None:  # fmt: skip
    """The warp that loads: every step of this program's tiles, as soon as there is room."""
    xs, ws, full, empty = ring
    tiles_m = gl.cdiv(num_rows, BM)
    first_tile = gl.program_id(0)
    stage, phase = 0, 1  # every block is empty at first
    for member in gl.static_range(MEMBERS):
        w_desc = w_descs[member]
        tiles_n = gl.cdiv(col_octets[member] * 8, BN)
        for tile in range(first_tile, tiles_m * tiles_n, gl.num_programs(0)):
            row_tile, col_tile = place(tile, tiles_m, tiles_n, BAND)
            for step in range(steps):
                there = full.index(stage)
                mbarrier.wait(empty.index(stage), phase)
                mbarrier.expect(there, x_desc.block_type.nbytes + w_desc.block_type.nbytes)
                load_block(x_desc, [row_tile * BM, step * BK], there, xs.index(stage))
                w_at = [step * BK, col_tile * BN] if TRANSPOSED else [col_tile * BN, step * BK]
                load_block(w_desc, w_at, there, ws.index(stage))
                stage, phase = block_after(stage, phase, STAGES)
        _, first_tile = next_member(first_tile, tiles_m * tiles_n)


@gluon.jit
def multiply(
    acc, held, stage, phase, steps, ring, STAGES: gl.constexpr, TRANSPOSED: gl.constexpr, HALF: gl.constexpr
) -> gl.tensor:
    """acc + x W^T over so many steps, of which the last is not awaited. held: the block it reads, -1 where none is.

    HALF: which half of the rows of x is meant, -1 for all. x of fewer rows than the operand has that goes first takes
    the place of the other one, and acc is W x^T.
    """
    xs, ws, full, empty = ring
    FEW: gl.constexpr = xs.shape[1] < 64
    for _ in range(steps):
        mbarrier.wait(full.index(stage), phase)
        x, w = xs.index(stage), ws.index(stage)
        if HALF >= 0:
            x = x.slice(HALF * acc.shape[0], acc.shape[0])
        w = w if TRANSPOSED else w.permute((1, 0))
        if FEW:
            acc = warpgroup_mma(w.permute((1, 0)), x.permute((1, 0)), acc, is_async=True)
        else:
            acc = warpgroup_mma(x, w, acc, is_async=True)
        acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
        mbarrier.arrive(empty.index(gl.maximum(held, 0)), pred=held >= 0)
        held = stage
        stage, phase = block_after(stage, phase, STAGES)
    return acc, held, stage, phase


@gluon.jit
def finish(acc, held, ring, next_turn, SHARED: gl.constexpr) -> gl.tensor:
    """The sum of all products. The other group goes on when they are issued, blocks are free when they are done."""
    if not SHARED:
        mbarrier.arrive(next_turn)
    acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
    mbarrier.arrive(ring[3].index(held))
    return acc


@gluon.jit
def group_of(adapters, group) -> gl.tensor:
    """Slot, first pool row and ranks of a listed group, slot -1 past the last; see groups.py."""
    record, capacity = adapters[0], adapters[1]
    slot = gl.load(record + group, cache_modifier=".cg")
    pool_row = gl.load(record + capacity + group, cache_modifier=".cg")
    return slot, pool_row, gl.load(record + 2 * capacity + group, cache_modifier=".cg")


@gluon.jit
def groups_from(adapters, first, TOGETHER: gl.constexpr) -> gl.tensor:
    """`group_of` of so many groups from this one on."""
    groups = (group_of(adapters, first),)
    for i in gl.static_range(1, TOGETHER):
        groups = groups + (group_of(adapters, first + i),)
    return groups


@gluon.jit
def copy_b(groups, lanes, cols, b_ptr, num_cols, bs, half, TOGETHER: gl.constexpr) -> None:
    """Asks for B of these groups, [16, BN] each, into a half of the blocks; zero beyond the rank and without a slot."""
    for i in gl.static_range(TOGETHER):
        slot, pool_row, ranks = groups[i]
        at = b_ptr + (pool_row + lanes).to(gl.int64)[:, None] * num_cols + cols[None, :]
        mask = ((slot >= 0) & (lanes <= ranks % 16))[:, None] & (cols < num_cols)[None, :]
        load_elements(bs.index(half * TOGETHER + i), at, mask)
    async_copy.commit_group()


@gluon.jit
def load_hs(groups, lanes, rows, row_slots, adapters, num_rows, J: gl.constexpr, TOGETHER: gl.constexpr) -> gl.tensor:
    """load_h of each of these groups."""
    hs = (load_h(groups[0], lanes, rows, row_slots, adapters, num_rows, J),)
    for i in gl.static_range(1, TOGETHER):
        hs = hs + (load_h(groups[i], lanes, rows, row_slots, adapters, num_rows, J),)
    return hs


@gluon.jit
def load_h(group, lanes, rows, row_slots, adapters, num_rows, J: gl.constexpr) -> gl.tensor:
    """h of these rows for a group, [BM, 16]; zero for rows of other slots. row_slots: the first of each row."""
    total = load_part(group, lanes, rows, 0, row_slots, adapters, J)
    for j in gl.static_range(1, J):
        slots = gl.load(adapters[2] + rows * J + j, mask=rows < num_rows, other=-1)
        part = load_part(group, lanes, rows, j, slots, adapters, J)
        total = (total.to(gl.float32) + part.to(gl.float32)).to(part.dtype)
    return total


@gluon.jit
def load_part(group, lanes, rows, j, slots, adapters, J: gl.constexpr) -> gl.tensor:
    """load_h of slot j of each row."""
    slot, _, ranks = group
    _, _, _, h_ptr, h_width = adapters
    at = h_ptr + ((rows * J + j) * h_width)[:, None] + (ranks // 16 * 16 + lanes)[None, :]
    return gl.load(at, mask=(slots == slot)[:, None] & (slot >= 0), other=0.0, cache_modifier=".cg")


@gluon.jit
def adapted(
    acc, stage, phase, steps, ring, next_turn, bs, first_row, first_col, adapters, b_ptr, num_rows, num_cols,
    J: gl.constexpr, STAGES: gl.constexpr, AHEAD: gl.constexpr, TRANSPOSED: gl.constexpr, HALF: gl.constexpr,
    PDL: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """acc + x W^T + h B, TOGETHER groups for each wait, of which two are on their way at a time.

    What the first ones need is asked for AHEAD steps before the last, or after it (0): then the other warps multiply
    meanwhile.
    """
    BM: gl.constexpr = acc.shape[0]
    BN: gl.constexpr = acc.shape[1]
    TOGETHER: gl.constexpr = 1 if HALF >= 0 else 2  # y lends B two blocks as wide as a shared tile
    gl.static_assert(4 * TOGETHER <= MOST)  # so many are read of a list before its length is known
    of_h: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    of_b: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BN, BN // 8], [4, 1], [1, 0])
    rows = (first_row + gl.arange(0, BM, layout=gl.SliceLayout(1, of_h))).to(gl.int64)
    h_lanes = gl.arange(0, 16, layout=gl.SliceLayout(0, of_h))
    b_lanes = gl.arange(0, 16, layout=gl.SliceLayout(1, of_b))
    cols = first_col + gl.arange(0, BN, layout=gl.SliceLayout(0, of_b))
    late = gl.minimum(steps, AHEAD)
    none = gl.to_tensor(-1)
    acc, held, stage, phase = multiply(acc, none, stage, phase, steps - late, ring, STAGES, TRANSPOSED, HALF)
    if AHEAD == 0:
        acc = finish(acc, held, ring, next_turn, HALF >= 0)
    if PDL:
        gdc_wait()
    count = gl.load(adapters[0] + FIELDS * adapters[1], cache_modifier=".cg")
    groups, next_groups = groups_from(adapters, 0, TOGETHER), groups_from(adapters, TOGETHER, TOGETHER)
    coming, after = groups_from(adapters, 2 * TOGETHER, TOGETHER), groups_from(adapters, 3 * TOGETHER, TOGETHER)
    row_slots = gl.load(adapters[2] + rows * J, mask=rows < num_rows, other=-1)
    if AHEAD > 0:
        first = gl.minimum(late, 1)
        acc, held, stage, phase = multiply(acc, held, stage, phase, first, ring, STAGES, TRANSPOSED, HALF)
    tma.store_wait(0)  # y of the tile before has left the memory that B takes
    debug_barrier()
    copy_b(groups, b_lanes, cols, b_ptr, num_cols, bs, 0, TOGETHER)
    copy_b(next_groups, b_lanes, cols, b_ptr, num_cols, bs, 1, TOGETHER)
    hs = load_hs(groups, h_lanes, rows, row_slots, adapters, num_rows, J, TOGETHER)
    next_hs = load_hs(next_groups, h_lanes, rows, row_slots, adapters, num_rows, J, TOGETHER)
    if AHEAD > 0:
        acc, held, stage, phase = multiply(acc, held, stage, phase, late - 1, ring, STAGES, TRANSPOSED, HALF)
        acc = finish(acc, held, ring, next_turn, HALF >= 0)
    half = 0
    for first in range(0, count, TOGETHER):
        async_copy.wait_group(1)
        fence_async_shared()
        debug_barrier()
        for i in gl.static_range(TOGETHER):
            acc = warpgroup_mma(hs[i], bs.index(half * TOGETHER + i), acc, is_async=True)
        acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
        debug_barrier()  # all have read them
        copy_b(coming, b_lanes, cols, b_ptr, num_cols, bs, half, TOGETHER)
        hs, next_hs = next_hs, load_hs(coming, h_lanes, rows, row_slots, adapters, num_rows, J, TOGETHER)
        coming, after = after, groups_from(adapters, gl.minimum(first + 4 * TOGETHER, count), TOGETHER)
        half ^= 1
    async_copy.wait_group(0)
    debug_barrier()
    return acc


@gluon.jit
def put(part, buffer, y_desc, row, col, bias, num_cols, HAS_BIAS: gl.constexpr) -> None:
    """Stores columns of a tile of y as soon as the buffer is free."""
    if HAS_BIAS:
        cols = col + gl.arange(0, PART, layout=gl.SliceLayout(0, part.type.layout))
        part += gl.load(bias[0] + cols * bias[1], mask=cols < num_cols, other=0.0).to(gl.float32)[None, :]
    tma.store_wait(1)
    debug_barrier()
    buffer.store(part.to(y_desc.dtype))
    fence_async_shared()
    debug_barrier()
    store_block(y_desc, [row, col], buffer)


@gluon.jit
def store(acc, buffers, y_desc, row, col, bias, num_cols, HAS_BIAS: gl.constexpr) -> None:
    """A tile of y, PART columns at a time."""
    BM: gl.constexpr = acc.shape[0]
    BN: gl.constexpr = acc.shape[1]
    left, right = gl.split(gl.permute(gl.reshape(acc, [BM, 2, BN // 2]), (0, 2, 1)))
    if BN > 2 * PART:
        store(left, buffers, y_desc, row, col, bias, num_cols, HAS_BIAS)
        store(right, buffers, y_desc, row, col + BN // 2, bias, num_cols, HAS_BIAS)
    else:
        put(left, buffers.index(0), y_desc, row, col, bias, num_cols, HAS_BIAS)
        put(right, buffers.index(1), y_desc, row, col + PART, bias, num_cols, HAS_BIAS)


@gluon.jit
def as_b(ys, BN: gl.constexpr) -> gl.tensor:
    """The memory of y's parts as blocks of B, [.., 16, BN], of which two are used."""
    shape: gl.constexpr = [ys.shape[0] * ys.shape[1] * ys.shape[2] // (16 * BN), 16, BN]
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([16, BN], ys.dtype)
    return viewed(ys, ys.dtype, shape, layout)


@gluon.jit
def compute(
    GROUP: gl.constexpr, ring, ys, turns, y_descs, biases, scratch, b_ptrs, num_rows, steps, col_octets,
    J: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BAND: gl.constexpr, STAGES: gl.constexpr,
    AHEAD: gl.constexpr, SHARED: gl.constexpr, TRANSPOSED: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_POOL: gl.constexpr, PDL: gl.constexpr,
) -> None:  # fmt: skip
    """A group of warps: product, adapters, bias and store of every other tile of this program's, or of half of each."""
    HEIGHT: gl.constexpr = BM // 2 if SHARED else BM
    HALF: gl.constexpr = GROUP if SHARED else -1
    SKIPS: gl.constexpr = 1 if SHARED else 2
    of_acc: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    bs = as_b(ys, BN)
    h_ptr, h_width, groups_ptr, capacity, slots_ptr = scratch
    tiles_m, programs = gl.cdiv(num_rows, BM), gl.num_programs(0)
    first_tile = gl.program_id(0)
    before, own = 0, 0  # tiles of this program, of this group
    for member in gl.static_range(len(HAS_POOL)):
        num_cols = col_octets[member] * 8
        tiles_n = gl.cdiv(num_cols, BN)
        skipped = 0 if SHARED else ((before + GROUP) & 1) * programs
        for tile in range(first_tile + skipped, tiles_m * tiles_n, SKIPS * programs):
            row_tile, col_tile = place(tile, tiles_m, tiles_n, BAND)
            first_row = row_tile * BM + (GROUP * HEIGHT if SHARED else 0)
            done = (own if SHARED else 2 * own + GROUP) * steps
            stage, phase = done % STAGES, done // STAGES & 1
            if not SHARED:
                mbarrier.wait(turns.index(GROUP), (own & 1) ^ (1 - GROUP))
            own += 1
            acc = gl.zeros([HEIGHT, BN], gl.float32, of_acc)
            if HAS_POOL[member]:
                record = groups_ptr + (member * tiles_m + row_tile) * (FIELDS * capacity + 1)
                own_h = h_ptr + (member * J * num_rows).to(gl.int64) * h_width
                acc = adapted(
                    acc, stage, phase, steps, ring, turns.index(1 - GROUP), bs, first_row, col_tile * BN,
                    (record, capacity, slots_ptr, own_h, h_width), b_ptrs[member], num_rows, num_cols, J, STAGES,
                    AHEAD, TRANSPOSED, HALF, PDL,
                )  # fmt: skip
            else:
                none = gl.to_tensor(-1)
                acc, held, _, _ = multiply(acc, none, stage, phase, steps, ring, STAGES, TRANSPOSED, HALF)
                acc = finish(acc, held, ring, turns.index(1 - GROUP), SHARED)
            store(acc, ys, y_descs[member], first_row, col_tile * BN, biases[member], num_cols, HAS_BIAS[member])
        count, first_tile = next_member(first_tile, tiles_m * tiles_n)
        before += count
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_rows", "max_adapters"])
def prefill_hopper_kernel(
    x_desc, w0_desc, w1_desc, w2_desc, w3_desc, y0_desc, y1_desc, y2_desc, y3_desc, biases, h_ptr, h_width, groups_ptr,
    capacity, slots_ptr, sites, b_ptrs, num_rows, feature_octets, col_octets, max_adapters,
    J: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, BAND: gl.constexpr,
    AHEAD: gl.constexpr, SHARED: gl.constexpr, TRANSPOSED: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_POOL: gl.constexpr, PDL: gl.constexpr, FIRST: gl.constexpr,
) -> None:  # fmt: skip
    """As prefill.prefill_kernel, whose parameters these are. SHARED: the groups of warps share every tile."""
    if PDL and FIRST:
        gdc_wait()
    if PDL:
        gdc_launch_dependents()
    dtype: gl.constexpr = x_desc.dtype
    xs = gl.allocate_shared_memory(dtype, [STAGES, BM, BK], x_desc.layout)
    ws = gl.allocate_shared_memory(dtype, [STAGES, BK if TRANSPOSED else BN, BN if TRANSPOSED else BK], w0_desc.layout)
    ys = gl.allocate_shared_memory(dtype, [2, BM // 2 if SHARED else BM, PART], y0_desc.layout)
    other_ys = gl.allocate_shared_memory(dtype, [2, BM // 2 if SHARED else BM, PART], y0_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2 if SHARED else 1)
    for group in gl.static_range(2):
        mbarrier.init(turns.index(group), count=1)
    ring = (xs, ws, full, empty)
    w_descs, y_descs = (w0_desc, w1_desc, w2_desc, w3_desc), (y0_desc, y1_desc, y2_desc, y3_desc)
    scratch = (h_ptr, h_width, groups_ptr, capacity, slots_ptr)
    steps = gl.cdiv(feature_octets * 8, BK)
    gl.warp_specialize(
        [
            (
                compute,
                (
                    0, ring, ys, turns, y_descs, biases, scratch, b_ptrs, num_rows, steps, col_octets, J, BM, BN,
                    BAND, STAGES, AHEAD, SHARED, TRANSPOSED, HAS_BIAS, HAS_POOL, PDL,
                ),
            ),
            (
                compute,
                (
                    1, ring, other_ys, turns, y_descs, biases, scratch, b_ptrs, num_rows, steps, col_octets, J, BM, BN,
                    BAND, STAGES, AHEAD, SHARED, TRANSPOSED, HAS_BIAS, HAS_POOL, PDL,
                ),
            ),
            (
                load,
                (
                    ring, x_desc, w_descs, num_rows, steps, col_octets, BM, BN, BK, BAND, STAGES, TRANSPOSED,
                    len(HAS_POOL),
                ),
            ),
        ],
        [4, 1],
        [216, 24],
    )  # fmt: skip
    if PDL:
        gdc_wait()


launcher = Launcher(prefill_hopper_kernel)


def describe(base: torch.Tensor, block: tuple[int, ...]) -> Described:
    """What TMA moves, with the layout of its blocks in shared memory."""
    return Described(base, block, _layout(block, base.dtype))


@cache
def _layout(block: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(block), gl.float16 if dtype == torch.float16 else gl.bfloat16)
