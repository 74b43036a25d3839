"""One row (or a few rows over few columns): y = x W^T + bias + adapters by matrix-vector products, no matrix unit.

Stage: run time, the second launch of such a linear: shrink.py's runs before, and this one streams W meanwhile.

Letters: T rows, J slots per row, E = T * J entries, K in-features, N out-features, C columns of h, R ranks, S slots.
"""

# ruff: noqa: ANN001, RET505, C419 (pointers and blocks have no static type; Triton compiles one branch of a constexpr,
# so both stay; a list costs less host time than a generator)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fxlora.kernels.call import LinearCall, Plan
from fxlora.kernels.launch import Launcher
from fxlora.kernels.overlap import let_later_start, wait_for_earlier
from fxlora.kernels.shrink import adapter_of, shrink, slot_of
from fxlora.kernels.tiles import GemvTile
from fxlora.kernels.triton_helpers import cdiv, next_power_of_2, whole, whole_rows


@triton.jit
def load_b(b_ptr, start, rank, first, cols, col_mask, num_cols, BR: tl.constexpr) -> tl.tensor:
    """[BN, BR]: ranks first .. first + BR of B for these columns."""
    ranks = first + tl.arange(0, BR)
    at = (start + ranks).to(tl.int64) * num_cols
    return tl.load(b_ptr + at[None, :] + cols[:, None], mask=(ranks < rank)[None, :] & col_mask[:, None], other=0.0)


@triton.jit
def add_block(acc, x_at, w_at, first, col_mask, num_features, BK: tl.constexpr, EVEN: tl.constexpr) -> tl.tensor:
    """acc [BN, BK] and the products of BK in-features."""
    inside = first + tl.arange(0, BK) < num_features
    w_tile = load_w(w_at + first, col_mask, inside, EVEN)
    x_tile = tl.load(x_at + first + tl.arange(0, BK), mask=inside, other=0.0)
    return acc + w_tile.to(tl.float32) * x_tile.to(tl.float32)[None, :]


