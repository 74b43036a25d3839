"""`lora_linear` for many rows on one GPU: per member one launch with shrink, base GEMM and expand.

Stage: run time. Programs stay resident and share the tiles of y. Those with the fewest of them first run the shrink of
the row tiles and publish h; each of them needs h only behind the in-features of its first tile. Grids come from shapes
alone, slots, ranks and scalings are read on the device: a captured CUDA graph serves whatever is loaded at replay.

Arithmetic: h = coeff * (scaling * (x A^T)) in fp32, rounded to the dtype of x; h B is accumulated onto the base result,
16 ranks at a time, slots ascending. A row of another slot meets zeros in h, which leave its fp32 sum as it is, so its
bits depend on its own adapters alone; B has to be finite between `start` and `start + rank`, A need not be.

Letters: T rows, J slots per row, K in-features, N out-features.
"""

# ruff: noqa: ANN001, SIM108 (pointers and blocks have no static type; a choice at compile time is a statement)

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fxlora.kernels.handshake import clear_after_last, leave, raise_counter, resident_programs, wait_for
from fxlora.kernels.prefill_shrink import FIELDS, Adapters, adapters_of, load_groups, shrink_row_tile, slots_of, spread
from fxlora.kernels.registry import SitePool
from fxlora.kernels.tiles import Tile
from fxlora.kernels.triton_helpers import INTERPRET, cdiv, device_of, dot, next_power_of_2

_BAND = 8  # row tiles whose tiles of y follow each other, so that W and x are read from L2
_SHRINK_STAGES = 6
_AHEAD = 6  # loads of the expand are issued this many steps before the last one of the base GEMM
_SHRINKS_PER_TILE = 3  # a shrink takes about a quarter of the time of a 128 x 256 tile of y, whatever K


@triton.jit
def tile_rows(row_tile, BM: tl.constexpr) -> tl.tensor:
    """Rows of a row tile."""
    return (row_tile * BM + tl.arange(0, BM)).to(tl.int64)


@triton.jit
def load_h(rows, columns, adapters, num_rows, J: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr) -> tl.tensor:
    """h of these rows, [BM, BR]; zero in the columns of slots that a row does not use, and past the last row."""
    col_slots, _, ranks = columns
    col_slots, h_cols = spread(col_slots, ranks, BR)
    h_tile = tl.zeros([BM, BR], adapters.h.dtype.element_ty)
    for j in tl.static_range(J):
        own = (col_slots >= 0)[None, :] & (slots_of(rows, j, adapters, num_rows, J)[:, None] == col_slots[None, :])
        h_at = adapters.h + ((rows * J + j) * adapters.width)[:, None] + h_cols[None, :]
        part = tl.load(h_at, mask=own, other=0.0, cache_modifier=".cg")
        if J == 1:
            h_tile = part
        else:
            h_tile = (h_tile.to(tl.float32) + part.to(tl.float32)).to(part.dtype)
    return h_tile


@triton.jit
def load_b(cols, columns, adapters, num_cols, BR: tl.constexpr) -> tl.tensor:
    """B of a row tile's groups, [BR, BN]; zero beyond the rank and without a slot."""
    col_slots, pool_rows, ranks = columns
    lanes = tl.arange(0, BR) % 16
    b_at = adapters.b + (pool_rows + lanes).to(tl.int64)[:, None] * num_cols + cols[None, :]
    mask = ((col_slots >= 0) & (lanes <= ranks % 16))[:, None] & (cols < num_cols)[None, :]
    return tl.load(b_at, mask=mask, other=0.0)


