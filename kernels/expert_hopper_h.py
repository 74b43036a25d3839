"""h of the experts on a Hopper GPU, from the programs of expert_hopper.py that make it to those that expand it.

Stage: run time. h is MISSING (expert_lists.py) until it is stored, and whoever needs it looks until it is not. That
saves the word that would say so, and the round trips between h and that word.
"""

# ruff: noqa: ANN001, RUF005 (pointers and blocks have no static type; Gluon knows no unpacking inside a tuple)

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fxlora.kernels.expert_order import BM, record_of
from fxlora.kernels.prefill_hopper import group_of


@gluon.jit
def makers_groups(row_tile, first, lists, SHARE: gl.constexpr) -> gl.tensor:
    """Slot, number of ranks - 1 and scaling of SHARE groups of a row tile; slot -1 past the last."""
    record, scalings = (record_of(row_tile, lists), lists.capacity), lists.scalings + row_tile * lists.capacity + first
    slot, _, last = group_of(record, first)
    found = ((slot, last, gl.load(scalings, cache_modifier=".cg")),)
    for i in gl.static_range(1, SHARE):
        slot, _, last = group_of(record, first + i)
        found = found + ((slot, last, gl.load(scalings + i, cache_modifier=".cg")),)
    return found


@gluon.jit
def slots_of(first_row, end, lists, layout: gl.constexpr) -> gl.tensor:
    """Rows of a tile, and the slot of each, -1 where there is none."""
    rows = first_row + gl.arange(0, BM, layout=layout)
    return rows.to(gl.int64), gl.load(lists.slots + rows, mask=rows < end, other=-1, cache_modifier=".cg")


