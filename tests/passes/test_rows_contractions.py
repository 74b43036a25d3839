"""Rows under matmul, einsum and attention: a summed dim of requests mixes, batch dims agree, packed keys are assumed.

Shape letters: B requests, T tokens, H features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from fxlora.passes.rows.contractions import parse_einsum
from fxlora.passes.rows.labels import Label
from tests.passes.build import holder, mapping_of, proved, reason_of, returned, rows_of, traced, weight

Body = Callable[..., Any]
B = 29
attend = F.scaled_dot_product_attention


class Dims:
    """Stands for a prover that knows how many dims each operand has."""

    def __init__(self, dims: dict[str, int]) -> None:
        self.dims = dims

    def ndim(self, node: fx.Node) -> int:
        return self.dims[node.name]


@pytest.mark.parametrize(
    ("equation", "dims", "terms", "result"),
    [
        ("bti,oi->bto", (3, 2), ["bti", "oi"], "bto"),
        (" b t i , o i -> b t o ", (3, 2), ["bti", "oi"], "bto"),
        ("ij,jk", (2, 2), ["ij", "jk"], "ik"),
        ("ki,kj", (2, 2), ["ki", "kj"], "ij"),
        ("ii", (2,), ["ii"], ""),
        ("...i,oi->...o", (4, 2), ["FGHi", "oi"], "FGHo"),
        ("...i,...i->...", (3, 2), ["GHi", "Hi"], "GH"),
        ("...ij,jk", (4, 2), ["GHij", "jk"], "GHik"),
        ("...,i->...i", (0, 1), ["", "i"], "i"),
        ("a...b->b...a", (4,), ["aGHb"], "bGHa"),
    ],
)
def test_equations(equation: str, dims: tuple[int, ...], terms: list[str], result: str) -> None:
    """Dims under dots get letters of their own, the same in every term; which ones is free."""
    gm = traced(lambda x, y: torch.einsum(equation, *[x, y][: len(dims)]))
    node = returned(gm.graph)
    parsed = parse_einsum(Dims(dict(zip("xy", dims, strict=False))), node)
    assert parsed is not None
    made = sorted({c for c in "".join([*parsed[0], parsed[1]]) if not c.islower()})
    letters = str.maketrans(dict(zip(made, "ABCDEFGH"[8 - len(made) :], strict=True)))
    assert [term.translate(letters) for term in parsed[0]] == terms
    assert parsed[1].translate(letters) == result
    assert [n.name for n in parsed[2]] == list("xy")[: len(dims)]


def test_operands_may_come_as_a_list() -> None:
    node = returned(traced(lambda x, y: torch.ops.aten.einsum.default("bi,oi->bo", [x, y])).graph)
    parsed = parse_einsum(Dims({"x": 2, "y": 2}), node)
    assert parsed is not None
    assert [n.name for n in parsed[2]] == ["x", "y"]


def test_equations_given_in_lists() -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    dims = Dims({"x": 3, "y": 2})
    one = graph.call_function(torch.einsum, (x, [..., 0, 30], [30, ...]))
    assert parse_einsum(dims, one) == (["7Ae"], "e7", [x])
    two = graph.call_function(torch.einsum, (x, [0, 1, 2], y, [2, 3]))
    assert parse_einsum(dims, two) == (["ABC", "CD"], "ABD", [x, y])
    assert parse_einsum(dims, graph.call_function(torch.einsum, (x, [0, 1, 60], [0]))) is None


def test_other_equations_are_not_read() -> None:
    assert parse_einsum(Dims({"x": 2}), returned(traced(lambda x: torch.einsum("ij,jk", x)).graph)) is None


KEPT: dict[str, tuple[Body, tuple[int, ...]]] = {
    "rows as a weight": (lambda self, x: F.linear(self.w, x[:, 0]), (1,)),
    "x @ w": (lambda self, x: x @ self.w, (0,)),
    "w @ x": (lambda self, x: self.w @ x.transpose(1, 2), (0,)),
    "w @ rows": (lambda self, x: self.w @ x[:, 0].t(), (1,)),
    "vector": (lambda self, x: x @ self.v, (0,)),
    "mv": (lambda self, x: torch.mv(x[:, 0], self.v), (0,)),
    "x @ x.T per request": (lambda self, x: x @ x.transpose(1, 2), (0,)),
    "bmm": (lambda self, x: torch.bmm(x, x.mT), (0,)),
    "more dims on the left": (lambda self, x: x.unsqueeze(1) @ x.unsqueeze(1).mT, (0,)),
    "more dims on the right": (lambda self, x: self.w @ x.unsqueeze(0).mT, (1,)),
    "addmm": (lambda self, x: torch.addmm(self.v, x[:, 0], self.w), (0,)),
    "baddbmm": (lambda self, x: torch.baddbmm(x[:, :1, :1], x, x.mT), (0,)),
    "solve": (lambda self, x: torch.linalg.solve(gram(x), x), (0,)),
    "solve by a weight": (lambda self, x: torch.linalg.solve(self.w, x.mT), (0,)),
    "solve triangular": (lambda self, x: torch.linalg.solve_triangular(gram(x), x, upper=False), (0,)),
    "solve from the right": (
        lambda self, x: torch.linalg.solve_triangular(gram(x.mT), x, upper=True, left=False),
        (0,),
    ),
    "right sides of requests": (
        lambda self, x: torch.linalg.solve_triangular(self.w, x[:, 0].t(), upper=False, unitriangular=True),
        (1,),
    ),
    "inverse": (lambda self, x: torch.linalg.inv(gram(x)) @ x, (0,)),
    "cholesky": (lambda self, x: torch.linalg.cholesky(gram(x)) @ x, (0,)),
    "einsum linear": (lambda self, x: torch.einsum("bti,oi->bto", x, self.w), (0,)),
    "einsum moved": (lambda self, x: torch.einsum("bti,oi->otb", x, self.w), (2,)),
    "einsum batched": (lambda self, x: torch.einsum("bti,bsi->bts", x, x), (0,)),
    "einsum of three": (lambda self, x: torch.einsum("bti,oi,bti->bto", x, self.w, x), (0,)),
    "einsum of one": (lambda self, x: torch.einsum("bti->itb", x), (2,)),
    "einsum over tokens": (lambda self, x: torch.einsum("bti->bi", x), (0,)),
    "einsum outer": (lambda self, x: torch.einsum("bti,e->ebti", x, self.v), (1,)),
    "attention": (lambda self, x: attend(*[x.unsqueeze(1)] * 3), (0,)),
    "attention causal": (lambda self, x: attend(*[x.unsqueeze(1)] * 3, is_causal=True), (0,)),
    "attention masked": (
        lambda self, x: attend(*[x.unsqueeze(1)] * 3, attn_mask=(x @ x.mT).unsqueeze(1) > 0),
        (0,),
    ),
    "attention over shared keys": (lambda self, x: attend(x, self.k, self.k), (0,)),
}


def gram(x: torch.Tensor) -> torch.Tensor:
    """A positive definite matrix for each of the leading dims."""
    return x @ x.mT + torch.eye(x.shape[-2], device=x.device)


def model_of(body: Body) -> nn.Module:
    return holder(body, w=weight(6, 6), v=weight(6), k=weight(1, 3, 6))


@pytest.mark.parametrize("op", KEPT)
def test_products_that_keep_requests_apart(op: str) -> None:
    body, dims = KEPT[op]
    assert mapping_of(rows_of(model_of(body), torch.randn(4, 5, 6))) == (dims, list(range(B)))


MIXED: dict[str, tuple[Body, str]] = {
    "x.T @ x": (lambda self, x: x[:, 0].T @ x[:, 0], "sums over the request dim"),
    "x @ x.T": (lambda self, x: x[:, 0] @ x[:, 0].T, "different requests"),
    "tokens of all": (lambda self, x: x.flatten(0, 1) @ x.flatten(0, 1).T, "different requests"),
    "rolled": (lambda self, x: x @ x[torch.arange(x.shape[0], device=x.device).roll(1)].mT, "different requests"),
    "dot": (lambda self, x: torch.dot(x[:, 0, 0], x[:, 0, 0]), "sums over the request dim"),
    "mv over the batch": (lambda self, x: torch.mv(x[:, 0].T, x[:, 0, 0]), "sums over the request dim"),
    "weight of a request": (lambda self, x: F.linear(x[0, :6, :6], x[:, 0]), "depend"),
    "equations of all": (lambda self, x: torch.linalg.solve(gram(x[:, 0]), x[:, 0]), "different requests"),
    "rows of all": (
        lambda self, x: torch.linalg.solve_triangular(self.w, x[:6, 0], upper=False),
        "sums over the request dim",
    ),
    "matrix of several": (
        lambda self, x: torch.linalg.solve_triangular(x[:6, 0], self.w, upper=False),
        "equations of several requests",
    ),
    "inverse of several": (lambda self, x: torch.linalg.inv(x[:6, 0]), "matrix of several requests"),
    "solve for vectors": (lambda self, x: torch.linalg.solve(self.w, x[:6, 0, 0]), "vectors on the right side"),
    "einsum over the batch": (lambda self, x: torch.einsum("bti->ti", x), "sums over the request dim"),
    "einsum pair over the batch": (lambda self, x: torch.einsum("bti,bsi->ts", x, x), "sums over the request dim"),
    "einsum across": (lambda self, x: torch.einsum("ai,bi->ab", x[:, 0], x[:, 0]), "different requests"),
    "attention over the batch": (lambda self, x: attend(*[x.transpose(0, 1)] * 3), "keys of several requests"),
    "attention of features": (lambda self, x: attend(*[x.permute(1, 2, 0)] * 3), "over the request dim"),
    "attention of other keys": (lambda self, x: attend(x, x.flip(0), x), "flip along"),
    "attention to a neighbour": (
        lambda self, x: attend(x, x[torch.arange(x.shape[0], device=x.device).roll(1)], x),
        "different requests",
    ),
    "mask over the batch": (lambda self, x: attend(*[x.unsqueeze(1)] * 3, attn_mask=x.sum(0) @ x.sum(0).T), "sum over"),
}


@pytest.mark.parametrize("op", MIXED)
def test_products_that_mix(op: str) -> None:
    body, reason = MIXED[op]
    assert reason in reason_of(rows_of(model_of(body), torch.randn(4, 5, 6)))


def test_a_weight_over_the_batch_mixes_where_the_batch_is_fixed() -> None:
    """A graph with a [B, B] weight runs at no other batch: still mixed."""
    model = holder(lambda self, x: self.w @ x, w=weight(4, 4))
    assert "sums over the request dim" in reason_of(rows_of(model, torch.randn(4, 6)))


PACKED: dict[str, Body] = {
    "attention": lambda x: attend(*[x.unsqueeze(1)] * 3),
    "matmul": lambda x: (x @ x.mT).softmax(-1) @ x,
    "einsum": lambda x: torch.einsum("bti,bsi->bts", x, x) @ x,
}


@pytest.mark.parametrize("op", PACKED)
@pytest.mark.parametrize("batch", [1, 2])
def test_packed_keys_are_the_masks_job_and_said_so(op: str, batch: int) -> None:
    """A query keeps its own token's row, whatever keys it reads in its sequence."""
    prover = proved(PACKED[op], torch.randn(batch, 5, 6), batch_dims=(0, 1))
    rows = prover.rows(returned(prover.graph))
    assert isinstance(rows, Label), rows
    assert rows.map.ids[0].flatten().tolist() == prover.seed.ids[0].flatten().tolist()
    assert any("mask" in words for words in prover.assumed.values())


