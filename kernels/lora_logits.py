"""Triton body of `lora_logits`: the linear over the vocabulary.

Stage: run time, last op of a rewritten graph. Letters: T rows, J slots per row, K in-features, V vocabulary.
"""

from __future__ import annotations

import torch

from fxlora.kernels.lora_linear import lora_linear


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
    return lora_linear(x, [weight], [bias], row_slots, row_coeffs, segments, group)[0]
