"""Weights by memory: one key per tensor however many Parameters and names it has; PEFT's wrappers are refused."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from fxlora.passes.errors import PeftModelError
from fxlora.passes.weights import Weights, tensor_key
from tests.passes.build import holder, traced, weight


def test_two_parameters_over_one_storage_are_one_weight() -> None:
    base = torch.randn(4, 3)
    assert tensor_key(nn.Parameter(base)) == tensor_key(nn.Parameter(base))
    assert tensor_key(nn.Parameter(base)) != tensor_key(nn.Parameter(base.clone()))


@pytest.mark.parametrize("other", ["shape", "stride", "offset", "dtype"])
def test_another_view_of_the_memory_is_another_weight(other: str) -> None:
    base = torch.randn(4, 4)
    views = {"shape": base.view(2, 8), "stride": base.T, "dtype": base.view(torch.int32), "offset": base[2:]}
    first = base[:2] if other == "offset" else base
    assert tensor_key(first) != tensor_key(views[other])


def test_weights_without_memory_go_by_identity() -> None:
    left, right = torch.empty(2, 3, device="meta"), torch.empty(2, 3, device="meta")
    assert tensor_key(left) == tensor_key(left)
    assert tensor_key(left) != tensor_key(right)
    empty = torch.empty(0, 3)
    assert tensor_key(empty) != tensor_key(torch.empty(0, 3))


def shared() -> nn.Module:
    """One table on three paths, twice as the same Parameter and once as another over its memory."""
    table = nn.Embedding(7, 3)
    model = holder(lambda self, ids: self.embed(ids), embed=table, head=nn.Linear(3, 7, bias=False))
    model.head.weight = table.weight
    model.register_parameter("copy", nn.Parameter(table.weight.data))
    return model


def test_every_name_of_a_tensor_is_known_the_models_order_first() -> None:
    model = shared()
    gm = traced(model)
    weights = Weights(gm, models=[model])
    assert weights.paths_of(model.embed.weight) == ("copy", "embed.weight", "head.weight")
    assert weights.paths_of(model.copy) == weights.paths_of(model.embed.weight)
    assert weights.paths_of(torch.randn(2)) == ()


def test_names_the_graph_lost_come_from_the_model() -> None:
    model = shared()
    gm = fx.symbolic_trace(model)
    assert "head.weight" not in Weights(gm).names
    assert "head.weight" in Weights(gm, models=[model]).names


def test_the_root_behind_casts_and_views() -> None:
    gm = traced(holder(lambda self, x: x @ self.w.t().contiguous().to(torch.float32).T[:, 1:], w=weight(4, 3)))
    weights = Weights(gm)
    product = next(n for n in gm.graph.nodes if n.name == "matmul")
    root, chain = weights.root(product.args[1])
    assert root is not None
    assert root.op == "get_attr"
    assert chain == ["getitem", "T", "to", "contiguous", "t"]
    assert weights.tensor_of(root) is gm.w


def test_a_computed_value_has_no_root() -> None:
    gm = traced(holder(lambda self, x: x @ (self.w * 2).t(), w=weight(4, 3)))
    product = next(n for n in gm.graph.nodes if n.name == "matmul")
    assert Weights(gm).root(product.args[1]) == (None, [])
    assert Weights(gm).root(3) == (None, [])


def test_buffers_are_no_weights_but_bound_placeholders_are() -> None:
    gm = traced(lambda x, w: x @ w)
    x, w = [n for n in gm.graph.nodes if n.op == "placeholder"]
    parameter = nn.Parameter(weight(3, 4))
    gm.register_parameter("w", parameter)
    gm.register_buffer("b", weight(3, 4))
    weights = Weights(gm, {w: parameter})
    assert weights.is_weight(w)
    assert not weights.is_weight(x)
    assert not Weights(gm, {w: gm.b}).is_weight(w)


def test_a_buffer_that_a_module_computes_with_is_a_weight_of_its_name() -> None:
    gm = traced(lambda x, w: x @ w)
    gm.inner = nn.Module()
    gm.inner.register_buffer("weight", weight(3, 4))
    gm.inner.register_buffer("mask", weight(3, 4))
    assert list(Weights(gm).names) == ["inner.weight"]


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "base_layer"])
def test_names_of_pefts_wrappers_are_refused_with_the_way_out(part: str) -> None:
    with pytest.raises(PeftModelError, match=rf"layers\.{part}\.weight.*unload\(\)"):
        Weights.refuse_peft(["plain.weight", f"layers.{part}.weight"])
    Weights.refuse_peft([f"my_{part}_head.weight", f"{part}x.weight"])


def test_a_graph_that_holds_pefts_wrappers_is_refused() -> None:
    gm = traced(holder(lambda self, x: self.base_layer(x), base_layer=nn.Linear(3, 4)))
    with pytest.raises(PeftModelError, match="base_layer"):
        Weights(gm)
