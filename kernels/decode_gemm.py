"""First launch of a linear over few rows: sums = x W^T, W read once, and beside it h = coeff * scaling * (x A^T).

Stage: run time. The shrink's programs come first and share the GPU with those of the product; neither waits for the
other. Where rows are many, the shrink wants the matrix unit (decode_shrink.py) and is a launch of its own beside this
one. K may be split over programs, each of which leaves its part. Members without adapters are done here.

Letters: T rows, J slots per row, E = T * J entries, K in-features, N out-features.
"""

# ruff: noqa: ANN001, SIM102 (pointers and blocks have no static type; a choice at compile time is an `if` of its own)

from __future__ import annotations

import triton
import triton.language as tl

from fxlora.kernels.overlap import let_later_start, wait_for_earlier
from fxlora.kernels.shrink import shrink_entry
from fxlora.kernels.triton_helpers import dot, whole, whole_rows


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
    x_at, w_at, w_desc, x_col_stride, w_col_stride, first_col, row_mask, col_mask, first, last, num_features,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SWAP: tl.constexpr, EVEN: tl.constexpr,
    STAGES: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """x W^T over in-features first .. last: [BM, BN], or W x^T [BN, BM] (SWAP: W as wgmma's A operand).

    w_desc: W [N, K] by TMA, from column `first_col` on, in place of w_at. EVEN: no in-feature of the blocks lies
    outside, nor, without w_desc, a column of W.
    """
    acc = tl.zeros([BN, BM] if SWAP else [BM, BN], tl.float32)
    for block in tl.range(first, last, BK, num_stages=STAGES):
        ks = block + tl.arange(0, BK)
        inside = ks < num_features
        x_mask = row_mask[:, None] if EVEN else row_mask[:, None] & inside[None, :]
        x = tl.load(x_at[:, None] + ks[None, :] * x_col_stride, mask=x_mask, other=0.0)  # [BM, BK]
        if w_desc is not None:
            w = w_desc.load([first_col, block])  # zero outside
        elif EVEN:
            w = tl.load(w_at[:, None] + ks[None, :].to(tl.int64) * w_col_stride)  # [BN, BK]
        else:
            w_mask = col_mask[:, None] & inside[None, :]
            w = tl.load(w_at[:, None] + ks[None, :].to(tl.int64) * w_col_stride, mask=w_mask, other=0.0)
        acc = dot(w, x.T, acc, "ieee") if SWAP else dot(x, w.T, acc, "ieee")
    return acc


@triton.jit
def gemm_tile(
    x, w, bias, y_ptr, sums_ptr, tile, num_rows, num_features, num_cols, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, SPLIT: tl.constexpr, SWAP: tl.constexpr, EVEN: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SUMS: tl.constexpr, STAGES: tl.constexpr, UNITS: tl.constexpr,
) -> None:  # fmt: skip
    """One part of one tile [BM, BN] of one member; tile counts parts first, then rows, then columns."""
    x_ptr, x_row_stride, x_col_stride = x
    w_ptr, w_row_stride, w_col_stride = whole_rows(w, UNITS[0])
    num_cols = whole(num_cols, UNITS[1])
    split = tile % SPLIT
    tile = tile // SPLIT
    tiles_m = tl.cdiv(num_rows, BM)
    rows = (tile % tiles_m) * BM + tl.arange(0, BM)
    first_col = (tile // tiles_m) * BN
    cols = first_col + tl.arange(0, BN)
    row_mask = rows < num_rows
    col_mask = cols < num_cols
    each = tl.cdiv(tl.cdiv(num_features, BK), SPLIT) * BK
    first = split * each
    x_at = x_ptr + rows.to(tl.int64) * x_row_stride
    w_at = w_ptr + cols.to(tl.int64) * w_row_stride
    acc = product(
        x_at, w_at, None, x_col_stride, w_col_stride, first_col, row_mask, col_mask, first,
        tl.minimum(first + each, num_features), num_features, BM, BN, BK, SWAP, EVEN, STAGES,
    )  # fmt: skip
    y_at = along_rows(rows.to(tl.int64) * num_cols, SWAP) + along_cols(cols, SWAP)
    mask = along_rows(row_mask, SWAP) & along_cols(col_mask, SWAP)
    if HAS_SUMS:
        tl.store(sums_ptr + split.to(tl.int64) * num_rows * num_cols + y_at, acc, mask=mask)
    else:
        if HAS_BIAS:
            values = tl.load(bias[0] + cols * bias[1], mask=col_mask, other=0.0).to(tl.float32)
            acc += along_cols(values, SWAP)
        tl.store(y_ptr + y_at, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "max_adapters", "shrinkers", "parts"])
