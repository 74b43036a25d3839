"""Checks of op arguments that both bodies make, on shapes and dtypes alone (nothing here reads device memory).

Stage: run time, first thing in every body.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fxlora.kernels.errors import OpInputError
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
    """Raises OpInputError when a group has not one pool (or None) for each weight."""
    if len(weights) != len(pools):
        raise OpInputError(f"the op got {len(weights)} weights, its group has {len(pools)} members")
