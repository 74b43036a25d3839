"""Triton bodies of `lora_embedding`: rows of the table plus A[id] @ B, one launch.

Stage: run time, first op of a rewritten graph. The pool keeps A as [V, P], so a token's ranks lie side by side and no
shrink is needed. Up to ROW_ROWS rows each program serves a piece of one row; above, a tile of rows, where rows of one
slot share the read of B. An id outside the vocabulary gives a row of NaN (the CPU body raises IndexError).

Letters: T rows, J slots per row, V vocabulary, N width, R rank, S slots, P pool rows.
"""

# ruff: noqa: ANN001 (pointers and blocks of a Triton kernel have no static type)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fxlora.kernels.call import Plan, PlannedCall, Plans
from fxlora.kernels.checks import check_linears, check_members, check_rows
from fxlora.kernels.launch import Fixed, Launcher
from fxlora.kernels.registry import Group, derived_of, pools_of
from fxlora.kernels.replay import Replays
from fxlora.kernels.tiles import embedding_tile
from fxlora.kernels.triton_helpers import (
    add_adapters,
    cdiv,
    check_pool,
    device_of,
    expand_precision,
    next_power_of_2,
    strided,
)

ROW_ROWS = 128
"""Batches of up to this many rows go row by row: B is read once per row, which costs less than tiles of few rows."""


@triton.jit
def row_delta(row_id, start, rank, cols, num_cols, a, b_ptr, BN: tl.constexpr, BR: tl.constexpr) -> tl.tensor:
    """A[id] @ B of one slot for these columns, fp32 [BN]."""
    a_ptr, a_row_stride = a
    delta = tl.zeros([BN], tl.float32)
    for first in range(0, rank, BR):
        ranks = (first + tl.arange(0, BR)).to(tl.int64)
        rank_mask = ranks < rank
        h = tl.load(a_ptr + row_id * a_row_stride + start + ranks, mask=rank_mask, other=0.0)  # [BR]
        b_at = b_ptr + (start + ranks)[:, None] * num_cols + cols[None, :]
        b = tl.load(b_at, mask=rank_mask[:, None] & (cols < num_cols)[None, :], other=0.0)  # [BR, BN]
        delta += tl.sum(h.to(tl.float32)[:, None] * b.to(tl.float32), axis=0)
    return delta


@triton.jit(do_not_specialize=["num_rows", "vocabulary", "max_adapters"])
def row_kernel(
    ids,  # [T]: pointer, stride
    w,  # [V, N]: pointer, strides
    y_ptr,  # [T, N], contiguous
    a,  # [V, P]: pointer, row stride
    slots,  # int32 [T, J]: pointer, strides
    coeffs,  # fp32 [T, J]: pointer, strides
    pool,  # B [P, N], start, rank, scaling
    num_rows,
    vocabulary,
    num_cols,
    max_adapters,
    J: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    HAS_POOL: tl.constexpr,
    HAS_COEFFS: tl.constexpr,
) -> None:
    """BN columns of one row of y. No other row is read, so none can change this one's bits."""
    ids_ptr, ids_stride = ids
    w_ptr, w_row_stride, w_col_stride = w
    slots_ptr, slots_row_stride, slots_j_stride = slots
    coeffs_ptr, coeffs_row_stride, coeffs_j_stride = coeffs
    b_ptr, start_ptr, rank_ptr, scaling_ptr = pool
    row = tl.program_id(0).to(tl.int64)
    cols = (tl.program_id(1) * BN + tl.arange(0, BN)).to(tl.int64)
    col_mask = cols < num_cols
    row_id = tl.load(ids_ptr + row * ids_stride).to(tl.int64)
    known = (row_id >= 0) & (row_id < vocabulary)
    w_at = w_ptr + row_id * w_row_stride + cols * w_col_stride
    acc = tl.load(w_at, mask=col_mask & known, other=float("nan")).to(tl.float32)
    if HAS_POOL:
        for j in tl.static_range(J):
            slot = tl.load(slots_ptr + row * slots_row_stride + j * slots_j_stride)
            served = (slot >= 0) & (slot < max_adapters) & known
            rank = tl.load(rank_ptr + slot, mask=served, other=0)
            start = tl.load(start_ptr + slot, mask=served, other=0).to(tl.int64)
            factor = tl.load(scaling_ptr + slot, mask=served, other=0.0)
            if rank > 0:
                if HAS_COEFFS:
                    factor *= tl.load(coeffs_ptr + row * coeffs_row_stride + j * coeffs_j_stride)
                acc += factor * row_delta(row_id, start, rank, cols, num_cols, a, b_ptr, BN, BR)
    tl.store(y_ptr + row * num_cols + cols, acc.to(y_ptr.dtype.element_ty), mask=col_mask)


