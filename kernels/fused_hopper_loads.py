"""The warps of fused_hopper.py that load, through TMA: one x and W, one the Bs of adapters.

Stage: run time. Both fill one ring of blocks in shared memory, from which warps that multiply take them in order.
"""

# ruff: noqa: ANN001 (pointers and blocks of a kernel have no static type)

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fxlora.kernels.groups import FIELDS
from fxlora.kernels.prefill_hopper import block_after

BM = gl.constexpr(64)
"""Rows of a tile."""

NOWHERE = gl.constexpr(1 << 30)
"""A row past every matrix, from which TMA brings zeros."""


@gluon.jit
def tile_of(item, num_rows) -> gl.tensor:
    """Row tile and column tile of a member's item."""
    tiles_m = gl.cdiv(num_rows, BM)
    return item % tiles_m, item // tiles_m


@gluon.jit
def list_of(row_tile, member, lists, num_rows) -> gl.tensor:
    """A row tile's list of groups, and its capacity. lists: int32 [members, row tiles, list_words], and that."""
    groups_ptr, capacity = lists
    tiles_m = gl.cdiv(num_rows, BM)
    return groups_ptr + (member * tiles_m + row_tile) * (FIELDS * capacity + 1), capacity


@gluon.jit
def ask_w(w_desc, step, col, ring, stage, x_desc, TRANSPOSED: gl.constexpr) -> None:
    """Asks for a block of W, and lets its barrier expect one of x too."""
    there = ring[2].index(stage)
    mbarrier.expect(there, x_desc.block_type.nbytes + w_desc.block_type.nbytes)
    BK: gl.constexpr = x_desc.block_type.shape[1]
    at = [step * BK, col] if TRANSPOSED else [col, step * BK]
    tma.async_copy_global_to_shared(w_desc, at, there, ring[1].index(stage))


@gluon.jit
def ask_x(x_desc, step, row, ring, stage) -> None:
    """Asks for a block of x, of no more rows than there are."""
    to = ring[0].index(stage).slice(0, x_desc.block_type.shape[0])
    tma.async_copy_global_to_shared(x_desc, [row, step * x_desc.block_type.shape[1]], ring[2].index(stage), to)


@gluon.jit
def add(a, b) -> gl.tensor:
    """Their sum."""
    return a + b


@gluon.jit
def groups_in(row_tile, slots_ptr, site, max_adapters, num_rows, SLOTS: gl.constexpr, WARPS: gl.constexpr) -> gl.tensor:
    """Of each slot: its first pool row, the number of its first group among those of a row tile, one past its last, and
    its ranks. And how many there are. Groups are numbered as in the list, which is made while this is needed."""
    of_slots: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    rows, ids = row_tile * BM + gl.arange(0, BM, layout=of_slots), gl.arange(0, SLOTS, layout=of_slots)
    slots = gl.load(slots_ptr + rows, mask=rows < num_rows, other=-1)
    start = gl.load(site[1] + ids, mask=ids < max_adapters, other=0)
    rank = gl.load(site[2] + ids, mask=ids < max_adapters, other=0)
    known = (slots >= 0) & (slots < max_adapters)
    present = gl.histogram(gl.where(known, slots, 0), SLOTS, mask=known, layout=of_slots) > 0
    rank = gl.where(present, rank, 0)
    groups = (rank + 15) // 16
    end = gl.associative_scan(groups, 0, add)
    return start, end - groups, end, rank, gl.sum(groups, axis=0)


@gluon.jit
def ask_bs(groups, block, col, b_desc, there, bs, pieces, stage) -> None:
    """Asks for B of as many groups as have room, 16 ranks of each, zero past the last. groups: of `groups_in`."""
    PARTS: gl.constexpr = bs.shape[2] // pieces.shape[2]
    EACH: gl.constexpr = bs.shape[1] // 16
    start, first, end, _, count = groups
    mbarrier.expect(there, EACH * PARTS * b_desc.block_type.nbytes)
    for i in gl.static_range(EACH):
        number = EACH * block + i
        row = gl.sum(gl.where((number >= first) & (number < end), start + 16 * (number - first), 0), axis=0)
        row = gl.where(number < count, row, NOWHERE)
        for part in gl.static_range(PARTS):
            to = pieces.index((stage * PARTS + part) * EACH + i)
            tma.async_copy_global_to_shared(b_desc, [row, col + part * pieces.shape[2]], there, to)


