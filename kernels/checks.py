"""Checks of op arguments that both bodies make, on shapes and dtypes alone (nothing here reads device memory).

Stage: run time, first thing in every body.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fxlora.kernels.errors import OpInputError
from fxlora.kernels.expert_pool import ExpertPool
from fxlora.kernels.expert_segments import expert_segments_size, is_in_place
from fxlora.kernels.registry import SitePool


def check_rows(x_rows: int, row_slots: torch.Tensor, row_coeffs: torch.Tensor | None) -> None:
    """Raises OpInputError when row_slots is not int32 [T, J] for these T rows, or row_coeffs not fp32 [T, J]."""
    if row_slots.dim() != 2 or row_slots.shape[0] != x_rows or row_slots.dtype != torch.int32:
        raise OpInputError(f"row_slots is {row_slots.dtype} {tuple(row_slots.shape)}; expected int32 [{x_rows}, J]")
    if row_coeffs is not None and (row_coeffs.shape != row_slots.shape or row_coeffs.dtype != torch.float32):
        raise OpInputError(
            f"row_coeffs is {row_coeffs.dtype} {tuple(row_coeffs.shape)}; expected fp32 {tuple(row_slots.shape)}"
        )


def check_members(weights: Sequence[torch.Tensor], pools: Sequence[SitePool | None]) -> None:
    """Raises OpInputError when a group has not one pool (or None) for each weight, or is that of an expert weight."""
    if len(weights) != len(pools):
        raise OpInputError(f"the op got {len(weights)} weights, its group has {len(pools)} members")
    check_linears(pools)


def check_linears(pools: Sequence[SitePool | None]) -> None:
    """Raises OpInputError when a group is that of an expert weight."""
    if isinstance(pools[0], ExpertPool):
        raise OpInputError("the handle is that of an expert weight, not of linears or embeddings")


def check_experts(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, segments: torch.Tensor, pool: ExpertPool | None
) -> None:
    """Raises OpInputError when x [T, K], weight [E, N, K], bias, pool and segments do not fit each other."""
    if x.dim() != 2 or weight.dim() != 3 or weight.shape[2] != x.shape[1] or weight.dtype != x.dtype:
        raise OpInputError(
            f"x is {x.dtype} {tuple(x.shape)}, weight {weight.dtype} {tuple(weight.shape)}; expected [T, K] and "
            "[E, N, K] of one dtype"
        )
    num_experts, out_features, in_features = weight.shape
    if bias is not None and bias.shape != (num_experts, out_features):
        raise OpInputError(f"bias is {tuple(bias.shape)}; expected [{num_experts}, {out_features}]")
    if pool is None:
        return
    found = (pool.num_experts, pool.b.shape[1], pool.a.shape[1])
    if found != (num_experts, out_features, in_features) or pool.a.dtype != x.dtype:
        raise OpInputError(
            f"weight is {weight.dtype} {tuple(weight.shape)}, its pool is made for {pool.a.dtype} {found} (E, N, K)"
        )
    slots = pool.rank.numel()
    size = expert_segments_size(x.shape[0], num_experts, slots, is_in_place(segments.numel()))
    if segments.numel() != size:
        raise OpInputError(
            f"segments have {segments.numel()} elements; {x.shape[0]} rows of {num_experts} experts over the {slots} "
            f"slots of the pool have {size}"
        )
