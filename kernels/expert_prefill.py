"""Experts over many rows each: shrink of all row tiles, then the grouped GEMM with the expand in its epilogue.

Stage: run time. Two launches; the second starts while the first one ends and needs h only behind the in-features of its
first tile. Programs stay resident and share the tiles that the batch has: grids come from shapes alone. The weights
come through TMA where their strides allow it, x too where its rows are in place; else through pointers, at any stride.

Arithmetic as in prefill.py: h = coeff * (scaling * (x A^T)) in fp32, rounded to the dtype of x; h B is accumulated onto
the base result, 16 ranks at a time, slots ascending, and a row meets zeros at the ranks of other slots.

Letters: T rows, J slots per row, E experts, K in-features, N out-features.
"""

# ruff: noqa: ANN001, RET505 (blocks have no static type; Triton compiles one branch of a constexpr, so both stay)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fxlora.kernels.expert_call import ExpertCall, rows_of, tile_item, tiles_in_use
from fxlora.kernels.expert_prefill_shrink import adapters_of, shrink_tiles
from fxlora.kernels.groups import FIELDS, load_b, load_groups, load_h
from fxlora.kernels.overlap import let_later_start, wait_for_earlier
from fxlora.kernels.tiles import ExpertPrefillTile
from fxlora.kernels.triton_helpers import INTERPRET, cdiv, dot, strided

_AHEAD = 6  # loads of the expand are issued this many steps before the last one of the base GEMM
_POINTERS, _ALONG_K, _ALONG_N = 0, 1, 2  # how W is read: at any stride, or through TMA with K or N adjacent


