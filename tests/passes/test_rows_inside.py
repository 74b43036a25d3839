"""Ops that no rule names, by what torch makes of them; and learned rows that are repeated for every request."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.torch_version import TorchVersion

from fxlora.passes.rows.inside import look_inside
from fxlora.passes.rows.rules import is_known
from tests.passes.build import analysed, holder, mapping_of, proved, reason_of, returned, rows_of, weight

B = 29
shaped_quantile = pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.12", reason="torch 2.11 computes a quantile's shape from its data"
)


@pytest.mark.parametrize(
    ("body", "dims"),
    [
        (lambda x: F.cosine_similarity(x, x * 2, dim=-1), (0,)),
        (lambda x: torch.tensordot(torch.ones(4, 6), x, dims=([1], [2])), (1,)),
        pytest.param(lambda x: x.quantile(0.5, dim=1), (0,), marks=shaped_quantile),
        (lambda x: torch.trapezoid(x.movedim(0, 2), dim=0), (1,)),
        (lambda x: x.clone().tril_(), (0,)),
        (lambda x: torch.multinomial(x[:, 0].softmax(-1), 2), (0,)),
        (lambda x: F.gumbel_softmax(x, 1, dim=1), (0,)),
    ],
)
def test_rows_are_found_inside(body: Any, dims: tuple[int, ...]) -> None:
    assert mapping_of(rows_of(body, torch.randn(4, 5, 6))) == (dims, list(range(B)))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda x: F.cosine_similarity(x, x * 2, dim=0), "over the request dim"),
        pytest.param(lambda x: x.quantile(0.5, dim=0), "request dim", marks=shaped_quantile),
        (lambda x: torch.block_diag(x[:, 0], x[:, 1]), "rearranges rows of requests"),
        (lambda x: F.pdist(x[:, 0]), "no row rule for _pdist_forward"),
        (lambda x: torch.multinomial(x[:, 0].softmax(0).T, 2), "softmax along"),
        (lambda x: torch.multinomial(x[:, 0].exp().T, 2), "multinomial along"),
        (lambda x: F.gumbel_softmax(x[:, 0].T, 2), "gumbel_softmax along"),
        (lambda x: torch.histc(x), "no row rule for histc"),
        (lambda x: torch.broadcast_tensors(x[:, :1], x)[1], "hands on an operand beside its first"),
    ],
)
def test_what_mixes_inside(body: Any, reason: str) -> None:
    assert reason in reason_of(rows_of(body, torch.randn(4, 5, 6)))


def test_a_function_of_the_users_own_stays_closed() -> None:
    prover = proved(lambda x: F.cosine_similarity(x, x * 2, dim=-1), torch.randn(4, 5, 6))
    node = returned(prover.graph)
    assert mapping_of(look_inside(prover, node, is_known))[0] == (0,)
    node.target = lambda *args, **kwargs: F.cosine_similarity(*args, **kwargs)
    assert "no row rule" in reason_of(look_inside(prover, node, is_known))


def test_what_is_assumed_inside_is_told() -> None:
    """Tokens of one packed sequence that attend to each other: isolation is a mask's job, wherever the product is."""
    prover = proved(
        lambda x: torch.tensordot(x[0], x[0], dims=([1], [1])) @ x[0], torch.randn(1, 5, 6), batch_dims=(0, 1)
    )
    assert any("as the mask allows" in words for words in prover.assumed.values())


def queries(expanded: bool) -> Any:
    def body(self: Any, x: torch.Tensor) -> torch.Tensor:
        rows = self.queries.expand(x.shape[0], 4, 6) if expanded else self.queries
        return x.mean(1, keepdim=True) + F.linear(rows, self.w)

    return holder(body, queries=weight(1, 4, 6), w=weight(6, 6))


def test_learned_rows_repeated_for_every_request() -> None:
    """Each request's copy is its own once an adapter has changed it; one copy for all cannot be."""
    assert [use.rows.text for use in analysed(queries(True), torch.randn(3, 5, 6)).plan.uses] == ["flatten"]
    refused = analysed(queries(False), torch.randn(3, 5, 6)).plan
    assert not refused.uses
    assert any("carry no request (positions, constants)" in skip.reason for skip in refused.skipped)
