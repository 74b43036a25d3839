"""What the demo measures: how surprised a model is by a text it never saw."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def row_losses(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the mean next-token cross-entropy of each row, in nats.

    logits: [rows, length, vocabulary]; ids: int64 [rows, length]. Returns fp32 [rows].
    """
    from torch.nn import functional

    losses = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return losses.view(ids.shape[0], -1).mean(dim=1)
