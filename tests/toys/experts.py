"""Expert products in every spelling: a router, one weight for all experts, and what a body makes of both.

Shape letters: T tokens of all requests, A experts a token, E experts, K and N features, V words.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers.integrations.moe  # noqa: F401  registers its grouped matmul
from torch import Tensor, nn
from torch.nn import functional as F

from tests.toys.base import Adapter, scaling_of

B, L, K, N, E, A, V = 3, 5, 16, 24, 7, 2, 50
Body = Callable[["Routed", Tensor, Tensor, Tensor], Tensor]


class Routed(nn.Module):
    """x [B, L, K] -> [B, L, N]: every token goes to its A experts; `w` is [E, N, K], or [E, K, N] if stored so.

    body: (self, tokens [T, K], routing weights [T, A], experts [T, A]) -> [T, N]
    """

    def __init__(self, body: Body, stored_KN: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(K, E, bias=False)
        self.w = nn.Parameter(torch.randn((E, K, N) if stored_KN else (E, N, K)) / math.sqrt(K))
        self.b = nn.Parameter(torch.randn(E, N) / 10)
        self.stored_KN = stored_KN
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, K)
        weights, ids = torch.topk(F.softmax(self.gate(tokens), dim=-1), A, dim=-1)
        return self.body(self, tokens, weights, ids).reshape(x.shape[0], x.shape[1], N)


def routed(body: Body, stored_KN: bool = False) -> Routed:
    """The module, the same weights at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(23)
        return Routed(body, stored_KN).eval().requires_grad_(False)


