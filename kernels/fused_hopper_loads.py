"""The warps of fused_hopper.py that load, through TMA: one x and W, one the Bs of adapters.

Stage: run time. Both fill one ring of blocks in shared memory, from which warps that multiply take them in order.
"""

# ruff: noqa: ANN001 (pointers and blocks of a kernel have no static type)

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fxlora.kernels.gluon_names import load_block
from fxlora.kernels.prefill_hopper import block_after

NOWHERE = gl.constexpr(1 << 30)
"""A row past every matrix, from which TMA brings zeros."""


@gluon.jit
def tile_of(begin, num_rows, num_cols, BM: gl.constexpr, BN: gl.constexpr) -> gl.tensor:
    """Whether this program's tile is of the member whose tiles begin there; its row tile, of BM rows, and column tile;
    where the tiles of the next member begin."""
    tiles_m = gl.cdiv(num_rows, BM)
    item, count = gl.program_id(0) - begin, gl.cdiv(num_cols, BN) * tiles_m
    return (item >= 0) & (item < count), item % tiles_m, item // tiles_m, begin + count


@gluon.jit
def ask_w(w_desc, step, col, ring, stage, TRANSPOSED: gl.constexpr) -> None:
    """Asks for a block of W."""
    there = ring[2].index(stage)
    mbarrier.expect(there, w_desc.block_type.nbytes)
    BK: gl.constexpr = ring[0].shape[2]
    at = [step * BK, col] if TRANSPOSED else [col, step * BK]
    load_block(w_desc, at, there, ring[1].index(stage))


@gluon.jit
def ask_x(x_desc, step, row, ring, stage) -> None:
    """Asks for a block of x, of no more rows than there are."""
    there, to = ring[2].index(stage), ring[0].index(stage).slice(0, x_desc.block_type.shape[0])
    mbarrier.expect(there, x_desc.block_type.nbytes)
    load_block(x_desc, [row, step * x_desc.block_type.shape[1]], there, to)


@gluon.jit
def ask_bs(rows, col, b_desc, there, bs, pieces, stage) -> None:
    """Asks for B of as many groups as a block has room for, 16 ranks of each. rows: their first pool rows."""
    PARTS: gl.constexpr = bs.shape[2] // pieces.shape[2]
    EACH: gl.constexpr = rows.shape[0]
    numbers = gl.arange(0, EACH, layout=rows.type.layout)
    mbarrier.expect(there, EACH * PARTS * b_desc.block_type.nbytes)
    for i in gl.static_range(EACH):
        row = gl.sum(gl.where(numbers == i, rows, 0), axis=0)
        for part in gl.static_range(PARTS):
            to = pieces.index((stage * PARTS + part) * EACH + i)
            load_block(b_desc, [row, col + part * pieces.shape[2]], there, to)


@gluon.jit
def number_of(listed, i: gl.constexpr, WARPS: gl.constexpr) -> gl.tensor:
    """Of the groups that meet this program's rows: 0 for the number of their blocks, 1 for the fewest ranks of one."""
    return gl.max(listed[2].index(i).load(gl.BlockedLayout([1], [32], [WARPS], [0])), axis=0)


@gluon.jit
def load_bs(
    ring, b_ring, listed, b_descs, num_rows, widths, steps, STAGES: gl.constexpr, HAS_POOL: gl.constexpr,
    PDL: gl.constexpr,
) -> None:  # fmt: skip
    """Every B of this program's tile, behind the last block of W.

    A warp of its own asks for them, in the ring when the groups are listed and the other one has asked for everything:
    a block's barrier tells one phase from the next, not from one further on.
    """
    full, empty = ring[2], ring[3]
    bs, pieces, asked = b_ring
    BN: gl.constexpr = bs.shape[2]
    BM: gl.constexpr = ring[0].shape[1]
    EACH: gl.constexpr = bs.shape[1] // 16
    begin = 0
    for member in gl.static_range(len(HAS_POOL)):
        is_here, _, col_tile, end = tile_of(begin, num_rows, widths[member], BM, BN)
        if HAS_POOL[member]:  # noqa: SIM102 (a choice at compile time is an `if` of its own)
            if is_here & (gl.program_id(1) == 0):
                mbarrier.wait(asked, 0)
                stage, phase = steps % STAGES, (steps // STAGES & 1) ^ 1
                for block in range(number_of(listed, 0, 1)):
                    rows = listed[0].index(block).load(gl.BlockedLayout([EACH], [32], [1], [0]))
                    mbarrier.wait(empty.index(stage), phase)
                    ask_bs(rows, col_tile * BN, b_descs[member], full.index(stage), bs, pieces, stage)
                    stage, phase = block_after(stage, phase, STAGES)
        begin = end
    if PDL:
        gdc_wait()


@gluon.jit
def ask_first(
    ring, x_desc, w_descs, num_rows, widths, first, steps, STAGES: gl.constexpr, TRANSPOSED: gl.constexpr,
    WITH_X: gl.constexpr,
) -> None:  # fmt: skip
    """Asks for the blocks of this program's tile that the ring has room for, before warps part: the code of each comes
    from far, which takes as long as a few blocks do."""
    BM: gl.constexpr = ring[0].shape[1]
    BN: gl.constexpr = ring[1].shape[2 if TRANSPOSED else 1]
    begin = 0
    for member in gl.static_range(len(widths)):
        is_here, row_tile, col_tile, end = tile_of(begin, num_rows, widths[member], BM, BN)
        if is_here:
            for step in range(gl.minimum(steps, STAGES)):
                ask_w(w_descs[member], first + step, col_tile * BN, ring, step, TRANSPOSED)
                if WITH_X:
                    ask_x(x_desc, first + step, row_tile * BM, ring, step)
        begin = end


@gluon.jit
def load(
    ring, b_ring, x_desc, w_descs, num_rows, widths, first, steps, STAGES: gl.constexpr, TRANSPOSED: gl.constexpr,
    EARLY: gl.constexpr, HAS_X: gl.constexpr, PDL: gl.constexpr,
) -> None:  # fmt: skip
    """Every block of x and W of this program's tile, from `first` on; behind those of `ask_first` if EARLY, and x of
    those if not HAS_X."""
    BM: gl.constexpr = ring[0].shape[1]
    BN: gl.constexpr = b_ring[0].shape[2]
    begin = 0
    begun, stage, phase = (gl.minimum(steps, STAGES) if EARLY else 0), 0, (0 if EARLY else 1)
    if PDL:
        if not HAS_X:
            gdc_wait()
        gdc_launch_dependents()
    for member in gl.static_range(len(widths)):
        is_here, row_tile, col_tile, end = tile_of(begin, num_rows, widths[member], BM, BN)
        if is_here:
            row, col = row_tile * BM, col_tile * BN
            if not HAS_X:
                for step in range(begun):
                    ask_x(x_desc, first + step, row, ring, step)
            for step in range(begun, steps):
                mbarrier.wait(ring[3].index(stage), phase)
                ask_w(w_descs[member], first + step, col, ring, stage, TRANSPOSED)
                ask_x(x_desc, first + step, row, ring, stage)
                stage, phase = block_after(stage, phase, STAGES)
            mbarrier.arrive(b_ring[2])
        begin = end
    if PDL:
        gdc_wait()
