"""A weight under several names is one site: one node, one entry, one pool, one delta, whichever name is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import peft
import pytest
import torch
from torch import fx, nn

import fxlora
from fxlora.errors import AdapterError, ConflictingEntriesError, FxloraError
from tests.toys.base import Adapter, clone, make_adapter, merged, worst
from tests.toys.shared import BothWays, Model, OneBlockThrice, Pipeline, TwoLayers, UnusedGate, built, rows

NAMES: Sequence[str | None] = ("a", None, "b", "a")


def applied(model: nn.Module, form: str = "capture") -> Any:
    inputs = rows()
    gm = fx.symbolic_trace(model) if form == "symbolic_trace" else fxlora.capture(model, **clone(inputs))
    return fxlora.apply(gm, max_adapters=3, max_rank=8, example_inputs=clone(inputs))


@torch.no_grad()
def check(lora: Any, model: nn.Module, adapters: Mapping[str, Adapter], names: Sequence[str | None] = NAMES) -> None:
    """A mixed batch equals each request with its adapter added into the weights; each adapter matters."""
    inputs = rows(seed=6)
    got = lora(**clone(inputs), adapters=list(names))
    for index, name in enumerate(names):
        x = inputs["x"][index : index + 1]
        base, want = model(x), merged(model, adapters[name] if name else None)(x)
        assert name is None or worst([want], [base]) > 1e-3, f"{name} changes nothing"
        assert worst([got[index : index + 1]], [want]) <= 1e-5, f"request {index} ({name})"


def sites_over(lora: Any, weight: torch.Tensor) -> list[Any]:
    return [site for site in lora.sites if site.weight is weight]


def reads_of(lora: Any, weight: torch.Tensor) -> int:
    """How many nodes of the rewritten graph stand for a weight."""
    gm, count = lora.graph_module, 0
    named = dict(gm.named_parameters(remove_duplicate=False))
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            count += named.get(node.target) is weight
    return count


def pool_bytes(lora: Any) -> int:
    """Memory of the adapters' tensors."""
    return lora.pool.bytes


@pytest.mark.parametrize("called", ["gate", "runner", "both"])
@pytest.mark.parametrize("named", ["moe.gate", "moe.runner.gate"])
def test_either_name_binds_and_either_path_is_served(called: str, named: str) -> None:
    model = built(Model, called)
    weight = model.get_parameter("moe.gate.weight")
    for form in ("capture", "symbolic_trace"):
        lora = applied(model, form)
        (site,) = sites_over(lora, weight)
        assert reads_of(lora, weight) <= 1
        if form == "capture":
            assert {site.parameter, *site.aliases} == {"moe.gate.weight", "moe.runner.gate.weight"}
        elif f"{named}.weight" not in {site.parameter, *site.aliases}:
            continue
        adapters = {
            "a": make_adapter(model, [named, "start"], 2, 1),
            "b": make_adapter(model, [named, "end"], 5, 2, rslora=True),
        }
        for name, adapter in adapters.items():
            lora.load_adapter(name, adapter)
        check(lora, model, adapters)


@pytest.mark.parametrize("called", ["gate", "runner", "both"])
def test_a_gate_on_two_paths_costs_one_pool(called: str) -> None:
    """The pool of the model with two paths is that of its three distinct linears."""
    model = built(Model, called)
    lora = applied(model)
    assert sorted(site.parameter.split(".")[0] for site in lora.sites) == ["end", "moe", "start"]
    alone = built(Model, "gate")
    delattr(alone.get_submodule("moe"), "runner")
    assert pool_bytes(lora) == pool_bytes(applied(alone))


def test_both_names_in_one_file_must_agree() -> None:
    """Equal entries under two names are one entry; different ones are refused."""
    model = built(Model, "both")
    config, tensors = make_adapter(model, ["moe.gate"], 2, 1)
    twice = {**tensors, **{key.replace("moe.gate", "moe.runner.gate"): value.clone() for key, value in tensors.items()}}
    lora = applied(model)
    lora.load_adapter("a", (config, twice))
    check(lora, model, {"a": (config, tensors)}, ["a", None, None, "a"])
    other = {key: value + 1 if "runner" in key else value for key, value in twice.items()}
    with pytest.raises(ConflictingEntriesError, match=r"runner"):
        lora.load_adapter("b", (config, other))
    assert list(lora.adapter_names) == ["a"]
    check(lora, model, {"a": (config, tensors)}, ["a", None, None, "a"])


