"""A case made of tensors: its op call, the plain torch call beside it, and its float64 truth.

Letters: T rows, J slots per row, K in-features, N out-features, R rank, S slots, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from fxlora.kernels import ops
from fxlora.kernels.registry import PoolKind, SitePool, register_runtime, unregister_runtime
from tests.benchmarks.gpu_timing import Step
from tests.benchmarks.linear_cases import Case, least_bytes, least_flops, set_count

DIGEST = 0xBE4C
TOLERANCE = {torch.bfloat16: 4e-3, torch.float32: 1e-5}


class WrongResultError(Exception):
    """An output differs from float64 by more than the tolerance, or is not finite."""


@dataclass
class Member:
    """One weight of one set, and the adapters of every slot as drawn, rows and columns above a slot's rank zero."""

    weight: torch.Tensor  # [N, K] (embedding: [V, N])
    a_SRK: torch.Tensor  # embedding: [S, R, V]
    b_SRN: torch.Tensor
    pool: SitePool


@dataclass
class Built:
    """Tensors of a case. ours(i) and base(i) run weight set i and return one output per member."""

    case: Case
    x: torch.Tensor  # [T, K] (embedding: int64 [T], other ids for each set in `ids`)
    sets: list[list[Member]]
    row_slots: torch.Tensor
    row_coeffs: torch.Tensor | None
    scaling: torch.Tensor  # fp32 [S]
    segments: torch.Tensor
    handles: tuple[int, ...] = ()
    ids: list[torch.Tensor] = field(default_factory=list)

    def ours(self, i: int) -> list[torch.Tensor]:
        weights = [member.weight for member in self.sets[i % len(self.sets)]]
        rest = (self.row_slots, self.row_coeffs, self.segments, self.handles[i % len(self.sets)])
        if self.case.kind == "linear":
            return ops.lora_linear(self.x, weights, [None] * len(weights), *rest)
        if self.case.kind == "logits":
            return [ops.lora_logits(self.x, weights[0], None, *rest)]
        return [ops.lora_embedding(self.ids[i], weights[0], *rest)]

    def base(self, i: int) -> list[torch.Tensor]:
        """One `torch.mm` for each member, or `F.embedding`."""
        members = self.sets[i % len(self.sets)]
        if self.case.kind == "embedding":
            return [F.embedding(self.ids[i], members[0].weight)]
        return [torch.mm(self.x, member.weight.t()) for member in members]

    def reference(self, i: int) -> list[torch.Tensor]:
        """float64 truth of weight set i, from the tensors as drawn (pools are not read)."""
        return [self._member(member, i) for member in self.sets[i % len(self.sets)]]

    def _member(self, member: Member, i: int) -> torch.Tensor:
        embedding = self.case.kind == "embedding"
        x = self.ids[i] if embedding else self.x.double()
        y = F.embedding(x, member.weight).double() if embedding else x @ member.weight.double().t()
        for j in range(self.row_slots.shape[1]):
            for slot in self.row_slots[:, j].unique().tolist():
                if slot < 0:
                    continue
                rows = (self.row_slots[:, j] == slot).nonzero()[:, 0]
                a_RK = member.a_SRK[slot].double()
                h = a_RK.t()[x[rows]] if embedding else x[rows] @ a_RK.t()
                if self.row_coeffs is not None:
                    h = h * self.row_coeffs[rows, j, None].double()
                y[rows] += h @ member.b_SRN[slot].double() * self.scaling[slot].double()
        return y

    @property
    def count(self) -> int:
        """Numbers that `ours` and `base` take in turn."""
        return len(self.ids) or len(self.sets)

    def least(self) -> tuple[int, int]:
        """(bytes, floating-point operations) of one call."""
        slots = self.row_slots[self.row_slots >= 0]
        used = sum(self.case.rank_of(slot) for slot in slots.unique().tolist())
        entries = sum(self.case.rank_of(slot) for slot in slots.tolist())
        return least_bytes(self.case, used), least_flops(self.case, entries)

    def close(self) -> None:
        unregister_runtime(self.handles)


