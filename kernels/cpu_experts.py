"""CPU body of `lora_experts`: each expert's rows through its weight, then the adapter rows in place.

Stage: run time, behind `ops.py`. Promises: the base part never looks at slots or pools, so a row without an adapter has
the bits of the same call with nothing loaded; with the same batch shape and the same routing, a row's bits do not
depend on the slots of other rows. As in `cpu.py`, whose pieces add the adapters: with more than SINGLE_ROWS rows every
adapter GEMM of a batch has the same row count, and adapters are never merged.

Letters: T rows, J slots per row, E experts, K in-features, N out-features, S slots.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from itertools import pairwise

import torch

from fxlora.kernels.checks import check_experts, check_rows
from fxlora.kernels.cpu import SHRINK_X, SINGLE_ROWS, HostPlan, Rows, add_blocks, add_single, as_fp32, cut
from fxlora.kernels.expert_pool import ExpertPool
from fxlora.kernels.expert_segments import expert_starts_at, is_in_place, row_experts_at
from fxlora.kernels.registry import expert_pool_of

BLOCK_ROWS = 16
"""Rows of every adapter GEMM: few rows share one adapter and one expert."""


def lora_experts(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    row_slots: torch.Tensor,
    row_coeffs: torch.Tensor | None,
    segments: torch.Tensor,
    group: int,
) -> torch.Tensor:
    """See `ops.lora_experts`."""
    pool = expert_pool_of(group)
    check_rows(x.shape[0], row_slots, row_coeffs)
    check_experts(x, weight, bias, segments, pool)
    y_TN = _base(x, weight, bias, segments)
    if pool is not None and x.shape[0]:
        _add_adapters(y_TN, x, row_slots, row_coeffs, segments, pool)
    return y_TN


def _base(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, segments: torch.Tensor) -> torch.Tensor:
    """[T, N]: one product for each expert that has rows."""
    starts_at = expert_starts_at(x.shape[0])
    starts = segments[starts_at : starts_at + weight.shape[0] + 1].tolist()
    order = None if is_in_place(segments.numel()) else segments[: x.shape[0]].long()
    x_sorted = x if order is None else x.index_select(0, order)
    y_sorted = x.new_zeros(x.shape[0], weight.shape[1])
    for expert, (start, end) in enumerate(pairwise(starts)):
        if start == end:
            continue
        x_nK, y_nN, w_KN = x_sorted[start:end], y_sorted[start:end], weight[expert].t()
        if bias is None:
            torch.mm(x_nK, w_KN, out=y_nN)
        else:
            torch.addmm(bias[expert], x_nK, w_KN, out=y_nN)
    return y_sorted if order is None else torch.empty_like(y_sorted).index_copy_(0, order, y_sorted)


def _add_adapters(
    y_TN: torch.Tensor,
    x: torch.Tensor,
    row_slots: torch.Tensor,
    row_coeffs: torch.Tensor | None,
    segments: torch.Tensor,
    pool: ExpertPool,
) -> None:
    """Adds every adapter's part to y in place."""
    max_adapters = pool.rank.numel()
    experts_T1 = segments[row_experts_at(x.shape[0]) : expert_starts_at(x.shape[0])][:, None]
    adapted = (row_slots >= 0) & (experts_T1 < pool.num_experts)
    plan = host_plan(torch.where(adapted, experts_T1 * max_adapters + row_slots, -1))
    keys = {key for _, _, key in plan.single} | {block.slot for block in plan.blocks}
    extents = {key: pool.extent(key % max_adapters, key // max_adapters) for key in keys}
    if not any(extents.values()):
        return
    add = add_single if plan.single else add_blocks
    if x.dtype not in (torch.bfloat16, torch.float16):
        add([(y_TN, extents)], x.contiguous(), row_coeffs, plan, SHRINK_X)
        return
    y32_TN = y_TN.float()
    wide = {key: as_fp32(extent) for key, extent in extents.items()}
    add([(y32_TN, wide)], x.float(), row_coeffs, plan, SHRINK_X)
    y_TN.copy_(y32_TN)


def host_plan(keys_TJ: torch.Tensor) -> HostPlan:
    """Work of one row map and routing. keys: int32 [T, J], expert * S + slot, or -1; they take the place of slots."""
    return _parse(ctypes.string_at(keys_TJ.data_ptr(), keys_TJ.numel() * 4), *keys_TJ.shape)


@lru_cache(maxsize=64)
def _parse(content: bytes, num_rows: int, width: int) -> HostPlan:
    keys_JT = torch.frombuffer(bytearray(content), dtype=torch.int32).view(num_rows, width).t()
    if num_rows <= SINGLE_ROWS:
        found = [(row, j, key) for j, keys in enumerate(keys_JT.tolist()) for row, key in enumerate(keys) if key >= 0]
        return HostPlan(0, tuple(found), ())
    blocks: list[Rows] = []
    for j, keys_T in enumerate(keys_JT):
        order = keys_T.argsort(stable=True)
        keys, counts = keys_T.unique(return_counts=True)
        for key, rows in zip(keys.tolist(), order.split(counts.tolist()), strict=True):
            blocks += cut(rows, key, j, BLOCK_ROWS) if key >= 0 else ()
    return HostPlan(0, (), tuple(blocks))