@triton.jit
def load_w(
    w, w_desc, expert, first_col, first_k, num_cols, num_features,
    BN: tl.constexpr, BK: tl.constexpr, FORM: tl.constexpr, EVEN: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """[BK, BN] of an expert's W, transposed."""
    if FORM == 1:
        return w_desc.load([expert, first_col, first_k]).reshape(BN, BK).T
    elif FORM == 2:
        return w_desc.load([expert, first_k, first_col]).reshape(BK, BN)
    else:
        cols = first_col + tl.arange(0, BN)
        ks = first_k + tl.arange(0, BK)
        at = w[0] + expert.to(tl.int64) * w[1] + cols[None, :].to(tl.int64) * w[2] + ks[:, None].to(tl.int64) * w[3]
        if EVEN:
            return tl.load(at)
        else:
            return tl.load(at, mask=(ks < num_features)[:, None] & (cols < num_cols)[None, :], other=0.0)


@triton.jit
def load_x(
    x, x_desc, first, rows, row_mask, first_k, num_features, BK: tl.constexpr, EVEN_K: tl.constexpr
) -> tl.tensor:
    """[BM, BK] of x."""
    if x_desc is not None:
        return x_desc.load([first, first_k])
    else:
        ks = first_k + tl.arange(0, BK)
        mask = row_mask[:, None] if EVEN_K else row_mask[:, None] & (ks < num_features)[None, :]
        return tl.load(x[0] + rows[:, None] * x[1] + ks[None, :], mask=mask, other=0.0)


@triton.jit
def ask_for_groups(row_tile, first_group, count, adapters, BR: tl.constexpr) -> tl.tensor:
    """load_groups, never past the groups without a slot that end the list."""
    return load_groups(row_tile, tl.minimum(first_group, count), adapters, BR)


@triton.jit
def adapted_tile(
    x, x_desc, w, w_desc, expert, row_tile, first, rows, row_mask, first_col, adapters, num_rows, num_features,
    num_cols, steps, J: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
    FORM: tl.constexpr, EVEN: tl.constexpr, EVEN_K: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
    PDL: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """x W^T + h B of one tile of y. The loads of the first BR ranks hide behind the last steps of the base GEMM."""
    GROUPS: tl.constexpr = BR // 16
    cols = first_col + tl.arange(0, BN)
    own_rows = tl.where(row_mask, rows, num_rows)  # those of other tiles have no slots
    count = 0
    no_slots, zeros = tl.full([BR], -1, tl.int32), tl.full([BR], 0, tl.int32)
    columns, more_columns = (no_slots, zeros, zeros), (no_slots, zeros, zeros)
    h_tile = tl.zeros([BM, BR], adapters.h.dtype.element_ty)
    b_tile = tl.zeros([BR, BN], adapters.h.dtype.element_ty)
    acc = tl.zeros([BM, BN], tl.float32)
    ask_at = tl.maximum(steps - AHEAD, 0)
    for step in tl.range(0, steps, num_stages=STAGES):
        x_tile = load_x(x, x_desc, first, rows, row_mask, step * BK, num_features, BK, EVEN_K)
        w_tile = load_w(w, w_desc, expert, first_col, step * BK, num_cols, num_features, BN, BK, FORM, EVEN)
        acc = dot(x_tile, w_tile, acc, "ieee")
        if step == ask_at:
            wait_for_earlier(PDL)
            record = adapters.groups + row_tile * (FIELDS * adapters.capacity + 1)
            count = tl.load(record + FIELDS * adapters.capacity, cache_modifier=".cg")
            columns = load_groups(row_tile, 0, adapters, BR)
        if step == tl.minimum(ask_at + 1, steps - 1):
            h_tile = load_h(own_rows, columns, adapters, num_rows, J, BM, BR)
            b_tile = load_b(cols, columns, adapters, num_cols, BR)
            more_columns = ask_for_groups(row_tile, GROUPS, count, adapters, BR)
    for first_group in tl.range(0, count, GROUPS, num_stages=1):
        next_h = load_h(own_rows, more_columns, adapters, num_rows, J, BM, BR)  # on its way during the dot
        next_b = load_b(cols, more_columns, adapters, num_cols, BR)
        more_columns = ask_for_groups(row_tile, first_group + 2 * GROUPS, count, adapters, BR)
        acc = dot(h_tile, b_tile, acc, "ieee")
        h_tile, b_tile = next_h, next_b
    return acc


@triton.jit(do_not_specialize=["num_rows", "bound"])
def expert_prefill_kernel(
    x,  # [T, K]: pointer, row stride; columns adjacent
    x_desc,  # the same, or None
    w,  # [E, N, K]: pointer, strides
    w_desc,  # [E, N, K] (FORM 1) or [E, K, N] (FORM 2), or None
    bias,  # [E, N]: pointer, strides
    y_ptr,  # [T, N], contiguous
    adapters,  # or None
    table_ptr,
    num_rows,
    num_experts,
    bound,  # TB of the table
    num_features,
    num_cols,
    J: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    FORM: tl.constexpr,
    EVEN: tl.constexpr,
    EVEN_K: tl.constexpr,
    IN_PLACE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Every tile of y: base GEMM, adapters, bias, one store; rows without an expert become zero."""
    let_later_start(PDL)
    table = (table_ptr, num_rows, num_experts, bound)
    tiles_n = tl.cdiv(num_cols, BN)
    for item in tl.range(tl.program_id(0), tiles_in_use(table) * tiles_n, tl.num_programs(0), num_stages=1):
        expert, row_tile, col_tile, first, end = tile_item(item, tiles_n, table, BM)
        positions = first + tl.arange(0, BM)
        row_mask = positions < end
        rows = rows_of(positions, row_mask, table, IN_PLACE).to(tl.int64)
        first_col = col_tile * BN
        cols = first_col + tl.arange(0, BN)
        steps = tl.where(expert < num_experts, tl.cdiv(num_features, BK), 0)
        if adapters is not None:
            acc = adapted_tile(
                x, x_desc, w, w_desc, expert, row_tile, first, rows, row_mask, first_col, adapters, num_rows,
                num_features, num_cols, steps, J, BM, BN, BK, BR, FORM, EVEN, EVEN_K, STAGES, AHEAD, PDL,
            )  # fmt: skip
        else:
            acc = tl.zeros([BM, BN], tl.float32)
            for step in tl.range(0, steps, num_stages=STAGES):
                x_tile = load_x(x, x_desc, first, rows, row_mask, step * BK, num_features, BK, EVEN_K)
                w_tile = load_w(w, w_desc, expert, first_col, step * BK, num_cols, num_features, BN, BK, FORM, EVEN)
                acc = dot(x_tile, w_tile, acc, "ieee")
        if HAS_BIAS:
            bias_at = bias[0] + expert.to(tl.int64) * bias[1] + cols.to(tl.int64) * bias[2]
            bias_mask = (cols < num_cols) & (expert < num_experts)
            acc += tl.load(bias_at, mask=bias_mask, other=0.0).to(tl.float32)[None, :]
        y_at = y_ptr + rows[:, None] * num_cols + cols[None, :]
        tl.store(y_at, acc.to(y_ptr.dtype.element_ty), mask=row_mask[:, None] & (cols < num_cols)[None, :])
    wait_for_earlier(PDL)


def prefill(call: ExpertCall, tile: ExpertPrefillTile) -> torch.Tensor:
    """y [T, N] for `call`."""
    adapters = None
    if call.has_pool:
        adapters = adapters_of(call)
        shrink_tiles(call, adapters, tile)
    y = call.x.new_empty(call.rows, call.columns)
    form, w_desc = _described(call, tile)
    x_desc = None
    if tile.x_tma and call.in_place and _tma_reads(call.x, call):
        x_desc = TensorDescriptor.from_tensor(call.x, [call.height, tile.BK])
    even_k = call.features % tile.BK == 0
    pdl = call.overlap and call.has_pool
    keywords: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    expert_prefill_kernel[(min(call.tiles * cdiv(call.columns, tile.BN), tile.programs),)](
        (call.x, call.x.stride(0)),
        x_desc,
        strided(call.weight),
        w_desc,
        call.strided_bias,
        y,
        adapters,
        call.segments,
        call.rows,
        call.num_experts,
        call.bound,
        call.features,
        call.columns,
        J=call.width,
        BM=call.height,
        BN=tile.BN,
        BK=tile.BK,
        BR=tile.BR,
        FORM=form,
        EVEN=even_k and call.columns % tile.BN == 0,
        EVEN_K=even_k,
        IN_PLACE=call.in_place,
        HAS_BIAS=call.has_bias,
        STAGES=tile.num_stages,
        AHEAD=_AHEAD,
        PDL=pdl,
        num_warps=tile.num_warps,
        **keywords,
    )
    return y


def _described(call: ExpertCall, tile: ExpertPrefillTile) -> tuple[int, TensorDescriptor | None]:
    """How W is read, and its TMA descriptor."""
    weight = call.weight
    if tile.w_tma and _tma_reads(weight, call):
        return _ALONG_K, TensorDescriptor.from_tensor(weight, [1, tile.BN, tile.BK])
    if tile.w_tma and _tma_reads(weight.mT, call):
        return _ALONG_N, TensorDescriptor.from_tensor(weight.mT, [1, tile.BK, tile.BN])
    return _POINTERS, None


def _tma_reads(matrix: torch.Tensor, call: ExpertCall) -> bool:
    """Half precision, last dim adjacent, all else 16 bytes apart, on a GPU that has TMA."""
    if matrix.dtype == torch.float32 or not (call.overlap or INTERPRET.value):
        return False
    *strides, last = matrix.stride()
    return last == 1 and matrix.data_ptr() % 16 == 0 and not any(stride % 8 or not stride for stride in strides)
