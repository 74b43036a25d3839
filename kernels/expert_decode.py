"""Experts over few rows each: what the adapters add to every row, and beside it the base product.

Stage: run time. Two launches that run at the same time, with the rules of overlap.py: the first one computes each
entry's delta = coeff * scaling * (x A^T) B by vector products, both in one program, while the second one streams the
weights of the experts in use and looks at delta only behind its in-features. An entry's delta follows from its own x
and adapter alone; entries without an adapter get zeros.

Letters: T rows, J slots per row, entries T * J, E experts, K in-features, N out-features.
"""

# ruff: noqa: ANN001 (pointers and blocks of a Triton kernel have no static type)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fxlora.kernels.call import Plan
from fxlora.kernels.decode_gemm import along_cols, along_rows, product
from fxlora.kernels.expert_call import ExpertCall, rows_of, tile_item, tiles_in_use
from fxlora.kernels.launch import Launcher
from fxlora.kernels.overlap import let_later_start, wait_for_earlier
from fxlora.kernels.shrink import factor_of, rank_products, slot_of
from fxlora.kernels.tiles import DeltaTile, ExpertDecodeTiles, ExpertGemmTile
from fxlora.kernels.triton_helpers import cdiv, strided


@triton.jit
def pool_row(slot, expert, pool, known) -> tl.tensor:
    """First pool row of an expert's adapter. pool: A or B, start, step, rank."""
    start = tl.load(pool[1] + slot, mask=known, other=0)
    return start + expert * tl.load(pool[2] + slot, mask=known, other=0)


@triton.jit
def b_rows(b_ptr, start, rank, first, cols, num_cols, BR: tl.constexpr) -> tl.tensor:
    """[BR, BN]: ranks first .. first + BR of B for these columns."""
    ranks = first + tl.arange(0, BR)
    at = b_ptr + (start + ranks)[:, None].to(tl.int64) * num_cols + cols[None, :]
    return tl.load(at, mask=(ranks < rank)[:, None] & (cols < num_cols)[None, :], other=0.0)


