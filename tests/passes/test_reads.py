"""Every spelling of a linear or an embedding as one form, checked by computing the call from what the read says.

Shape letters: B requests, T tokens, K in-features, N out-features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from fxlora.passes.reads import Read, Refusal
from tests.passes.build import holder, reads_of, traced, weight

B, T, K, N, V = 2, 3, 4, 5, 7
Body = Callable[..., torch.Tensor]
aten = torch.ops.aten

NK: dict[str, Body] = {
    "F.linear": lambda self, x: F.linear(x, self.w),
    "F.linear by name": lambda self, x: F.linear(weight=self.w, input=x),
    "x @ w.T": lambda self, x: x @ self.w.T,
    "x @ w.t()": lambda self, x: x @ self.w.t(),
    "x @ w.mT": lambda self, x: x @ self.w.mT,
    "transpose": lambda self, x: torch.matmul(x, self.w.transpose(-1, -2)),
    "permute": lambda self, x: torch.matmul(x, torch.permute(self.w, (1, 0))),
    "matmul by name": lambda self, x: torch.matmul(input=x, other=self.w.T),
    "twice transposed": lambda self, x: F.linear(x, self.w.T.t()),
    "cast": lambda self, x: x @ self.w.to(torch.float32).t().contiguous(),
    "whole slice": lambda self, x: F.linear(x, self.w[:]),
    "unsqueezed and squeezed": lambda self, x: F.linear(x, self.w.unsqueeze(0).squeeze(0)),
    "mm": lambda self, x: torch.mm(x.reshape(-1, x.shape[-1]), self.w.t()),
    "aten.mm": lambda self, x: aten.mm.default(aten.view.default(x, [-1, x.shape[-1]]), aten.t.default(self.w)),
    "expanded bmm": lambda self, x: torch.bmm(x, self.w.t().unsqueeze(0).expand(B, -1, -1)),
    "einsum bti,oi->bto": lambda self, x: torch.einsum("bti,oi->bto", x, self.w),
    "einsum oi,bti->bto": lambda self, x: torch.einsum("oi,bti->bto", self.w, x),
    "einsum ...i,oi->...o": lambda self, x: torch.einsum("...i,oi->...o", x, self.w),
    "einsum out first": lambda self, x: torch.einsum("bti,oi->obt", x, self.w),
    "einsum out between": lambda self, x: torch.einsum("bti,oi->bot", x, self.w),
    "einsum lead swapped": lambda self, x: torch.einsum("bti,oi->tbo", x, self.w),
    "einsum over w.T": lambda self, x: torch.einsum("bti,io->bto", x, self.w.t()),
    "w @ x": lambda self, x: self.w @ x.transpose(1, 2),
    "mm(w, x)": lambda self, x: torch.mm(self.w, x.reshape(-1, x.shape[-1]).t()),
}
KN: dict[str, Body] = {
    "x @ w": lambda self, x: x @ self.w,
    "F.linear over w.T": lambda self, x: F.linear(x, self.w.t()),
    "matmul": lambda self, x: torch.matmul(x, self.w),
    "mm": lambda self, x: torch.mm(x.reshape(-1, x.shape[-1]), self.w),
    "einsum bti,io->bto": lambda self, x: torch.einsum("bti,io->bto", x, self.w),
    "einsum io,bti->tob": lambda self, x: torch.einsum("io,bti->tob", self.w, x),
    "einsum bti,io": lambda self, x: torch.einsum("bti,io", x, self.w),
    "w.T @ x": lambda self, x: self.w.T @ x.transpose(1, 2),
    "expanded bmm": lambda self, x: torch.bmm(x, self.w.expand(B, -1, -1)),
}
BIASED: dict[str, Body] = {
    "F.linear": lambda self, x: F.linear(x, self.w.t(), self.b),
    "addmm": lambda self, x: torch.addmm(self.b, x.reshape(-1, x.shape[-1]), self.w),
    "aten.addmm": lambda self, x: aten.addmm.default(self.b, x.view(-1, x.shape[-1]), self.w),
}


class Recorder(fx.Interpreter):
    """Runs a graph and keeps every value."""

    def run_node(self, n: fx.Node) -> Any:
        self.seen: dict[fx.Node, Any] = getattr(self, "seen", {})
        self.seen[n] = super().run_node(n)
        return self.seen[n]


def computed(read: Read, values: dict[fx.Node, Any]) -> torch.Tensor:
    """The call's result, from the fields of the read alone."""
    x, operand = values[read.x], values[read.operand]
    while operand.dim() > 2:
        operand = operand[0]
    if read.kind == "embedding":
        return operand[x]
    root = values[read.root]
    assert torch.equal(root.T if read.stored_KN else root, operand.T if read.operand_is_KN else operand)
    x = x if read.x_order is None else x.permute(read.x_order)
    out = x @ (operand if read.operand_is_KN else operand.T)
    out = out if read.bias is None else out + values[read.bias]
    out = out if read.out_order is None else out.permute(read.out_order)
    return out if read.addend is None else out + values[read.addend]