@triton.jit(do_not_specialize=["num_rows", "vocabulary", "max_adapters"])
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
    """One tile of y: rows of the table, adapters, one store. Arguments are those of `row_kernel`."""
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


_row_launcher = Launcher(row_kernel)
_tile_launcher = Launcher(embedding_kernel)


class EmbeddingSite:
    """What the pool of an embedding contributes to every call: arguments that never move, examined once."""

    def __init__(self, pools: Group) -> None:
        check_linears(pools)
        self.pool = pool = pools[0]
        self.resident = [] if pool is None else [pool.a, pool.b]
        self.plans: Plans = {}
        self.replays = Replays()
        self.max_adapters = 0 if pool is None else pool.start.numel()
        self.a_pool = Fixed((None, 0) if pool is None else (pool.a, pool.a.stride(0)))
        self.b_pool = Fixed((None,) * 4 if pool is None else (pool.b, pool.start, pool.rank, pool.scaling))


class EmbeddingCall(PlannedCall):
    """ids, table, row map and pool, as kernels take them."""

    def __init__(
        self,
        ids: torch.Tensor,
        weight: torch.Tensor,
        row_slots: torch.Tensor,
        row_coeffs: torch.Tensor | None,
        segments: torch.Tensor,
        site: EmbeddingSite,
    ) -> None:
        super().__init__()
        check_rows(ids.numel(), row_slots, row_coeffs)
        if site.pool is not None:
            check_pool(site.pool, segments, row_slots.numel())
        self.rows, self.width = row_slots.shape
        self.weight, self.site, self.plans, self.resident = weight, site, site.plans, site.resident
        self.x = ids if ids.dim() == 1 else ids.reshape(-1)
        self.y = torch.empty(*ids.shape, weight.shape[1], dtype=weight.dtype, device=weight.device)
        self.slots = strided(row_slots)
        self.coeffs = self.slots if row_coeffs is None else strided(row_coeffs)
        self.has_coeffs, self.overlap, self.device_index = row_coeffs is not None, False, row_slots.get_device()
        self.signature = (self.rows, self.width, weight.shape, weight.dtype, self.has_coeffs, self.device_index)


def lora_embedding(
    ids: torch.Tensor,
    weight: torch.Tensor,
    row_slots: torch.Tensor,
    row_coeffs: torch.Tensor | None,
    segments: torch.Tensor,
    group: int,
) -> torch.Tensor:
    """See `ops.lora_embedding`."""
    site = derived_of(group, EmbeddingSite)
    inputs = (ids, row_slots, row_coeffs, segments, (weight,), (None,))
    found = site.replays.run(*inputs)
    if found is not None:
        return found[0]
    check_members([weight], pools_of(group))
    with device_of(ids):
        found = site.replays.run(*inputs)  # which was refused if another GPU was the current one
        if found is not None:
            return found[0]
        call = EmbeddingCall(ids, weight, row_slots, row_coeffs, segments, site)
        if call.y.numel():
            _launch(call)
            site.replays.learn(inputs, call, [call.y])
        return call.y


def _launch(call: EmbeddingCall) -> None:
    by_rows = call.rows <= ROW_ROWS
    launcher, make = (_row_launcher, _plan_of_rows) if by_rows else (_tile_launcher, _plan_of_tiles)
    plan = call.plan(launcher, None, lambda: make(call))
    call.launch(
        plan,
        strided(call.x),
        strided(call.weight),
        call.y,
        call.site.a_pool,
        call.slots,
        call.coeffs,
        call.site.b_pool,
        call.rows,
        *call.weight.shape,
        call.site.max_adapters,
    )


def _plan_of_rows(call: EmbeddingCall) -> Plan:
    pool, block = call.site.pool, 128 if call.rows <= 16 else 256
    return call.planned(
        _row_launcher,
        (call.rows, cdiv(call.weight.shape[1], block)),
        (),
        4,
        num_stages=1,
        J=call.width,
        BN=block,
        BR=16 if pool is None else max(16, min(64, next_power_of_2(pool.rank_bound))),
        HAS_POOL=pool is not None,
        HAS_COEFFS=call.has_coeffs,
    )


def _plan_of_tiles(call: EmbeddingCall) -> Plan:
    tile = embedding_tile(call.rows)
    return call.planned(
        _tile_launcher,
        (cdiv(call.rows, tile.BM), cdiv(call.weight.shape[1], tile.BN)),
        (),
        tile.num_warps,
        num_stages=tile.num_stages,
        J=call.width,
        BM=tile.BM,
        BN=tile.BN,
        BR=tile.BR,
        HAS_POOL=call.site.pool is not None,
        HAS_COEFFS=call.has_coeffs,
        PRECISION=expand_precision(call.weight.dtype),
    )
