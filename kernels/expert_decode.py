"""Experts over few rows each: what the adapters add to every row, and beside it the base product.

Stage: run time. Launches that run at the same time, with the rules of overlap.py: the first ones compute each entry's
delta = coeff * scaling * (x A^T) B by vector products, h = coeff * scaling * (x A^T) in a launch of its own unless
entries are so few that its start would cost more than h made anew in each program; the last one streams the weights of
the experts in use. Programs of it that start beside the others look at delta behind their in-features, later ones ask
for it ahead of them. An entry's delta follows from its own x and adapter alone; entries without an adapter get zeros.

Letters: T rows, J slots per row, entries T * J, E experts, K in-features, N out-features, W columns of h.
"""

# ruff: noqa: ANN001 (blocks have no static type; Triton compiles one branch of a constexpr, so both stay)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fxlora.kernels.call import Plan
from fxlora.kernels.decode_gemm import along_cols, along_rows, product
from fxlora.kernels.expert_call import ExpertCall, rows_of, tile_item, tiles_in_use
from fxlora.kernels.expert_tiles import DeltaTile, ExpertDecodeTiles, ExpertGemmTile
from fxlora.kernels.launch import Launcher
from fxlora.kernels.overlap import let_later_start, wait_for_earlier
from fxlora.kernels.shrink import factor_of, rank_products, slot_of
from fxlora.kernels.tiles import VectorTile
from fxlora.kernels.triton_helpers import cdiv, strided


@triton.jit
def pool_row(slot, expert, pool, known) -> tl.tensor:
    """First pool row of an expert's adapter. pool: A or B, start, step, rank."""
    start = tl.load(pool[1] + slot, mask=known, other=0)
    return start + expert * tl.load(pool[2] + slot, mask=known, other=0)