def gemm_kernel(
    x,  # [T, K]: pointer, strides
    weights,  # of each member: pointer to [N, K], strides
    biases,  # of each member: pointer to [N], stride
    ys,  # of each member: pointer to [T, N], contiguous
    sums_ptr,  # fp32, the members' [SPLIT, T, N] one after another
    h_ptr,  # fp32 [members, E, W]
    h_stride,  # W
    slots,  # int32 [T, J]: pointer, strides
    coeffs,  # fp32 [T, J]: pointer, strides
    sites,  # of each member: A [P, K], start, rank, scaling
    widths,  # N of each member
    num_rows,
    num_features,
    max_adapters,
    shrinkers,  # programs of each member's shrink, 0 where a launch before this one makes h
    parts,  # programs that share the ranks of one entry
    J: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    SWAP: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,  # one flag for each member
    HAS_POOL: tl.constexpr,  # one flag for each member
    HAS_SUMS: tl.constexpr,  # one flag for each member
    HAS_COEFFS: tl.constexpr,
    SHRINK: tl.constexpr,  # K rounded up to a multiple of BK, BR and BK of shrink_entry
    STAGES: tl.constexpr,
    UNITS: tl.constexpr,  # of in-features and of out-features, as in triton_helpers.whole
    PDL: tl.constexpr,
    FIRST: tl.constexpr,  # no launch of this call comes before
) -> None:
    """Programs of the members' shrinks one after another, then those of their tiles."""
    wait_for_earlier(PDL and FIRST)
    let_later_start(PDL)
    x, num_features = whole_rows(x, UNITS[0]), whole(num_features, UNITS[0])
    program, begin = tl.program_id(0), 0
    for member in tl.static_range(len(HAS_POOL)):
        if HAS_POOL[member]:
            if (program >= begin) & (program < begin + shrinkers):
                h_at = h_ptr + member * num_rows.to(tl.int64) * J * h_stride
                for item in tl.range(program - begin, num_rows * J * parts, shrinkers, num_stages=1):
                    shrink_entry(
                        item // parts, item % parts, parts, x, h_at, h_stride, slots, coeffs, sites[member],
                        num_features, max_adapters, J, SHRINK[0], SHRINK[1], SHRINK[2], HAS_COEFFS,
                    )  # fmt: skip
        begin += shrinkers
    sums_at = sums_ptr
    for member in tl.static_range(len(HAS_POOL)):
        end = begin + tl.cdiv(widths[member], BN) * tl.cdiv(num_rows, BM) * SPLIT
        if (program >= begin) & (program < end):
            gemm_tile(
                x, weights[member], biases[member], ys[member], sums_at, program - begin, num_rows, num_features,
                widths[member], BM, BN, BK, SPLIT, SWAP, EVEN, HAS_BIAS[member], HAS_SUMS[member], STAGES, UNITS,
            )  # fmt: skip
        begin = end
        if HAS_SUMS[member]:
            sums_at += num_rows.to(tl.int64) * SPLIT * whole(widths[member], UNITS[1])
    wait_for_earlier(PDL)  # who waits for this launch then knows that h is complete, too
