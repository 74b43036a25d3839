"""What one adapter adds at one site: binding makes entries, the pool stores them.

Letters: E experts, K in-features (V, the vocabulary, for an embedding), N out-features, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Entry:
    """What one adapter adds at one site: x @ a_RK.T @ b_RN * scaling.

    a_RK: [R, K] (embedding: [R, V], read by column); b_RN: [R, N], PEFT's B transposed; dtype and device as stored.
    scaling is kept apart from both. keys: the adapter's names for the two, and those of equal entries under aliases.
    At a weight of E experts a_RK and b_RN hold the rank rows of one expert after the other, [E R, K] and [E R, N], or
    rank rows alone where `shared` (A, B) says that all experts have the same. experts: those that have tensors in the
    file; the rows of the others are zero.
    """

    a_RK: torch.Tensor
    b_RN: torch.Tensor
    scaling: float
    rank: int
    keys: tuple[str, ...]
    shared: tuple[bool, bool] = (False, False)
    experts: tuple[int, ...] = ()
