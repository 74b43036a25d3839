"""`lora_linear` for many rows on a GPU with TMA: the shrink, then one launch of all members' base GEMM and expand.

Stage: run time. group_shrink.py lists the groups of each row tile and makes h, beside the product's launch. That one's
programs stay resident and divide the tiles of y, one member's after the other's; they need h only behind the
in-features of their first tile. Grids come from shapes alone, slots, ranks and scalings are read on the device: a
captured CUDA graph serves whatever is loaded at replay. No program waits for another of its launch. On a Hopper GPU
large calls get the product of prefill_hopper.py.

Arithmetic: h = coeff * (scaling * (x A^T)) in fp32, rounded to the dtype of x; h B is accumulated onto the base result,
16 ranks at a time, slots ascending. A row of another slot meets zeros in h, which leave its fp32 sum as it is, so its
bits depend on its own adapters alone; B has to be finite between `start` and `start + rank`, A need not be.

Letters: T rows, J slots per row, K in-features, N out-features.
"""

# ruff: noqa: ANN001, C419, RET505 (pointers and blocks have no static type; a list costs less host time than a generator)

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fxlora.kernels.call import MOST_MEMBERS, LinearCall, Plan
from fxlora.kernels.entry import release
from fxlora.kernels.group_shrink import Scratch, scratch_of, shrink_groups
from fxlora.kernels.groups import adapters_of, add_groups, count_groups, load_b, load_groups, load_h
from fxlora.kernels.launch import Described, Launcher
from fxlora.kernels.overlap import let_later_start, wait_for_earlier
from fxlora.kernels.prefill_tiles import BesideTile, HopperTile, PrefillTile
from fxlora.kernels.triton_helpers import cdiv, dot, multiprocessors

logger = logging.getLogger(__name__)

_BAND = 8  # row tiles whose tiles of y follow each other, so that W and x are read from L2
_AHEAD = 6  # loads of the expand are issued this many steps before the last one of the base GEMM


@triton.jit
def tile_rows(row_tile, BM: tl.constexpr) -> tl.tensor:
    """Rows of a row tile."""
    return (row_tile * BM + tl.arange(0, BM)).to(tl.int64)


@triton.jit
def place(tile, tiles_m, tiles_n, BAND: tl.constexpr) -> tl.tensor:
    """Row tile and column tile of one tile of y; BAND row tiles follow each other, each column's from another on: tiles
    of rows with many adapters take longer, and few programs would have them all."""
    band, in_band = tile // (BAND * tiles_n), tile % (BAND * tiles_n)
    height = tl.minimum(tiles_m - band * BAND, BAND)
    column = in_band // height
    return band * BAND + (in_band + column) % height, column


@triton.jit
def next_member(first_tile, tiles) -> tl.tensor:
    """How many of a member's tiles this program has from its first on, and the first tile of the next member's, which
    are dealt out from where this one's end."""
    count = tl.cdiv(tl.maximum(tiles - first_tile, 0), tl.num_programs(0))
    return count, first_tile + count * tl.num_programs(0) - tiles


@triton.jit
def load_w(w_desc, col, k, TRANSPOSED: tl.constexpr) -> tl.tensor:
    """[BK, BN] of a member's W, transposed. TRANSPOSED: it lies as [K, N]."""
    if TRANSPOSED:
        return w_desc.load([k, col])
    else:
        return w_desc.load([col, k]).T


