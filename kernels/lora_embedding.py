"""Triton body of `lora_embedding`: rows of the table plus A[id] @ B, one launch.

Stage: run time, first op of a rewritten graph. The pool keeps A as [V, P], so a token's ranks lie side by side and no
shrink is needed. An id outside the vocabulary gives a row of NaN (the CPU body raises IndexError).

Letters: T rows, J slots per row, V vocabulary, N width, S slots, P pool rows.
"""

# ruff: noqa: ANN001 (pointers and blocks of a Triton kernel have no static type)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fxlora.kernels.checks import check_members, check_rows
from fxlora.kernels.registry import pools_of
from fxlora.kernels.tiles import embedding_tile
from fxlora.kernels.triton_helpers import (
    add_adapters,
    check_pool,
    device_of,
    expand_precision,
    pool_arguments,
    strided,
)


@triton.jit
def embedding_kernel(
    ids,  # [T]: pointer, stride
    w,  # [V, N]: pointer, strides
    y_ptr,  # [T, N], contiguous
    a,  # [V, P]: pointer, row stride
    slots,
    coeffs,
    pool,
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
) -> None:
    """One tile of y: rows of the table, adapters, one store."""
    ids_ptr, ids_stride = ids
    w_ptr, w_row_stride, w_col_stride = w
    a_ptr, a_row_stride = a
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    cols = (tl.program_id(1) * BN + tl.arange(0, BN)).to(tl.int64)
    row_mask = rows < num_rows
    out_mask = row_mask[:, None] & (cols < num_cols)[None, :]
    row_ids = tl.load(ids_ptr + rows * ids_stride, mask=row_mask, other=0).to(tl.int64)
    known = (row_ids >= 0) & (row_ids < vocabulary)
    w_at = w_ptr + row_ids[:, None] * w_row_stride + cols[None, :] * w_col_stride
    acc = tl.load(w_at, mask=out_mask & known[:, None], other=float("nan")).to(tl.float32)
    if HAS_POOL:
        h_offsets = tl.where(known, row_ids, 0) * a_row_stride
        acc = add_adapters(
            acc, rows, cols, a_ptr, h_offsets, 0, slots, coeffs, pool, num_rows, num_cols, max_adapters,
            J, BM, BN, BR, HAS_COEFFS, True, PRECISION,
        )  # fmt: skip
    y_at = y_ptr + rows[:, None] * num_cols + cols[None, :]
    tl.store(y_at, acc.to(y_ptr.dtype.element_ty), mask=out_mask)


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
    y = torch.empty(*ids.shape, num_cols, dtype=weight.dtype, device=weight.device)
    if not y.numel():
        return y
    max_adapters = 0 if pool is None else check_pool(pool, segments, row_slots.numel())
    ids_T = ids.reshape(-1)
    tile = embedding_tile(num_rows)
    with device_of(ids):
        embedding_kernel[(triton.cdiv(num_rows, tile.BM), triton.cdiv(num_cols, tile.BN))](
            strided(ids_T),
            strided(weight),
            y,
            (weight, 0) if pool is None else (pool.a, pool.a.stride(0)),
            strided(row_slots),
            strided(row_slots if row_coeffs is None else row_coeffs),
            pool_arguments(pool, row_slots),
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
