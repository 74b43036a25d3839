"""The warp of expert_hopper.py that loads x, W and A through TMA.

Stage: run time. It is ahead of the warps that multiply by as many blocks as there is room for, across tiles.
"""

# ruff: noqa: ANN001, RUF005 (pointers and blocks have no static type; Gluon knows no unpacking inside a tuple)

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from fxlora.kernels.expert_order import look, look_closer, share_of, steps_of
from fxlora.kernels.gluon_names import load_block
from fxlora.kernels.prefill_hopper import block_after

BN = gl.constexpr(256)
"""Columns of a tile."""

BK = gl.constexpr(64)
"""In-features of a block."""


@gluon.jit
def load_steps(
    stage, phase, steps, ring, descs, first_row, expert, first_col, a_rows, WITH_W: gl.constexpr,
    STAGES: gl.constexpr, TRANSPOSED: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """Asks for the blocks of so many steps, as soon as there is room. Returns the block and phase after them."""
    xs, ws, all_as, full, empty = ring
    x_desc, w_desc, a_desc = descs
    w_bytes: gl.constexpr = w_desc.block_type.nbytes if WITH_W else 0
    a_bytes: gl.constexpr = len(a_rows) * a_desc.block_type.nbytes
    for step in range(steps):
        there = full.index(stage)
        mbarrier.wait(empty.index(stage), phase)
        mbarrier.expect(there, x_desc.block_type.nbytes + w_bytes + a_bytes)
        load_block(x_desc, [first_row, step * BK], there, xs.index(stage))
        if WITH_W:
            w_at = [expert, step * BK, first_col] if TRANSPOSED else [expert, first_col, step * BK]
            load_block(w_desc, w_at, there, ws.index(stage))
        for i in gl.static_range(len(a_rows)):
            to = all_as.index(stage).slice(16 * i, 16)
            load_block(a_desc, [a_rows[i], step * BK], there, to)
        stage, phase = block_after(stage, phase, STAGES)
    return stage, phase


@gluon.jit
def rows_of_a(at, SHARE: gl.constexpr) -> gl.tensor:
    """First row of A of SHARE groups; any, past the last group of a tile."""
    rows = (gl.load(at, cache_modifier=".cg"),)
    for i in gl.static_range(1, SHARE):
        rows = rows + (gl.load(at + i, cache_modifier=".cg"),)
    return rows


@gluon.jit
def load(
    ring, descs, lists, items, all_steps, SHARE: gl.constexpr, STAGES: gl.constexpr, TRANSPOSED: gl.constexpr
) -> None:
    """Every block of x, W and A of this program's items."""
    stage, phase = 0, 1  # every block is empty at first
    item, programs = gl.program_id(0), gl.num_programs(0)
    place = look_closer(look(item, items), item, items, lists)
    while item < items[1]:
        seen = look(item + programs, items)
        row_tile, col_tile, first_row, _, expert, _, _ = place
        group, apart, passes = share_of(place, items, SHARE)
        steps, first_col = steps_of(place, items, all_steps), col_tile * BN
        if passes > 0:
            at = lists.a_rows + row_tile * lists.capacity + group
            stage, phase = load_steps(
                stage, phase, steps, ring, descs, first_row, expert, first_col, rows_of_a(at, SHARE), True,
                STAGES, TRANSPOSED,
            )  # fmt: skip
            for number in range(1, passes):
                a_rows = rows_of_a(at + number * apart, SHARE)
                stage, phase = load_steps(
                    stage, phase, steps, ring, descs, first_row, expert, first_col, a_rows, False, STAGES,
                    TRANSPOSED,
                )  # fmt: skip
        else:
            stage, phase = load_steps(
                stage, phase, steps, ring, descs, first_row, expert, first_col, (), True, STAGES, TRANSPOSED
            )
        item += programs
        place = look_closer(seen, item, items, lists)
