"""A linear over some rows whose tiles take their adapters' part along: y = x W^T + bias + h B in one pass.

Stage: run time, between `lora_linear.py`, which picks the tiles, and the kernels. For rows or columns so many that sums
left in memory (decode.py) cost more than they save, and for more rows where TMA cannot read them (prefill.py). Two
launches: group_shrink.py lists the groups of each row tile and makes h while the second one, here, multiplies; that one
reads both behind its last in-features, and adds h B as in-features more. A group's members share both. No program waits
for another of its launch.

Arithmetic: h = coeff * (scaling * (x A^T)) in fp32, rounded to the dtype of x; h B is accumulated onto the base result,
16 ranks at a time, slots ascending. Rows of several tiles are taken in the order of their slots, so that a tile meets
few adapters; a row's bits do not depend on where it lies. B has to be finite between `start` and `start + rank`.

Letters: T rows, J slots per row, K in-features, N out-features.
"""

# ruff: noqa: ANN001, C419 (blocks have no static type; a list is cheaper; a choice at compile time is an `if`)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fxlora.kernels.call import LinearCall, Plan
from fxlora.kernels.decode_gemm import along_cols, along_rows, product
from fxlora.kernels.group_shrink import Scratch, scratch_of, shrink_groups
from fxlora.kernels.groups import adapters_of, add_groups, count_groups
from fxlora.kernels.launch import Launcher
from fxlora.kernels.overlap import let_later_start, wait_for_earlier
from fxlora.kernels.tiles import FusedTiles
from fxlora.kernels.triton_helpers import cdiv, whole, whole_rows


@triton.jit
def fused_tile(
    row_tile, col_tile, x, weight, w_desc, bias, y_ptr, adapters, segments_ptr, num_rows, num_features, num_cols,
    J: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, SWAP: tl.constexpr,
    SORTED: tl.constexpr, EVEN: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_POOL: tl.constexpr, STAGES: tl.constexpr,
    EXPAND_STAGES: tl.constexpr, UNITS: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """One tile of one member's y: base product, bias, adapters, one store."""
    weight, num_cols = whole_rows(weight, UNITS[0]), whole(num_cols, UNITS[1])
    places, cols = row_tile * BM + tl.arange(0, BM), col_tile * BN + tl.arange(0, BN)
    row_mask, col_mask = places < num_rows, cols < num_cols
    rows = places.to(tl.int64)
    if SORTED:
        rows = tl.load(segments_ptr + places, mask=row_mask, other=num_rows).to(tl.int64)
    acc = product(
        x[0] + rows * x[1], weight[0] + cols.to(tl.int64) * weight[1], w_desc, x[2], weight[2], col_tile * BN, row_mask,
        col_mask, 0, num_features, num_features, BM, BN, BK, SWAP, EVEN, STAGES,
    )  # fmt: skip
    if HAS_BIAS:
        values = tl.load(bias[0] + cols * bias[1], mask=col_mask, other=0.0)
        acc += along_cols(values.to(tl.float32), SWAP)
    if HAS_POOL:
        wait_for_earlier(PDL)
        count = count_groups(row_tile, adapters)
        acc = add_groups(
            acc, row_tile, 0, count, rows, cols, adapters, num_rows, num_cols, J, BM, BR, SWAP, EXPAND_STAGES
        )
    mask = along_rows(row_mask, SWAP) & along_cols(col_mask, SWAP)
    at = along_rows(rows * num_cols, SWAP) + along_cols(cols, SWAP)
    tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "max_adapters"])