class RoutedByTable(Routed):
    """x [B, L, K], ids [B, L] -> [B, L, N]: a table of the vocabulary says which experts a token goes to (hash layers,
    arXiv 2106.04426; the first layers of DeepSeek-V4)."""

    table: Tensor

    def __init__(self, body: Body, lookup: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(body)
        self.register_buffer("table", torch.rand(V, E).argsort(-1)[:, :A])
        self.lookup = lookup

    def forward(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        assert ids is not None
        tokens = x.reshape(-1, K)
        experts = self.lookup(self.table, ids.reshape(-1)).long()
        weights = F.softmax(self.gate(tokens), dim=-1).gather(1, experts.clamp(0, E - 1))
        return self.body(self, tokens, weights, experts).reshape(x.shape[0], x.shape[1], N)


def routed_by_table(body: Body, lookup: Callable[[Tensor, Tensor], Tensor]) -> RoutedByTable:
    """The module, the same weights at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(23)
        return RoutedByTable(body, lookup).eval().requires_grad_(False)


def tokens_and_ids(batch: int = B, length: int = L, seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(0, V, (batch, length), generator=torch.Generator().manual_seed(seed))
    return {**tokens(batch, length, seed), "ids": ids}


def tokens(batch: int = B, length: int = L, seed: int = 0) -> dict[str, Tensor]:
    return {"x": torch.randn(batch, length, K, generator=torch.Generator().manual_seed(seed))}


def combined(y_TAN: Tensor, weights: Tensor) -> Tensor:
    return (y_TAN * weights.unsqueeze(-1)).sum(1)


def gathered(pick: Callable[[Routed, Tensor, Tensor], Tensor]) -> Body:
    """A body whose pick is (self, tokens [T A, K], experts [T A]) -> [T A, N]."""

    def body(self: Routed, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return combined(pick(self, x.repeat_interleave(A, 0), ids.reshape(-1)).view(-1, A, N), weights)

    return body


def chosen(product: Callable[[Routed, Tensor, Tensor], Tensor]) -> Body:
    """A body whose product is (self, tokens [T, K], experts [T, A]) -> [T, A, N]."""
    return lambda self, x, weights, ids: combined(product(self, x, ids), weights)


def dense(product: Callable[[Routed, Tensor], Tensor]) -> Body:
    """A body whose product is (self, tokens [T, K]) -> [E, T, N]: every expert computes every token."""

    def body(self: Routed, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        share = x.new_zeros((x.shape[0], E)).scatter(1, ids, weights)
        return torch.einsum("etn,te->tn", product(self, x), share)

    return body


def matmul(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """The grouped matmul that transformers takes for fp32 under a tracer, which torch's own refuses."""
    return torch.ops.transformers.grouped_mm_fallback(x, weight, offs=offs)


def grouped(product: Callable[[Routed, Tensor, Tensor], Tensor]) -> Body:
    """A body whose product is (self, tokens sorted by expert [T A, K], ends [E]) -> [T A, N]."""

    def body(self: Routed, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        experts, order = torch.sort(ids.reshape(-1))
        ends = torch.histc(experts.float(), bins=E, min=0, max=E - 1).cumsum(0, dtype=torch.int32)
        y = product(self, x[order // A], ends)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.shape[0])
        return combined(y[back].view(-1, A, N), weights)

    return body


def counted(self: Routed, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """Sorted by argsort alone: no node holds the experts in the order of the rows."""
    flat = ids.reshape(-1)
    order = flat.argsort(stable=True)
    ends = F.one_hot(flat, E).sum(0).cumsum(0).to(torch.int32)
    y = matmul(x.repeat_interleave(A, 0)[order], self.w.mT, offs=ends)
    return combined(torch.zeros_like(y).index_copy(0, order, y).view(-1, A, N), weights)


def looped(part: Callable[[Routed, Tensor, int], Tensor]) -> Body:
    """A loop over all experts, each for every token."""

    def body(self: Routed, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        y = x.new_zeros((x.shape[0], N))
        for e in range(E):
            y = y + part(self, x, e) * (weights * (ids == e)).sum(-1, keepdim=True)
        return y

    return body


def where_index_add(self: Routed, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    y = x.new_zeros((x.shape[0], N))
    mask = F.one_hot(ids, E).permute(2, 1, 0)
    for e in range(E):
        place, token = torch.where(mask[e])
        y.index_add_(0, token, F.linear(x[token], self.w[e]) * weights[token, place, None])
    return y


def where_assign(self: Routed, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    y = x.new_zeros((x.shape[0], N))
    for e in range(E):
        token, place = torch.where(ids == e)
        y[token] += weights[token, place, None] * (x[token] @ self.w[e].T)
    return y


def nonzero_index_add(self: Routed, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    y = x.new_zeros((x.shape[0], N))
    for e in range(E):
        token = (ids == e).any(-1).nonzero().squeeze(-1)
        share = (weights * (ids == e)).sum(-1)
        y = y.index_add(0, token, F.linear(x.index_select(0, token), self.w[e]) * share[token].unsqueeze(-1))
    return y


# Shapes alone decide these graphs: every tracer can make them.
SPELLINGS: Mapping[str, Body] = {
    "bmm of w[ids]": gathered(lambda self, x, ids: torch.bmm(self.w[ids], x.unsqueeze(-1)).squeeze(-1)),
    "bmm of w.mT[ids]": gathered(lambda self, x, ids: torch.bmm(x.unsqueeze(1), self.w.mT[ids]).squeeze(1)),
    "bmm of w[ids].mT": gathered(lambda self, x, ids: torch.bmm(x.unsqueeze(1), self.w[ids].mT).squeeze(1)),
    "index_select": gathered(lambda self, x, ids: (self.w.index_select(0, ids) @ x[:, :, None])[:, :, 0]),
    "baddbmm": gathered(
        lambda self, x, ids: torch.baddbmm(self.b[ids][:, :, None], self.w[ids], x.unsqueeze(-1)).squeeze(-1)
    ),
    "bias in place": gathered(
        lambda self, x, ids: torch.bmm(self.w[ids], x.unsqueeze(-1)).squeeze(-1).add_(self.b[ids])
    ),
    "matmul over two index dims": chosen(lambda self, x, ids: (self.w[ids] @ x[:, None, :, None]).squeeze(-1)),
    "einsum ti,taoi->tao": chosen(lambda self, x, ids: torch.einsum("ti,taoi->tao", x, self.w[ids])),
    "einsum aoti,ti->tao": chosen(
        lambda self, x, ids: torch.einsum("aoti,ti->tao", self.w[ids].permute(1, 2, 0, 3), x)
    ),
    "einsum ti,eoi->eto": dense(lambda self, x: torch.einsum("ti,eoi->eto", x, self.w)),
    "bmm of all": dense(lambda self, x: torch.bmm(x.repeat(E, 1).view(E, -1, K), self.w.mT)),
    "bmm of all, expanded": dense(lambda self, x: torch.bmm(x.expand(E, -1, -1), self.w.transpose(1, 2))),
    "broadcast matmul": dense(lambda self, x: x @ self.w.mT),
    "broadcast matmul, turned": dense(lambda self, x: (self.w @ x.t()).mT),
    "baddbmm of all": dense(lambda self, x: torch.baddbmm(self.b[:, None], x.expand(E, -1, -1), self.w.mT)),
    "linear of w[e]": looped(lambda self, x, e: F.linear(x, self.w[e])),
    "x @ w[e].T + b[e]": looped(lambda self, x, e: x @ self.w[e].T + self.b[e]),
    "unbind": looped(lambda self, x, e: F.linear(x, self.w.unbind(0)[e])),
    "chunk": looped(lambda self, x, e: F.linear(x, self.w.chunk(E)[e].squeeze(0))),
}
# Sorted rows, put back by index writes: for a tracer that follows those.
GROUPED: Mapping[str, Body] = {
    "grouped": grouped(lambda self, x, ends: matmul(x, self.w.transpose(-2, -1), offs=ends)),
    "grouped, by argsort": counted,
}
STORED_KN: Mapping[str, Body] = {
    "bmm of w[ids]": gathered(lambda self, x, ids: torch.bmm(x.unsqueeze(1), self.w[ids]).squeeze(1)),
    "einsum ti,taio->tao": chosen(lambda self, x, ids: torch.einsum("ti,taio->tao", x, self.w[ids])),
    "bmm of all": dense(lambda self, x: torch.bmm(x.repeat(E, 1).view(E, -1, K), self.w)),
    "x @ w[e]": looped(lambda self, x, e: x @ self.w[e]),
    "grouped": grouped(lambda self, x, ends: matmul(x, self.w, offs=ends)),
}
# Data decides how many tokens an expert computes: only a whole-graph capture makes these.
PICKED: Mapping[str, Body] = {
    "where, index_add_": where_index_add,
    "where, assigned": where_assign,
    "nonzero, index_add": nonzero_index_add,
}


def make_expert_adapter(module: Routed, rank: int, seed: int, rslora: bool = False) -> Adapter:
    """A PEFT adapter in memory over `w`, A [E, R, K] and B [E, N, R]."""
    generator = torch.Generator().manual_seed(seed)
    config: dict[str, Any] = {"peft_type": "LORA", "r": rank, "lora_alpha": rank + 1, "use_rslora": rslora}
    return config, {
        "base_model.model.w.lora_A.weight": torch.randn(E, rank, K, generator=generator) / math.sqrt(K),
        "base_model.model.w.lora_B.weight": torch.randn(E, N, rank, generator=generator) / 2,
    }


@torch.no_grad()
def merged_experts(module: Routed, adapter: Adapter | None) -> Routed:
    """A copy with the adapter added into the experts' weights."""
    made = copy.deepcopy(module)
    if adapter is not None:
        config, tensors = adapter
        first, second = tensors.values()
        delta = scaling_of(config) * second @ first
        made.w.add_(delta.mT if made.stored_KN else delta)
    return made
