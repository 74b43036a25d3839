"""The in-features of a tile of fused_hopper.py in parts, each a program's of its own (split K).

Stage: run time. Few columns make few tiles, too few multiprocessors to bring a tall W. Each program leaves what its
in-features contribute in memory; the last one to do so adds all of it up, in the order of the parts, whoever that is.
No program waits for another one for more than a few looks, so nothing can hang.
"""

# ruff: noqa: ANN001 (pointers and blocks of a kernel have no static type)

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language import debug_barrier

LOOKS = gl.constexpr(8)
"""How often the first part looks whether the others are there before it leaves its own like them: what it saves is the
way to memory and back, about two looks."""


@gluon.jit
def part_of(steps, PARTS: gl.constexpr) -> gl.tensor:
    """First step, of BK in-features, of this program's part, and how many steps that has."""
    part = gl.program_id(1)
    first = part * steps // PARTS
    return first, (part + 1) * steps // PARTS - first


@gluon.jit
def add_parts(acc, sums_ptr, counts_ptr, PARTS: gl.constexpr) -> gl.tensor:
    """The sum of a tile's parts, of which acc is this program's, and whether this program is the one that has it.

    sums: fp32 [tiles, PARTS, elements of acc]; counts: int32 [tiles], zero before the launch.
    """
    ROWS: gl.constexpr = acc.shape[0]
    COLS: gl.constexpr = acc.shape[1]
    tile, part = gl.program_id(0), gl.program_id(1)
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, acc.type.layout))
    cols = gl.arange(0, COLS, layout=gl.SliceLayout(0, acc.type.layout))
    at = sums_ptr + tile * (PARTS * ROWS * COLS) + rows[:, None] * COLS + cols[None, :]
    found, looks = gl.to_tensor(0), gl.to_tensor(0)
    if part == 0:  # adapters made it late: the others may have left theirs
        while (found < PARTS - 1) & (looks < LOOKS):
            found, looks = gl.atomic_add(counts_ptr + tile, 0, sem="acquire", scope="gpu"), looks + 1
    if found < PARTS - 1:
        gl.store(at + part * (ROWS * COLS), acc)
        debug_barrier()
        found = gl.atomic_add(counts_ptr + tile, 1, sem="acq_rel", scope="gpu")
    total = gl.zeros_like(acc)
    if found == PARTS - 1:
        for i in gl.static_range(PARTS):
            is_other = (rows >= 0)[:, None] & (cols >= 0)[None, :] & (part != i)
            other = gl.load(at + i * (ROWS * COLS), mask=is_other, other=0.0, cache_modifier=".cg")
            total += gl.where(is_other, other, acc)
    return total, found == PARTS - 1