@gluon.jit
def load_bs(
    ring, b_ring, b_descs, slots_ptr, sites, max_adapters, num_rows, widths, steps, STAGES: gl.constexpr,
    HAS_POOL: gl.constexpr, SLOTS: gl.constexpr, PDL: gl.constexpr,
) -> None:  # fmt: skip
    """Every B of this program's tile, behind the last block of W.

    A warp of its own looks up where they lie, as that takes round trips; it does not wait for the shrink. It uses the
    ring when the other one has asked for everything: a block's barrier tells one phase from the next, not from one
    further on.
    """
    full, empty = ring[2], ring[3]
    bs, pieces, asked = b_ring
    BN: gl.constexpr = bs.shape[2]
    program, begin = gl.program_id(0), 0
    for member in gl.static_range(len(HAS_POOL)):
        end = begin + gl.cdiv(widths[member], BN) * gl.cdiv(num_rows, BM)
        if HAS_POOL[member]:  # noqa: SIM102 (a choice at compile time is an `if` of its own)
            if (program >= begin) & (program < end):
                row_tile, col_tile = tile_of(program - begin, num_rows)
                groups = groups_in(row_tile, slots_ptr, sites[member], max_adapters, num_rows, SLOTS, 1)
                mbarrier.wait(asked, 0)
                stage, phase = steps % STAGES, (steps // STAGES & 1) ^ 1
                for block in range(gl.cdiv(groups[4], bs.shape[1] // 16)):
                    mbarrier.wait(empty.index(stage), phase)
                    ask_bs(groups, block, col_tile * BN, b_descs[member], full.index(stage), bs, pieces, stage)
                    stage, phase = block_after(stage, phase, STAGES)
        begin = end
    if PDL:
        gdc_wait()


@gluon.jit
def load(
    ring, b_ring, x_desc, w_descs, num_rows, widths, steps, STAGES: gl.constexpr, TRANSPOSED: gl.constexpr,
    PDL: gl.constexpr, FIRST: gl.constexpr,
) -> None:  # fmt: skip
    """Every block of x and W of this program's tile. W is asked for before the kernels ahead have made x."""
    BN: gl.constexpr = b_ring[0].shape[2]
    program, begin = gl.program_id(0), 0
    if PDL and not FIRST:
        gdc_launch_dependents()
    for member in gl.static_range(len(widths)):
        end = begin + gl.cdiv(widths[member], BN) * gl.cdiv(num_rows, BM)
        if (program >= begin) & (program < end):
            row_tile, col_tile = tile_of(program - begin, num_rows)
            row, col, w_desc = row_tile * BM, col_tile * BN, w_descs[member]
            for stage in gl.static_range(STAGES):
                if stage < steps:
                    ask_w(w_desc, stage, col, ring, stage, x_desc, TRANSPOSED)
                    if not (PDL and FIRST):
                        ask_x(x_desc, stage, row, ring, stage)
            if PDL and FIRST:
                gdc_wait()
                gdc_launch_dependents()
                for stage in gl.static_range(STAGES):
                    if stage < steps:
                        ask_x(x_desc, stage, row, ring, stage)
            stage, phase = 0, 0
            for step in range(STAGES, steps):
                mbarrier.wait(ring[3].index(stage), phase)
                ask_w(w_desc, step, col, ring, stage, x_desc, TRANSPOSED)
                ask_x(x_desc, step, row, ring, stage)
                stage, phase = block_after(stage, phase, STAGES)
            mbarrier.arrive(b_ring[2])
        begin = end
    if PDL:
        gdc_wait()
