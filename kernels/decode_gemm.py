"""The base product of a linear over few rows, W read once: y = x W^T + bias + delta. It runs beside expand.py's.

Stage: run time. delta is looked at only once the product is done; rows without an adapter get nothing added. K may be
split over programs; whichever of a tile ends last adds the parts in order, so the bits do not depend on timing.

Letters: T rows, J slots per row, E = T * J entries, K in-features, N out-features.
"""

# ruff: noqa: ANN001 (pointers and blocks of a Triton kernel have no static type)

from __future__ import annotations

import triton
import triton.language as tl

from fxlora.kernels.overlap import let_later_start, wait_for_earlier
from fxlora.kernels.triton_helpers import dot


@triton.jit
def along_rows(values, SWAP: tl.constexpr) -> tl.tensor:
    """[BM] values laid along the rows of the accumulator."""
    return values[None, :] if SWAP else values[:, None]


@triton.jit
def along_cols(values, SWAP: tl.constexpr) -> tl.tensor:
    """[BN] values laid along the columns of the accumulator."""
    return values[:, None] if SWAP else values[None, :]


@triton.jit
def product(
    x_at, w_at, x_col_stride, w_col_stride, row_mask, col_mask, first, last, num_features,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SWAP: tl.constexpr, EVEN: tl.constexpr,
    STAGES: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """x W^T over in-features first .. last: [BM, BN], or W x^T [BN, BM] (SWAP: W as wgmma's A operand).

    EVEN: no column of W and no in-feature of the blocks lies outside.
    """
    acc = tl.zeros([BN, BM] if SWAP else [BM, BN], tl.float32)
    for block in tl.range(first, last, BK, num_stages=STAGES):
        ks = block + tl.arange(0, BK)
        inside = ks < num_features
        x_mask = row_mask[:, None] if EVEN else row_mask[:, None] & inside[None, :]
        x = tl.load(x_at[:, None] + ks[None, :] * x_col_stride, mask=x_mask, other=0.0)  # [BM, BK]
        if EVEN:
            w = tl.load(w_at[:, None] + ks[None, :].to(tl.int64) * w_col_stride)  # [BN, BK]
        else:
            w_mask = col_mask[:, None] & inside[None, :]
            w = tl.load(w_at[:, None] + ks[None, :].to(tl.int64) * w_col_stride, mask=w_mask, other=0.0)
        acc = dot(w, x.T, acc, "ieee") if SWAP else dot(x, w.T, acc, "ieee")
    return acc


@triton.jit
def has_adapter(slots, rank_ptr, rows, row_mask, j, max_adapters) -> tl.tensor:
    """[BM]: whether entry j of each row has an adapter of some rank."""
    at = slots[0] + rows.to(tl.int64) * slots[1] + j * slots[2]
    slot = tl.load(at, mask=row_mask, other=-1)
    return tl.load(rank_ptr + slot, mask=(slot >= 0) & (slot < max_adapters), other=0) > 0


@triton.jit
def add_delta(
    acc, delta_ptr, slots, rank_ptr, rows, row_mask, cols, mask, has, num_cols, max_adapters,
    J: tl.constexpr, SWAP: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """acc plus the delta of each j in order; rows without an adapter keep their bits. has: [BM], of j = 0."""
    for j in tl.static_range(J):
        if j > 0:
            has = has_adapter(slots, rank_ptr, rows, row_mask, j, max_adapters)
        chosen = along_rows(has, SWAP) & mask
        at = along_rows((rows * J + j).to(tl.int64) * num_cols, SWAP) + along_cols(cols, SWAP)
        delta = tl.load(delta_ptr + at, mask=chosen, other=0.0, cache_modifier=".cg")
        acc = tl.where(chosen, acc + delta, acc)
    return acc


@triton.jit
def gemm_tile(
    x, w, bias, y_ptr, delta_ptr, parts_ptr, counter_ptr, slots, rank_ptr, tile, num_rows, num_features, num_cols,
    max_adapters, J: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
    SWAP: tl.constexpr, EVEN: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_POOL: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
) -> None:  # fmt: skip
    """One part of one tile [BM, BN] of one member; tile counts parts first, then rows, then columns."""
    x_ptr, x_row_stride, x_col_stride = x
    w_ptr, w_row_stride, w_col_stride = w
    split = tile % SPLIT
    tile = tile // SPLIT
    tiles_m = tl.cdiv(num_rows, BM)
    rows = (tile % tiles_m) * BM + tl.arange(0, BM)
    cols = (tile // tiles_m) * BN + tl.arange(0, BN)
    row_mask = rows < num_rows
    col_mask = cols < num_cols
    has = row_mask
    if HAS_POOL:
        has = has_adapter(slots, rank_ptr, rows, row_mask, 0, max_adapters)
    each = tl.cdiv(tl.cdiv(num_features, BK), SPLIT) * BK
    first = split * each
    x_at = x_ptr + rows.to(tl.int64) * x_row_stride
    w_at = w_ptr + cols.to(tl.int64) * w_row_stride
    acc = product(
        x_at, w_at, x_col_stride, w_col_stride, row_mask, col_mask, first, tl.minimum(first + each, num_features),
        num_features, BM, BN, BK, SWAP, EVEN, STAGES,
    )  # fmt: skip
    y_at = along_rows(rows.to(tl.int64) * num_cols, SWAP) + along_cols(cols, SWAP)
    mask = along_rows(row_mask, SWAP) & along_cols(col_mask, SWAP)
    done = True
    if SPLIT > 1:
        acc, done = add_parts(acc, parts_ptr, counter_ptr + tile, y_at, mask, split, num_rows * num_cols, SPLIT)
    wait_for_earlier(PDL)
    if done:
        if HAS_BIAS:
            values = tl.load(bias[0] + cols * bias[1], mask=col_mask, other=0.0).to(tl.float32)
            acc += along_cols(values, SWAP)
        if HAS_POOL:
            acc = add_delta(
                acc, delta_ptr, slots, rank_ptr, rows, row_mask, cols, mask, has, num_cols, max_adapters, J, SWAP
            )
        tl.store(y_ptr + y_at, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_parts(acc, parts_ptr, counter_ptr, y_at, mask, split, size, SPLIT: tl.constexpr) -> tl.tensor:
    """The sum of all parts of a tile, in order, and whether this program is the one that has it."""
    tl.store(parts_ptr + split.to(tl.int64) * size + y_at, acc, mask=mask)
    tl.debug_barrier()
    done = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == SPLIT - 1
    if done:
        acc = tl.load(parts_ptr + y_at, mask=mask, other=0.0, cache_modifier=".cg")
        for part in tl.static_range(1, SPLIT):
            acc += tl.load(parts_ptr + part * size + y_at, mask=mask, other=0.0, cache_modifier=".cg")
        tl.store(counter_ptr, 0)
    return acc, done


@triton.jit(do_not_specialize=["num_rows", "max_adapters"])
def gemm_kernel(
    x,  # [T, K]: pointer, strides
    weights,  # of each member: pointer to [N, K], strides
    biases,  # of each member: pointer to [N], stride
    ys,  # of each member: pointer to [T, N], contiguous
    delta_ptr,  # fp32, the members' [E, N] one after another
    parts_ptr,  # fp32, the members' [SPLIT, T, N] one after another
    counters_ptr,  # int32, one for each tile, zero before and after
    slots,  # int32 [T, J]: pointer, strides
    sites,  # of each member: A, start, rank, scaling
    widths,  # N of each member
    num_rows,
    num_features,
    max_adapters,
    J: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    SWAP: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,  # one flag for each member
    HAS_POOL: tl.constexpr,  # one flag for each member
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Programs of the members' tiles one after another."""
    let_later_start(PDL)
    program = tl.program_id(0)
    tiles_m = tl.cdiv(num_rows, BM)
    begin = 0
    width = 0
    for member in tl.static_range(len(HAS_POOL)):
        end = begin + tl.cdiv(widths[member], BN) * tiles_m * SPLIT
        if (program >= begin) & (program < end):
            gemm_tile(
                x, weights[member], biases[member], ys[member], delta_ptr + width * num_rows * J,
                parts_ptr + width * num_rows * SPLIT, counters_ptr + begin // SPLIT, slots, sites[member][2],
                program - begin, num_rows, num_features, widths[member], max_adapters, J, BM, BN, BK, SPLIT, SWAP, EVEN,
                HAS_BIAS[member], HAS_POOL[member], STAGES, PDL,
            )  # fmt: skip
        begin = end
        width += widths[member]