@triton.jit
def adapted_tile(
    x_desc, w_desc, row_tile, col_tile, adapters, num_rows, num_cols, steps, J: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
    DEPTH: tl.constexpr, LATER: tl.constexpr, TRANSPOSED: tl.constexpr, PDL: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """x W^T + h B of one tile of y.

    The loads of the first DEPTH times BR ranks hide behind the last steps of the base GEMM: AHEAD steps before the end
    the groups are asked for, a step later h and B, and nothing waits for them before the end. The others follow in a
    loop of their own, LATER[0] ranks at a time in LATER[1] stages.
    """
    rows, cols = tile_rows(row_tile, BM), col_tile * BN + tl.arange(0, BN)
    count = 0
    no_slots, zeros = tl.full([BR], -1, tl.int32), tl.full([BR], 0, tl.int32)
    columns, more_columns = (no_slots, zeros, zeros), (no_slots, zeros, zeros)
    h_tile, more_h = tl.zeros([BM, BR], adapters.h.dtype.element_ty), tl.zeros([BM, BR], adapters.h.dtype.element_ty)
    b_tile, more_b = tl.zeros([BR, BN], adapters.h.dtype.element_ty), tl.zeros([BR, BN], adapters.h.dtype.element_ty)
    acc = tl.zeros([BM, BN], tl.float32)
    ask_at = tl.maximum(steps - AHEAD, 0)
    for step in tl.range(0, steps, num_stages=STAGES):
        x_tile = x_desc.load([row_tile * BM, step * BK])  # [BM, BK]
        acc = dot(x_tile, load_w(w_desc, col_tile * BN, step * BK, TRANSPOSED), acc, "ieee")
        if step == ask_at:
            wait_for_earlier(PDL)
            count = count_groups(row_tile, adapters)
            columns = load_groups(row_tile, 0, adapters, BR)
            if DEPTH == 2:
                more_columns = load_groups(row_tile, BR // 16, adapters, BR)
        if step == tl.minimum(ask_at + 1, steps - 1):
            h_tile = load_h(rows, columns, adapters, num_rows, J, BM, BR)
            b_tile = load_b(cols, columns, adapters, num_cols, BR)
            if DEPTH == 2:
                more_h = load_h(rows, more_columns, adapters, num_rows, J, BM, BR)
                more_b = load_b(cols, more_columns, adapters, num_cols, BR)
    if count > 0:
        acc = dot(h_tile, b_tile, acc, "ieee")
    if (DEPTH == 2) & (count > BR // 16):
        acc = dot(more_h, more_b, acc, "ieee")
    if count > DEPTH * (BR // 16):
        acc = add_groups(
            acc, row_tile, DEPTH * (BR // 16), count, rows, cols, adapters, num_rows, num_cols, J, BM, LATER[0], False,
            LATER[1],
        )  # fmt: skip
    return acc


@triton.jit
def store_tile(y_desc, row, col, acc, BM: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr) -> None:
    """One tile of y; in halves it needs half the shared memory."""
    if PARTS == 2:
        left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
        y_desc.store([row, col], left.to(y_desc.dtype))
        y_desc.store([row, col + BN // 2], right.to(y_desc.dtype))
    else:
        y_desc.store([row, col], acc.to(y_desc.dtype))


@triton.jit
def member_tiles(
    first_tile, x_desc, w_desc, y_desc, bias, adapters, num_rows, num_features, num_cols, J: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, BAND: tl.constexpr, PARTS: tl.constexpr,
    STAGES: tl.constexpr, AHEAD: tl.constexpr, DEPTH: tl.constexpr, LATER: tl.constexpr, TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """One program's tiles of one member's y, from this one on: base GEMM, adapters, bias, one store."""
    tiles_m, tiles_n, steps = tl.cdiv(num_rows, BM), tl.cdiv(num_cols, BN), tl.cdiv(num_features, BK)
    for tile in tl.range(first_tile, tiles_m * tiles_n, tl.num_programs(0), num_stages=1):
        row_tile, col_tile = place(tile, tiles_m, tiles_n, BAND)
        if adapters is not None:
            acc = adapted_tile(
                x_desc, w_desc, row_tile, col_tile, adapters, num_rows, num_cols, steps, J, BM, BN, BK, BR, STAGES,
                AHEAD, DEPTH, LATER, TRANSPOSED, PDL,
            )  # fmt: skip
        else:
            acc = tl.zeros([BM, BN], tl.float32)
            for step in tl.range(0, steps, num_stages=STAGES):
                x_tile = x_desc.load([row_tile * BM, step * BK])
                acc = dot(x_tile, load_w(w_desc, col_tile * BN, step * BK, TRANSPOSED), acc, "ieee")
        if HAS_BIAS:
            cols = col_tile * BN + tl.arange(0, BN)
            acc += tl.load(bias[0] + cols * bias[1], mask=cols < num_cols, other=0.0).to(tl.float32)[None, :]
        store_tile(y_desc, row_tile * BM, col_tile * BN, acc, BM, BN, PARTS)


@triton.jit(do_not_specialize=["num_rows", "max_adapters"])
def prefill_kernel(
    x_desc,  # [T, K]
    w0_desc,  # of each member [N, K] (TRANSPOSED: [K, N]), None past the last
    w1_desc,
    w2_desc,
    w3_desc,
    y0_desc,  # of each member [T, N], None past the last
    y1_desc,
    y2_desc,
    y3_desc,
    biases,  # of each member: pointer to [N], stride
    h_ptr,  # [members, T * J, W], like x
    h_width,  # W
    groups_ptr,  # int32 [members, row tiles, list_words(capacity)]
    capacity,
    slots_ptr,  # int32 [T, J], contiguous
    sites,  # of each member: A [P, K], start, rank, scaling
    b_ptrs,  # of each member: B [P, N]
    num_rows,
    feature_octets,  # K / 8
    col_octets,  # N / 8 of each member
    max_adapters,
    J: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    BAND: tl.constexpr,
    PARTS: tl.constexpr,  # y is stored in column halves (2) or at once (1)
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    DEPTH: tl.constexpr,
    LATER: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # every W lies as [K, N]
    HAS_BIAS: tl.constexpr,  # one flag for each member
    HAS_POOL: tl.constexpr,  # one flag for each member
    PDL: tl.constexpr,
    FIRST: tl.constexpr,  # no launch of this call comes before
) -> None:
    """Every tile of the members, one after another, dealt out to the programs in turn."""
    wait_for_earlier(PDL and FIRST)
    let_later_start(PDL)
    w_descs, y_descs = (w0_desc, w1_desc, w2_desc, w3_desc), (y0_desc, y1_desc, y2_desc, y3_desc)
    tiles_m = tl.cdiv(num_rows, BM)
    first_tile = tl.program_id(0)
    for member in tl.static_range(len(HAS_POOL)):
        num_cols = col_octets[member] * 8
        adapters = None
        if HAS_POOL[member]:
            adapters = adapters_of(
                member, b_ptrs[member], sites[member], max_adapters, slots_ptr, h_ptr, h_width, groups_ptr, capacity,
                num_rows * J, tiles_m,
            )  # fmt: skip
        member_tiles(
            first_tile, x_desc, w_descs[member], y_descs[member], biases[member], adapters, num_rows,
            feature_octets * 8, num_cols, J, BM, BN, BK, BR, BAND, PARTS, STAGES, AHEAD, DEPTH, LATER,
            TRANSPOSED, HAS_BIAS[member], PDL,
        )  # fmt: skip
        _, first_tile = next_member(first_tile, tiles_m * tl.cdiv(num_cols, BN))
    wait_for_earlier(PDL)


_launcher = Launcher(prefill_kernel)


def prefill(call: LinearCall, tile: PrefillTile | HopperTile) -> list[torch.Tensor]:
    """-> [..., N] of each member; bf16 or fp16.

    x and every weight have unit stride along K and rows 16 bytes apart, or every weight has unit stride along N and
    columns 16 bytes apart; K and N are multiples of 8, none is 0.
    """
    transposed = lie_transposed(call)
    scratch = scratch_of(call, tile.BM, sorts=False)
    if call.members.has_pools:
        _shrink(call, scratch, tile)
    outputs = call.new_outputs()
    product = _product(tile, scratch.width)
    plan = call.plan(product.launcher, tile, lambda: _plan(call, tile, product, transposed), step=transposed)
    nothing = (None,) * (MOST_MEMBERS - len(outputs))
    call.launch(
        plan,
        product.describe(call.x, (tile.BM, tile.BK)),
        *call.described_weights((tile.BN, tile.BK), transposed=transposed, describe=product.describe),
        *[product.describe(y.view(call.rows, -1), product.y_block) for y in outputs],
        *nothing,
        call.strided_biases,
        scratch.h,
        scratch.width,
        scratch.groups,
        scratch.capacity,
        scratch.slots,
        call.members.a_pools,
        call.members.b_pools,
        *plan.numbers,
    )
    return outputs


def _shrink(call: LinearCall, scratch: Scratch, tile: PrefillTile | HopperTile) -> None:
    """The launch before the product's."""
    if isinstance(tile.shrink, BesideTile):
        from fxlora.kernels.prefill_hopper_shrink import shrink_beside  # another Triton may not have what it imports

        shrink_beside(call, scratch, tile.shrink)
    else:
        shrink_groups(call, scratch, tile.shrink)


class Product(NamedTuple):
    """What differs between the kernels that make the product."""

    launcher: Launcher
    programs: int  # for each multiprocessor
    num_warps: int
    y_block: tuple[int, int]  # of a store
    constants: Mapping[str, Any]
    describe: Callable[[torch.Tensor, tuple[int, ...]], Described] = Described


@cache
def _product(tile: PrefillTile | HopperTile, width: int) -> Product:
    """width: W."""
    if isinstance(tile, HopperTile):
        from fxlora.kernels import prefill_hopper as hopper  # another Triton may not have what it imports

        y_block = (tile.BM // 2 if tile.shared else tile.BM, hopper.PART.value)
        constants = {"BAND": tile.band, "AHEAD": tile.ahead, "SHARED": tile.shared}
        return Product(hopper.launcher, tile.programs, 4, y_block, constants, hopper.describe)
    parts = 2 if tile.BN >= 128 else 1
    depth = 1 if min(2 * width, 64) <= tile.BR else 2
    constants = {"BR": tile.BR, "BAND": _BAND, "PARTS": parts, "AHEAD": _AHEAD, "DEPTH": depth, "LATER": tile.later}
    return Product(_launcher, tile.programs, tile.num_warps, (tile.BM, tile.BN // parts), constants)


def _plan(call: LinearCall, tile: PrefillTile | HopperTile, product: Product, transposed: bool) -> Plan:
    members = call.members
    tiles = cdiv(call.rows, tile.BM) * sum([cdiv(n, tile.BN) for n in call.widths])
    octets = tuple([n // 8 for n in call.widths])
    return call.planned(
        product.launcher,
        (min(tiles, product.programs * multiprocessors(call.x.device)),),
        (call.rows, call.features // 8, octets, members.max_adapters),
        product.num_warps,
        J=call.width,
        BM=tile.BM,
        BN=tile.BN,
        BK=tile.BK,
        STAGES=tile.num_stages,
        **product.constants,
        TRANSPOSED=transposed,
        HAS_BIAS=call.has_bias,
        HAS_POOL=members.has_pool,
        PDL=call.overlap,
        FIRST=not members.has_pools,
    )


def lie_transposed(call: LinearCall) -> bool:
    """Whether every weight's out-features lie side by side, as those of transformers' Conv1D do."""
    return all([weight.stride(0) == 1 and weight.stride(1) != 1 for weight in call.weights])


@cache
def has_gluon(device: torch.device) -> bool:
    """Whether kernels in Gluon serve this GPU: one of compute capability 9, and a Triton whose Gluon is known.

    Gluon is experimental: releases rename parts of it (gluon_names.py). What it makes faster is as right without it.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    known = (3, 6) <= release() <= (3, 9)
    if not known:
        logger.warning("triton %s has no Gluon that fxlora knows: most calls cost more", triton.__version__)
    return known
