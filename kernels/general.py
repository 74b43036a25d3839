"""`lora_linear` for everything in half precision: any stride and width, any number of rows. Two launches, not tuned.

Stage: run time, where no special body applies: many rows in fp16 that TMA cannot read.
Shrink first, then the base GEMM with the expand in its epilogue.

Letters: T rows, J slots per row, E = T * J entries, K in-features, N out-features, W columns of h, S slots.
"""

# ruff: noqa: ANN001 (pointers and blocks of a Triton kernel have no static type)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fxlora.kernels.call import LinearCall
from fxlora.kernels.registry import SitePool
from fxlora.kernels.segments import tile_bound
from fxlora.kernels.tiles import GeneralTiles, Tile
from fxlora.kernels.triton_helpers import (
    add_adapters,
    cdiv,
    dot,
    next_power_of_2,
    pool_arguments,
    strided,
    whole,
    whole_rows,
)


@triton.jit
def shrink_kernel(
    x,  # [T, K]: pointer, strides
    a_ptr,  # [P, K]
    h_ptr,  # fp32 [E, W]
    h_entry_stride,
    segments_ptr,
    start_ptr,
    rank_ptr,
    num_entries,
    num_features,
    max_adapters,
    J: tl.constexpr,
    SLOTS: tl.constexpr,  # power of two > S
    BM: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    UNIT: tl.constexpr,  # of in-features, as in triton_helpers.whole
) -> None:
    """h of one tile of sorted entries, all of one slot."""
    x_ptr, x_row_stride, x_col_stride = whole_rows(x, UNIT)
    num_features = whole(num_features, UNIT)
    tile = tl.program_id(0)
    slots = tl.arange(0, SLOTS)
    starts_ptr = segments_ptr + num_entries
    starts = tl.load(starts_ptr + slots, mask=slots <= max_adapters, other=0)
    begins = tl.where(slots <= max_adapters, starts // BM + slots, 2147483647)
    slot = tl.sum((begins <= tile).to(tl.int32), axis=0) - 1
    if slot >= max_adapters:
        return
    begin = tl.load(starts_ptr + slot)
    end = tl.load(starts_ptr + slot + 1)
    first = begin + (tile - (begin // BM + slot)) * BM
    rank = tl.load(rank_ptr + slot)
    if (first >= end) | (rank == 0):
        return
    positions = first + tl.arange(0, BM)
    row_mask = positions < end
    entries = tl.load(segments_ptr + positions, mask=row_mask, other=0).to(tl.int64)
    x_at = x_ptr + (entries // J) * x_row_stride
    a_at = a_ptr + tl.load(start_ptr + slot).to(tl.int64) * num_features
    for first_rank in range(0, rank, BR):
        ranks = (first_rank + tl.arange(0, BR)).to(tl.int64)
        acc = tl.zeros([BM, BR], tl.float32)
        for first_k in range(0, num_features, BK):
            ks = (first_k + tl.arange(0, BK)).to(tl.int64)
            k_mask = ks < num_features
            x_mask = row_mask[:, None] & k_mask[None, :]
            x_tile = tl.load(x_at[:, None] + ks[None, :] * x_col_stride, mask=x_mask, other=0.0)  # [BM, BK]
            a_mask = k_mask[:, None] & (ranks < rank)[None, :]
            a_tile = tl.load(a_at + ranks[None, :] * num_features + ks[:, None], mask=a_mask, other=0.0)  # [BK, BR]
            acc = dot(x_tile, a_tile, acc, "ieee")
        h_at = h_ptr + entries[:, None] * h_entry_stride + ranks[None, :]
        tl.store(h_at, acc, mask=row_mask[:, None] & (ranks < rank)[None, :])


@triton.jit
def linear_kernel(
    x,  # [T, K]: pointer, strides
    w,  # [N, K]: pointer, strides
    bias,  # [N]: pointer, stride
    y_ptr,  # [T, N], contiguous
    h_ptr,  # fp32 [E, W]
    h_entry_stride,
    slots,
    coeffs,
    pool,
    num_rows,
    num_features,
    num_cols,
    max_adapters,
    J: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_POOL: tl.constexpr,
    HAS_COEFFS: tl.constexpr,
    PRECISION: tl.constexpr,
    UNITS: tl.constexpr,  # of in-features and of out-features, as in triton_helpers.whole
) -> None:
    """One tile of y: base GEMM, bias, adapters, one store."""
    x_ptr, x_row_stride, x_col_stride = whole_rows(x, UNITS[0])
    w_ptr, w_row_stride, w_col_stride = whole_rows(w, UNITS[0])
    num_features, num_cols = whole(num_features, UNITS[0]), whole(num_cols, UNITS[1])
    tiles_m = tl.cdiv(num_rows, BM)
    rows = ((tl.program_id(0) % tiles_m) * BM + tl.arange(0, BM)).to(tl.int64)
    cols = ((tl.program_id(0) // tiles_m) * BN + tl.arange(0, BN)).to(tl.int64)
    row_mask = rows < num_rows
    col_mask = cols < num_cols
    acc = tl.zeros([BM, BN], tl.float32)
    for first_k in range(0, num_features, BK):
        ks = (first_k + tl.arange(0, BK)).to(tl.int64)
        k_mask = ks < num_features
        x_at = x_ptr + rows[:, None] * x_row_stride + ks[None, :] * x_col_stride
        x_tile = tl.load(x_at, mask=row_mask[:, None] & k_mask[None, :], other=0.0)  # [BM, BK]
        w_at = w_ptr + cols[None, :] * w_row_stride + ks[:, None] * w_col_stride
        w_tile = tl.load(w_at, mask=k_mask[:, None] & col_mask[None, :], other=0.0)  # [BK, BN]
        acc = dot(x_tile, w_tile, acc, "ieee")
    if HAS_BIAS:
        acc += tl.load(bias[0] + cols * bias[1], mask=col_mask, other=0.0).to(tl.float32)[None, :]
    if HAS_POOL:
        acc = add_adapters(
            acc, rows, cols, h_ptr, rows * J * h_entry_stride, h_entry_stride, slots, coeffs, pool,
            num_rows, num_cols, max_adapters, J, BM, BN, BR, HAS_COEFFS, False, PRECISION,
        )  # fmt: skip
    y_at = y_ptr + rows[:, None] * num_cols + cols[None, :]
    tl.store(y_at, acc.to(y_ptr.dtype.element_ty), mask=row_mask[:, None] & col_mask[None, :])


def general(call: LinearCall, tiles: GeneralTiles) -> list[torch.Tensor]:
    """The members' outputs for `call`."""
    tile = tiles.gemm
    outputs = call.new_outputs()
    for y, weight, bias, pool in zip(outputs, call.weights, call.biases, call.members.pools, strict=True):
        h_EW = y if pool is None else shrink(call, pool, tiles.shrink)
        linear_kernel[(cdiv(call.rows, tile.BM) * cdiv(weight.shape[0], tile.BN),)](
            strided(call.x),
            strided(weight),
            (weight, 0) if bias is None else strided(bias),
            y,
            h_EW,
            h_EW.stride(0),
            call.slots,
            call.coeffs,
            pool_arguments(pool, call.row_slots),
            call.rows,
            call.features,
            weight.shape[0],
            call.members.max_adapters,
            J=call.width,
            BM=tile.BM,
            BN=tile.BN,
            BK=tile.BK,
            BR=tile.BR,
            HAS_BIAS=bias is not None,
            HAS_POOL=pool is not None,
            HAS_COEFFS=call.has_coeffs,
            PRECISION=call.precision,
            UNITS=call.units,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return outputs


def shrink(call: LinearCall, pool: SitePool, tile: Tile) -> torch.Tensor:
    """h = x A^T of each entry's slot, fp32 [E, W]; only the columns below the slot's rank are written."""
    max_adapters = call.members.max_adapters
    h_EW = call.x.new_empty(call.entries, pool.rank_bound, dtype=torch.float32)
    shrink_kernel[(tile_bound(call.entries, max_adapters, tile.BM),)](
        strided(call.x),
        pool.a,
        h_EW,
        h_EW.stride(0),
        call.segments,
        pool.start,
        pool.rank,
        call.entries,
        call.features,
        max_adapters,
        J=call.width,
        SLOTS=next_power_of_2(max_adapters + 1),
        BM=tile.BM,
        BK=tile.BK,
        BR=tile.BR,
        UNIT=call.units[0],
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return h_EW
