"""Triton body of `lora_embedding`: rows of the table plus A[id] @ B, one launch.

Stage: run time, first op of a rewritten graph. The pool keeps A as [V, P], so a token's ranks lie side by side and no
shrink is needed. An id outside the vocabulary gives a row of NaN (the CPU body raises IndexError).

Letters: T rows, J slots per row, V vocabulary, N width, S slots, P pool rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fxlora.kernels.checks import check_members, check_rows
from fxlora.kernels.registry import pools_of
from fxlora.kernels.tiles import embedding_tile
from fxlora.kernels.triton_helpers import add_adapters, check_pool, device_of, expand_precision


@triton.jit
def embedding_kernel(
    ids_ptr,  # [T]
    ids_stride,
    w_ptr,  # [V, N]
    w_row_stride,
    w_col_stride,
    y_ptr,  # [T, N], contiguous
    a_ptr,  # [V, P]
    a_row_stride,
    slots_ptr,  # int32 [T, J]
    slots_row_stride,
    slots_j_stride,
    coeffs_ptr,  # fp32 [T, J]
    coeffs_row_stride,
    coeffs_j_stride,
    b_ptr,  # [P, N]
    b_row_stride,
    start_ptr,
    rank_ptr,
    scaling_ptr,
    num_rows,
    vocabulary,
    num_cols,
    max_adapters,
    J: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    HAS_POOL: tl.constexpr,
    HAS_COEFFS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    cols = (tl.program_id(1) * BN + tl.arange(0, BN)).to(tl.int64)
    row_mask = rows < num_rows
    col_mask = cols < num_cols
    ids = tl.load(ids_ptr + rows * ids_stride, mask=row_mask, other=0).to(tl.int64)
    known = (ids >= 0) & (ids < vocabulary)
    w_at = w_ptr + ids[:, None] * w_row_stride + cols[None, :] * w_col_stride
    acc = tl.load(w_at, mask=(row_mask & known)[:, None] & col_mask[None, :], other=float("nan")).to(tl.float32)
    if HAS_POOL:
        acc = add_adapters(
            acc,
            rows,
            cols,
            a_ptr,
            tl.where(known, ids, 0) * a_row_stride,
            0,
            slots_ptr,
            slots_row_stride,
            slots_j_stride,
            coeffs_ptr,
            coeffs_row_stride,
            coeffs_j_stride,
            b_ptr,
            b_row_stride,
            start_ptr,
            rank_ptr,
            scaling_ptr,
            num_rows,
            num_cols,
            max_adapters,
            J,
            BM,
            BN,
            BR,
            HAS_COEFFS,
            True,
            PRECISION,
        )
    y_at = y_ptr + rows[:, None] * num_cols + cols[None, :]
    tl.store(y_at, acc.to(y_ptr.dtype.element_ty), mask=row_mask[:, None] & col_mask[None, :])


def lora_embedding(
    ids: torch.Tensor,
    weight: torch.Tensor,
    row_slots: torch.Tensor,
    row_coeffs: torch.Tensor | None,
    segments: torch.Tensor,
    group: int,
) -> torch.Tensor:
    """See `ops.lora_embedding`."""
    pools = pools_of(group)
    check_members([weight], pools)
    check_rows(ids.numel(), row_slots, row_coeffs)
    pool = pools[0]
    num_rows, width = row_slots.shape
    vocabulary, num_cols = weight.shape
    y = weight.new_empty(*ids.shape, num_cols)
    if not y.numel():
        return y
    max_adapters = 0 if pool is None else check_pool(pool, segments, row_slots.numel())
    ids_T = ids.reshape(-1)
    coeffs = row_slots if row_coeffs is None else row_coeffs
    tile = embedding_tile(num_rows)
    with device_of(ids):
        embedding_kernel[(triton.cdiv(num_rows, tile.BM), triton.cdiv(num_cols, tile.BN))](
            ids_T,
            ids_T.stride(0),
            weight,
            *weight.stride(),
            y,
            weight if pool is None else pool.a,
            0 if pool is None else pool.a.stride(0),
            row_slots,
            *row_slots.stride(),
            coeffs,
            *coeffs.stride(),
            weight if pool is None else pool.b,
            num_cols,
            row_slots if pool is None else pool.start,
            row_slots if pool is None else pool.rank,
            row_slots if pool is None else pool.scaling,
            num_rows,
            vocabulary,
            num_cols,
            max_adapters,
            J=width,
            BM=tile.BM,
            BN=tile.BN,
            BR=tile.BR,
            HAS_POOL=pool is not None,
            HAS_COEFFS=row_coeffs is not None,
            PRECISION=expand_precision(weight.dtype),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return y