def draw_rows(case: Case, generator: torch.Generator) -> torch.Tensor:
    """int32 [T, J]: runs of rows of one slot, over `case.adapters` random slots; -1 for the last `bare_rows`."""
    device = generator.device
    slots = torch.randperm(case.slots, generator=generator, device=device)[: case.adapters]
    if case.ragged and case.adapters > 1:
        cuts = torch.randperm(case.rows - 1, generator=generator, device=device)[: case.adapters - 1].sort()[0] + 1
        runs = torch.searchsorted(cuts, torch.arange(case.rows, device=device), right=True)
    else:
        runs = torch.arange(case.rows, device=device) // -(-case.rows // case.adapters)
    columns = [slots.roll(j)[runs] for j in range(case.width)]
    row_slots = torch.stack(columns, dim=1).to(torch.int32)
    row_slots[case.rows - case.bare_rows :] = -1
    return row_slots


def draw_member(case: Case, out: int, scaling: Sequence[float], dtype: torch.dtype, g: torch.Generator) -> Member:
    """A random weight and random adapters in every slot of a pool of its own."""
    embedding = case.kind == "embedding"
    features, rank, device = case.features, case.rank, g.device

    def draw(*shape: int, fan: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, device=device, dtype=dtype) * fan**-0.5

    kind: PoolKind = "embedding" if embedding else "linear"
    pool = SitePool.allocate(
        kind=kind, pool_rows=case.slots * rank, in_features=features, out_features=out, max_adapters=case.slots,
        dtype=dtype, device=device, max_rank=rank,
    )  # fmt: skip
    weight = draw(features, out, fan=1) if embedding else draw(out, features, fan=features)
    a_SRK = draw(case.slots, rank, features, fan=1 if embedding else features)
    b_SRN = draw(case.slots, rank, out, fan=rank)
    for slot, scale in enumerate(scaling):
        own = case.rank_of(slot)
        a_SRK[slot, own:], b_SRN[slot, own:] = 0, 0
        pool.write(slot, start=slot * rank, a_RK=a_SRK[slot, :own], b_RN=b_SRN[slot, :own], scaling=scale)
    return Member(weight, a_SRK, b_SRN, pool)


def build(
    case: Case, device: str = "cuda", dtype: torch.dtype = torch.bfloat16, sets: int | None = None, seed: int = 0
) -> Built:
    """Draw everything and register one handle for each weight set. sets: fewer weight sets than the case asks for."""
    g = torch.Generator(device=device).manual_seed(seed)
    count = sets or set_count(case)
    scaling = torch.rand(case.slots, generator=g, device=device) * 1.5 + 0.5
    weight_sets = 1 if case.kind == "embedding" else count
    members = [[draw_member(case, out, scaling.tolist(), dtype, g) for out in case.outs] for _ in range(weight_sets)]
    row_slots = draw_rows(case, g)
    coeffs = torch.rand(row_slots.shape, generator=g, device=device) if case.width > 1 else None
    ids: list[torch.Tensor] = []
    x = torch.randn(case.rows, case.features if case.kind != "embedding" else 1, generator=g, device=device)
    if case.kind == "embedding":
        ids = [torch.randint(case.features, (case.rows,), generator=g, device=device) for _ in range(min(count, 32))]
    handles = register_runtime(DIGEST, [tuple(member.pool for member in group) for group in members])
    segments = ops.segment_rows(row_slots, case.slots)
    return Built(case, x.to(dtype), members, row_slots, coeffs, scaling, segments, handles, ids)


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of the truth; infinite where an output is not finite."""
    if found.shape != truth.shape or not bool(found.isfinite().all()):
        return float("inf")
    return float((found.double() - truth.double()).norm() / truth.double().norm())


def poison(like: Sequence[torch.Tensor]) -> None:
    """Leave NaN in the freed memory that outputs of these shapes are likely to be given next."""
    filled = [torch.full_like(tensor, float("nan")) for tensor in like]
    del filled


def check(step: Step, i: int, truth: Sequence[torch.Tensor], dtype: torch.dtype) -> float:
    """Run step i and return its largest error; raises WrongResultError where it is above the tolerance."""
    poison([tensor.to(dtype) for tensor in truth])
    return judge_outputs(step(i), truth, dtype, f"set {i}")


def judge_outputs(found: Any, truth: Sequence[torch.Tensor], dtype: torch.dtype, what: str) -> float:
    """Largest relative error of the outputs; raises WrongResultError where it is above the tolerance."""
    error = max(relative_error(y, expected) for y, expected in zip(found, truth, strict=True))
    if not error < TOLERANCE[dtype]:
        raise WrongResultError(f"{what}: relative error {error:.1e}, allowed {TOLERANCE[dtype]:.0e}")
    return error