def the_read(body: Body, example: torch.Tensor, **members: torch.Tensor) -> Read:
    """The only read of `w`, which must be a read and compute what its call computes."""
    gm = traced(holder(body, **members))
    (read,) = reads_of(gm, example)
    assert isinstance(read, Read), read
    recorder = Recorder(gm, garbage_collect_values=False)
    recorder.run(example)
    (reader,) = [n for n in read.operand.users if n in recorder.seen and read.x in n.all_input_nodes]
    assert torch.allclose(computed(read, recorder.seen), recorder.seen[reader], atol=1e-5)
    assert read.root.target == "w"
    return read


@pytest.mark.parametrize("features", [N, K], ids=["oblong", "square"])
@pytest.mark.parametrize("spelling", NK)
def test_linears_over_a_weight_of_out_by_in(spelling: str, features: int) -> None:
    """A square weight must not hide its orientation."""
    read = the_read(NK[spelling], torch.randn(B, T, K), w=weight(features, K))
    assert (read.kind, read.stored_KN) == ("linear", False)


@pytest.mark.parametrize("features", [N, K], ids=["oblong", "square"])
@pytest.mark.parametrize("spelling", KN)
def test_linears_over_a_weight_of_in_by_out(spelling: str, features: int) -> None:
    read = the_read(KN[spelling], torch.randn(B, T, K), w=weight(K, features))
    assert (read.kind, read.stored_KN) == ("linear", True)


@pytest.mark.parametrize("spelling", BIASED)
def test_biases(spelling: str) -> None:
    read = the_read(BIASED[spelling], torch.randn(B, T, K), w=weight(K, N), b=weight(N))
    assert read.bias is not None
    assert (read.bias.target, read.addend) == ("b", None)


def test_what_addmm_adds_beside_a_bias() -> None:
    """A matrix is no bias, and neither is a vector over the dim that `w @ x` puts last."""
    matrix = the_read(lambda self, x: torch.addmm(x.relu(), x, self.w), torch.randn(B, K), w=weight(K, K))
    assert (matrix.bias, getattr(matrix.addend, "name", "")) == (None, "relu")
    beside = the_read(
        lambda self, x: torch.addmm(self.b, self.w, x.t()), torch.randn(B, K), w=weight(N, K), b=weight(B)
    )
    assert (beside.bias, getattr(beside.addend, "target", "")) == (None, "b")


@pytest.mark.parametrize(
    "body",
    [
        lambda self, ids: F.embedding(ids, self.w),
        lambda self, ids: F.embedding(weight=self.w, input=ids),
        lambda self, ids: torch.ops.aten.embedding.default(self.w, ids),
        lambda self, ids: self.w[ids],
        lambda self, ids: self.w[ids, :],
        lambda self, ids: torch.ops.aten.index.Tensor(self.w, [ids]),
        lambda self, ids: F.embedding(ids, self.w.to(torch.float32)),
    ],
)
def test_embeddings(body: Body) -> None:
    read = the_read(body, torch.randint(0, V, (B, T)), w=weight(V, K))
    assert (read.kind, read.x.target) == ("embedding", "ids")


@pytest.mark.parametrize("dim", [0, -2])
def test_index_select_is_an_embedding(dim: int) -> None:
    read = the_read(lambda self, ids: torch.index_select(self.w, dim, ids), torch.tensor([3, 1, 1]), w=weight(V, K))
    assert read.kind == "embedding"


