"""One row (or a few rows over few columns): y = x W^T + bias + adapters by matrix-vector products, no matrix unit.

Stage: run time. FUSED, for a single row: one launch, whose first programs do the shrink and store it tagged, while all
others stream their rows of W; those look for h only once their own product is done. Not FUSED: delta.py's kernel runs
before, and this one overlaps it.

Nothing can hang. A program that has looked for h too often computes it itself, by the same arithmetic and so to the
same bits, and goes on; no order of programs is assumed.

Letters: T rows, J slots per row, E = T * J entries, K in-features, N out-features, C columns of h, R ranks, S slots.
"""

# ruff: noqa: ANN001 (pointers and blocks of a Triton kernel have no static type)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fxlora.kernels.call import LinearCall
from fxlora.kernels.delta import compute_h
from fxlora.kernels.launch import Launcher
from fxlora.kernels.overlap import await_tagged, enter, launch_number, leave, let_later_start, untag, wait_for_earlier
from fxlora.kernels.shrink import adapter_of, shrink_entry, slot_of
from fxlora.kernels.tiles import GemvTile
from fxlora.kernels.triton_helpers import cdiv, next_power_of_2
from fxlora.kernels.workspace import sync


@triton.jit
def load_b(b_ptr, start, rank, first, cols, col_mask, num_cols, BR: tl.constexpr) -> tl.tensor:
    """[BN, BR]: ranks first .. first + BR of B for these columns."""
    ranks = first + tl.arange(0, BR)
    at = (start + ranks).to(tl.int64) * num_cols
    return tl.load(b_ptr + at[None, :] + cols[:, None], mask=(ranks < rank)[None, :] & col_mask[:, None], other=0.0)


