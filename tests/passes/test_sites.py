"""Sites: one per weight and role with all its uses and names; every other weight is skipped with its reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxlora.passes.experts import Packing
from fxlora.passes.normalize import inline_modules, unify_weights
from fxlora.passes.rows.seeds import choose_seeds
from fxlora.passes.rows.worlds import size_worlds
from fxlora.passes.sites import Role, Site, Skipped, find_sites, module_name
from fxlora.passes.weights import Weights
from tests.passes.build import holder, job_of, weight


def sites_of(
    model: nn.Module, *examples: torch.Tensor, models: Sequence[nn.Module] | None = None
) -> tuple[list[Site], dict[str, str]]:
    """Sites of a model, and the reason of each skipped path."""
    job = job_of(model, *examples)
    inline_modules(job.gm)
    unify_weights(job.gm)
    seeds, _ = choose_seeds(job.inputs, None)
    world = size_worlds(job.gm, job.inputs, seeds, {}).worlds[0]
    known = [model] if models is None else models
    sites, skipped = find_sites(job.gm, Weights(job.gm, models=known), world, [job.gm, *known])
    assert all(isinstance(s, Skipped) and s.reason for s in skipped)
    assert not {s.parameter for s in sites} & {s.name for s in skipped}
    return sites, {s.name: s.reason for s in skipped}


def test_a_linear_says_what_it_is() -> None:
    model = holder(lambda self, x: self.proj(x), proj=nn.Linear(3, 5).double())
    ((site,), skipped) = sites_of(model, torch.randn(2, 3).double())
    assert (site.name, site.parameter, site.aliases) == ("proj", "proj.weight", ())
    assert (site.role, site.in_features, site.out_features) == (Role.LINEAR, 3, 5)
    assert (site.dtype, site.device) == (torch.float64, torch.device("cpu"))
    assert site.weight is model.proj.weight
    assert not site.stored_KN
    assert [n.name for n in site.uses] == ["linear"]
    assert skipped == {}


def test_an_embedding_and_a_weight_stored_in_by_out() -> None:
    model = holder(lambda self, ids: self.embed(ids) @ self.conv, embed=nn.Embedding(7, 3), conv=weight(3, 5))
    (embed, conv), _ = sites_of(model, torch.randint(0, 7, (2, 4)))
    assert (embed.role, embed.in_features, embed.out_features) == (Role.EMBEDDING, 7, 3)
    assert embed.dtype == torch.float32, "the dtype of the result, not of the ids"
    assert (conv.role, conv.in_features, conv.out_features, conv.stored_KN) == (Role.LINEAR, 3, 5, True)
    assert (conv.name, conv.parameter) == ("conv", "conv")


def test_the_dtype_is_that_of_the_activations() -> None:
    model = holder(lambda self, x: F.linear(x, self.w.to(torch.bfloat16)), w=weight(5, 3))
    ((site,), _) = sites_of(model, torch.randn(2, 3).bfloat16())
    assert (site.dtype, site.weight.dtype) == (torch.bfloat16, torch.float32)


def test_a_tied_weight_is_one_site_per_role() -> None:
    model = holder(
        lambda self, ids: self.head(self.embed(ids)), embed=nn.Embedding(7, 3), head=nn.Linear(3, 7, bias=False)
    )
    model.head.weight = model.embed.weight
    sites, _ = sites_of(model, torch.randint(0, 7, (2, 4)))
    assert [site.role for site in sites] == [Role.EMBEDDING, Role.LINEAR]
    assert sites[0].weight is sites[1].weight
    assert [(s.in_features, s.out_features) for s in sites] == [(7, 3), (3, 7)]
    assert {s.parameter for s in sites} | {a for s in sites for a in s.aliases} == {"embed.weight", "head.weight"}


def test_a_layer_called_thrice_is_one_site_with_three_uses() -> None:
    """ALBERT shares one block among its layers."""
    model = holder(lambda self, x: self.block(self.block(self.block(x).relu()).relu()), block=nn.Linear(3, 3))
    ((site,), _) = sites_of(model, torch.randn(2, 3))
    assert [n.name for n in site.uses] == ["linear", "linear_1", "linear_2"]


def test_one_linear_on_two_paths_is_one_site_with_both_names() -> None:
    gate = nn.Linear(3, 4)
    runner = holder(lambda self, x: self.gate(x), gate=gate)
    model = holder(lambda self, x: self.gate(x) + self.runner(x.tanh()), gate=gate, runner=runner)
    ((site,), _) = sites_of(model, torch.randn(2, 3))
    assert (site.name, site.aliases) == ("gate", ("runner.gate.weight",))
    assert len(site.uses) == 2


@pytest.mark.parametrize("first", ["plain", "transposed"])
def test_plain_and_transposed_reads_refuse_each_other(first: str) -> None:
    """A square weight, whichever comes first; the reason says so."""

    def plain_first(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x, self.w), self.w.t())

    def transposed_first(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x @ self.w, self.w)

    body = plain_first if first == "plain" else transposed_first
    sites, skipped = sites_of(holder(body, w=weight(3, 3)), torch.randn(2, 3))
    assert sites == []
    assert "plainly and transposed" in skipped["w"]


def test_one_bad_read_refuses_the_whole_weight() -> None:
    """The embedding role goes too: what scales the table would not see the adapter."""
    model = holder(lambda self, ids: F.embedding(ids, self.w) * self.w.abs().mean(), w=weight(7, 3))
    sites, skipped = sites_of(model, torch.randint(0, 7, (2, 4)))
    assert sites == []
    assert "abs" in skipped["w"]


def test_the_first_reason_is_kept() -> None:
    model = holder(lambda self, x: x @ self.w[:, :2] + (x * self.w.sum())[:, :2], w=weight(3, 3))
    _, skipped = sites_of(model, torch.randn(2, 3))
    assert "part or a reshape" in skipped["w"]


def test_what_the_graph_never_reads_is_skipped_once_with_all_names() -> None:
    model = holder(lambda self, x: self.proj(x), proj=nn.Linear(3, 4), gate=nn.Linear(3, 2))
    model.other = model.gate
    job = job_of(model, torch.randn(2, 3))
    inline_modules(job.gm)
    world = size_worlds(job.gm, job.inputs, choose_seeds(job.inputs, None)[0], {}).worlds[0]
    _, skipped = find_sites(job.gm, Weights(job.gm, models=[model]), world)
    assert [(s.name, s.reason, s.aliases) for s in skipped] == [
        ("gate.weight", "not read by this graph", ("other.weight",))
    ]


def test_expert_weights_are_sites_and_vectors_are_passed_over_in_silence() -> None:
    model = holder(
        lambda self, x: torch.einsum("bi,eio->beo", x, self.experts).sum(1) * self.scale,
        experts=weight(2, 3, 4),
        scale=weight(4),
    )
    (site,), skipped = sites_of(model, torch.randn(5, 3))
    assert (site.name, site.role, site.num_experts) == ("experts", Role.EXPERTS, 2)
    assert (site.in_features, site.out_features, site.stored_KN, site.packing) == (3, 4, True, None)
    assert skipped == {}


@pytest.mark.parametrize(
    ("taken_apart", "packing"),
    [
        (lambda y: y.chunk(2, -1)[0], Packing(2, strided=False)),
        (lambda y: y[..., :4] * y[..., 4:], Packing(2, strided=False)),
        (lambda y: y[..., ::2] + y[..., 1::2], Packing(2, strided=True)),
        (lambda y: (y + 1).split(2, dim=-1)[3], Packing(4, strided=False)),
        (lambda y: y.chunk(2, 0)[0], None),
        (lambda y: y[..., :3], None),
        (lambda y: y.chunk(2, -1)[0] * y.split(2, -1)[0].repeat(1, 1, 2), None),
        (lambda y: y.relu(), None),
    ],
)
def test_how_a_result_is_taken_apart_tells_the_matrices_in_a_weight(
    taken_apart: Callable[[torch.Tensor], torch.Tensor], packing: Packing | None
) -> None:
    model = holder(lambda self, x: taken_apart(torch.einsum("bi,eoi->beo", x, self.w)), w=weight(3, 8, 5))
    (site,), _ = sites_of(model, torch.randn(4, 5))
    assert site.packing == packing


@pytest.mark.parametrize("said", [True, False, None])
def test_what_a_module_says_of_its_layout_is_kept(said: bool | None) -> None:
    model = holder(lambda self, x: torch.einsum("bi,eoi->beo", x, self.w), w=weight(3, 8, 5))
    if said is not None:
        model.is_transposed = said
    (site,), _ = sites_of(model, torch.randn(4, 5))
    assert site.declared_KN is bool(said)


def test_missing_modules_are_named_with_their_place() -> None:
    layers = nn.ModuleList([nn.Linear(3, 3), nn.Identity(), nn.Linear(3, 3)])
    model = holder(lambda self, x: self.layers[2](self.layers[1](self.layers[0](x))), layers=layers)
    model.register_module("head", None)
    sites, skipped = sites_of(model, torch.randn(2, 3))
    assert [site.name for site in sites] == ["layers.0", "layers.2"]
    assert "None" in skipped["head"]
    assert "another pipeline stage" in skipped["layers.1"]


def test_an_identity_beside_no_weights_is_nothing() -> None:
    model = holder(lambda self, x: self.proj(self.acts(x)), proj=nn.Linear(3, 3), acts=nn.Sequential(nn.Identity()))
    assert sites_of(model, torch.randn(2, 3))[1] == {}


@pytest.mark.parametrize(
    ("parameter", "name"),
    [("a.b.weight", "a.b"), ("weight", "weight"), ("a.experts", "a.experts"), ("a.weight.b", "a.weight.b")],
)
def test_module_name(parameter: str, name: str) -> None:
    assert module_name(parameter) == name
