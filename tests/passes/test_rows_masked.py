"""Writes through masks: a choice of each element, or a list of values that masks of all requests share out."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

import fxlora
from tests.passes.build import inputs_of, mapping_of, proved, reason_of, returned
from tests.toys.base import make_adapter

Body = Callable[..., Any]
B = 29


def graph_of(body: Callable[[fx.Graph, fx.Node], fx.Node]) -> fx.GraphModule:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(body(graph, x))
    return fx.GraphModule(nn.Module(), graph)


def stored(key: Callable[[fx.Node], Any], value: Callable[[fx.Node, fx.Node], Any]) -> fx.GraphModule:
    """`y = x * 2; y[key] = value` of x [B, T, H]; ``key`` is made of a mask [B, T], ``value`` of x and the mask."""

    def body(graph: fx.Graph, x: fx.Node) -> fx.Node:
        mask = graph.call_function(operator.gt, (graph.call_function(torch.select, (x, 2, 0)), 0))
        y = graph.call_function(operator.mul, (x, 2))
        graph.call_function(operator.setitem, (y, key(mask), value(x, mask)))
        return y

    return graph_of(body)


def picked(x: fx.Node, mask: fx.Node) -> fx.Node:
    """`-(x + 1)[mask]`."""
    graph = x.graph
    more = graph.call_function(operator.add, (x, 1))
    return graph.call_function(operator.neg, (graph.call_function(operator.getitem, (more, mask)),))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (lambda mask: mask, lambda x, mask: 0.5),
        (lambda mask: (mask, slice(None)), lambda x, mask: 0.5),
        (lambda mask: (mask, Ellipsis), lambda x, mask: 0.5),
        (lambda mask: mask, lambda x, mask: x.graph.call_method("new_zeros", (x, (1, 1)))),
    ],
)
def test_a_value_beside_the_mask_is_a_choice(key: Any, value: Any) -> None:
    prover = proved(stored(key, value), torch.randn(4, 5, 6))
    assert mapping_of(prover.rows(returned(prover.graph))) == ((0,), list(range(B)))


def test_values_of_the_same_mask_go_back_to_their_places() -> None:
    from fxlora.passes.rows.labels import Mixed
    from fxlora.passes.rows.masked import write
    from fxlora.passes.rows.propagate import Prover
    from fxlora.passes.rows.seeds import choose_seeds
    from fxlora.passes.rows.worlds import size_worlds

    gm = stored(lambda mask: mask, lambda x, mask: 0.5)
    inputs = inputs_of(gm, torch.randn(4, 5, 6))
    seeds, primary = choose_seeds(inputs, None)
    prover = Prover(gm, size_worlds(gm, inputs, seeds, {}), seeds, primary).run()
    store = next(n for n in gm.graph.nodes if n.target is operator.setitem)
    target, mask, _ = store.args
    with gm.graph.inserting_before(store):
        own, other = (
            picked(inputs[0].node, mask),
            picked(inputs[0].node, gm.graph.call_function(operator.gt, (mask, 0))),
        )
    for node in (own, other):
        operand: Any = node.args[0]
        for world in prover.worlds:
            shape = world.facts(inputs[0].node)
            world.values |= {operand.args[0]: shape, operand: shape, node: shape}
            if operand.args[1] is not mask:
                world.values[operand.args[1]] = world.facts(mask)
        prover.labels[operand.args[0]] = prover.labels[inputs[0].node]
    assert mapping_of(write(prover, store, target, [mask], own)) == ((0,), list(range(B)))
    assert "a value for each true element" in reason_of(write(prover, store, target, [mask], other))
    with gm.graph.inserting_before(store):
        numbered = gm.graph.call_function(torch.rand, (4, 5, 6))
        added, scaled = (gm.graph.call_function(operator.add, (own, operand)) for operand in (numbered, 2.0))
    for world in prover.worlds:
        world.values |= dict.fromkeys((numbered, added, scaled), world.facts(inputs[0].node))
    prover.labels[own] = Mixed("indexing by a mask")
    assert mapping_of(write(prover, store, target, [mask], scaled)) == ((0,), list(range(B)))
    assert "a value for each true element" in reason_of(write(prover, store, target, [mask], added))


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        (lambda mask: (mask, 0), lambda x, mask: 0.5, "beside other indices"),
        (lambda mask: mask, lambda x, mask: x.graph.call_function(torch.select, (x, 0, 0)), "each true element"),
        (lambda mask: mask, lambda x, mask: x.graph.call_method("mean", (x, (0, 1))), "mean over the request dim"),
    ],
)
def test_writes_that_mix(key: Any, value: Any, reason: str) -> None:
    prover = proved(stored(key, value), torch.randn(4, 5, 6))
    assert reason in reason_of(prover.rows(returned(prover.graph)))


class Filled(nn.Module):
    """`proj` of embeddings [B, T, H] in whose places of negative ids stand lifted features [B, F, 4], in order."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.lift, self.proj = nn.Embedding(9, 6), nn.Linear(4, 6), nn.Linear(6, 7)

    def forward(self, ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        embedded = self.table(ids.clamp(min=0))
        return self.proj(embedded.masked_scatter((ids < 0).unsqueeze(-1), self.lift(features).flatten(0, 1)))


def served(batch_dims: Any) -> tuple[Filled, Any, torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    model, ids, features = Filled().eval(), torch.randint(0, 9, (3, 8)), torch.randn(3, 2, 4)
    ids[0, 2:4] = ids[1, 6:] = ids[2, [0, 4]] = -1
    gm = fxlora.capture(model, ids=ids, features=features)
    lora = fxlora.apply(gm, max_adapters=2, max_rank=4, batch_dims=batch_dims)
    return model, lora, ids, features


@torch.no_grad()
def test_features_go_to_their_own_request_or_nowhere() -> None:
    """The batch is right row by row; where a request has places for another's features, it sees NaN, not them."""
    model, lora, ids, features = served(None)
    lora.load_adapter("a", make_adapter(model, ["proj"], 2, 11))
    names = ["a", None, "a"]
    mixed = lora(ids=ids, features=features, adapters=names)
    for i, name in enumerate(names):
        alone = lora(ids=ids[i : i + 1].repeat(3, 1), features=features[i : i + 1].repeat(3, 1, 1), adapters=name)
        assert torch.allclose(mixed[i], alone[0], atol=1e-5)
    assert not torch.allclose(mixed, model(ids, features), atol=1e-3)
    ids[0, 5], ids[1, 6] = -1, 1  # six places for six features, but one of the second request's goes to the first
    torn = lora(ids=ids, features=features, adapters=names)
    assert torn.isnan().nonzero()[:, :2].unique(dim=0).tolist() == [[0, 5]]
    assert torch.allclose(torn[2], mixed[2])


def test_features_of_nobody() -> None:
    """What has no request dim may be said to follow the requests: by the caller, in so many words."""
    _, lora, _, _ = served({"ids": 0, "features": None})
    assert [site.name for site in lora.sites] == ["table", "proj"]
    assert "fills the masked places" in lora.assumed[0]
    torch.manual_seed(2)
    ids, features = torch.full((3, 4), -1), torch.randn(4, 3, 4)
    gm = fxlora.capture(Filled().eval(), ids=ids, features=features)
    lora = fxlora.apply(gm, max_adapters=2, max_rank=4)
    assert [site.name for site in lora.sites] == ["table"]
    assert "inputs that are not known to follow the requests: features" in lora.skipped[-1].reason


def test_none_for_an_input_that_is_not_there() -> None:
    with pytest.raises(fxlora.FxloraError, match=r"'pixels'.*'ids', 'features'"):
        served({"ids": 0, "pixels": None})