@pytest.mark.parametrize("named", ["layers.0.gate", "layers.1.gate", "layers.0.runner.gate", "layers.1.runner.gate"])
def test_a_gate_of_two_layers_is_one_site(named: str) -> None:
    model = built(TwoLayers)
    lora = applied(model)
    (site,) = sites_over(lora, model.get_parameter("layers.0.gate.weight"))
    assert len({site.parameter, *site.aliases}) == 4
    adapters = {"a": make_adapter(model, [named], 2, 1), "b": make_adapter(model, [named], 4, 2)}
    for name, adapter in adapters.items():
        lora.load_adapter(name, adapter)
    check(lora, model, adapters)


@pytest.mark.parametrize("form", ["capture", "symbolic_trace"])
def test_one_block_called_thrice_is_two_sites(form: str) -> None:
    model = built(OneBlockThrice)
    lora = applied(model, form)
    assert sorted(site.name for site in lora.sites) == ["down", "up"]
    adapters = {"a": make_adapter(model, ["up", "down"], 2, 1), "b": make_adapter(model, ["down"], 4, 2)}
    for name, adapter in adapters.items():
        lora.load_adapter(name, adapter)
    check(lora, model, adapters)


@pytest.mark.parametrize("form", ["capture", "symbolic_trace"])
def test_a_weight_read_both_ways_is_refused_with_its_reason(form: str) -> None:
    model = built(BothWays)
    lora = applied(model, form)
    assert not sites_over(lora, model.get_parameter("square.weight"))
    (skipped,) = [entry for entry in lora.skipped if entry.name == "square.weight"]
    assert "orientation" in skipped.reason or "transposed" in skipped.reason
    with pytest.raises(AdapterError, match=r"square"):
        lora.load_adapter("a", make_adapter(model, ["square"], 2, 1))
    adapters = {"b": make_adapter(model, ["end"], 3, 2)}
    lora.load_adapter("b", adapters["b"])
    check(lora, model, adapters, ["b", None, "b", None])


def applied_to_wrapped(wrapped: Any, form: str) -> Any:
    """Apply to a PeftModel as a graph; symbolic_trace cannot follow PEFT."""
    inputs = rows()
    if form == "export":
        gm = torch.export.export(wrapped, (), clone(inputs)).module()
    else:
        gm = fxlora.capture(wrapped, **clone(inputs))
    return fxlora.apply(gm, max_adapters=3, max_rank=8, example_inputs=clone(inputs))


@pytest.mark.parametrize("form", ["capture", "export"])
def test_a_peft_model_is_refused_or_unwrapped(form: str) -> None:
    """PEFT's own wrappers never become sites: refused with the call that unwraps, or served as the base."""
    config = peft.LoraConfig(r=2, target_modules=["start", "moe.gate"], init_lora_weights=False)
    wrapped = peft.get_peft_model(built(Model, "gate"), config).eval()
    try:
        lora = applied_to_wrapped(wrapped, form)
    except FxloraError as error:
        if "unload" in str(error) or "get_base_model" in str(error):
            return
        raise
    assert not [site.name for site in lora.sites if "lora_" in site.name or "base_layer" in site.name]
    adapters = {"b": make_adapter(built(Model, "gate"), ["end"], 3, 2)}
    lora.load_adapter("b", adapters["b"])
    check(lora, built(Model, "gate"), adapters, ["b", None, "b", None])


def test_missing_pipeline_layers_are_named() -> None:
    """What another stage holds is in `skipped`, and an adapter that reaches for it is told so."""
    model = built(Pipeline)
    lora = applied(model)
    assert sorted(site.name for site in lora.sites) == ["layers.0", "layers.2"]
    skipped = {entry.name: entry.reason for entry in lora.skipped}
    assert any(name.startswith("layers.1") for name in skipped), skipped
    whole = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(10, 10) for _ in range(3)])})
    config, tensors = make_adapter(whole, ["layers.0", "layers.1"], 2, 1)
    with pytest.raises(AdapterError, match=r"layers\.1"):
        lora.load_adapter("a", (config, tensors))
    mine = {key: value for key, value in tensors.items() if "layers.0" in key}
    lora.load_adapter("a", (config, mine))
    check(lora, model, {"a": (config, mine)}, ["a", None, "a", None])


def test_an_unused_gate_is_skipped_with_a_reason() -> None:
    model = built(UnusedGate)
    lora = applied(model)
    assert [site.name for site in lora.sites] == ["proj"]
    (skipped,) = [entry for entry in lora.skipped if entry.name == "gate.weight"]
    assert skipped.reason
    with pytest.raises(AdapterError, match=r"gate"):
        lora.load_adapter("a", make_adapter(model, ["gate"], 2, 1))