def refused(body: Body, example: torch.Tensor, **members: torch.Tensor) -> str:
    (read,) = reads_of(holder(body, **members), example)
    assert isinstance(read, Refusal), read
    assert read.root.target == "w"
    return read.reason


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda self, x: x @ self.w[:, :2], "part or a reshape"),
        (lambda self, x: F.linear(x, self.w[:2]), "part or a reshape"),
        (lambda self, x: F.linear(x, self.w.chunk(2)[0]), "part or a reshape"),
        (lambda self, x: x.reshape(-1, 2 * K) @ self.w.view(2 * K, 2), "part or a reshape"),
        (lambda self, x: x @ self.w.reshape(-1)[: K * 2].view(K, 2), "part or a reshape"),
        (lambda self, x: x * self.w, "read by mul"),
        (lambda self, x: self.w.sum() * x, "read by sum"),
        (lambda self, x: F.linear(self.w, x.reshape(-1, K)), "weight as its input"),
        (lambda self, x: self.w @ x.reshape(-1)[:K], "with a vector"),
        (lambda self, x: self.w @ self.w, "with itself"),
        (lambda self, x: torch.einsum("ti,oi->o", x, self.w), "no linear"),
        (lambda self, x: torch.einsum("ti,ti->ti", x, self.w), "no linear"),
        (lambda self, x: torch.einsum("ti,ii->ti", x, self.w), "diagonal"),
        (lambda self, x: torch.einsum("oi,io->oi", self.w, self.w), "itself"),
        (lambda self, x: torch.einsum("ti,oi,ti->to", x, self.w, x), "other than one weight"),
        (lambda self, x: torch.addmm(x, x, self.w, beta=2), "alpha or beta"),
        (lambda self, x: torch.addmm(x, x, self.w, alpha=0.5), "alpha or beta"),
        (lambda self, x: self.w.unsqueeze(0) @ x, "leading dims"),
        (lambda self, x: F.linear(x, self.w.repeat(1, 1)), "read by repeat"),
        (lambda self, x: torch.mm(x, self.w, out=torch.zeros_like(x)), "mm puts its result into a tensor"),
    ],
)
def test_other_reads_are_refused_with_their_reason(body: Body, reason: str) -> None:
    """A square weight, so that every one of these runs."""
    assert reason in refused(body, torch.randn(K, K), w=weight(K, K))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda self, ids: F.embedding(ids, self.w, max_norm=1.0), "max_norm"),
        (lambda self, ids: F.embedding(ids, self.w.t()), "transposed or sliced"),
        (lambda self, ids: self.w[:, ids], "part of the weight"),
        (lambda self, ids: self.w.t()[ids], "transposed or sliced"),
        (lambda self, ids: self.w[:2][ids.clamp(max=1)], "transposed or sliced"),
        (lambda self, ids: self.w[ids, ids], "part of the weight"),
        (lambda self, ids: torch.index_select(self.w, 1, ids), "part of the weight"),
    ],
)
def test_other_lookups_are_refused_with_their_reason(body: Body, reason: str) -> None:
    assert reason in refused(body, torch.tensor([0, 2, 1]), w=weight(K, K))


