"""Triton body of `lora_logits`: the linear over the vocabulary, with a tile choice of its own.

Stage: run time, last op of a rewritten graph. Letters: T rows, J slots per row, K in-features, V vocabulary.
"""

from __future__ import annotations

import torch

from fxlora.kernels.checks import check_members, check_rows
from fxlora.kernels.lora_linear import linear
from fxlora.kernels.registry import pools_of
from fxlora.kernels.tiles import logits_tile


def lora_logits(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    row_slots: torch.Tensor,
    row_coeffs: torch.Tensor | None,
    segments: torch.Tensor,
    group: int,
) -> torch.Tensor:
    """See `ops.lora_logits`."""
    pools = pools_of(group)
    check_members([weight], pools)
    check_rows(x.numel() // x.shape[-1], row_slots, row_coeffs)
    tile = logits_tile(row_slots.shape[0], x.dtype)
    return linear(x, weight, bias, row_slots, row_coeffs, segments, pools[0], tile)