@triton.jit
def adapter_at(entry, slots, table_ptr, num_rows, num_experts, max_adapters, J: tl.constexpr) -> tl.tensor:
    """Slot and expert of an entry, and whether it has both."""
    slot = slot_of(entry, slots, max_adapters, J)
    expert = tl.load(table_ptr + num_rows + entry // J)
    return slot, expert, (slot >= 0) & (expert < num_experts)


@triton.jit
def h_of_ranks(
    entry, slot, expert, rank, first, known, x, coeffs, a_pool, num_features,
    J: tl.constexpr, K: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, HAS_COEFFS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """[BR] fp32: h of an entry at ranks first .. first + BR, zero beyond its rank."""
    start = pool_row(slot, expert, a_pool, known)
    factor = factor_of(entry, tl.load(a_pool[4] + slot, mask=known, other=0.0), coeffs, J, HAS_COEFFS)
    x_at = x[0] + (entry // J).to(tl.int64) * x[1]
    return rank_products(x_at, a_pool[0], start, rank, first, num_features, K, BR, BK) * factor


@triton.jit(do_not_specialize=["num_rows", "max_adapters", "parts"])
def expert_shrink_kernel(
    x,  # [T, K]: pointer, row stride
    h,  # fp32 [T * J, W]: pointer, W
    slots,  # int32 [T, J]: pointer, strides
    coeffs,  # fp32 [T, J]: pointer, strides
    table_ptr,
    a_pool,  # A [PA, K], start, step, rank, scaling
    num_rows,
    num_experts,
    num_features,
    max_adapters,
    parts,  # programs that share the ranks of one entry
    J: tl.constexpr,
    K: tl.constexpr,  # num_features rounded up to a multiple of BK
    BR: tl.constexpr,
    BK: tl.constexpr,
    HAS_COEFFS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """h of every entry as far as its rank: ranks part * BR .., (part + parts) * BR .., ..."""
    wait_for_earlier(PDL)
    let_later_start(PDL)
    for item in tl.range(tl.program_id(0), num_rows * J * parts, tl.num_programs(0), num_stages=1):
        entry, part = item // parts, item % parts
        slot, expert, known = adapter_at(entry, slots, table_ptr, num_rows, num_experts, max_adapters, J)
        rank = tl.load(a_pool[3] + slot, mask=known, other=0)
        for first in range(part * BR, rank, parts * BR):
            values = h_of_ranks(
                entry, slot, expert, rank, first, known, x, coeffs, a_pool, num_features, J, K, BR, BK, HAS_COEFFS
            )
            ranks = first + tl.arange(0, BR)
            tl.store(h[0] + entry.to(tl.int64) * h[1] + ranks, values, mask=ranks < rank)


@triton.jit
def b_rows(b_ptr, start, rank, first, cols, num_cols, BR: tl.constexpr) -> tl.tensor:
    """[BR, BN]: ranks first .. first + BR of B for these columns."""
    ranks = first + tl.arange(0, BR)
    at = b_ptr + (start + ranks)[:, None].to(tl.int64) * num_cols + cols[None, :]
    return tl.load(at, mask=(ranks < rank)[:, None] & (cols < num_cols)[None, :], other=0.0)


@triton.jit(do_not_specialize=["num_rows", "max_adapters"])
def expert_delta_kernel(
    delta_ptr,  # fp32 [T * J, N]
    x,  # [T, K]: pointer, row stride
    h,  # fp32 [T * J, W]: pointer, W; never read where SHRINKS
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
    J: tl.constexpr,
    K: tl.constexpr,  # num_features rounded up to a multiple of BK
    BR: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    SHRINKS: tl.constexpr,  # no launch before this one makes h
    HAS_COEFFS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """delta of every entry, BN columns at a time; zeros where it has no adapter."""
    if SHRINKS:
        wait_for_earlier(PDL)
    let_later_start(PDL)
    parts = tl.cdiv(num_cols, BN)
    for item in tl.range(tl.program_id(0), num_rows * J * parts, tl.num_programs(0), num_stages=1):
        entry, part = item // parts, item % parts
        slot, expert, known = adapter_at(entry, slots, table_ptr, num_rows, num_experts, max_adapters, J)
        rank = tl.load(b_pool[3] + slot, mask=known, other=0)
        b_row = pool_row(slot, expert, b_pool, known)
        cols = part * BN + tl.arange(0, BN)
        b = b_rows(b_pool[0], b_row, rank, 0, cols, num_cols, BR)  # on its way until h is there
        values = tl.zeros([BN], tl.float32)
        if not SHRINKS:
            wait_for_earlier(PDL)
        for first in range(0, rank, BR):
            if SHRINKS:
                h_ranks = h_of_ranks(
                    entry, slot, expert, rank, first, known, x, coeffs, a_pool, num_features, J, K, BR, BK, HAS_COEFFS
                )
            else:
                ranks = first + tl.arange(0, BR)
                h_ranks = tl.load(h[0] + entry.to(tl.int64) * h[1] + ranks, mask=ranks < rank, other=0.0)
            next_b = b_rows(b_pool[0], b_row, rank, first + BR, cols, num_cols, BR)
            values += tl.sum(h_ranks[:, None] * b.to(tl.float32), axis=0)
            b = next_b
        tl.store(delta_ptr + entry.to(tl.int64) * num_cols + cols, values, mask=cols < num_cols)
    wait_for_earlier(PDL)


@triton.jit
def sum_of_deltas(
    delta_ptr, rows, cols, num_cols, mask,
    J: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SWAP: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """What the adapters add to a tile of y, zero outside the mask."""
    at = along_rows(rows * J * num_cols, SWAP) + along_cols(cols, SWAP)
    total = tl.zeros([BN, BM] if SWAP else [BM, BN], tl.float32)
    for i in tl.static_range(J):
        total += tl.load(delta_ptr + at + i * num_cols, mask=mask, other=0.0, cache_modifier=".cg")
    return total


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
    FIRST: tl.constexpr,  # programs that start beside those of delta
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
    table = (table_ptr, num_rows, num_experts, bound, 2 * num_rows + num_experts + 2)
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
        late = (item == tl.program_id(0)) & (item < FIRST)
        if not late:
            wait_for_earlier(PDL)
        wanted = mask & (expert < num_experts)
        early = sum_of_deltas(delta_ptr, rows, cols, num_cols, wanted & (not late), J, BM, BN, SWAP)
        acc = product(
            x[0] + rows * x[1], w_at, None, 1, w[3], 0, row_mask, col_mask, 0, last, num_features, BM, BN, BK, SWAP,
            EVEN, STAGES,
        )  # fmt: skip
        if late:
            wait_for_earlier(PDL)
        if J > 0:
            acc += early + sum_of_deltas(delta_ptr, rows, cols, num_cols, wanted & late, J, BM, BN, SWAP)
        if HAS_BIAS:
            bias_at = bias[0] + expert.to(tl.int64) * bias[1] + cols.to(tl.int64) * bias[2]
            bias_mask = col_mask & (expert < num_experts)
            acc += along_cols(tl.load(bias_at, mask=bias_mask, other=0.0).to(tl.float32), SWAP)
        y_at = y_ptr + along_rows(rows * num_cols, SWAP) + along_cols(cols, SWAP)
        tl.store(y_at, acc.to(y_ptr.dtype.element_ty), mask=mask)
    wait_for_earlier(PDL)


_shrink, _delta, _gemm = Launcher(expert_shrink_kernel), Launcher(expert_delta_kernel), Launcher(expert_gemm_kernel)


def decode(call: ExpertCall, tiles: ExpertDecodeTiles) -> torch.Tensor:
    """y [T, N] for `call`."""
    table, x = call.segments, (call.x, call.x.stride(0))
    delta = _delta_of(call, tiles) if call.has_pool else table
    y = call.x.new_empty(call.rows, call.columns)
    plan = call.plan(_gemm, tiles.gemm, lambda: _gemm_plan(call, tiles.gemm))
    call.launch(plan, x, strided(call.weight), call.strided_bias, y, delta, table, *plan.numbers)
    return y


def _delta_of(call: ExpertCall, tiles: ExpertDecodeTiles) -> torch.Tensor:
    """fp32 [T * J, N], filled."""
    site, table, x = call.site, call.segments, (call.x, call.x.stride(0))
    shrink, delta = tiles.shrink, call.new_scratch(call.entries, call.columns, dtype=torch.float32)
    h = (delta, 0)
    if shrink:
        h = (call.new_scratch(call.entries, site.h_width, dtype=torch.float32), site.h_width)
        plan = call.plan(_shrink, shrink, lambda: _shrink_plan(call, shrink))
        call.launch(plan, x, h, call.slots, call.coeffs, table, site.a_pool, *plan.numbers)
    plan = call.plan(_delta, tiles, lambda: _delta_plan(call, tiles.delta, not shrink))
    call.launch(plan, delta, x, h, call.slots, call.coeffs, table, site.a_pool, site.b_pool, *plan.numbers)
    return delta


def _shrink_plan(call: ExpertCall, tile: VectorTile) -> Plan:
    parts = min(cdiv(call.site.h_width, tile.BR), tile.parts)
    return call.planned(
        _shrink,
        (min(call.entries * parts, tile.programs),),
        (call.rows, call.num_experts, call.features, call.site.max_adapters, parts),
        tile.num_warps,
        J=call.width,
        K=cdiv(call.features, tile.BK) * tile.BK,
        BR=tile.BR,
        BK=tile.BK,
        HAS_COEFFS=call.has_coeffs,
        PDL=call.overlap,
    )


def _delta_plan(call: ExpertCall, tile: DeltaTile, shrinks: bool) -> Plan:
    return call.planned(
        _delta,
        (min(call.entries * cdiv(call.columns, tile.BN), tile.programs),),
        (call.rows, call.num_experts, call.features, call.columns, call.site.max_adapters),
        tile.num_warps,
        J=call.width,
        K=cdiv(call.features, tile.BK) * tile.BK,
        BR=tile.BR,
        BK=tile.BK,
        BN=tile.BN,
        SHRINKS=shrinks,
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
        FIRST=tile.first,
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