@triton.jit(do_not_specialize=["num_rows", "max_adapters", "parts"])
def expert_delta_kernel(
    delta_ptr,  # fp32 [T * J, N]
    x,  # [T, K]: pointer, row stride
    slots,  # int32 [T, J]: pointer, strides
    coeffs,  # fp32 [T, J]: pointer, strides
    table_ptr,
    a_pool,  # A [PA, K], start, step, rank, scaling
    b_pool,  # B [PB, N], start, step, rank
    num_rows,
    num_experts,
    num_features,
    num_cols,
    max_adapters,
    parts,  # programs that share the columns of one entry
    J: tl.constexpr,
    K: tl.constexpr,  # num_features rounded up to a multiple of BK
    BR: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    HAS_COEFFS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """delta of every entry, columns part * BN .., (part + parts) * BN .., ...; zeros where it has no adapter."""
    wait_for_earlier(PDL)
    let_later_start(PDL)
    lanes = tl.arange(0, BN)
    for item in tl.range(tl.program_id(0), num_rows * J * parts, tl.num_programs(0), num_stages=1):
        entry, part = item // parts, item % parts
        slot = slot_of(entry, slots, max_adapters, J)
        expert = tl.load(table_ptr + num_rows + entry // J)
        known = (slot >= 0) & (expert < num_experts)
        rank = tl.load(a_pool[3] + slot, mask=known, other=0)
        delta_at = delta_ptr + entry.to(tl.int64) * num_cols
        if rank > 0:
            a_row, b_row = pool_row(slot, expert, a_pool, known), pool_row(slot, expert, b_pool, known)
            factor = factor_of(entry, tl.load(a_pool[4] + slot), coeffs, J, HAS_COEFFS)
            x_at = x[0] + (entry // J).to(tl.int64) * x[1]
            for first in range(0, rank, BR):
                cols = part * BN + lanes
                b = b_rows(b_pool[0], b_row, rank, first, cols, num_cols, BR)  # on its way during the shrink
                h = rank_products(x_at, a_pool[0], a_row, rank, first, num_features, K, BR, BK) * factor
                if first > 0:
                    tl.debug_barrier()  # what this program wrote before is read below
                for _ in range(part * BN, num_cols, parts * BN):
                    next_b = b_rows(b_pool[0], b_row, rank, first, cols + parts * BN, num_cols, BR)
                    values = tl.sum(h[:, None] * b.to(tl.float32), axis=0)
                    if first > 0:
                        values += tl.load(delta_at + cols, mask=cols < num_cols, other=0.0)
                    tl.store(delta_at + cols, values, mask=cols < num_cols)
                    b = next_b
                    cols += parts * BN
        else:
            for first_col in range(part * BN, num_cols, parts * BN):
                tl.store(delta_at + first_col + lanes, tl.zeros([BN], tl.float32), mask=first_col + lanes < num_cols)


@triton.jit(do_not_specialize=["num_rows", "bound"])
def expert_gemm_kernel(
    x,  # [T, K]: pointer, row stride; columns adjacent
    w,  # [E, N, K]: pointer, strides
    bias,  # [E, N]: pointer, strides
    y_ptr,  # [T, N], contiguous
    delta_ptr,  # fp32 [T * J, N]; never read where J is 0
    table_ptr,
    num_rows,
    num_experts,
    bound,  # TB of the table
    num_features,
    num_cols,
    J: tl.constexpr,  # deltas of a row; 0 without a pool
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SWAP: tl.constexpr,
    EVEN: tl.constexpr,
    IN_PLACE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """y = x W^T + bias + delta. Programs share the tiles [BM, BN] of the batch; rows without an expert become zero."""
    let_later_start(PDL)
    table = (table_ptr, num_rows, num_experts, bound)
    tiles_n = tl.cdiv(num_cols, BN)
    for item in tl.range(tl.program_id(0), tiles_in_use(table) * tiles_n, tl.num_programs(0), num_stages=1):
        expert, _, col_tile, first, end = tile_item(item, tiles_n, table, BM)
        positions = first + tl.arange(0, BM)
        row_mask = positions < end
        rows = rows_of(positions, row_mask, table, IN_PLACE).to(tl.int64)
        cols = col_tile * BN + tl.arange(0, BN)
        col_mask = cols < num_cols
        mask = along_rows(row_mask, SWAP) & along_cols(col_mask, SWAP)
        w_at = w[0] + expert.to(tl.int64) * w[1] + cols.to(tl.int64) * w[2]
        last = tl.where(expert < num_experts, num_features, 0)
        acc = product(
            x[0] + rows * x[1], w_at, 1, w[3], row_mask, col_mask, 0, last, num_features, BM, BN, BK, SWAP, EVEN, STAGES
        )
        wait_for_earlier(PDL)
        if expert < num_experts:
            if HAS_BIAS:
                bias_at = bias[0] + expert.to(tl.int64) * bias[1] + cols.to(tl.int64) * bias[2]
                acc += along_cols(tl.load(bias_at, mask=col_mask, other=0.0).to(tl.float32), SWAP)
            for i in tl.static_range(J):
                at = along_rows((rows * J + i) * num_cols, SWAP) + along_cols(cols, SWAP)
                acc += tl.load(delta_ptr + at, mask=mask, other=0.0, cache_modifier=".cg")
        y_at = y_ptr + along_rows(rows * num_cols, SWAP) + along_cols(cols, SWAP)
        tl.store(y_at, acc.to(y_ptr.dtype.element_ty), mask=mask)
    wait_for_earlier(PDL)


_delta, _gemm = Launcher(expert_delta_kernel), Launcher(expert_gemm_kernel)


def decode(call: ExpertCall, tiles: ExpertDecodeTiles) -> torch.Tensor:
    """y [T, N] for `call`."""
    site, table, x = call.site, call.segments, (call.x, call.x.stride(0))
    delta = call.segments
    if call.has_pool:
        delta = call.x.new_empty(call.entries * call.columns, dtype=torch.float32)
        plan = call.plan(_delta, tiles.delta, lambda: _delta_plan(call, tiles.delta))
        plan.launch(delta, x, call.slots, call.coeffs, table, site.a_pool, site.b_pool, *plan.numbers)
    y = call.x.new_empty(call.rows, call.columns)
    plan = call.plan(_gemm, tiles.gemm, lambda: _gemm_plan(call, tiles.gemm))
    plan.launch(x, strided(call.weight), call.strided_bias, y, delta, table, *plan.numbers)
    return y


def _delta_plan(call: ExpertCall, tile: DeltaTile) -> Plan:
    parts = max(1, min(tile.programs // call.entries, cdiv(call.columns, tile.BN)))
    return call.planned(
        _delta,
        (min(call.entries * parts, tile.most_programs),),
        (call.rows, call.num_experts, call.features, call.columns, call.site.max_adapters, parts),
        tile.num_warps,
        J=call.width,
        K=cdiv(call.features, tile.BK) * tile.BK,
        BR=tile.BR,
        BK=tile.BK,
        BN=tile.BN,
        HAS_COEFFS=call.has_coeffs,
        PDL=call.overlap,
    )


def _gemm_plan(call: ExpertCall, tile: ExpertGemmTile) -> Plan:
    return call.planned(
        _gemm,
        (min(call.tiles * cdiv(call.columns, tile.BN), tile.programs),),
        (call.rows, call.num_experts, call.bound, call.features, call.columns),
        tile.num_warps,
        J=call.width if call.has_pool else 0,
        BM=call.height,
        BN=tile.BN,
        BK=tile.BK,
        SWAP=tile.SWAP,
        EVEN=call.features % tile.BK == 0 and call.columns % tile.BN == 0,
        IN_PLACE=call.in_place,
        HAS_BIAS=call.has_bias,
        STAGES=tile.num_stages,
        PDL=call.overlap and call.has_pool,
    )
