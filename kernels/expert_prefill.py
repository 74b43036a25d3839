"""Experts over many rows each: shrink of all row tiles, then the grouped GEMM with the expand in its epilogue.

Stage: run time. Two launches. Programs of the second stay resident and share the tiles of y in a fixed order, so that
those that read the same weights and rows do so at about the same time, which L2 needs: they start together, when the
first launch has ended. Where few of them share anything, they start beside its last ones, by the rules of overlap.py,
and need h only behind the in-features of their first tile. On a Hopper GPU few programs of expert_hopper_shrink.py may
make h beside all of them, tile after tile, and expert_hopper.py takes the place of both launches where experts have
several tiles. A tile of 128 rows with no more than 64 in use is half as high, which leaves the bits of a row as they
are. Where most experts have little more than 128 rows, a program takes the 32 after them along, for one pass over W.
Grids come from shapes alone. The weights come through TMA where their strides allow it, x too where its rows are in
place; else through pointers, at any stride.

Arithmetic as in fused.py: h = coeff * (scaling * (x A^T)) in fp32, rounded to the dtype of x; h B is accumulated onto
the base result, 16 ranks at a time, slots ascending, and a row meets zeros at the ranks of other slots.

Letters: T rows, J slots per row, E experts, K in-features, N out-features.
"""

# ruff: noqa: ANN001, RET505 (blocks have no static type; Triton compiles one branch of a constexpr, so both stay)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fxlora.kernels.call import Plan
from fxlora.kernels.expert_call import ExpertCall, load_x, rows_of, tile_item, tiles_in_use
from fxlora.kernels.expert_prefill_shrink import adapters_of, shrink_tiles
from fxlora.kernels.expert_segments import HIGH
from fxlora.kernels.expert_tiles import ExpertBesideTile, ExpertPrefillTile
from fxlora.kernels.groups import add_groups, add_groups_to_both, count_groups
from fxlora.kernels.launch import Described, Launcher
from fxlora.kernels.overlap import wait_for_earlier, wait_until_ready
from fxlora.kernels.triton_helpers import cdiv, dot, multiprocessors, strided

_POINTERS, _ALONG_K, _ALONG_N = 0, 1, 2  # how W is read: at any stride, or through TMA with K or N adjacent

MOST_COUNTED = 32
"""Slots of a pool whose use in a batch is counted in little time."""


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
def multiply(x_tile, w_tile, acc, SWAP: tl.constexpr) -> tl.tensor:
    """acc [BM, BN] (SWAP: [BN, BM]) + x W."""
    if SWAP:
        return dot(w_tile.T, x_tile.T, acc, "ieee")
    else:
        return dot(x_tile, w_tile, acc, "ieee")


@triton.jit
def store_rows(
    acc, expert, rows, row_mask, cols, bias, y_ptr, num_cols, num_experts, HAS_BIAS: tl.constexpr, SWAP: tl.constexpr
) -> None:
    """Rows of y, with the bias."""
    if SWAP:
        acc = acc.T
    if HAS_BIAS:
        bias_at = bias[0] + expert.to(tl.int64) * bias[1] + cols.to(tl.int64) * bias[2]
        bias_mask = (cols < num_cols) & (expert < num_experts)
        acc += tl.load(bias_at, mask=bias_mask, other=0.0).to(tl.float32)[None, :]
    y_at = y_ptr + rows[:, None] * num_cols + cols[None, :]
    tl.store(y_at, acc.to(y_ptr.dtype.element_ty), mask=row_mask[:, None] & (cols < num_cols)[None, :])


