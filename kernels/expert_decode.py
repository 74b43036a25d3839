"""Experts over few rows each, host side: shrink, expand and the base product, three launches that run at the same time.

Stage: run time, between `lora_experts.py` and the kernels. As decode.py, with the same rules of overlap: the adapters'
part is done, by vector products of each entry alone, while the base product streams the experts' weights.

Letters: T rows, J slots per row, entries T * J, E experts, K in-features, N out-features.
"""

# ruff: noqa: ANN001 (pointers and blocks have no static type; a choice at compile time is an `if` of its own)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fxlora.kernels.call import Plan
from fxlora.kernels.decode_gemm import add_delta, along_cols, along_rows, has_adapter, product
from fxlora.kernels.expert_call import ExpertCall, rows_of, table_of, tile_item, tiles_in_use
from fxlora.kernels.launch import Launcher
from fxlora.kernels.overlap import let_later_start, wait_for_earlier
from fxlora.kernels.shrink import factor_of, rank_products, slot_of
from fxlora.kernels.tiles import ExpandTile, ExpertDecodeTiles, ExpertGemmTile, ShrinkTile
from fxlora.kernels.triton_helpers import cdiv, strided


@triton.jit
def adapter_at(entry, slots, pool, table, max_adapters, J: tl.constexpr) -> tl.tensor:
    """Slot, rank (0 without an adapter) and first pool row of an entry. pool: A or B, start, step, rank."""
    slot = slot_of(entry, slots, max_adapters, J)
    expert = tl.load(table[0] + table[1] + entry // J)
    known = (slot >= 0) & (expert < table[2])
    rank = tl.load(pool[3] + slot, mask=known, other=0)
    start = tl.load(pool[1] + slot, mask=known, other=0) + expert * tl.load(pool[2] + slot, mask=known, other=0)
    return slot, rank, start


@triton.jit(do_not_specialize=["num_rows", "max_adapters", "parts"])
def expert_shrink_kernel(
    x,  # [T, K]: pointer, row stride
    h_ptr,  # fp32 [T * J, W]
    h_stride,  # W
    slots,  # int32 [T, J]: pointer, strides
    coeffs,  # fp32 [T, J]: pointer, strides
    table,
    pool,  # A [PA, K], start, step, rank, scaling
    num_rows,
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
    """h = coeff * scaling * (x A^T) of every entry."""
    wait_for_earlier(PDL)
    let_later_start(PDL)
    for item in tl.range(tl.program_id(0), num_rows * J * parts, tl.num_programs(0), num_stages=1):
        entry, part = item // parts, item % parts
        slot, rank, start = adapter_at(entry, slots, pool, table, max_adapters, J)
        if part * BR < rank:
            factor = factor_of(entry, tl.load(pool[4] + slot), coeffs, J, HAS_COEFFS)
            x_at = x[0] + (entry // J).to(tl.int64) * x[1]
            for first in range(part * BR, rank, parts * BR):
                values = rank_products(x_at, pool[0], start, rank, first, num_features, K, BR, BK) * factor
                ranks = first + tl.arange(0, BR)
                tl.store(h_ptr + entry.to(tl.int64) * h_stride + ranks, values, mask=ranks < rank)


@triton.jit
def rank_rows(b_ptr, start, rank, first, cols, num_cols, BR: tl.constexpr) -> tl.tensor:
    """[BR, BN] fp32: ranks first .. first + BR of B for these columns."""
    ranks = first + tl.arange(0, BR)
    at = b_ptr + (start + ranks)[:, None].to(tl.int64) * num_cols + cols[None, :]
    return tl.load(at, mask=(ranks < rank)[:, None] & (cols < num_cols)[None, :], other=0.0)


@triton.jit(do_not_specialize=["num_rows", "max_adapters"])
def expert_expand_kernel(
    delta_ptr,  # fp32 [T * J, N]
    h_ptr,  # fp32 [T * J, W]
    h_stride,  # W
    slots,  # int32 [T, J]: pointer, strides
    table,
    pool,  # B [PB, N], start, step, rank
    num_rows,
    num_cols,
    max_adapters,
    J: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """delta = h B of every entry that has an adapter."""
    let_later_start(PDL)
    parts = tl.cdiv(num_cols, BN)
    for item in tl.range(tl.program_id(0), num_rows * J * parts, tl.num_programs(0), num_stages=1):
        entry, cols = item // parts, item % parts * BN + tl.arange(0, BN)
        _, rank, start = adapter_at(entry, slots, pool, table, max_adapters, J)
        if rank > 0:
            b = rank_rows(pool[0], start, rank, 0, cols, num_cols, BR)  # on its way before h is waited for
            wait_for_earlier(PDL)
            h_at = h_ptr + entry.to(tl.int64) * h_stride
            acc = tl.zeros([BN], tl.float32)
            for first in range(0, rank, BR):
                ranks = first + tl.arange(0, BR)
                h = tl.load(h_at + ranks, mask=ranks < rank, other=0.0, cache_modifier=".cg")
                acc += tl.sum(h[:, None] * b.to(tl.float32), axis=0)
                b = rank_rows(pool[0], start, rank, first + BR, cols, num_cols, BR)
            tl.store(delta_ptr + entry.to(tl.int64) * num_cols + cols, acc, mask=cols < num_cols)
    wait_for_earlier(PDL)


@triton.jit(do_not_specialize=["num_rows", "max_adapters"])
def expert_gemm_kernel(
    x,  # [T, K]: pointer, row stride; columns adjacent
    w,  # [E, N, K]: pointer, strides
    bias,  # [E, N]: pointer, strides
    y_ptr,  # [T, N], contiguous
    delta_ptr,  # fp32 [T * J, N]
    slots,  # int32 [T, J]: pointer, strides
    table,
    pool,  # B, start, step, rank
    num_rows,
    num_features,
    num_cols,
    max_adapters,
    J: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SWAP: tl.constexpr,
    EVEN: tl.constexpr,
    IN_PLACE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_POOL: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """y = x W^T + bias + delta. Programs share the tiles [BM, BN] of the batch; rows without an expert become zero."""
    let_later_start(PDL)
    tiles_n = tl.cdiv(num_cols, BN)
    for item in tl.range(tl.program_id(0), tiles_in_use(table) * tiles_n, tl.num_programs(0), num_stages=1):
        expert, _, col_tile, first, end = tile_item(item, tiles_n, table, BM)
        positions = first + tl.arange(0, BM)
        row_mask = positions < end
        rows = rows_of(positions, row_mask, table, IN_PLACE)
        cols = col_tile * BN + tl.arange(0, BN)
        col_mask = cols < num_cols
        mask = along_rows(row_mask, SWAP) & along_cols(col_mask, SWAP)
        has = row_mask
        if HAS_POOL:
            has = has_adapter(slots, pool[3], rows, row_mask, 0, max_adapters)
        w_at = w[0] + expert.to(tl.int64) * w[1] + cols.to(tl.int64) * w[2]
        steps_end = tl.where(expert < table[2], num_features, 0)
        acc = product(
            x[0] + rows.to(tl.int64) * x[1], w_at, 1, w[3], row_mask, col_mask, 0, steps_end, num_features,
            BM, BN, BK, SWAP, EVEN, STAGES,
        )  # fmt: skip
        wait_for_earlier(PDL)
        if expert < table[2]:
            if HAS_BIAS:
                bias_at = bias[0] + expert.to(tl.int64) * bias[1] + cols.to(tl.int64) * bias[2]
                acc += along_cols(tl.load(bias_at, mask=col_mask, other=0.0).to(tl.float32), SWAP)
            if HAS_POOL:
                acc = add_delta(
                    acc, delta_ptr, slots, pool[3], rows, row_mask, cols, mask, has, num_cols, max_adapters, J, SWAP
                )
        y_at = y_ptr + along_rows(rows.to(tl.int64) * num_cols, SWAP) + along_cols(cols, SWAP)
        tl.store(y_at, acc.to(y_ptr.dtype.element_ty), mask=mask)
    wait_for_earlier(PDL)


_shrink, _expand, _gemm = Launcher(expert_shrink_kernel), Launcher(expert_expand_kernel), Launcher(expert_gemm_kernel)


def decode(call: ExpertCall, tiles: ExpertDecodeTiles) -> torch.Tensor:
    """y [T, N] for `call`."""
    site, table = call.site, tuple(table_of(call))
    delta = call.segments
    if call.has_pool:
        sizes = (cdiv(call.entries * call.columns, 4) * 4, call.entries * call.h_stride)  # h starts at 16 bytes
        delta, h = torch.split_with_sizes(call.x.new_empty(sum(sizes), dtype=torch.float32), sizes)
        shrink = call.plan(_shrink, tiles.shrink, lambda: _shrink_plan(call, tiles.shrink))
        x = (call.x, call.x.stride(0))
        shrink.launch(x, h, call.h_stride, call.slots, call.coeffs, table, site.a_pool, *shrink.numbers)
        expand = call.plan(_expand, tiles.expand, lambda: _expand_plan(call, tiles.expand))
        expand.launch(delta, h, call.h_stride, call.slots, table, site.b_pool, *expand.numbers)
    y = call.x.new_empty(call.rows, call.columns)
    gemm = call.plan(_gemm, tiles.gemm, lambda: _gemm_plan(call, tiles.gemm))
    gemm.launch(
        (call.x, call.x.stride(0)),
        strided(call.weight),
        call.strided_bias,
        y,
        delta,
        call.slots,
        table,
        site.b_pool,
        *gemm.numbers,
    )
    return y


def _shrink_plan(call: ExpertCall, tile: ShrinkTile) -> Plan:
    parts = min(cdiv(call.site.h_width, tile.BR), tile.parts)
    return call.planned(
        _shrink,
        (min(call.entries * parts, tile.programs),),
        (call.rows, call.features, call.site.max_adapters, parts),
        tile.num_warps,
        J=call.width,
        K=cdiv(call.features, tile.BK) * tile.BK,
        BR=tile.BR,
        BK=tile.BK,
        HAS_COEFFS=call.has_coeffs,
        PDL=call.overlap,
    )


def _expand_plan(call: ExpertCall, tile: ExpandTile) -> Plan:
    return call.planned(
        _expand,
        (min(call.entries * cdiv(call.columns, tile.BN), tile.programs),),
        (call.rows, call.columns, call.site.max_adapters),
        tile.num_warps,
        J=call.width,
        BR=min(tile.BR, call.h_stride),
        BN=tile.BN,
        PDL=call.overlap,
    )


def _gemm_plan(call: ExpertCall, tile: ExpertGemmTile) -> Plan:
    return call.planned(
        _gemm,
        (min(call.tiles * cdiv(call.columns, tile.BN), tile.programs),),
        (call.rows, call.features, call.columns, call.site.max_adapters),
        tile.num_warps,
        J=call.width,
        BM=call.height,
        BN=tile.BN,
        BK=tile.BK,
        SWAP=tile.SWAP,
        EVEN=call.features % tile.BK == 0 and call.columns % tile.BN == 0,
        IN_PLACE=call.in_place,
        HAS_BIAS=call.has_bias,
        HAS_POOL=call.has_pool,
        STAGES=tile.num_stages,
        PDL=call.overlap and call.has_pool,
    )
