"""One model as every kind of graph torch makes: the same sites, the same answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import fx, nn

import fxlora
from fxlora.errors import FxloraError, NeedsExampleInputsError
from tests.toys.base import Adapter, clone, make_adapter, merged, worst
from tests.toys.forms import FORMS, LENGTH, PATHS, EverySpelling, every_spelling, exported, ids

NAMES: Sequence[str | None] = ("a", None, "b", "a")
ROLES: Mapping[str, set[str]] = {"embed": {"embedding"}, "head": {"logits"}}


def adapters(model: nn.Module) -> dict[str, Adapter]:
    return {"a": make_adapter(model, PATHS, 2, 1), "b": make_adapter(model, PATHS, 6, 2, rslora=True)}


def site_of(lora: Any, model: EverySpelling, path: str) -> Any:
    """The one site over a path's weight in the role that the path means; identity, not name."""
    weight, roles = model.get_parameter(f"{path}.weight"), ROLES.get(path, {"linear"})
    found = [site for site in lora.sites if site.weight is weight and site.role.value in roles]
    assert len(found) == 1, f"{path}: {[(site.name, site.role) for site in found]}"
    return found[0]


def renamed(adapter: Adapter, lora: Any, model: EverySpelling) -> Adapter:
    """The adapter under the names the graph has: make_fx keeps none of the model's."""
    config, tensors = adapter
    made = dict(tensors)
    for path in PATHS:
        name = site_of(lora, model, path).name
        for key in [key for key in tensors if key.startswith(f"base_model.model.{path}.lora")]:
            made[key.replace(f"model.{path}.", f"model.{name}.")] = made.pop(key)
    return {**config, "target_modules": [site_of(lora, model, path).name for path in PATHS]}, made


def apply(gm: fx.GraphModule) -> Any:
    inputs = ids()
    return fxlora.apply(gm, max_adapters=3, max_rank=8, batch_dims={"ids": 0}, example_inputs=clone(inputs))


def wanted(model: EverySpelling, inputs: Mapping[str, torch.Tensor], made: Mapping[str, Adapter]) -> list[torch.Tensor]:
    """Each request under its own adapter, by adding the adapter into the weights; checks that each one matters.

    The tied table is read in two roles: head and embedding carry their own adapters, so they are untied first.
    """
    model.head.weight = nn.Parameter(model.head.weight.clone(), requires_grad=False)
    rows = []
    for index, name in enumerate(NAMES):
        mine = {key: value[index : index + 1] for key, value in inputs.items()}
        base, row = model(**mine), merged(model, made[name] if name else None)(**mine)
        assert name is None or worst([row], [base]) > 1e-2, f"{name} changes nothing"
        rows.append(row)
    return rows


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_every_form_gives_the_same_answers(form: str) -> None:
    """Ten linears in nine spellings, a tied head and a gate on two paths: twelve reads, ten sites."""
    model, inputs = every_spelling(), ids(seed=3)
    made = adapters(model)
    lora = apply(FORMS[form](model, ids()))
    assert {id(site_of(lora, model, path)) for path in PATHS} == {id(site) for site in lora.sites}
    for name, adapter in made.items():
        lora.load_adapter(name, renamed(adapter, lora, model))
    got = lora(**clone(inputs), adapters=list(NAMES))
    got = got if isinstance(got, torch.Tensor) else got[0]
    for index, want in enumerate(wanted(every_spelling(), inputs, made)):
        assert worst([got[index : index + 1]], [want]) <= 1e-5, f"request {index}"


@pytest.mark.parametrize("form", [form for form in FORMS if not form.startswith("make_fx")])
def test_names_are_the_models(form: str) -> None:
    """Sites go by the model's own paths, so an adapter file binds without renaming."""
    model = every_spelling()
    lora = apply(FORMS[form](model, ids()))
    for path in PATHS:
        site = site_of(lora, model, path)
        names = {site.parameter, *site.aliases}
        assert f"{path}.weight" in names, f"{path} is {names}"
    for name, adapter in adapters(model).items():
        lora.load_adapter(name, adapter)
    assert list(lora.adapter_names) == ["a", "b"]


@pytest.mark.parametrize("form", ["export", "export_decomposed", "dynamo", "capture"])
def test_both_paths_of_the_gate_are_known(form: str) -> None:
    model = every_spelling()
    site = site_of(apply(FORMS[form](model, ids())), model, "gate")
    assert {site.parameter, *site.aliases} == {"gate.weight", "runner.gate.weight"}


def test_lifted_export_graph_is_served_or_says_how() -> None:
    """`ExportedProgram.graph_module` takes weights as inputs: there is no base weight to adapt in it."""
    model = every_spelling()
    gm = exported(model, ids()).graph_module
    with pytest.raises(FxloraError, match=r"module\(\)"):
        apply(gm)


def test_shapes_must_come_from_somewhere() -> None:
    with pytest.raises(NeedsExampleInputsError):
        fxlora.apply(fx.symbolic_trace(every_spelling()), max_adapters=3, max_rank=8)


@torch.no_grad()
def test_a_dynamic_graph_serves_other_sizes() -> None:
    """Captured at [4, 7], called at [6, 7] and [2, 5]: one graph."""
    model = every_spelling()
    lora = apply(FORMS["capture"](model, ids()))
    made = adapters(model)
    for name, adapter in made.items():
        lora.load_adapter(name, adapter)
    graph = lora.graph_module
    for batch, length in ((6, LENGTH), (2, 5)):
        inputs = ids(batch, length, seed=8)
        names: list[str | None] = ["b", *[None] * (batch - 2), "a"]
        got = lora(**clone(inputs), adapters=names)
        untied = every_spelling()
        untied.head.weight = nn.Parameter(untied.head.weight.clone(), requires_grad=False)
        for index, chosen in enumerate(names):
            want = merged(untied, made[chosen] if chosen else None)(ids=inputs["ids"][index : index + 1])
            assert worst([got[index : index + 1]], [want]) <= 1e-5
    assert lora.graph_module is graph