@triton.jit
def expert_tile(
    expert, row_tile, col_tile, first, end, is_first, x, x_desc, x_tail_desc, w, w_desc, bias, y_ptr, adapters, table,
    num_features, num_cols, J: tl.constexpr, BM: tl.constexpr, TAIL: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BR: tl.constexpr, FORM: tl.constexpr, EVEN: tl.constexpr, EVEN_K: tl.constexpr, IN_PLACE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_POOL: tl.constexpr, STAGES: tl.constexpr, EXPAND_STAGES: tl.constexpr,
    SWAP: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """One tile of y, BM rows from position `first` on and TAIL more: base GEMM, adapters, bias, one store.

    is_first: of its program, which with PDL may have started before the shrink ended.
    """
    num_rows, num_experts = table[1], table[2]
    positions = first + tl.arange(0, BM)
    row_mask = positions < end
    rows = rows_of(positions, row_mask, table, IN_PLACE).to(tl.int64)
    first_col = col_tile * BN
    cols = first_col + tl.arange(0, BN)
    steps = tl.where(expert < num_experts, tl.cdiv(num_features, BK), 0)
    count = 0
    if HAS_POOL:
        count = tl.where(steps > 0, count_groups(row_tile, adapters), 0)  # on its way during the base GEMM
    acc = tl.zeros([BN, BM] if SWAP else [BM, BN], tl.float32)
    tail, tail_rows, tail_mask = acc, rows, row_mask  # of no use without a TAIL
    if TAIL:
        tail_positions = first + BM + tl.arange(0, TAIL)
        tail_mask = tail_positions < end
        tail_rows = rows_of(tail_positions, tail_mask, table, IN_PLACE).to(tl.int64)
        tail = tl.zeros([BN, TAIL], tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        x_tile = load_x(x, x_desc, first, rows, row_mask, step * BK, num_features, BK, EVEN_K)
        w_tile = load_w(w, w_desc, expert, first_col, step * BK, num_cols, num_features, BN, BK, FORM, EVEN)
        acc = multiply(x_tile, w_tile, acc, SWAP)
        if TAIL:
            x_tail = load_x(x, x_tail_desc, first + BM, tail_rows, tail_mask, step * BK, num_features, BK, EVEN_K)
            tail = multiply(x_tail, w_tile, tail, True)
    if HAS_POOL:
        if adapters.ready is not None:
            if steps > 0:
                wait_until_ready(adapters.ready + row_tile)
            count = tl.where(steps > 0, count_groups(row_tile, adapters), 0)
        elif PDL and is_first:
            wait_for_earlier(PDL)
            count = tl.where(steps > 0, count_groups(row_tile, adapters), 0)
        own_rows = tl.where(row_mask, rows, num_rows)  # those of other tiles have no slots
        if TAIL:
            own_tail_rows = tl.where(tail_mask, tail_rows, num_rows)
            acc, tail = add_groups_to_both(
                acc, tail, row_tile, count, own_rows, own_tail_rows, cols, adapters, num_rows, num_cols, J, BM, TAIL,
                BR, EXPAND_STAGES,
            )  # fmt: skip
        else:
            acc = add_groups(
                acc, row_tile, 0, count, own_rows, cols, adapters, num_rows, num_cols, J, BM, BR, SWAP, EXPAND_STAGES
            )
    if TAIL:  # first, so that it is out of the registers
        store_rows(tail, expert, tail_rows, tail_mask, cols, bias, y_ptr, num_cols, num_experts, HAS_BIAS, True)
    store_rows(acc, expert, rows, row_mask, cols, bias, y_ptr, num_cols, num_experts, HAS_BIAS, SWAP)


@triton.jit(do_not_specialize=["num_rows", "bound", "tiles_at"])
def expert_prefill_kernel(
    x,  # [T, K]: pointer, row stride; columns adjacent
    x_desc,  # the same in blocks of BM rows, or None
    x_half_desc,  # of BM // 2 rows; read with HALVES
    x_tail_desc,  # of TAIL rows
    w,  # [E, N, K]: pointer, strides
    w_desc,  # [E, N, K] (FORM 1) or [E, K, N] (FORM 2), or None
    bias,  # [E, N]: pointer, strides
    y_ptr,  # [T, N], contiguous
    adapters,  # or None
    table_ptr,
    num_rows,
    num_experts,
    bound,  # TB of the table
    tiles_at,
    num_features,
    num_cols,
    J: tl.constexpr,
    BM: tl.constexpr,
    TAIL: tl.constexpr,  # more rows of a tile, taken along where there are any; with it SWAP
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    FORM: tl.constexpr,
    EVEN: tl.constexpr,
    EVEN_K: tl.constexpr,
    IN_PLACE: tl.constexpr,
    X_TMA: tl.constexpr,  # x_desc is there
    HAS_BIAS: tl.constexpr,
    HAS_POOL: tl.constexpr,
    HALVES: tl.constexpr,  # a tile is half as high where no more rows are left
    STAGES: tl.constexpr,
    EXPAND_STAGES: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Every tile of y; rows without an expert become zero."""
    table = (table_ptr, num_rows, num_experts, bound, tiles_at)
    tiles_n = tl.cdiv(num_cols, BN)
    for item in tl.range(tl.program_id(0), tiles_in_use(table) * tiles_n, tl.num_programs(0), num_stages=1):
        expert, row_tile, col_tile, first, end = tile_item(item, tiles_n, table, BM + TAIL)
        is_first = item == tl.program_id(0)
        if HALVES and end - first <= BM // 2:
            expert_tile(
                expert, row_tile, col_tile, first, end, is_first, x, x_half_desc, None, w, w_desc, bias, y_ptr,
                adapters, table, num_features, num_cols, J, BM // 2, 0, BN, BK, BR, FORM, EVEN, EVEN_K, IN_PLACE,
                HAS_BIAS, HAS_POOL, STAGES, EXPAND_STAGES, TAIL > 0, PDL,
            )  # fmt: skip
        elif TAIL and end - first > BM:
            expert_tile(
                expert, row_tile, col_tile, first, end, is_first, x, x_desc, x_tail_desc, w, w_desc, bias, y_ptr,
                adapters, table, num_features, num_cols, J, BM, TAIL, BN, BK, BR, FORM, EVEN, EVEN_K, IN_PLACE,
                HAS_BIAS, HAS_POOL, STAGES, EXPAND_STAGES, True, PDL,
            )  # fmt: skip
        else:
            expert_tile(
                expert, row_tile, col_tile, first, end, is_first, x, x_desc, None, w, w_desc, bias, y_ptr,
                adapters, table, num_features, num_cols, J, BM, 0, BN, BK, BR, FORM, EVEN, EVEN_K, IN_PLACE,
                HAS_BIAS, HAS_POOL, STAGES, EXPAND_STAGES, TAIL > 0, PDL,
            )  # fmt: skip
    wait_for_earlier(PDL)


_launcher = Launcher(expert_prefill_kernel)


def prefill(call: ExpertCall, tile: ExpertPrefillTile) -> torch.Tensor:
    """y [T, N] for `call`."""
    if tile.TAIL:
        call.height = HIGH
    in_reach = call.in_place and _tma_reads(call.x, call)
    x_tma = tile.x_tma and in_reach
    adapters = None
    if call.has_pool:
        if isinstance(tile.shrink, ExpertBesideTile):
            from fxlora.kernels.expert_hopper_shrink import shrink_beside  # another Triton may not have what it imports

            adapters = adapters_of(call, beside=True)
            shrink_beside(call, adapters, tile.shrink)
        else:
            adapters = adapters_of(call)
            shrink_tiles(call, adapters, tile.shrink, in_reach and tile.shrink.x_tma, tile.early)
    y = call.x.new_empty(call.rows, call.columns)
    form, w_desc = _described(call, tile)
    plan = call.plan(_launcher, tile, lambda: _plan(call, tile, form, x_tma), step=(form, x_tma))
    call.launch(
        plan,
        (call.x, call.x.stride(0)),
        Described(call.x, (tile.BM, tile.BK)) if x_tma else None,
        Described(call.x, (tile.BM // 2, tile.BK)) if x_tma and _halves(tile) else None,
        Described(call.x, (tile.TAIL, tile.BK)) if x_tma and tile.TAIL else None,
        strided(call.weight),
        w_desc,
        call.strided_bias,
        y,
        adapters,
        call.segments,
        *plan.numbers,
    )
    return y


def _halves(tile: ExpertPrefillTile) -> bool:
    """Whether a row tile with rows for no more than half of it is half as high."""
    return tile.BM >= 128


def _plan(call: ExpertCall, tile: ExpertPrefillTile, form: int, x_tma: bool) -> Plan:
    even_k = call.features % tile.BK == 0
    left = multiprocessors(call.x.device)
    if isinstance(tile.shrink, ExpertBesideTile) and call.has_pool:
        left = max(1, left - tile.shrink.few)
    return call.planned(
        _launcher,
        (min(call.tiles * cdiv(call.columns, tile.BN), tile.programs * left),),
        (call.rows, call.num_experts, call.bound, call.tiles_at, call.features, call.columns),
        tile.num_warps,
        J=call.width,
        BM=tile.BM,
        TAIL=tile.TAIL,
        BN=tile.BN,
        BK=tile.BK,
        BR=tile.BR,
        FORM=form,
        EVEN=even_k and call.columns % tile.BN == 0,
        EVEN_K=even_k,
        IN_PLACE=call.in_place,
        X_TMA=x_tma,
        HAS_BIAS=call.has_bias,
        HAS_POOL=call.has_pool,
        HALVES=_halves(tile),
        STAGES=tile.num_stages,
        EXPAND_STAGES=tile.expand_stages,
        PDL=call.has_pool and call.overlap and tile.early,
    )


def _described(call: ExpertCall, tile: ExpertPrefillTile) -> tuple[int, Described | None]:
    """How W is read, and as what by TMA."""
    weight = call.weight
    if tile.w_tma and _tma_reads(weight, call):
        return _ALONG_K, Described(weight, (1, tile.BN, tile.BK))
    if tile.w_tma and _tma_reads(weight.mT, call):
        return _ALONG_N, Described(weight.mT, (1, tile.BK, tile.BN))
    return _POINTERS, None


def shrinks_beside(call: ExpertCall) -> bool:
    """Whether expert_hopper_shrink.py serves a call: TMA can read x and A, and there are not too many slots, whose
    rounds each of its programs counts before it begins."""
    return _tma_reads_x_and_a(call) and call.site.max_adapters <= MOST_COUNTED


def runs_in_one(call: ExpertCall) -> bool:
    """Whether expert_hopper.py serves a call: rows of one slot each, of up to 64 ranks, and TMA moves x, A, W and y."""
    if not _tma_reads_x_and_a(call) or call.width > 1 or call.site.h_width > 64:
        return False
    return call.columns % 8 == 0 and (_tma_reads(call.weight, call) or _tma_reads(call.weight.mT, call))


def _tma_reads_x_and_a(call: ExpertCall) -> bool:
    """The rows come in place, and there is an A."""
    pool = call.site.pool
    if pool is None or not call.in_place or pool.a.numel() == 0:
        return False
    return _tma_reads(call.x, call) and _tma_reads(pool.a, call)


def _tma_reads(matrix: torch.Tensor, call: ExpertCall) -> bool:
    """TMA reads it, and no two rows or experts are the same memory."""
    return call.tma_reads(matrix) and 0 not in matrix.stride()
