"""The logits site is found by structure: tied, the model's output embedding, or the last linear. Never by a name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxlora.passes.logits import mark_logits
from fxlora.passes.sites import Role
from tests.passes.build import analysed, holder, job_of, weight


def roles_of(model: nn.Module, *examples: torch.Tensor, head: torch.Tensor | None = None) -> dict[str, str]:
    """Role of each site by name."""
    from fxlora.passes.pipeline import analyse

    job = job_of(model, *examples)
    job.output_embedding = head
    analyse(job)
    return {site.name: site.role.value for site in job.sites}


def chain(after: Callable[[Any], Any], **extra: torch.Tensor) -> nn.Module:
    """Two linears with misleading names, and something after the last."""
    return holder(
        lambda self, x: after(self.down_proj(self.lm_head(x).relu())),
        lm_head=nn.Linear(3, 4),
        down_proj=nn.Linear(4, 6),
        **extra,
    )


@pytest.mark.parametrize(
    "after",
    [
        lambda y: y,
        lambda y: 30.0 * torch.tanh(y / 30.0),
        lambda y: y.float() * 0.5,
        lambda y: y[:, -1:, :],
        lambda y: y.contiguous().view(-1, 6),
        lambda y: y.squeeze(1).masked_fill(torch.zeros(6, dtype=torch.bool), -1e9),
        lambda y: (y, y.sum()),
        lambda y: {"logits": y},
    ],
    ids=["bare", "softcap", "scaled", "sliced", "viewed", "masked", "first of two", "dict"],
)
def test_the_last_linear_is_logits_whatever_it_is_called(after: Callable[[Any], Any]) -> None:
    roles = roles_of(chain(after), torch.randn(2, 5, 3))
    assert roles == {"lm_head": "linear", "down_proj": "logits"}


@pytest.mark.parametrize(
    "after",
    [
        lambda y: y.softmax(-1),
        lambda y: y.sum(-1),
        lambda y: F.layer_norm(y, (6,)),
        lambda y: y @ y.transpose(-1, -2),
        lambda y: y + y.relu(),
        lambda y: (y.sum(), y),
    ],
    ids=["softmax", "sum", "norm", "matmul", "two ways", "second output"],
)
def test_what_only_leads_to_the_output_is_no_logits(after: Callable[[Any], Any]) -> None:
    assert set(roles_of(chain(after), torch.randn(2, 5, 3)).values()) == {"linear"}


def test_a_residual_stream_ends_in_no_logits() -> None:
    model = holder(lambda self, x: x.relu() + self.lm_head(x), lm_head=nn.Linear(3, 3))
    assert roles_of(model, torch.randn(2, 5, 3)) == {"lm_head": "linear"}


def test_the_models_own_output_embedding_decides_alone() -> None:
    """Given, it is the logits site wherever it stands, and the last linear is not."""
    model = chain(lambda y: y)
    assert roles_of(model, torch.randn(2, 5, 3), head=model.lm_head.weight) == {
        "lm_head": "logits",
        "down_proj": "linear",
    }
    assert set(roles_of(model, torch.randn(2, 5, 3), head=weight(2, 2)).values()) == {"linear"}


def tied(after: Callable[[Any], Any]) -> nn.Module:
    model = holder(
        lambda self, ids: after(self.scores(self.mid(self.table(ids)))),
        table=nn.Embedding(7, 3),
        mid=nn.Linear(3, 3),
        scores=nn.Linear(3, 7, bias=False),
    )
    model.scores.weight = model.table.weight
    return model


@pytest.mark.parametrize("after", [lambda y: y, lambda y: y.softmax(-1)], ids=["last", "not last"])
def test_a_linear_over_the_embedding_is_logits_wherever_it_stands(after: Callable[[Any], Any]) -> None:
    model = tied(after)
    job = analysed(model, torch.randint(0, 7, (2, 4)), models=[model])
    assert [site.role for site in job.sites] == [Role.EMBEDDING, Role.LINEAR, Role.LOGITS]


def test_a_tied_head_goes_by_the_last_name_and_the_table_by_the_first() -> None:
    model = tied(lambda y: y)
    job = analysed(model, torch.randint(0, 7, (2, 4)), models=[model])
    embedding, logits = (next(s for s in job.sites if s.role is role) for role in (Role.EMBEDDING, Role.LOGITS))
    assert (embedding.name, embedding.aliases) == ("table", ("scores.weight",))
    assert (logits.name, logits.parameter, logits.aliases) == ("scores", "scores.weight", ("table.weight",))


def test_marking_leaves_the_other_sites_as_they_are() -> None:
    job = analysed(chain(lambda y: y), torch.randn(2, 5, 3))
    again = mark_logits(job.gm, job.sites, job.weights, None)
    assert [s.name for s in again] == [s.name for s in job.sites]
    assert again[0] is job.sites[0]
    assert (again[1].in_features, again[1].out_features) == (4, 6)


@pytest.mark.parametrize("names", [("a", "b"), ("lm_head", "score"), ("b", "a")])
def test_no_name_has_a_say(names: tuple[str, str]) -> None:
    """The same graph under other names gives the same roles."""
    first, second = names
    model = holder(
        lambda self, x: getattr(self, second)(getattr(self, first)(x)),
        **{first: nn.Linear(3, 4), second: nn.Linear(4, 5)},
    )
    assert roles_of(model, torch.randn(2, 5, 3)) == {first: "linear", second: "logits"}


def test_an_untied_head_keeps_its_first_name() -> None:
    head = nn.Linear(3, 4)
    model = holder(lambda self, x: self.head(x), head=head, wrapper=nn.ModuleDict({"inner": head}))
    assert [site.name for site in analysed(model, torch.randn(2, 3), models=[model]).sites] == ["head"]
