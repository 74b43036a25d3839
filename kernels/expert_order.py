"""Which program of expert_hopper.py computes which tile, and which of them make h.

Stage: run time, read by every role of that kernel. An item is a tile of y, in the order of expert_call.tile_item.
Program p of P takes items p, p + P, p + 2 P, ..; those from a multiple of P to the next are a round.

Of the slots that a row tile meets, each of its first column tiles makes h of SHARE: of so many column tiles that the
items of an expert up to the last of them are no more than two rounds, or else of one. So what the first unfinished item
waits for is itself or less than 2 P items later: the first or the second unfinished item of its program, whose two
groups of warps work on one each and wait for nobody before they have stored what they make. All programs run at once,
hence nobody waits in vain.
"""

# ruff: noqa: ANN001 (blocks have no static type)

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fxlora.kernels.expert_lists import HEIGHT
from fxlora.kernels.groups import FIELDS

BM = gl.constexpr(HEIGHT.value)
"""Rows of a tile."""


@gluon.jit
def record_of(row_tile, lists) -> gl.tensor:
    """Where a row tile's list of groups begins."""
    return lists.groups + row_tile * (FIELDS * lists.capacity + 1)


@gluon.jit
def look(item, items) -> gl.tensor:
    """What the list of row tiles says of an item's expert: its number, first row tile, first row and end; of the last
    expert's past the last item. items: the list, how many there are, column tiles, E."""
    at = items[0] + 4 * (gl.minimum(item, items[1] - 1) // items[2] + 1)
    return gl.load(at), gl.load(at + 1), gl.load(at + 2), gl.load(at + 3)


@gluon.jit
def look_closer(seen, item, items, lists) -> gl.tensor:
    """Row tile, column tile, first row and end of an item; its expert, the row tiles of that, and how many groups its
    row tile has."""
    expert, first_tile, start, end = seen
    tiles_m, base = gl.cdiv(end - start, BM), first_tile * items[2]
    in_expert = gl.minimum(item, items[1] - 1) - base
    in_column = in_expert % tiles_m
    down = (in_column + (base + in_expert - in_column) // gl.num_programs(0)) % tiles_m
    groups = gl.load(record_of(first_tile + down, lists) + FIELDS * lists.capacity, cache_modifier=".cg")
    return first_tile + down, in_expert // tiles_m, start + down * BM, end, expert, tiles_m, groups


@gluon.jit
def share_of(place, items, SHARE: gl.constexpr) -> gl.tensor:
    """The first group whose h an item makes, how far the next of its are, and in how many passes over x."""
    _, col_tile, _, _, _, tiles_m, groups = place
    makers = gl.minimum(items[2], gl.maximum(1, 2 * gl.num_programs(0) // tiles_m))
    passes = gl.cdiv(gl.maximum(groups - col_tile * SHARE, 0), makers * SHARE)
    passes = gl.where(col_tile < makers, passes, 0)
    return gl.where(passes > 0, col_tile * SHARE, 0), makers * SHARE, passes


@gluon.jit
def steps_of(place, items, all_steps) -> gl.tensor:
    """Steps over the in-features; none where the rows have no expert."""
    return gl.where(place[4] < items[3], all_steps, 0)


@gluon.jit
def blocks_of(place, items, all_steps, SHARE: gl.constexpr) -> gl.tensor:
    """Blocks of x that an item takes."""
    return steps_of(place, items, all_steps) * gl.maximum(1, share_of(place, items, SHARE)[2])