@triton.jit
def product(
    x_at, w_at, w_tile, col_mask, num_features, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BLOCKS: tl.constexpr, EVEN: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """[BN] fp32: a row of x times BN rows of W, of which w_tile is the first block.

    BLOCKS of W are asked for at once, all where they are no more: what is unrolled further has spilled registers.
    """
    STEP: tl.constexpr = BLOCKS * BK
    IN_STEPS: tl.constexpr = 0 if K <= STEP else (K - BK) // STEP * STEP
    ks = tl.arange(0, BK)
    x_tile = tl.load(x_at + ks, mask=ks < num_features, other=0.0)
    acc = w_tile.to(tl.float32) * x_tile.to(tl.float32)[None, :]
    for begin in tl.range(BK, BK + IN_STEPS, STEP, num_stages=1):
        for at in tl.static_range(0, STEP, BK):
            acc = add_block(acc, x_at, w_at, begin + at, col_mask, num_features, BK, EVEN)
    for first in tl.static_range(BK + IN_STEPS, K, BK):
        acc = add_block(acc, x_at, w_at, first, col_mask, num_features, BK, EVEN)
    return tl.sum(acc, axis=1)


@triton.jit
def load_w(w_at, col_mask, inside, EVEN: tl.constexpr) -> tl.tensor:
    """[BN, BK] of W."""
    if EVEN:
        return tl.load(w_at)
    else:
        return tl.load(w_at, mask=col_mask[:, None] & inside[None, :], other=0.0)


@triton.jit
def times_h(b, h_at, rank, first, BR: tl.constexpr) -> tl.tensor:
    """[BN] fp32: these ranks of B times h."""
    ranks = first + tl.arange(0, BR)
    h = tl.load(h_at + ranks, mask=ranks < rank, other=0.0, cache_modifier=".cg")
    return tl.sum(b.to(tl.float32) * h[None, :], axis=1)


@triton.jit
def gemv_tile(
    x, w, bias, y_ptr, h_ptr, h_stride, slots, site, b_ptr, row, block, num_features, num_cols, max_adapters,
    J: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BLOCKS: tl.constexpr, BR: tl.constexpr,
    EVEN: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_POOL: tl.constexpr, UNITS: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """Columns block * BN .. of one row of one member. W and the first ranks of B are asked for before anything else."""
    w, num_cols = whole_rows(w, UNITS[0]), whole(num_cols, UNITS[1])
    cols = block * BN + tl.arange(0, BN)
    col_mask = cols < num_cols
    ks = tl.arange(0, BK)
    w_at = w[0] + cols[:, None].to(tl.int64) * w[1] + ks[None, :]
    w_tile = load_w(w_at, col_mask, ks < num_features, EVEN)
    rank, start, b = 0, 0, w_tile
    if HAS_POOL:
        rank, start, _ = adapter_of(slot_of(row * J, slots, max_adapters, J), site)
        b = load_b(b_ptr, start, rank, 0, cols, col_mask, num_cols, BR)
    y = product(x[0] + row.to(tl.int64) * x[1], w_at, w_tile, col_mask, num_features, K, BN, BK, BLOCKS, EVEN)
    if HAS_BIAS:
        y += tl.load(bias[0] + cols * bias[1], mask=col_mask, other=0.0).to(tl.float32)
    wait_for_earlier(PDL)
    if HAS_POOL:
        for j in tl.static_range(J):
            if j > 0:
                rank, start, _ = adapter_of(slot_of(row * J + j, slots, max_adapters, J), site)
                b = load_b(b_ptr, start, rank, 0, cols, col_mask, num_cols, BR)
            h_at = h_ptr + (row * J + j).to(tl.int64) * h_stride
            delta = times_h(b, h_at, rank, 0, BR)
            for first in range(BR, rank, BR):
                more_b = load_b(b_ptr, start, rank, first, cols, col_mask, num_cols, BR)
                delta += times_h(more_b, h_at, rank, first, BR)
            y = tl.where(rank > 0, y + delta, y)
    tl.store(y_ptr + row.to(tl.int64) * num_cols + cols, y.to(y_ptr.dtype.element_ty), mask=col_mask)


@triton.jit(do_not_specialize=["num_rows", "max_adapters"])
def gemv_kernel(
    x,  # [T, K]: pointer, row stride; columns adjacent
    weights,  # of each member: pointer to [N, K], row stride; columns adjacent
    biases,  # of each member: pointer to [N], stride
    ys,  # of each member: pointer to [T, N], contiguous
    h_ptr,  # fp32 [members, T * J, W]
    h_stride,  # W
    slots,  # int32 [T, J]: pointer, strides
    sites,  # of each member: A [P, K], start, rank, scaling
    b_ptrs,  # of each member: B [P, N]
    widths,  # N of each member
    num_rows,
    num_features,
    max_adapters,
    J: tl.constexpr,
    K: tl.constexpr,  # num_features rounded up to a multiple of BK
    BN: tl.constexpr,
    BK: tl.constexpr,
    BLOCKS: tl.constexpr,  # of BK in-features, asked for at once
    BR: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,  # one flag for each member
    HAS_POOL: tl.constexpr,  # one flag for each member
    UNITS: tl.constexpr,  # of in-features and of out-features, as in triton_helpers.whole
    PDL: tl.constexpr,
) -> None:
    """The members' blocks one after another, rows of a block side by side."""
    let_later_start(PDL)
    x, num_features = whole_rows(x, UNITS[0]), whole(num_features, UNITS[0])
    program = tl.program_id(0)
    begin = 0
    for member in tl.static_range(len(HAS_POOL)):
        end = begin + tl.cdiv(widths[member], BN) * num_rows
        if (program >= begin) & (program < end):
            gemv_tile(
                x, weights[member], biases[member], ys[member], h_ptr + member * num_rows * J * h_stride, h_stride,
                slots, sites[member], b_ptrs[member], (program - begin) % num_rows, (program - begin) // num_rows,
                num_features, widths[member], max_adapters, J, K, BN, BK, BLOCKS, BR, EVEN, HAS_BIAS[member],
                HAS_POOL[member], UNITS, PDL,
            )  # fmt: skip
        begin = end


_launcher = Launcher(gemv_kernel)


def gemv(call: LinearCall, tile: GemvTile) -> list[torch.Tensor]:
    """The members' outputs for `call`. Weights must have adjacent columns."""
    members = call.members
    stride = max(2, next_power_of_2(members.h_width))
    h = call.new_scratch(len(call.widths) * call.entries * stride if members.has_pools else 0, dtype=torch.float32)
    if members.has_pools:
        shrink(call, h, stride, tile.shrink)
    outputs = call.new_outputs()
    plan = call.plan(_launcher, tile, lambda: _plan(call, stride, tile))
    call.launch(
        plan,
        (call.x, call.x.stride(0)),
        tuple([(weight, weight.stride(0)) for weight in call.weights]),
        call.strided_biases,
        tuple(outputs),
        h,
        stride,
        call.slots,
        members.a_pools,
        members.b_pools,
        call.widths,
        *plan.numbers,
    )
    return outputs


def _plan(call: LinearCall, stride: int, tile: GemvTile) -> Plan:
    members = call.members
    return call.planned(
        _launcher,
        (sum([cdiv(n, tile.BN) for n in call.widths]) * call.rows,),
        (call.rows, call.features, members.max_adapters),
        tile.num_warps,
        J=call.width,
        K=cdiv(call.features, tile.BK) * tile.BK,
        BN=tile.BN,
        BK=tile.BK,
        BLOCKS=tile.blocks,
        BR=min(64, stride),
        EVEN=call.features % tile.BK == 0 and not any([n % tile.BN for n in call.widths]),
        HAS_BIAS=call.has_bias,
        HAS_POOL=members.has_pool,
        UNITS=call.units,
        PDL=call.overlap and members.has_pools,
    )
