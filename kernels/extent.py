"""What a CPU body reads of one adapter at one site, and what both kinds of pools check when an adapter is written.

Stage: below the pools of `registry.py` and `expert_pool.py`. Letters: K in-features, N out-features, R rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fxlora.kernels.errors import PoolWriteError


class Extent(NamedTuple):
    """Views of the pools.

    window: A, for a rank of 1 together with a neighbouring pool row: the bits of a product of one row depend on where
    the result lies. `ranks` are this adapter's rows of it.
    """

    a: torch.Tensor  # [R, K] (embedding: [V, R])
    window: torch.Tensor  # [W, K], W >= R (embedding: same as a)
    ranks: slice
    b: torch.Tensor  # [R, N]
    scaling: float


def extent_of(a_PK: torch.Tensor, b_PN: torch.Tensor, a_start: int, b_start: int, rank: int, scaling: float) -> Extent:
    """The extent of `rank` rows from `a_start` and `b_start` on."""
    first = max(0, a_start - 1) if rank == 1 else a_start
    return Extent(
        a=a_PK[a_start : a_start + rank],
        window=a_PK[first : first + max(rank, 2)],
        ranks=slice(a_start - first, a_start - first + rank),
        b=b_PN[b_start : b_start + rank],
        scaling=scaling,
    )


def finite_as(b_RN: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
    """B as the pool will hold it. Raises PoolWriteError where it is not finite then."""
    converted = b_RN.detach().to(pool)
    bad = converted.numel() - int(converted.isfinite().sum())
    if bad:
        raise PoolWriteError(
            f"{bad} of {converted.numel()} values of B are not finite in {pool.dtype}: prefill multiplies B by "
            "zero in the neighbours' rows of a batch, and they would become NaN"
        )
    return converted


def check_slot(slot: int, max_adapters: int) -> None:
    """Raises PoolWriteError when a site has no such slot."""
    if not 0 <= slot < max_adapters:
        raise PoolWriteError(f"slot {slot} is outside the {max_adapters} slots of this site")
