"""Targets as PEFT's target_modules, a reason for every site left alone, and a digest that changes with the plan."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxlora.passes.errors import RowsNotProvenError, TargetError
from fxlora.passes.plan import AdapterShape, Plan, Targets, digest_of
from fxlora.passes.sites import Role, Site
from tests.passes.build import analysed, holder, weight


class Block(nn.Module):
    """Two projections of one input; h [B, T, 6]."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.q_proj(h) * self.v_proj(h)


class Model(nn.Module):
    """An embedding with positions, two blocks, a head, a weight nobody reads, and one read in part."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(13, 6), nn.Embedding(9, 6)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head, self.spare, self.part = nn.Linear(6, 13), nn.Linear(6, 6), nn.Parameter(torch.randn(6, 8))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.embed(ids) + self.position(torch.arange(ids.shape[1]))
        for layer in self.layers:
            h = layer(h)
        return self.head(h @ self.part[:, :6])


def planned(targets: Targets = None, **options: Any) -> Plan:
    model = Model()
    return analysed(model, torch.randint(0, 13, (2, 4)), targets=targets, models=[model], **options).plan


def names(plan: Plan) -> list[str]:
    return [site.name for site in plan.sites]


ALL = [
    "embed",
    "layers.0.q_proj",
    "layers.0.v_proj",
    "layers.1.q_proj",
    "layers.1.v_proj",
    "head",
]


@pytest.mark.parametrize("targets", [None, "all"])
def test_every_provable_site_by_default(targets: Targets) -> None:
    plan = planned(targets)
    assert names(plan) == ALL
    reasons = {s.name: s.reason for s in plan.skipped}
    assert "not read" in reasons.pop("spare.weight")
    assert "part or a reshape" in reasons.pop("part")
    assert "shared by the whole batch" in reasons.pop("position.weight")
    assert reasons == {}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj"], ["layers.0.q_proj", "layers.1.q_proj"]),
        (("q_proj", "head"), ["layers.0.q_proj", "layers.1.q_proj", "head"]),
        (["0.q_proj"], ["layers.0.q_proj"]),
        (["layers.1.v_proj"], ["layers.1.v_proj"]),
        (["head.weight"], ["head"]),
        ("head", ["head"]),
        (r".*\.(q|v)_proj", ALL[1:5]),
        (r"layers\.0\..*", ALL[1:3]),
        (r"head\.weight", ["head"]),
    ],
)
def test_lists_match_by_suffix_and_strings_as_a_regex(targets: Targets, expected: list[str]) -> None:
    plan = planned(targets)
    assert names(plan) == expected
    left = [s for s in plan.skipped if "not targeted" in s.reason]
    assert {s.name for s in left} == {f"{n}.weight" for n in [*ALL, "position"] if n not in expected}


@pytest.mark.parametrize("targets", [["proj"], ["q_pro"], "q_proj", ["_proj"], ["q_proj", "nothing"], r".*\.q"])
def test_a_name_that_matches_nothing_is_an_error(targets: Targets) -> None:
    """A suffix must end at a dot, a regex must match the whole name, and one good name does not excuse another."""
    with pytest.raises(TargetError, match="matches no weight"):
        planned(targets)


def test_a_typo_names_the_nearest() -> None:
    with pytest.raises(TargetError, match=r"'q_porj'.*nearest.*q_proj"):
        planned(["q_porj"])
    with pytest.raises(TargetError, match=r"nearest.*layers\.0\.v_proj"):
        planned(["layers.0.v_prj"])


@pytest.mark.parametrize("targets", [["spare"], "spare", ["spare.weight"], "sp.*"])
def test_a_target_that_is_no_site_says_why(targets: Targets) -> None:
    with pytest.raises(TargetError, match=r"means 'spare.weight', but that is no site: not read"):
        planned(targets)


def test_a_target_read_in_part_says_why() -> None:
    with pytest.raises(TargetError, match="part or a reshape"):
        planned(["part"])


@pytest.mark.parametrize("targets", [["position"], "position", ["embed", "position"]])
def test_a_target_without_proven_rows_is_an_error(targets: Targets) -> None:
    with pytest.raises(RowsNotProvenError, match=r"'position'.*shared by the whole batch"):
        planned(targets)


def test_an_alias_names_the_site() -> None:
    gate = nn.Linear(6, 3)
    model = holder(lambda self, x: self.gate(x).softmax(-1), gate=gate, runner=nn.ModuleDict({"router": gate}))
    job = analysed(model, torch.randn(2, 6), targets=["runner.router"], models=[model])
    assert names(job.plan) == ["gate"]


def test_mixed_rows_leave_the_site_with_the_reason() -> None:
    model = holder(lambda self, x: (self.a(x), self.b(x.flip(0))), a=nn.Linear(6, 3), b=nn.Linear(6, 3))
    plan = analysed(model, torch.randn(2, 4, 6)).plan
    assert names(plan) == ["a"]
    assert "flip along the request dim" in plan.skipped[0].reason
    assert len(plan.mixed_outputs) == 1
    assert plan.mixed_outputs[0].startswith("output 1: flip")


def test_a_dim_of_requests_that_the_weight_sums_over_is_refused() -> None:
    model = holder(lambda self, x: torch.einsum("tb,ob->to", x, self.w), w=weight(3, 5))
    plan = analysed(model, torch.randn(4, 5), batch_dims={"x": 1}).plan
    assert plan.sites == ()
    assert "the dim that the weight sums over" in plan.skipped[0].reason


def test_one_use_without_rows_leaves_the_whole_site() -> None:
    model = holder(lambda self, x: self.a(x) + self.a(x.roll(1, 0)), a=nn.Linear(6, 3))
    plan = analysed(model, torch.randn(2, 4, 6)).plan
    assert (plan.sites, plan.uses) == ((), ())


def test_uses_stand_in_graph_order_over_shared_maps() -> None:
    plan = planned()
    assert [use.node.name for use in plan.uses] == [
        "embedding",
        "linear",
        "linear_1",
        "linear_2",
        "linear_3",
        "linear_4",
    ]
    assert len({id(use.rows) for use in plan.uses}) == 1, "ids and their embeddings have the same rows"


def site(**changes: Any) -> Site:
    made = Site("a", "a.weight", (), Role.LINEAR, weight(4, 3), 3, 4, torch.float32, torch.device("cpu"))
    return replace(made, **changes)


SHAPE = AdapterShape(4, 16)


@pytest.mark.parametrize(
    "changes",
    [
        {"parameter": "b.weight"},
        {"role": Role.LOGITS},
        {"in_features": 5},
        {"out_features": 5},
        {"dtype": torch.bfloat16},
        {"device": torch.device("meta")},
        {"num_experts": 2},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_the_digest_changes_with_a_site(changes: dict[str, Any]) -> None:
    assert digest_of([site()], SHAPE) != digest_of([site(**changes)], SHAPE)


@pytest.mark.parametrize(
    "shape", [AdapterShape(5, 16), AdapterShape(4, 32), AdapterShape(4, 16, 64), AdapterShape(4, 16, None, 8)]
)
def test_the_digest_changes_with_the_memory(shape: AdapterShape) -> None:
    assert digest_of([site()], SHAPE) != digest_of([site()], shape)


def test_the_digest_changes_with_number_and_order_of_sites() -> None:
    other = site(parameter="b.weight")
    digests = {digest_of(sites, SHAPE) for sites in ([], [site()], [site(), other], [other, site()])}
    assert len(digests) == 4


def test_the_digest_is_32_bits_and_the_same_for_the_same_plan() -> None:
    """Other tensors and aliases of the same shape change nothing: compile caches hit across processes."""
    first = digest_of([site()], SHAPE)
    assert 0 <= first < 2**32
    assert first == digest_of([site(weight=weight(4, 3), aliases=("x",))], AdapterShape(4, 16))
    assert planned().digest == planned().digest


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (None, ["gate"]),
        ("all", ["gate", "w"]),
        ("all-linear", ["gate"]),
        (["w"], ["w"]),
        (["gate", "w"], ["gate", "w"]),
        (".*", ["gate", "w"]),
    ],
)
def test_experts_are_targets_where_they_are_asked_for(targets: Targets, names: list[str]) -> None:
    model = holder(
        lambda self, x: torch.einsum("ti,taoi->tao", x, self.w[self.gate(x).topk(2, -1)[1]]),
        gate=nn.Linear(3, 5),
        w=weight(5, 4, 3),
    )
    plan = analysed(model, torch.randn(7, 3), targets=targets).plan
    assert sorted(site.name for site in plan.sites) == names
    reasons = {skip.name: skip.reason for skip in plan.skipped}
    if targets is None:
        assert reasons == {
            "w": "not targeted: adapter memory for 5 experts is allocated only where `targets` asks for it; "
            """apply with targets="all", or name 'w' in targets"""
        }


def test_an_empty_list_is_an_error() -> None:
    with pytest.raises(TargetError):
        planned([])


def test_a_broken_regex_is_a_target_error() -> None:
    with pytest.raises(TargetError):
        planned("(q_proj")


def zeros(kind: str) -> Any:
    """A weight that reads x and a row of zeros, or what is none."""

    def body(self: Any, x: torch.Tensor) -> torch.Tensor:
        row = x.new_full((1, 1, 6), 0.5 if kind == "full" else 0.0)
        if kind == "written":
            row.add_(1.0)
        if kind == "written through a view":
            row.view(-1).fill_(1.0)
        if kind == "a copy, written":
            row = row.clone()
            row.fill_(1.0)
        if kind == "out":
            torch.add(row, 1.0, out=row)
        first = F.linear(row.expand(1, 2, 6).to(x.dtype), self.w)
        if kind == "written later":
            row.add_(1.0)
        return first if kind == "alone" else torch.cat([first + 0 * x[:, :2], F.linear(x, self.w)], 1)

    return holder(body, w=weight(6, 6))


@pytest.mark.parametrize("kind", ["zero", "written later"])
def test_a_call_on_zeros_needs_no_adapter(kind: str) -> None:
    plan = analysed(zeros(kind), torch.randn(3, 5, 6)).plan
    assert [use.rows.text for use in plan.uses] == ["flatten"]
    assert len(plan.sites[0].uses) == 2


@pytest.mark.parametrize("kind", ["full", "written", "written through a view", "a copy, written", "out"])
def test_what_only_looks_like_zeros_is_refused(kind: str) -> None:
    refused = analysed(zeros(kind), torch.randn(3, 5, 6)).plan
    assert not refused.uses
    assert any("carry no request (positions, constants)" in skip.reason for skip in refused.skipped)


def test_a_weight_that_reads_zeros_alone_is_no_site() -> None:
    refused = analysed(zeros("alone"), torch.randn(3, 5, 6)).plan
    assert not refused.sites
    assert any("reads zeros alone" in skip.reason for skip in refused.skipped)
