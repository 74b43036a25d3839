"""`lora_linear` for many rows on a GPU with TMA: the shrink, then per member one launch of base GEMM and expand.

Stage: run time. group_shrink.py lists the groups of each row tile and makes h, beside the first member's launch. Its
programs stay resident and divide the tiles of y; they need h only behind the in-features of their first tile. Members
share row tiles, each has columns of its own to a tile. Grids come from shapes alone, slots, ranks and scalings are
read on the device: a captured CUDA graph serves whatever is loaded at replay. No program waits for another of its
launch.

Arithmetic: h = coeff * (scaling * (x A^T)) in fp32, rounded to the dtype of x; h B is accumulated onto the base result,
16 ranks at a time, slots ascending. A row of another slot meets zeros in h, which leave its fp32 sum as it is, so its
bits depend on its own adapters alone; B has to be finite between `start` and `start + rank`, A need not be.

Letters: T rows, J slots per row, K in-features, N out-features.
"""

# ruff: noqa: ANN001 (pointers and blocks of a Triton kernel have no static type)

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from fxlora.kernels.call import LinearCall, Plan
from fxlora.kernels.group_shrink import Scratch, scratch_of, shrink_groups
from fxlora.kernels.groups import Adapters, add_groups, count_groups, load_b, load_groups, load_h
from fxlora.kernels.launch import Described, Launcher
from fxlora.kernels.overlap import let_later_start, wait_for_earlier
from fxlora.kernels.tiles import PrefillTile, PrefillTiles
from fxlora.kernels.triton_helpers import cdiv, dot

_BAND = 8  # row tiles whose tiles of y follow each other, so that W and x are read from L2
_AHEAD = 6  # loads of the expand are issued this many steps before the last one of the base GEMM


@triton.jit
def tile_rows(row_tile, BM: tl.constexpr) -> tl.tensor:
    """Rows of a row tile."""
    return (row_tile * BM + tl.arange(0, BM)).to(tl.int64)


@triton.jit
def adapted_tile(
    x_desc, w_desc, row_tile, col_tile, adapters, num_rows, num_cols, steps, J: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
    DEPTH: tl.constexpr, LATER: tl.constexpr, PDL: tl.constexpr,
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
        w_tile = w_desc.load([col_tile * BN, step * BK])  # [BN, BK]
        acc = dot(x_tile, w_tile.T, acc, "ieee")
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
            acc,
            row_tile,
            DEPTH * (BR // 16),
            rows,
            cols,
            adapters,
            num_rows,
            num_cols,
            J,
            BM,
            LATER[0],
            False,
            LATER[1],
        )
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


@triton.jit(do_not_specialize=["num_rows"])
def prefill_kernel(
    x_desc,  # [T, K]
    w_desc,  # [N, K]
    y_desc,  # [T, N]
    bias_ptr,  # [N], or None
    adapters,  # or None
    num_rows,
    feature_octets,  # K / 8
    col_octets,  # N / 8
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
    HAS_BIAS: tl.constexpr,
    HAS_POOL: tl.constexpr,
    PDL: tl.constexpr,
    FIRST: tl.constexpr,  # no launch of this call comes before
) -> None:
    """Every tile of y: base GEMM, adapters, bias, one store."""
    if FIRST:
        wait_for_earlier(PDL)
    let_later_start(PDL)
    num_features, num_cols = feature_octets * 8, col_octets * 8
    tiles_m, tiles_n, steps = tl.cdiv(num_rows, BM), tl.cdiv(num_cols, BN), tl.cdiv(num_features, BK)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), num_stages=1):
        band, in_band = tile // (BAND * tiles_n), tile % (BAND * tiles_n)
        height = tl.minimum(tiles_m - band * BAND, BAND)
        row_tile, col_tile = band * BAND + in_band % height, in_band // height
        if HAS_POOL:
            acc = adapted_tile(
                x_desc, w_desc, row_tile, col_tile, adapters, num_rows, num_cols, steps, J, BM, BN, BK, BR, STAGES,
                AHEAD, DEPTH, LATER, PDL,
            )  # fmt: skip
        else:
            acc = tl.zeros([BM, BN], tl.float32)
            for step in tl.range(0, steps, num_stages=STAGES):
                x_tile, w_tile = x_desc.load([row_tile * BM, step * BK]), w_desc.load([col_tile * BN, step * BK])
                acc = dot(x_tile, w_tile.T, acc, "ieee")
        if HAS_BIAS:
            cols = col_tile * BN + tl.arange(0, BN)
            acc += tl.load(bias_ptr + cols, mask=cols < num_cols, other=0.0).to(tl.float32)[None, :]
        store_tile(y_desc, row_tile * BM, col_tile * BN, acc, BM, BN, PARTS)
    wait_for_earlier(PDL)


