"""Adapter memory of one expert weight [E, N, K]: rank rows of all experts, packed, and the table that finds them.

Stage: run time, between the adapter pool that writes (`fxlora/pool.py`) and `lora_experts`, which reads. Expert e of
a slot owns A rows a_start + e * a_step .. + rank and B rows b_start + e * b_step .. + rank. A step of the rank is an
ordinary adapter: its E * rank rows lie packed, expert by expert, without rounding. A step of 0 is shared by all
experts: one A, or one B.

Letters: E experts, K in-features, N out-features, S slots, PA and PB pool rows, RA and RB rows of one adapter.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from fxlora.kernels.errors import PoolWriteError
from fxlora.kernels.extent import Extent, check_slot, extent_of, finite_as


class ExpertExtent(NamedTuple):
    """One slot of the table, on the host."""

    a_start: int
    a_step: int
    b_start: int
    b_step: int
    rank: int
    scaling: float


@dataclass(eq=False)
class ExpertPool:
    """Rank rows of every adapter loaded on one expert weight, and the table that says which belong to which slot.

    a: [PA, K] of the weight's dtype. b: [PB, N], same dtype. a_start, a_step, b_start, b_step: int32 [S], in pool rows.
    rank: int32 [S], per expert, 0 for a slot that adds nothing here. scaling: fp32 [S]. All keep their addresses for
    life and are updated in place.
    max_rank: highest rank that `write` accepts, the smaller pool if None. Device bodies size their intermediate by it.
    extents: the same table on the host, for CPU bodies. highest_rank: of the slots that add something now.
    """

    num_experts: int
    a: torch.Tensor
    b: torch.Tensor
    a_start: torch.Tensor
    a_step: torch.Tensor
    b_start: torch.Tensor
    b_step: torch.Tensor
    rank: torch.Tensor
    scaling: torch.Tensor
    max_rank: int | None = None
    kind: Literal["experts"] = "experts"
    extents: list[ExpertExtent | None] = field(default_factory=list, repr=False)
    highest_rank: int = 0

    @staticmethod
    def bytes_needed(
        *,
        num_experts: int,
        pool_rows_a: int,
        pool_rows_b: int,
        in_features: int,
        out_features: int,
        max_adapters: int,
        dtype: torch.dtype,
        device: torch.device | str,
        max_rank: int | None = None,
    ) -> int:
        """Bytes that `allocate` with the same arguments would take."""
        del num_experts, device, max_rank
        return (pool_rows_a * in_features + pool_rows_b * out_features) * dtype.itemsize + 24 * max_adapters

    @classmethod
    def allocate(
        cls,
        *,
        num_experts: int,
        pool_rows_a: int,
        pool_rows_b: int,
        in_features: int,
        out_features: int,
        max_adapters: int,
        dtype: torch.dtype,
        device: torch.device | str,
        max_rank: int | None = None,
    ) -> ExpertPool:
        """Empty pool: every slot has rank 0. An ordinary adapter takes E * rank rows of each, a shared one rank."""
        a_start, a_step, b_start, b_step, rank = (
            torch.zeros(max_adapters, dtype=torch.int32, device=device) for _ in range(5)
        )
        return cls(
            num_experts=num_experts,
            a=torch.zeros(pool_rows_a, in_features, dtype=dtype, device=device),
            b=torch.zeros(pool_rows_b, out_features, dtype=dtype, device=device),
            a_start=a_start,
            a_step=a_step,
            b_start=b_start,
            b_step=b_step,
            rank=rank,
            scaling=torch.zeros(max_adapters, dtype=torch.float32, device=device),
            max_rank=max_rank,
            extents=[None] * max_adapters,
        )

    @property
    def rank_bound(self) -> int:
        """No slot of this weight ever has a higher rank."""
        return min(self.a.shape[0], self.b.shape[0]) if self.max_rank is None else self.max_rank

    @property
    def bytes(self) -> int:
        """Bytes held on the device."""
        table = (self.a_start, self.a_step, self.b_start, self.b_step, self.rank, self.scaling)
        return sum(t.numel() * t.element_size() for t in (self.a, self.b, *table))

    def write(
        self,
        slot: int,
        *,
        a_start: int,
        a_step: int,
        b_start: int,
        b_step: int,
        rank: int,
        a_rows: torch.Tensor,
        b_rows: torch.Tensor,
        scaling: float,
    ) -> None:
        """Copies one adapter into the pools and publishes it as `slot`, its rank last.

        a_rows: [RA, K], b_rows: [RB, N], each with E * rank rows, expert by expert, where its step is the rank, and
        with rank rows where its step is 0; any float dtype and device, converted to the pool's. Raises PoolWriteError
        when the slot, the steps, the rows or the shapes do not fit, or when B is not finite in the pool's dtype;
        nothing is written then.
        """
        check_slot(slot, len(self.extents))
        if not 0 <= rank <= self.rank_bound:
            raise PoolWriteError(f"rank {rank} is not within the {self.rank_bound} that this site was allocated for")
        self._check("A", self.a, a_rows, a_start, a_step, rank)
        self._check("B", self.b, b_rows, b_start, b_step, rank)
        b_rows = finite_as(b_rows, self.b)
        self.clear(slot)
        if not rank:
            return
        self.a[a_start : a_start + a_rows.shape[0]].copy_(a_rows.detach())
        self.b[b_start : b_start + b_rows.shape[0]].copy_(b_rows)
        self.a_start[slot], self.a_step[slot] = a_start, a_step
        self.b_start[slot], self.b_step[slot] = b_start, b_step
        self.scaling[slot] = scaling
        self.rank[slot] = rank
        self.extents[slot] = ExpertExtent(a_start, a_step, b_start, b_step, rank, float(scaling))
        self.highest_rank = max(self.highest_rank, rank)

    def clear(self, slot: int) -> None:
        """Makes `slot` add nothing here. The rows keep their values until they are written again."""
        check_slot(slot, len(self.extents))
        self.rank[slot] = 0
        self.extents[slot] = None
        self.highest_rank = max((extent.rank for extent in self.extents if extent), default=0)

    def extent(self, slot: int, expert: int) -> Extent | None:
        """What one expert of a slot owns; None for a slot that adds nothing."""
        found = self.extents[slot]
        if found is None:
            return None
        a_start, b_start = found.a_start + expert * found.a_step, found.b_start + expert * found.b_step
        return extent_of(self.a, self.b, a_start, b_start, found.rank, found.scaling)

    def _check(self, name: str, pool: torch.Tensor, rows: torch.Tensor, start: int, step: int, rank: int) -> None:
        if step not in (0, rank):
            raise PoolWriteError(f"the step of {name} is {step}; expected the rank, {rank}, or 0 where experts share")
        expected = (rank if step == 0 else self.num_experts * rank, pool.shape[1])
        if rows.shape != expected:
            raise PoolWriteError(
                f"{name} is {tuple(rows.shape)}; {self.num_experts} experts at rank {rank} and step {step} take "
                f"{list(expected)}"
            )
        if start < 0 or start + expected[0] > pool.shape[0]:
            raise PoolWriteError(
                f"rows {start} to {start + expected[0]} of {name} are outside the {pool.shape[0]} rows of this pool"
            )