EXPERTS: dict[str, tuple[Body, tuple[str, str, str, bool]]] = {
    "bmm of all": (lambda self, x: torch.bmm(x, self.w), ("eBk", "e", "eBn", True)),
    "bmm of all, turned": (lambda self, x: torch.bmm(x, self.w.mT), ("eBk", "e", "eBn", False)),
    "broadcast": (lambda self, x: torch.matmul(x[0], self.w), ("Ak", "e", "eAn", True)),
    "broadcast by a dim of one": (lambda self, x: torch.matmul(x[:1], self.w), ("_Bk", "e", "eBn", True)),
    "four dims": (lambda self, x: torch.matmul(x[:, None], self.w), ("A_Ck", "e", "AeCn", True)),
    "einsum": (lambda self, x: torch.einsum("bti,eoi->beto", x, self.w), ("CDk", "e", "CeDn", False)),
    "one of them": (lambda self, x: F.linear(x, self.w[1]), ("ABk", "", "ABn", False)),
    "one of them, by select": (lambda self, x: torch.matmul(x, self.w.select(0, 1)), ("ABk", "", "ABn", True)),
    "picked": (
        lambda self, x: torch.bmm(self.w[x.argmax(-1)[:, 0]], x.transpose(1, 2)),
        ("pkC", "p", "pnC", False),
    ),
    "picked along two dims": (
        lambda self, x: torch.einsum("ti,taoi->tao", x[:, 0], self.w[x.argmax(-1)]),
        ("pk", "pq", "pqn", False),
    ),
    "all in one": (lambda self, x: F.linear(x, self.w.view(B * K, K)), ("ABk", "e", "ABen", False)),
    "picked, columns in one": (
        lambda self, x: torch.bmm(x[:, 0].unsqueeze(1), self.w[x.argmax(-1)].permute(0, 3, 1, 2).reshape(B, K, T * K)),
        ("pk", "pq", "p_qn", False),
    ),
    "picked, then turned": (
        lambda self, x: torch.matmul(x.unsqueeze(2), self.w.transpose(1, 2)[x.argmax(-1)]).squeeze(2),
        ("pqk", "pq", "pq_n", False),
    ),
}


@pytest.mark.parametrize("name", EXPERTS)
def test_products_of_experts_letter_by_letter(name: str) -> None:
    """x [E, T, K] of as many requests as experts; the letters of x, of the experts picked and of the result."""
    body, expected = EXPERTS[name]
    reads = reads_of(holder(body, w=weight(B, K, K)), torch.randn(B, T, K))
    (read,) = [read for read in reads if isinstance(read, Read)]
    assert len(reads) == 1
    assert read.product is not None
    found = (read.product.x_term, read.product.index_term, read.product.out_term, read.stored_KN)
    assert (read.kind, read.experts, found) == ("experts", B, expected)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda self, x: x[:, :1] + self.w, "3-D weight, read by add"),
        (lambda self, x: torch.bmm(self.w, self.w), "multiplied with themselves"),
        (lambda self, x: torch.einsum("bti,bio->to", x, self.w), "sums over rows or experts"),
        (lambda self, x: torch.bmm(x, self.w[:, :, [1, 0, 3, 2]]), "a part or a reshape"),
        (lambda self, x: torch.matmul(x, self.w.reshape(K, B * K)), "a part or a reshape"),
        (lambda self, x: F.layer_norm(self.w[1], (K,)), "3-D weight, read by layer_norm"),
    ],
)
def test_other_reads_of_expert_weights_are_refused_as_such(body: Body, reason: str) -> None:
    reads = reads_of(holder(body, w=weight(B, K, K)), torch.randn(B, T, K))
    assert reads
    assert all(isinstance(read, Refusal) and reason in read.reason for read in reads), reads


def test_sizes_and_dtypes_of_a_weight_read_nothing() -> None:
    def body(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.w.dtype) * self.w.shape[0] + self.w.size(1) + torch.zeros_like(self.w).sum()

    assert [type(read) for read in reads_of(holder(body, w=weight(3, 4)), torch.randn(2))] == []


def test_vectors_are_no_weights_of_a_site() -> None:
    assert reads_of(holder(lambda self, x: x * self.w, w=weight(3)), torch.randn(2, 3)) == []


def test_a_foreign_call_is_named_without_its_mark() -> None:
    assert "read by tests.passes.test_reads.foreign_mix" in refused(
        lambda self, x: foreign_mix(x, self.w), torch.randn(2, 3), w=weight(4, 3)
    )


@fx.wrap
def foreign_mix(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x @ w.t()


def test_a_lookup_hands_its_rows_on() -> None:
    found = reads_of(holder(lambda self, ids: self.w[ids] + 1, w=weight(V, K)), torch.tensor([1, 2]))
    assert [type(read) for read in found] == [Read]


def test_a_weight_expanded_over_the_batch_of_x_is_a_linear() -> None:
    body = lambda self, x: torch.bmm(x, self.w.expand(x.shape[0], -1, -1))  # noqa: E731
    (read,) = reads_of(holder(body, w=weight(K, N)), torch.randn(B, T, K))
    assert isinstance(read, Read)
