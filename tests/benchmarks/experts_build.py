"""A case of expert weights made of tensors: its op call, grouped GEMMs without adapters beside it, its float64 truth.

Letters: M tokens, T rows, E experts, K in-features, N out-features, R rank, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fxlora.kernels import ops
from fxlora.kernels.registry import ExpertPool, register_runtime, unregister_runtime
from tests.benchmarks.experts_cases import SLOTS, ExpertCase
from tests.benchmarks.linear_build import DIGEST
from tests.benchmarks.linear_cases import ELEMENT_BYTES


@dataclass
class Routing:
    """One draw: the experts of every token, and the rows sorted by expert."""

    topk_ids: torch.Tensor  # int64 [M, k]
    order: torch.Tensor  # int64 [T]: row of the op -> pair token * k + choice
    offsets: torch.Tensor  # int32 [E]
    x: torch.Tensor  # [T, K], as the op reads it
    row_slots: torch.Tensor  # int32 [T, 1]
    segments: torch.Tensor

    @property
    def expert_ids(self) -> torch.Tensor:
        """int64 [T], in the op's order of rows."""
        return self.topk_ids.flatten()[self.order]


@dataclass
class Built:
    """Tensors of a case. Numbers are those of routings."""

    case: ExpertCase
    x: torch.Tensor  # [M, K], or [T, K] where rows of one token differ
    weight: torch.Tensor  # [E, N, K]
    a: torch.Tensor  # [S, E, R, K]
    b: torch.Tensor  # [S, E, R, N]
    slots: torch.Tensor  # int32 [M]
    scaling: torch.Tensor  # fp32 [S]
    routings: list[Routing]
    handles: tuple[int, ...]  # with the pool, without

    def ours(self, i: int) -> list[torch.Tensor]:
        """The op. As an op of a group, it returns a list."""
        routing = self.routings[i]
        rest = (routing.row_slots, None, routing.segments, self.handles[0])
        return [ops.lora_experts(routing.x, self.weight, None, *rest)]

    def bare(self, i: int) -> list[torch.Tensor]:
        """The op of a weight that owns no pool: our grouped GEMM alone."""
        routing = self.routings[i]
        rest = (routing.row_slots, None, routing.segments, self.handles[1])
        return [ops.lora_experts(routing.x, self.weight, None, *rest)]

    def base(self, i: int) -> list[torch.Tensor]:
        """torch's grouped GEMM, on rows sorted by expert."""
        routing = self.routings[i]
        return [torch._grouped_mm(routing.x, self.weight.transpose(1, 2), offs=routing.offsets)]

    def reference(self, i: int, adapters: bool = True) -> list[torch.Tensor]:
        """float64 truth, from the tensors as drawn (pools are not read)."""
        return [self._truth(self.routings[i], adapters)]

    def _truth(self, routing: Routing, adapters: bool) -> torch.Tensor:
        experts, slots = routing.expert_ids, routing.row_slots[:, 0]
        y = torch.zeros(len(experts), self.case.out, dtype=torch.float64, device=self.x.device)
        for expert in experts.unique().tolist():
            mine = (experts == expert).nonzero()[:, 0]
            y[mine] = routing.x[mine].double() @ self.weight[expert].double().t()
            for slot in slots[mine].unique().tolist() if adapters else ():
                rows = mine[slots[mine] == slot]
                h = routing.x[rows].double() @ self.a[slot, expert].double().t()
                y[rows] += h @ self.b[slot, expert].double() * self.scaling[slot].double()
        return y

    @property
    def count(self) -> int:
        return len(self.routings)

    def least(self) -> tuple[int, int]:
        """(bytes, floating-point operations) of one call, on average over the routings."""
        case = self.case
        experts = pairs = 0.0
        for routing in self.routings:
            ids = routing.expert_ids
            experts += len(ids.unique()) / self.count
            pairs += len((ids * SLOTS + routing.row_slots[:, 0]).unique()) / self.count
        wide = case.features + case.out
        read = experts * case.features * case.out + pairs * case.rank * wide + case.pairs * wide
        return int(ELEMENT_BYTES * read), 2 * case.pairs * (case.features * case.out + case.rank * wide)

    def close(self) -> None:
        unregister_runtime(self.handles)


def draw_pool(case: ExpertCase, a: torch.Tensor, b: torch.Tensor, scaling: torch.Tensor) -> ExpertPool:
    """A pool that holds these adapters in its slots, in order."""
    each = case.num_experts * case.rank
    pool = ExpertPool.allocate(
        num_experts=case.num_experts, pool_rows_a=SLOTS * each, pool_rows_b=SLOTS * each, in_features=case.features,
        out_features=case.out, max_adapters=SLOTS, dtype=a.dtype, device=a.device, max_rank=case.rank,
    )  # fmt: skip
    for slot, scale in enumerate(scaling.tolist()):
        pool.write(
            slot, a_start=slot * each, a_step=case.rank, b_start=slot * each, b_step=case.rank, rank=case.rank,
            a_rows=a[slot].view(each, case.features), b_rows=b[slot].view(each, case.out), scaling=scale,
        )  # fmt: skip
    return pool


def draw_routing(case: ExpertCase, x: torch.Tensor, slots: torch.Tensor, g: torch.Generator) -> Routing:
    """Random experts for every token, all different; rows sorted by expert if the case says so."""
    scores = torch.rand(case.rows, case.num_experts, generator=g, device=g.device)
    topk_ids = scores.topk(case.top_k).indices
    ids = topk_ids.flatten()
    order = ids.argsort(stable=True) if case.in_place else torch.arange(case.pairs, device=g.device)
    offsets = torch.bincount(ids, minlength=case.num_experts).cumsum(0).to(torch.int32)
    of_pair = order if x.shape[0] == case.pairs else order // case.top_k
    row_slots = slots[order // case.top_k][:, None].contiguous()
    routing = (offsets, None) if case.in_place else (None, ids)
    segments = ops.segment_experts(row_slots, *routing, case.num_experts, SLOTS)
    return Routing(topk_ids, order, offsets, x[of_pair].contiguous(), row_slots, segments)


def build(
    case: ExpertCase, device: str = "cuda", dtype: torch.dtype = torch.bfloat16, sets: int | None = None, seed: int = 0
) -> Built:
    """Draw everything and register a group with the pool and one without. sets: fewer routings than the case has."""
    g = torch.Generator(device=device).manual_seed(seed)

    def draw(*shape: int, fan: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, device=device, dtype=dtype) * fan**-0.5

    down = case.name.split("-")[1] == "down"
    x = draw(case.pairs if down else case.rows, case.features, fan=1)
    weight = draw(case.num_experts, case.out, case.features, fan=case.features)
    a = draw(SLOTS, case.num_experts, case.rank, case.features, fan=case.features)
    b = draw(SLOTS, case.num_experts, case.rank, case.out, fan=case.rank)
    scaling = torch.rand(SLOTS, generator=g, device=device) * 1.5 + 0.5
    used = torch.randperm(SLOTS, generator=g, device=device)[: case.adapters]
    slots = used[torch.arange(case.rows, device=device) // -(-case.rows // case.adapters)].to(torch.int32)
    routings = [draw_routing(case, x, slots, g) for _ in range(sets or case.routings)]
    handles = register_runtime(DIGEST, [(draw_pool(case, a, b, scaling),), (None,)])
    return Built(case, x, weight, a, b, slots, scaling, routings, handles)