def fused_kernel(
    x,  # [T, K]: pointer, strides
    weights,  # of each member: pointer to [N, K], strides
    w0_desc,  # the same, None past the last and where TMA does not read them
    w1_desc,
    w2_desc,
    w3_desc,
    biases,  # of each member: pointer to [N], stride
    ys,  # of each member: pointer to [T, N], contiguous
    h_ptr,  # [members, T * J, W], like x
    h_width,  # W
    groups_ptr,  # int32 [members, row tiles, list_words(capacity)]
    capacity,
    segments_ptr,
    slots_ptr,  # int32 [T, J], contiguous
    sites,  # of each member: A [P, K], start, rank, scaling
    b_ptrs,  # of each member: B [P, N]
    widths,  # N of each member
    num_rows,
    num_features,
    max_adapters,
    J: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,  # ranks that are expanded at once
    SWAP: tl.constexpr,
    SORTED: tl.constexpr,  # rows are taken in the order of their slots
    EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,  # one flag for each member
    HAS_POOL: tl.constexpr,  # one flag for each member
    STAGES: tl.constexpr,
    EXPAND_STAGES: tl.constexpr,
    UNITS: tl.constexpr,  # of in-features and of out-features, as in triton_helpers.whole
    PDL: tl.constexpr,
    FIRST: tl.constexpr,  # no launch of this call comes before
) -> None:
    """The members' tiles, one after another; row tiles first."""
    wait_for_earlier(PDL and FIRST)
    let_later_start(PDL)
    x, num_features = whole_rows(x, UNITS[0]), whole(num_features, UNITS[0])
    tiles_m = tl.cdiv(num_rows, BM)
    program, begin = tl.program_id(0), 0
    w_descs = (w0_desc, w1_desc, w2_desc, w3_desc)
    for member in tl.static_range(len(HAS_POOL)):
        end = begin + tl.cdiv(widths[member], BN) * tiles_m
        if (program >= begin) & (program < end):
            adapters = None
            if HAS_POOL[member]:
                adapters = adapters_of(
                    member, b_ptrs[member], sites[member], max_adapters, slots_ptr, h_ptr, h_width, groups_ptr,
                    capacity, num_rows * J, tiles_m,
                )  # fmt: skip
            fused_tile(
                (program - begin) % tiles_m, (program - begin) // tiles_m, x, weights[member], w_descs[member],
                biases[member], ys[member], adapters, segments_ptr, num_rows, num_features, widths[member], J, BM, BN,
                BK, BR, SWAP, SORTED, EVEN, HAS_BIAS[member], HAS_POOL[member], STAGES, EXPAND_STAGES, UNITS, PDL,
            )  # fmt: skip
        begin = end
    wait_for_earlier(PDL)


_launcher = Launcher(fused_kernel)


def fused(call: LinearCall, tiles: FusedTiles) -> list[torch.Tensor]:
    """-> [..., N] of each member."""
    outputs = tuple(call.new_outputs())
    scratch = scratch_of(call, tiles.gemm.BM, sorts=True)
    if call.members.has_pools:
        shrink_groups(call, scratch, tiles.shrink)
    by_tma = tiles.w_tma and call.rows_by_tma(*call.weights)
    plan = call.plan(_launcher, tiles, lambda: _plan(call, scratch, tiles, by_tma), step=by_tma)
    call.launch(
        plan,
        (call.x, *call.x.stride()),
        call.strided_weights,
        *call.described_weights((tiles.gemm.BN, tiles.gemm.BK), by_tma),
        call.strided_biases,
        outputs,
        scratch.h,
        scratch.width,
        scratch.groups,
        scratch.capacity,
        call.segments,
        scratch.slots,
        call.members.a_pools,
        call.members.b_pools,
        call.widths,
        *plan.numbers,
    )
    return list(outputs)


def _plan(call: LinearCall, scratch: Scratch, tiles: FusedTiles, by_tma: bool) -> Plan:
    tile = tiles.gemm
    return call.planned(
        _launcher,
        (sum([cdiv(n, tile.BN) for n in call.widths]) * cdiv(call.rows, tile.BM),),
        (call.rows, call.features, call.members.max_adapters),
        tile.num_warps,
        J=call.width,
        BM=tile.BM,
        BN=tile.BN,
        BK=tile.BK,
        BR=tiles.BR,
        SWAP=tile.SWAP,
        SORTED=scratch.is_sorted,
        EVEN=call.features % tile.BK == 0 and (by_tma or not any([n % tile.BN for n in call.widths])),
        HAS_BIAS=call.has_bias,
        HAS_POOL=call.members.has_pool,
        STAGES=tile.num_stages,
        EXPAND_STAGES=tiles.stages,
        UNITS=call.units,
        PDL=call.overlap,
        FIRST=not call.members.has_pools,
    )
