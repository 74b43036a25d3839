"""Sizes of a proof: distinct, at least two, never the caller's; fixed dims and guards are kept for the calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from fxlora.passes.errors import RowsNotProvenError
from fxlora.passes.rows.seeds import choose_seeds
from fxlora.passes.rows.worlds import (
    GraphInput,
    Sizing,
    TensorFacts,
    UnknownShapeError,
    World,
    has_all_values,
    shape_env_of,
    size_worlds,
)
from tests.passes.build import holder, inputs_of, traced, weight

Body = Callable[..., Any]


def sized(target: nn.Module | Body, *examples: torch.Tensor, batch_dims: Any = None) -> tuple[fx.GraphModule, Sizing]:
    """A graph without recorded shapes, run at sizes of the proof."""
    gm = traced(target)
    inputs = inputs_of(gm, *examples)
    return gm, size_worlds(gm, inputs, choose_seeds(inputs, batch_dims)[0], {})


def symbolic(function: Body, *examples: torch.Tensor) -> tuple[fx.GraphModule, list[GraphInput]]:
    """A graph with symbolic sizes, and its inputs."""
    gm = make_fx(function, tracing_mode="symbolic")(*examples)
    inputs = []
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            value = node.meta["val"]
            symbols = tuple(s.node._expr if isinstance(s, torch.SymInt) else None for s in value.shape)
            hints = tuple(int(s.node.hint) if isinstance(s, torch.SymInt) else s for s in value.shape)
            inputs.append(GraphInput(node, str(node.target), hints, symbols, value.dtype))
    return gm, inputs


def symbolic_sizing(function: Body, *examples: torch.Tensor, batch_dims: Any = None) -> tuple[fx.GraphModule, Sizing]:
    gm, inputs = symbolic(function, *examples)
    return gm, size_worlds(gm, inputs, choose_seeds(inputs, batch_dims)[0], {})


def node(gm: fx.GraphModule, name: str) -> fx.Node:
    return next(n for n in gm.graph.nodes if n.name == name)


def shapes(gm: fx.GraphModule, sizing: Sizing, name: str) -> list[tuple[int, ...]]:
    return [world.shape(node(gm, name)) for world in sizing.worlds]


@pytest.mark.parametrize("batch", [1, 3])
def test_free_dims_are_distinct_and_never_the_callers(batch: int) -> None:
    """Three dims of one traced size: the request dim is told from the others, in every world."""
    gm, sizing = sized(lambda x: x.relu(), torch.randn(batch, 4, 4))
    assert not sizing.frozen
    found = shapes(gm, sizing, "x")
    assert len(found) == len({shape[0] for shape in found}) == 3
    for requests, rows, columns in found:
        assert requests not in (batch, rows)
        assert min(requests, rows) >= 2
        assert rows == columns, "dims of one traced size move together"
    assert shapes(gm, sizing, "relu") == found


def test_other_dims_of_the_request_dims_size_are_free_of_it() -> None:
    gm, sizing = sized(lambda x: x.relu(), torch.randn(4, 4))
    assert all(shape[0] != shape[1] for shape in shapes(gm, sizing, "x"))


def test_dims_of_size_one_stay() -> None:
    gm, sizing = sized(lambda x: x.relu(), torch.randn(4, 1, 3))
    assert all(shape[1] == 1 for shape in shapes(gm, sizing, "x"))


def test_a_dim_that_a_weight_fixes_stays_and_the_call_must_keep_it() -> None:
    gm, sizing = sized(holder(lambda self, x: x @ self.w, w=weight(6, 5)), torch.randn(4, 3, 6))
    assert all(shape[2] == 6 for shape in shapes(gm, sizing, "x"))
    assert len({shape[1] for shape in shapes(gm, sizing, "x")}) == 3
    assert sizing.fixed[node(gm, "x")] == {2: 6}


def test_where_only_the_batch_can_vary_the_rest_is_fixed() -> None:
    gm, sizing = sized(lambda x: x.view(-1, 3, 2, 5) + 1, torch.randn(4, 6, 5))
    assert len({shape[0] for shape in shapes(gm, sizing, "x")}) == 3
    assert sizing.fixed[node(gm, "x")] == {1: 6, 2: 5}


def test_a_graph_that_runs_at_no_other_size_is_frozen() -> None:
    gm, sizing = sized(lambda x: x.view(4, 3, 2), torch.randn(4, 6))
    assert sizing.frozen
    assert sizing.fixed[node(gm, "x")] == {0: 4, 1: 6}
    assert set(shapes(gm, sizing, "x")) == {(4, 6)}
    assert len(sizing.worlds) > 3, "random indices are drawn often where the batch is small"


def test_a_graph_that_needs_data_is_refused() -> None:
    with pytest.raises(RowsNotProvenError, match="depends on data"):
        sized(lambda x: x[: int_of(x.sum())], torch.randn(4, 6))


@fx.wrap
def int_of(x: torch.Tensor) -> int:
    return int(x.item())


def test_packed_sizes_keep_a_batch_of_one_and_free_the_tokens() -> None:
    gm, sizing = sized(lambda x: x.relu(), torch.randn(1, 6, 3), batch_dims=(0, 1))
    found = shapes(gm, sizing, "x")
    assert {shape[0] for shape in found} == {1}
    assert len({shape[1] for shape in found}) == 3
    gm, sizing = sized(lambda x: x.relu(), torch.randn(2, 6, 3), batch_dims=(0, 1))
    assert len({shape[:2] for shape in shapes(gm, sizing, "x")}) == 3


def test_tensors_without_memory_are_enough_for_weights() -> None:
    """Nothing of the weights is read: a graph over 10^12 parameters is sized on shapes alone."""
    model = holder(lambda self, x: x @ self.w)
    model.w = nn.Parameter(torch.empty(10**6, 10**6, device="meta"), requires_grad=False)
    gm = traced(model)
    inputs = inputs_of(gm, torch.empty(4, 10**6, device="meta"))
    sizing = size_worlds(gm, inputs, choose_seeds(inputs, None)[0], {})
    assert [shape[1] for shape in shapes(gm, sizing, "matmul")] == [10**6] * 3


def test_symbols_get_sizes_of_their_own() -> None:
    gm, sizing = symbolic_sizing(lambda x, y: (x + y).reshape(-1), torch.randn(4, 5), torch.randn(4, 5))
    assert not sizing.frozen
    assert sizing.guards == ()
    found = shapes(gm, sizing, "x_1")
    assert found == shapes(gm, sizing, "y_1")
    assert all(a != b and 4 not in (a, b) for a, b in found)
    assert shapes(gm, sizing, "view") == [(a * b,) for a, b in found]


def test_symbols_that_stand_for_an_expression_follow_it() -> None:
    gm, sizing = symbolic_sizing(lambda x, y: torch.cat([x, x], 1) + y, torch.randn(4, 3), torch.randn(4, 6))
    assert [shape[1] for shape in shapes(gm, sizing, "y_1")] == [2 * shape[1] for shape in shapes(gm, sizing, "x_1")]


def test_sizes_obey_the_guards() -> None:
    def body(x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.shape[1] > 18 else x

    gm, sizing = symbolic_sizing(body, torch.randn(4, 25))
    assert all(shape[1] > 18 for shape in shapes(gm, sizing, "x_1"))
    gm, sizing = symbolic_sizing(body, torch.randn(4, 6))
    assert all(shape[1] <= 18 for shape in shapes(gm, sizing, "x_1"))


def test_sizes_obey_guards_that_are_no_bounds() -> None:
    gm, sizing = symbolic_sizing(lambda x: x * 2 if x.shape[1] % 4 == 0 else x, torch.randn(4, 8))
    assert all(shape[1] % 4 == 0 for shape in shapes(gm, sizing, "x_1"))


def test_a_static_batch_is_proven_more_often() -> None:
    gm, inputs = symbolic(lambda x: x + 1, torch.randn(4, 6))
    static = [GraphInput(i.node, i.name, i.sizes, (None, i.symbols[1]), i.dtype) for i in inputs]
    sizing = size_worlds(gm, static, choose_seeds(static, None)[0], {})
    assert len(sizing.worlds) > 3
    assert sizing.fixed[static[0].node] == {0: 4}


def test_what_tracing_recorded() -> None:
    gm = traced(lambda x: x + 1)
    assert shape_env_of(gm) is None
    assert not has_all_values(gm)
    gm, _ = symbolic(lambda x: x + 1, torch.randn(4, 6))
    assert shape_env_of(gm) is not None
    assert has_all_values(gm)
    del node(gm, "add").meta["val"]
    assert not has_all_values(gm)


def test_facts_of_one_world() -> None:
    gm, sizing = sized(lambda x: (x.size(0), x.chunk(2, 1), x.sum()), torch.randn(4, 6))
    world = sizing.worlds[0]
    batch = world.shape(node(gm, "x"))[0]
    assert world.facts(node(gm, "size")) == batch
    assert world.number(node(gm, "size")) == batch
    assert world.number(7) == 7
    assert [type(f) for f in world.facts(node(gm, "chunk"))] == [TensorFacts, TensorFacts]
    assert world.facts(node(gm, "sum_1")) == TensorFacts((), torch.float32, torch.device("cpu"))
    with pytest.raises(UnknownShapeError, match="size is no tensor"):
        world.shape(node(gm, "size"))
    with pytest.raises(UnknownShapeError, match="no shape is known"):
        World().facts(node(gm, "x"))


def test_a_size_that_data_decides_is_a_size_of_its_own() -> None:
    gm, sizing = symbolic_sizing(lambda x: x.nonzero() * 1, torch.randn(4, 6))
    for (found, _), sizes in zip(shapes(gm, sizing, "mul"), shapes(gm, sizing, "x_1"), strict=True):
        assert found >= 2
        assert found not in sizes


@pytest.mark.parametrize("example", [(4, 7, 3), (29, 5, 3)])
def test_a_free_dim_is_free_whatever_its_traced_size(example: tuple[int, ...]) -> None:
    gm, sizing = sized(holder(lambda self, x: x @ self.w, w=weight(3, 5)), torch.randn(example))
    assert sizing.fixed[node(gm, "x")] == {2: 3}