_launcher = Launcher(prefill_kernel)


def prefill(call: LinearCall, tiles: PrefillTiles) -> list[torch.Tensor]:
    """-> [..., N] of each member; bf16 or fp16.

    x and every weight have unit stride along K and rows 16 bytes apart, K and N are multiples of 8.
    """
    scratch = scratch_of(call, tiles.BM, sorts=False)
    if call.members.has_pools:
        shrink_groups(call, scratch, tiles.shrink)
    outputs = call.new_outputs()
    x = Described(call.x, (tiles.BM, tiles.BK))
    for member, y in enumerate(outputs):
        if y.numel():
            _launch(call, x, y.view(call.rows, -1), member, _adapters_of(call, scratch, member), scratch.width, tiles)
    return outputs


def _adapters_of(call: LinearCall, scratch: Scratch, member: int) -> Adapters | None:
    """The kernel's view of a member's pool and rows."""
    pool = call.members.fixed_b[member]
    if pool is None:
        return None
    b, start, rank = pool
    return Adapters(
        b, start, rank, call.members.max_adapters, scratch.slots, scratch.h[member], scratch.width,
        scratch.groups[member], scratch.capacity,
    )  # fmt: skip


def _launch(
    call: LinearCall, x: Described, y: torch.Tensor, member: int, adapters: Adapters | None, width: int,
    tiles: PrefillTiles,
) -> None:  # fmt: skip
    """One member's y [T, N]."""
    bias, tile = call.biases[member], tiles.members[member]
    plan = call.plan(_launcher, tiles, lambda: _plan(call, member, width, tiles), step=member)
    call.launch(
        plan,
        x,
        Described(call.weights[member], (tile.BN, tiles.BK)),
        Described(y, (tiles.BM, tile.BN // _parts(tile))),
        None if bias is None else bias.contiguous(),
        adapters,
        *plan.numbers,
    )


def _parts(tile: PrefillTile) -> int:
    return 2 if tile.BN >= 128 else 1


def _plan(call: LinearCall, member: int, width: int, tiles: PrefillTiles) -> Plan:
    columns, tile = call.widths[member], tiles.members[member]
    count = cdiv(call.rows, tiles.BM) * cdiv(columns, tile.BN)
    return call.planned(
        _launcher,
        (min(count, tile.programs * multiprocessors(call.x.device)),),
        (call.rows, call.features // 8, columns // 8),
        tile.num_warps,
        J=call.width,
        BM=tiles.BM,
        BN=tile.BN,
        BK=tiles.BK,
        BR=tile.BR,
        BAND=_BAND,
        PARTS=_parts(tile),
        STAGES=tile.num_stages,
        AHEAD=_AHEAD,
        DEPTH=1 if min(2 * width, 64) <= tile.BR else 2,
        LATER=tile.later,
        HAS_BIAS=call.has_bias[member],
        HAS_POOL=call.members.has_pool[member],
        PDL=call.overlap,
        FIRST=member == 0 and not call.members.has_pools,
    )


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of the GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