@gluon.jit
def put_h(
    h, groups, FIRST: gl.constexpr, to_put, end, lists, coeffs_ptr, CHUNKS: gl.constexpr, HAS_COEFFS: gl.constexpr
) -> None:
    """Stores h of a tile's rows, 16 columns for each group: zero beyond the rank."""
    if h.shape[1] > 16:
        left, right = gl.split(gl.permute(gl.reshape(h, [BM, 2, h.shape[1] // 2]), (0, 2, 1)))
        put_h(left, groups, FIRST, to_put, end, lists, coeffs_ptr, CHUNKS, HAS_COEFFS)
        put_h(right, groups, FIRST + h.shape[1] // 32, to_put, end, lists, coeffs_ptr, CHUNKS, HAS_COEFFS)
    else:
        rows, slots = to_put
        slot, last, scaling = groups[FIRST]
        of_h: gl.constexpr = rows.type.layout.parent
        lanes = gl.arange(0, 16, layout=gl.SliceLayout(0, of_h))
        value = gl.convert_layout(h, of_h) * scaling
        if HAS_COEFFS:
            value = value * gl.load(coeffs_ptr + rows, mask=rows < end, other=0.0)[:, None]
        value = gl.where((lanes <= last % 16)[None, :], value, 0.0).to(lists.h.dtype.element_ty)
        at = lists.h + (rows * (16 * CHUNKS))[:, None] + (last - last % 16 + lanes)[None, :]
        is_own = ((slots == slot) & (slot >= 0)).to(gl.int32)[:, None] + lanes[None, :] * 0
        gl.inline_asm_elementwise(
            """{
            .reg .pred own;
            setp.ne.s32 own, $5, 0;
            @own st.relaxed.gpu.global.b32 [$2], $4;
            mov.b32 $0, 0;
            mov.b32 $1, 0;
            }""", "=r,=r,l,l,r,r,r", [at.to(gl.int64), value, is_own], dtype=gl.int32, is_pure=False, pack=2,
        )  # fmt: skip


@gluon.jit
def get_h(to_get, lists, CHUNKS: gl.constexpr) -> gl.tensor:
    """h of a tile's rows, [BM, 16] in the dtype of x for each 16 ranks, zero beyond a row's ranks: once all of it is
    there."""
    parts = (look_at_h(to_get, lists, 0, CHUNKS),)
    for chunk in gl.static_range(1, CHUNKS):
        parts = parts + (look_at_h(to_get, lists, chunk, CHUNKS),)
    return parts


@gluon.jit
def look_at_h(to_get, lists, CHUNK: gl.constexpr, CHUNKS: gl.constexpr) -> gl.tensor:
    """Part of `get_h`: every thread waits until no half of its four words is MISSING; first it looks at one alone, as
    looks cost what loads of W do.

    After LOOKS of overlap.py the launch ends with an error, a store to nowhere; a trap here would cost all registers.
    """
    rows, slots, ranks = to_get
    lanes = gl.arange(0, 16, layout=gl.SliceLayout(0, rows.type.layout.parent))
    at = lists.h + (rows * (16 * CHUNKS))[:, None] + (16 * CHUNK + lanes)[None, :]
    is_made = slots >= 0 if CHUNK == 0 else ranks > 16 * CHUNK
    is_there = is_made.to(gl.int32)[:, None] + lanes[None, :] * 0
    return gl.inline_asm_elementwise(
        """{
        .reg .pred p0, p1, p2, p3, again; .reg .b32 looks, x, t, found; .reg .b64 nowhere;
        setp.ne.s32 p0, $12, 0;
        setp.ne.s32 p1, $14, 0;
        setp.ne.s32 p2, $16, 0;
        setp.ne.s32 p3, $18, 0;
        mov.b32 $0, 0;
        mov.b32 $1, 0;
        mov.b32 $2, 0;
        mov.b32 $3, 0;
        mov.b32 looks, 0;
        mov.b64 nowhere, 0;
        LOOK:
        @p0 ld.relaxed.gpu.global.b32 $0, [$4];
        not.b32 x, $0;
        sub.u32 t, x, 0x00010001;
        and.b32 found, t, $0;
        and.b32 found, found, 0x80008000;
        add.s32 looks, looks, 1;
        setp.lt.s32 again, looks, 4000000;
        setp.ne.and.b32 again, found, 0, again;
        @again bra LOOK;
        LOOK_AT_ALL:
        @p1 ld.relaxed.gpu.global.b32 $1, [$6];
        @p2 ld.relaxed.gpu.global.b32 $2, [$8];
        @p3 ld.relaxed.gpu.global.b32 $3, [$10];
        not.b32 x, $1;
        sub.u32 t, x, 0x00010001;
        and.b32 t, t, $1;
        or.b32 found, found, t;
        not.b32 x, $2;
        sub.u32 t, x, 0x00010001;
        and.b32 t, t, $2;
        or.b32 found, found, t;
        not.b32 x, $3;
        sub.u32 t, x, 0x00010001;
        and.b32 t, t, $3;
        or.b32 found, found, t;
        and.b32 found, found, 0x80008000;
        add.s32 looks, looks, 1;
        setp.lt.s32 again, looks, 4000000;
        setp.ne.and.b32 again, found, 0, again;
        mov.b32 found, 0;
        @again bra LOOK_AT_ALL;
        setp.ge.s32 again, looks, 4000000;
        @again st.global.b32 [nowhere], looks;
        }""", "=&r,=&r,=&r,=&r,l,l,l,l,l,l,l,l,r,r,r,r,r,r,r,r", [at.to(gl.int64), is_there],
        dtype=lists.h.dtype.element_ty, is_pure=False, pack=8,
    )  # fmt: skip


@gluon.jit
def h_of_group(parts, slots, group) -> gl.tensor:
    """The part of h that a group's ranks make, [BM, 16]; zero for rows of other slots."""
    slot, _, last = group
    h = parts[0]
    for chunk in gl.static_range(1, len(parts)):
        h = gl.where(last // 16 == chunk, parts[chunk], h)
    return gl.where((slots == slot)[:, None], h, gl.zeros_like(h))