@triton.jit
def adapted_tile(
    x_desc,
    w_desc,
    row_tile,
    col_tile,
    adapters,
    counters_ptr,
    place,
    is_first,
    num_rows,
    num_cols,
    steps,
    J: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    DEPTH: tl.constexpr,
) -> tl.tensor:
    """x W^T + h B of one tile of y, and this program's place among those that left.

    The loads of the first DEPTH times BR ranks hide behind the last steps of the base GEMM: AHEAD steps before the end
    the groups are asked for, a step later h and B, and nothing waits for them before the end.
    """
    cols = col_tile * BN + tl.arange(0, BN)
    count = 0
    no_slots, zeros = tl.full([BR], -1, tl.int32), tl.full([BR], 0, tl.int32)
    columns, more_columns = (no_slots, zeros, zeros), (no_slots, zeros, zeros)
    h_tile, more_h = tl.zeros([BM, BR], adapters.h.dtype.element_ty), tl.zeros([BM, BR], adapters.h.dtype.element_ty)
    b_tile, more_b = tl.zeros([BR, BN], adapters.h.dtype.element_ty), tl.zeros([BR, BN], adapters.h.dtype.element_ty)
    acc = tl.zeros([BM, BN], tl.float32)
    ask_at = tl.maximum(steps - AHEAD, 0)
    for step in tl.range(0, steps, num_stages=STAGES):
        x_tile = x_desc.load([row_tile * BM, step * BK])  # [BM, BK]
        w_tile = w_desc.load([col_tile * BN, step * BK])  # [BN, BK]
        acc = dot(x_tile, w_tile.T, acc, "ieee")
        if step == ask_at:
            if is_first & (not INTERPRET):
                wait_for(counters_ptr, tl.cdiv(num_rows, BM))
                place = leave(counters_ptr + 1)
            record = adapters.groups + row_tile * (FIELDS * adapters.capacity + 1)
            count = tl.load(record + FIELDS * adapters.capacity, cache_modifier=".cg")
            columns = load_groups(row_tile, 0, adapters, BR)
            if DEPTH == 2:
                more_columns = load_groups(row_tile, BR // 16, adapters, BR)
        if step == tl.minimum(ask_at + 1, steps - 1):
            h_tile = load_h(tile_rows(row_tile, BM), columns, adapters, num_rows, J, BM, BR)
            b_tile = load_b(cols, columns, adapters, num_cols, BR)
            if DEPTH == 2:
                more_h = load_h(tile_rows(row_tile, BM), more_columns, adapters, num_rows, J, BM, BR)
                more_b = load_b(cols, more_columns, adapters, num_cols, BR)
    if count > 0:
        acc = dot(h_tile, b_tile, acc, "ieee")
    if (DEPTH == 2) & (count > BR // 16):
        acc = dot(more_h, more_b, acc, "ieee")
    for first_group in tl.range(DEPTH * (BR // 16), count, BR // 16, num_stages=1):
        columns = load_groups(row_tile, first_group, adapters, BR)
        h_tile = load_h(tile_rows(row_tile, BM), columns, adapters, num_rows, J, BM, BR)
        acc = dot(h_tile, load_b(cols, columns, adapters, num_cols, BR), acc, "ieee")
    return acc, place


@triton.jit
def store_tile(y_desc, row, col, acc, BM: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr) -> None:
    """One tile of y; in halves it needs half the shared memory."""
    if PARTS == 2:
        left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
        y_desc.store([row, col], left.to(y_desc.dtype))
        y_desc.store([row, col + BN // 2], right.to(y_desc.dtype))
    else:
        y_desc.store([row, col], acc.to(y_desc.dtype))


@triton.jit(do_not_specialize=["num_rows", "shrinkers"])
def prefill_kernel(
    x_desc,  # [T, K]
    w_desc,  # [N, K]
    y_desc,  # [T, N]
    bias_ptr,  # [N], or None
    adapters,  # or None
    counters_ptr,
    num_rows,
    feature_octets,  # K / 8
    col_octets,  # N / 8
    shrinkers,
    J: tl.constexpr,
    JP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    BAND: tl.constexpr,
    PARTS: tl.constexpr,  # y is stored in column halves (2) or at once (1)
    STAGES: tl.constexpr,
    SHRINK_BR: tl.constexpr,
    SHRINK_STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
    DEPTH: tl.constexpr,
    HAS_COEFFS: tl.constexpr,
) -> None:
    """Every tile of y: base GEMM, adapters, bias, one store."""
    pid, programs = tl.program_id(0), tl.num_programs(0)
    num_features, num_cols = feature_octets * 8, col_octets * 8
    tiles_m, tiles_n, steps = tl.cdiv(num_rows, BM), tl.cdiv(num_cols, BN), tl.cdiv(num_features, BK)
    if adapters is not None and pid < shrinkers:
        for row_tile in tl.range(pid, tiles_m, shrinkers, num_stages=1):
            shrink_row_tile(
                row_tile, x_desc, adapters, num_rows, num_features, J, JP, BM, BK, SHRINK_BR, SHRINK_STAGES, HAS_COEFFS
            )
            raise_counter(counters_ptr)
    place = -1
    first_tile = programs - 1 - pid
    for tile in tl.range(first_tile, tiles_m * tiles_n, programs, num_stages=1):
        band, in_band = tile // (BAND * tiles_n), tile % (BAND * tiles_n)
        height = tl.minimum(tiles_m - band * BAND, BAND)
        row_tile, col_tile = band * BAND + in_band % height, in_band // height
        if adapters is not None:
            acc, place = adapted_tile(
                x_desc, w_desc, row_tile, col_tile, adapters, counters_ptr, place, tile == first_tile,
                num_rows, num_cols, steps, J, BM, BN, BK, BR, STAGES, AHEAD, DEPTH,
            )  # fmt: skip
        else:
            acc = tl.zeros([BM, BN], tl.float32)
            for step in tl.range(0, steps, num_stages=STAGES):
                x_tile, w_tile = x_desc.load([row_tile * BM, step * BK]), w_desc.load([col_tile * BN, step * BK])
                acc = dot(x_tile, w_tile.T, acc, "ieee")
        if bias_ptr is not None:
            cols = col_tile * BN + tl.arange(0, BN)
            acc += tl.load(bias_ptr + cols, mask=cols < num_cols, other=0.0).to(tl.float32)[None, :]
        store_tile(y_desc, row_tile * BM, col_tile * BN, acc, BM, BN, PARTS)
    if adapters is not None:
        clear_after_last(counters_ptr, place, programs, first_tile < tiles_m * tiles_n)


def prefill(
    x_TK: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    row_slots: torch.Tensor,
    row_coeffs: torch.Tensor | None,
    pools: Sequence[SitePool | None],
    segments: torch.Tensor,
    tile: Tile,
    counters: torch.Tensor,
) -> list[torch.Tensor]:
    """x [T, K] contiguous, weights [N, K] each with unit stride along K -> [T, N] per weight; bf16 or fp16.

    K and N are multiples of 8, x and weights 16-byte aligned. tile: BR (16, 32 or 64) ranks are expanded at once.
    counters: COUNTERS int32, zero, which no other launch uses at the same time.
    """
    outputs = []
    for weight, bias, pool in zip(weights, biases, pools, strict=True):
        adapters = None if pool is None else adapters_of(x_TK, row_slots, row_coeffs, pool, segments, tile)
        outputs.append(linear(x_TK, weight, bias, adapters, tile, counters))
    return outputs


def linear(
    x_TK: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    adapters: Adapters | None,
    tile: Tile,
    counters: torch.Tensor,
) -> torch.Tensor:
    """One member of `prefill`."""
    (num_rows, num_features), num_cols = x_TK.shape, weight.shape[0]
    y = torch.empty(num_rows, num_cols, dtype=x_TK.dtype, device=x_TK.device)
    if not y.numel():
        return y
    num_slots, width = (1, 16) if adapters is None else (adapters.slots.shape[1], adapters.width)
    tiles_m, tiles_n = cdiv(num_rows, tile.BM), cdiv(num_cols, tile.BN)
    programs = resident_programs(x_TK.device)
    parts = 2 if tile.BN >= 128 else 1
    with device_of(x_TK):
        prefill_kernel[(programs,)](
            TensorDescriptor.from_tensor(x_TK, [tile.BM, tile.BK]),
            TensorDescriptor.from_tensor(weight, [tile.BN, tile.BK]),
            TensorDescriptor.from_tensor(y, [tile.BM, tile.BN // parts]),
            bias,
            adapters,
            counters,
            num_rows,
            num_features // 8,
            num_cols // 8,
            shrinking_programs(tiles_m, tiles_m * tiles_n, programs),
            J=num_slots,
            JP=next_power_of_2(num_slots),
            BM=tile.BM,
            BN=tile.BN,
            BK=tile.BK,
            BR=tile.BR,
            BAND=_BAND,
            PARTS=parts,
            STAGES=tile.num_stages,
            SHRINK_BR=32 if width <= 32 else 64 if width <= 64 else 128,
            SHRINK_STAGES=_SHRINK_STAGES,
            AHEAD=_AHEAD,
            DEPTH=1 if min(2 * width, 64) <= tile.BR else 2,
            HAS_COEFFS=adapters is not None and adapters.coeffs is not adapters.slots,
            num_warps=tile.num_warps,
        )
    return y


def shrinking_programs(tiles_m: int, tiles: int, programs: int) -> int:
    """How many programs, the first ones, run the shrink: those with a tile of y less than others, if they suffice."""
    if INTERPRET.value:  # programs run one after another, and the first tile of y needs all of h
        return 1
    idle = -tiles % programs
    return idle if idle * _SHRINKS_PER_TILE >= tiles_m else min(tiles_m, programs)