def test_per_request_nothing_is_assumed() -> None:
    assert proved(PACKED["matmul"], torch.randn(4, 5, 6)).assumed == {}


@pytest.mark.parametrize(
    "body",
    [
        lambda x: attend(*[x.transpose(0, 1)] * 3),
        lambda x: attend(x, x.flip(0), x.flip(0)),
        lambda x: torch.einsum("bti,bsi->ts", x, x),
        lambda x: x @ x[torch.arange(x.shape[0], device=x.device).roll(1)].mT,
    ],
)
def test_packed_sequences_of_one_batch_do_not_see_each_other(body: Body) -> None:
    reason_of(rows_of(body, torch.randn(3, 5, 6), batch_dims=(0, 1)))


ELEMENTWISE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "logsigmoid": F.logsigmoid,
    "expit": torch.special.expit,
    "special erf": torch.special.erf,
    "special ndtr": torch.special.ndtr,
    "special xlogy": lambda x: torch.special.xlogy(x, x),
    "special logsumexp": lambda x: torch.special.logsumexp(x, dim=-1, keepdim=True),
    "special log_softmax": lambda x: torch.special.log_softmax(x, dim=-1),
    "arccos": lambda x: torch.arccos(x.tanh()),
    "float_power": lambda x: torch.float_power(x, 2.0).float(),
    "isclose": lambda x: torch.isclose(x, x + 1).float(),
    "polar": lambda x: torch.view_as_real(torch.polar(x, x)).flatten(-2),
    "complex": lambda x: torch.complex(x, x).abs(),
    "conj": lambda x: torch.complex(x, x).conj().imag,
    "byte": lambda x: x.abs().byte().float(),
    "bucketize": lambda x: torch.bucketize(x, torch.arange(3.0, device=x.device)).float(),
    "isin": lambda x: torch.isin(x.round(), torch.arange(3.0, device=x.device)).float(),
    "det": lambda x: torch.linalg.det(gram(x)),
    "matrix_power": lambda x: torch.linalg.matrix_power(gram(x), 2),
}


@pytest.mark.parametrize("op", ELEMENTWISE)
def test_each_request_alone(op: str) -> None:
    rows = rows_of(model_of(lambda self, x: ELEMENTWISE[op](x)), torch.randn(4, 5, 6))
    assert mapping_of(rows) == ((0,), list(range(B)))
