"""Random calls of lora_experts and their comparison with the reference: what all expert tests of this folder share."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fxlora.kernels import ops, reference
from fxlora.kernels.registry import ExpertPool
from tests.kernels.cases import TOLERANCE, assert_near, registered

# The interpreter cuts bf16 off instead of rounding it.
LIMIT = {**TOLERANCE, torch.bfloat16: 1.2e-2} if ops.INTERPRET else TOLERANCE


@dataclass(frozen=True)
class ExpertCase:
    """One call: rows in place with `offsets`, or in any order with `expert_ids`."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    row_slots: torch.Tensor
    row_coeffs: torch.Tensor | None
    offsets: torch.Tensor | None
    expert_ids: torch.Tensor | None
    pool: ExpertPool | None
    max_adapters: int

    @property
    def row_experts(self) -> list[int | None]:
        return reference.experts_of(self.x.shape[0], self.offsets, self.expert_ids, self.weight.shape[0])

    def segments(self) -> torch.Tensor:
        routing = (self.offsets, self.expert_ids, self.weight.shape[0], self.max_adapters)
        return ops.segment_experts(self.row_slots, *routing)

    def call(self, segments: torch.Tensor, handle: int) -> torch.Tensor:
        rest = (self.row_slots, self.row_coeffs, segments, handle)
        return ops.lora_experts(self.x, self.weight, self.bias, *rest)

    def run(self) -> torch.Tensor:
        with registered([self.pool]) as handle:
            return self.call(self.segments(), handle)

    def expected(self) -> torch.Tensor:
        rest = (self.row_slots, self.row_coeffs, self.row_experts, self.pool)
        return reference.lora_experts(self.x, self.weight, self.bias, *rest)

    def with_slots(self, row_slots: torch.Tensor) -> ExpertCase:
        return replace(self, row_slots=row_slots)

    def base(self) -> torch.Tensor:
        """The same call without any adapter in the batch."""
        return self.with_slots(torch.full_like(self.row_slots, -1)).run()


def make_expert_pool(
    num_experts: int,
    in_features: int,
    out_features: int,
    ranks: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    shared: Sequence[str] = (),
) -> ExpertPool:
    """One adapter per rank (0: an empty slot), extents packed in shuffled order, unused pool memory NaN.

    shared: for each slot "" (ordinary), "A" or "B" (one for all experts) or "AB"; the last one is repeated.
    """
    of_slot = [shared[min(slot, len(shared) - 1)] if shared else "" for slot in range(len(ranks))]
    rows = {
        name: [rank * (1 if name in share else num_experts) for rank, share in zip(ranks, of_slot, strict=True)]
        for name in "AB"
    }
    pool = ExpertPool.allocate(
        num_experts=num_experts,
        pool_rows_a=sum(rows["A"]) + 2,
        pool_rows_b=sum(rows["B"]) + 2,
        in_features=in_features,
        out_features=out_features,
        max_adapters=len(ranks),
        dtype=dtype,
        device=device,
        max_rank=max([1, *ranks]),
    )
    pool.a.fill_(float("nan"))
    pool.b.fill_(float("nan"))
    a_start, b_start = 1, 0
    for slot in random.sample(range(len(ranks)), len(ranks)):
        rank, share = ranks[slot], of_slot[slot]
        pool.write(
            slot,
            a_start=a_start,
            a_step=0 if "A" in share else rank,
            b_start=b_start,
            b_step=0 if "B" in share else rank,
            rank=rank,
            a_rows=torch.randn(rows["A"][slot], in_features, device=device) * in_features**-0.5,
            b_rows=torch.randn(rows["B"][slot], out_features, device=device) * max(rank, 1) ** -0.5,
            scaling=random.uniform(0.5, 2.0),
        )
        a_start, b_start = a_start + rows["A"][slot], b_start + rows["B"][slot]
    return pool


def draw_experts(rows: int, num_experts: int, empty: Sequence[int] = (), missing: bool = True) -> torch.Tensor:
    """int64 [T]: an expert for each row, none of `empty`; a few outside 0 .. E - 1 if `missing`."""
    choice = torch.tensor([e for e in range(num_experts) if e not in empty])
    ids = choice[torch.randint(len(choice), (rows,))]
    if missing:
        ids[torch.rand(rows) < 0.1] = random.choice([-1, num_experts, num_experts + 5])
    return ids


def make_expert_case(
    *,
    rows: int = 40,
    experts: int = 5,
    features: int = 40,
    out: int = 24,
    ranks: Sequence[int] = (8, 16, 0, 3),
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    in_place: bool = True,
    bias: bool = False,
    width: int = 1,
    coeffs: bool | None = None,
    transposed: bool = False,
    shared: Sequence[str] = (),
    empty: Sequence[int] = (),
    missing: bool = True,
    ids_dtype: torch.dtype = torch.int64,
    has_pool: bool = True,
    slot_runs: int = 1,
) -> ExpertCase:
    """A random call; `slot_runs` adjacent rows share their slots."""
    ids = draw_experts(rows, experts, empty, missing)
    offsets = torch.bincount(ids[(ids >= 0) & (ids < experts)], minlength=experts).cumsum(0).to(device, ids_dtype)
    shape = (experts, features, out) if transposed else (experts, out, features)
    weight = (torch.randn(shape, device=device) * features**-0.5).to(dtype)
    slots = torch.randint(-1, len(ranks), (-(-rows // slot_runs), width), dtype=torch.int32)
    slots = slots.repeat_interleave(slot_runs, 0)[:rows]
    if rows:
        slots[0] = 0
    return ExpertCase(
        x=torch.randn(rows, features, device=device).to(dtype),
        weight=weight.transpose(1, 2) if transposed else weight,
        bias=torch.randn(experts, out, device=device).to(dtype) if bias else None,
        row_slots=slots.to(device),
        row_coeffs=torch.rand(rows, width, device=device) + 0.5 if (width > 1 if coeffs is None else coeffs) else None,
        offsets=offsets if in_place else None,
        expert_ids=None if in_place else ids.to(device, ids_dtype),
        pool=make_expert_pool(experts, features, out, ranks, dtype, device, shared) if has_pool else None,
        max_adapters=len(ranks),
    )


def assert_experts_right(case: ExpertCase) -> torch.Tensor:
    """Runs the case: every row near the reference, the adapters mattered, rows without one have the base's bits."""
    found, truth = case.run(), case.expected()
    assert found.is_contiguous()
    assert_near([found], [truth], case.x.dtype, LIMIT)
    base = case.base()
    plain = (case.row_slots < 0).all(1)
    assert torch.equal(found[plain], base[plain])
    homeless = torch.tensor([expert is None for expert in case.row_experts], device=found.device)
    assert not found[homeless].any()
    if case.pool is not None:
        rank = case.pool.rank[case.row_slots.clamp(min=0).long()]
        adapted = ((case.row_slots >= 0) & (rank > 0)).any(1) & ~homeless
        assert (found[adapted] != base[adapted]).any(1).all(), "an adapter changed nothing"
    return found