@triton.jit
def product(
    x_at, w_at, w_tile, col_mask, num_features, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    EVEN: tl.constexpr, STAGES: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """[BN] fp32: a row of x times BN rows of W. STAGES 0: all of W is asked for at once, w_tile is its first block."""
    ks = tl.arange(0, BK)
    acc = tl.zeros([BN, BK], tl.float32)
    if STAGES == 0:
        for first in tl.static_range(0, K, BK):
            if first > 0:
                w_tile = load_w(w_at + first, col_mask, first + ks < num_features, EVEN)
            x_tile = tl.load(x_at + first + ks, mask=first + ks < num_features, other=0.0)
            acc += w_tile.to(tl.float32) * x_tile.to(tl.float32)[None, :]
    else:
        for first in tl.range(0, K, BK, num_stages=STAGES):
            w_tile = load_w(w_at + first, col_mask, first + ks < num_features, EVEN)
            x_tile = tl.load(x_at + first + ks, mask=first + ks < num_features, other=0.0)
            acc += w_tile.to(tl.float32) * x_tile.to(tl.float32)[None, :]
    return tl.sum(acc, axis=1)


@triton.jit
def load_w(w_at, col_mask, inside, EVEN: tl.constexpr) -> tl.tensor:
    """[BN, BK] of W."""
    if EVEN:
        return tl.load(w_at)
    else:
        return tl.load(w_at, mask=col_mask[:, None] & inside[None, :], other=0.0)


@triton.jit
def h_chunk(
    entry, first, rank, x, h_ptr, h_stride, slots, coeffs, site, number, num_features, max_adapters,
    J: tl.constexpr, BR: tl.constexpr, SHRINK: tl.constexpr, HAS_COEFFS: tl.constexpr, FUSED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """[BR] fp32: ranks first .. first + BR of an entry's h."""
    ranks = first + tl.arange(0, BR)
    mask = ranks < rank
    at = h_ptr + entry.to(tl.int64) * h_stride + ranks
    if FUSED:
        h, came = await_tagged(at, mask, number)
        if not came:
            shrink_entry(
                entry, 0, 1, x, h_ptr, h_stride, slots, coeffs, site, number, num_features, max_adapters, J, SHRINK,
                HAS_COEFFS, True,
            )  # fmt: skip
            tl.debug_barrier()
            h, _ = untag(tl.load(at, mask=mask, other=0, volatile=True))
        return h
    else:
        return tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def add_adapters(
    y, b, row, rank, start, cols, col_mask, x, h_ptr, h_stride, slots, coeffs, site, b_ptr, number, num_features,
    num_cols, max_adapters, J: tl.constexpr, BR: tl.constexpr, SHRINK: tl.constexpr, HAS_COEFFS: tl.constexpr,
    FUSED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """y plus h B of each j in order. b, rank, start: of j = 0, the first BR ranks."""
    for j in tl.static_range(J):
        if j > 0:
            rank, start, _ = adapter_of(slot_of(row * J + j, slots, max_adapters, J), site)
            b = load_b(b_ptr, start, rank, 0, cols, col_mask, num_cols, BR)
        if rank > 0:
            h = h_chunk(
                row * J + j, 0, rank, x, h_ptr, h_stride, slots, coeffs, site, number, num_features, max_adapters, J, BR,
                SHRINK, HAS_COEFFS, FUSED,
            )  # fmt: skip
            delta = tl.sum(b.to(tl.float32) * h[None, :], axis=1)
            for first in range(BR, rank, BR):
                more_b = load_b(b_ptr, start, rank, first, cols, col_mask, num_cols, BR)
                h = h_chunk(
                    row * J + j, first, rank, x, h_ptr, h_stride, slots, coeffs, site, number, num_features,
                    max_adapters, J, BR, SHRINK, HAS_COEFFS, FUSED,
                )  # fmt: skip
                delta += tl.sum(more_b.to(tl.float32) * h[None, :], axis=1)
            y += delta
    return y


@triton.jit
def gemv_tile(
    x, w, bias, y_ptr, h_ptr, h_stride, slots, coeffs, site, b_ptr, sync_ptr, row, block, num_features, num_cols,
    max_adapters, J: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
    SHRINK: tl.constexpr, EVEN: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_POOL: tl.constexpr,
    HAS_COEFFS: tl.constexpr, FUSED: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """Columns block * BN .. of one row of one member. W and the first ranks of B are asked for before anything else."""
    cols = block * BN + tl.arange(0, BN)
    col_mask = cols < num_cols
    ks = tl.arange(0, BK)
    w_at = w[0] + cols[:, None].to(tl.int64) * w[1] + ks[None, :]
    w_tile = tl.zeros([BN, BK], w[0].dtype.element_ty)
    if STAGES == 0:
        w_tile = load_w(w_at, col_mask, ks < num_features, EVEN)
    if HAS_POOL:
        rank, start, _ = adapter_of(slot_of(row * J, slots, max_adapters, J), site)
        b = load_b(b_ptr, start, rank, 0, cols, col_mask, num_cols, BR)
    number = 0
    if FUSED:
        wait_for_earlier(PDL)
        number = launch_number(enter(sync_ptr))
    y = product(x[0] + row.to(tl.int64) * x[1], w_at, w_tile, col_mask, num_features, K, BN, BK, EVEN, STAGES)
    if HAS_BIAS:
        y += tl.load(bias[0] + cols * bias[1], mask=col_mask, other=0.0).to(tl.float32)
    if HAS_POOL:
        if not FUSED:
            wait_for_earlier(PDL)
        y = add_adapters(
            y, b, row, rank, start, cols, col_mask, x, h_ptr, h_stride, slots, coeffs, site, b_ptr, number,
            num_features, num_cols, max_adapters, J, BR, SHRINK, HAS_COEFFS, FUSED,
        )  # fmt: skip
    tl.store(y_ptr + row.to(tl.int64) * num_cols + cols, y.to(y_ptr.dtype.element_ty), mask=col_mask)


@triton.jit
def produce(
    x, h_ptr, h_stride, slots, coeffs, sites, sync_ptr, num_features, max_adapters, parts, J: tl.constexpr,
    SHRINK: tl.constexpr, HAS_POOL: tl.constexpr, HAS_COEFFS: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """The shrink of the only row: this program's ranks of one member's entry j, tagged."""
    wait_for_earlier(PDL)
    number = launch_number(enter(sync_ptr))
    item = tl.program_id(0) // parts
    for member in tl.static_range(len(HAS_POOL)):
        if HAS_POOL[member]:
            if item // J == member:
                shrink_entry(
                    item % J, tl.program_id(0) % parts, parts, x, h_ptr + member * J * h_stride, h_stride, slots,
                    coeffs, sites[member], number, num_features, max_adapters, J, SHRINK, HAS_COEFFS, True,
                )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "max_adapters", "parts"])
def gemv_kernel(
    x,  # [T, K]: pointer, row stride; columns adjacent
    weights,  # of each member: pointer to [N, K], row stride; columns adjacent
    biases,  # of each member: pointer to [N], stride
    ys,  # of each member: pointer to [T, N], contiguous
    h_ptr,  # [members, T * J, W]: tagged words if FUSED, else fp32
    h_stride,  # W
    slots,  # int32 [T, J]: pointer, strides
    coeffs,  # fp32 [T, J]: pointer, strides
    sites,  # of each member: A [P, K], start, rank, scaling
    b_ptrs,  # of each member: B [P, N]
    sync_ptr,  # see overlap.py
    widths,  # N of each member
    num_rows,
    num_features,
    max_adapters,
    parts,  # programs that share the shrink of one entry
    J: tl.constexpr,
    K: tl.constexpr,  # num_features rounded up to a multiple of BK
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    SHRINK: tl.constexpr,  # see shrink.py
    EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,  # one flag for each member
    HAS_POOL: tl.constexpr,  # one flag for each member
    HAS_COEFFS: tl.constexpr,
    FUSED: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """FUSED: the shrink's programs first. Then the members' blocks one after another, rows of a block side by side."""
    let_later_start(PDL)
    program = tl.program_id(0)
    if FUSED:
        producers = len(HAS_POOL) * J * parts
        if program < producers:
            produce(
                x, h_ptr, h_stride, slots, coeffs, sites, sync_ptr, num_features, max_adapters, parts, J, SHRINK,
                HAS_POOL, HAS_COEFFS, PDL,
            )  # fmt: skip
        program -= producers
    begin = 0
    for member in tl.static_range(len(HAS_POOL)):
        end = begin + tl.cdiv(widths[member], BN) * num_rows
        if (program >= begin) & (program < end):
            gemv_tile(
                x, weights[member], biases[member], ys[member], h_ptr + member * num_rows * J * h_stride, h_stride,
                slots, coeffs, sites[member], b_ptrs[member], sync_ptr, (program - begin) % num_rows,
                (program - begin) // num_rows, num_features, widths[member], max_adapters, J, K, BN, BK, BR, SHRINK,
                EVEN, HAS_BIAS[member], HAS_POOL[member], HAS_COEFFS, FUSED, STAGES, PDL,
            )  # fmt: skip
        begin = end
    if FUSED:
        leave(sync_ptr)


_gemv = Launcher(gemv_kernel)


def gemv(call: LinearCall, tile: GemvTile) -> list[torch.Tensor]:
    """The members' outputs for `call`; fused only for a call of one row. Weights must have adjacent columns."""
    members = call.members
    shrink = tile.delta.shrink
    count = len(call.widths)
    fused = tile.delta.fused and members.has_pools
    parts = min(cdiv(members.h_width, shrink.BR), shrink.parts)
    programs = sum([cdiv(n, tile.BN) for n in call.widths]) * call.rows
    stride = max(64, next_power_of_2(members.h_width))  # whole chunks of BR words
    if fused:
        programs += count * call.width * parts
        counts, h = sync(programs, count * call.width * stride, call.x.device, call.stream)
    else:
        counts, h = call.segments, call.x.new_empty(count * call.entries * stride, dtype=torch.float32)
        if members.has_pools:
            compute_h(call, h, stride, tile.delta)
    outputs = call.new_outputs()
    call.launch(
        _gemv,
        (programs,),
        (
            (call.x, call.x.stride(0)),
            tuple([(weight, weight.stride(0)) for weight in call.weights]),
            call.strided_biases,
            tuple(outputs),
            h,
            stride,
            call.slots,
            call.coeffs,
            members.a_pools,
            members.b_pools,
            counts,
            call.widths,
            call.rows,
            call.features,
            members.max_adapters,
            parts,
        ),
        tile.num_warps,
        J=call.width,
        K=cdiv(call.features, tile.BK) * tile.BK,
        BN=tile.BN,
        BK=tile.BK,
        BR=min(64, max(2, next_power_of_2(members.h_width))),
        SHRINK=(cdiv(call.features, shrink.BK) * shrink.BK, shrink.BR, shrink.BK, 1),
        EVEN=call.features % tile.BK == 0 and not any([n % tile.BN for n in call.widths]),
        HAS_BIAS=call.has_bias,
        HAS_POOL=members.has_pool,
        HAS_COEFFS=call.has_coeffs,
        FUSED=fused,
        STAGES=tile.num_stages,
        PDL=call.overlap and members.has_pools,
    )
    return outputs
