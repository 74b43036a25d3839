"""How a graph is called, in each of its three forms: by name or position, and every wrong call a CallError."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

import fxlora
from fxlora.errors import CallError, GraphError, NeedsExampleInputsError
from fxlora.signature import (
    Signature,
    bound_weights,
    constant_leaves,
    example_arguments,
    graph_inputs,
    refuse_lifted,
    tensor_leaves,
)


class Model(nn.Module):
    """x [B, 3] and y [B, 4] -> [B, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.proj(x) - y


X, Y = torch.randn(2, 3), torch.randn(2, 4)
FORMS: dict[str, Callable[[nn.Module], fx.GraphModule]] = {
    "plain": fx.symbolic_trace,
    "pytree": lambda model: torch.export.export(model, (X, Y)).module(),
    "dynamo": lambda model: fxlora.capture(model, x=X, y=Y),
}


@pytest.fixture(scope="module", params=FORMS)
def signature(request: pytest.FixtureRequest) -> Signature:
    return Signature.of(FORMS[request.param](Model().eval()))


CALLS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((X, Y), {}),
    ((X,), {"y": Y}),
    ((), {"x": X, "y": Y}),
    ((), {"y": Y, "x": X}),
]


@pytest.mark.parametrize(("args", "kwargs"), CALLS)
def test_positions_and_names_are_one(signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    assert signature.names == ["x", "y"]
    flat = signature.flatten(args, kwargs)  # torch 2.11 has sizes among them
    flat = [t for t in flat if isinstance(t, torch.Tensor) and not isinstance(t, nn.Parameter)]
    assert [t.shape for t in flat] == [X.shape, Y.shape]
    assert torch.equal(flat[0], X)
    assert torch.equal(flat[1], Y)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((X,), {}, r"'y'\W* (is|are) missing"),
        ((), {"y": Y}, r"'x'\W* (is|are) missing"),
        ((), {}, "missing"),
        ((X, Y), {"x": X}, "'x' is given twice"),
        ((X, Y), {"z": X}, r"'z' is not in the graph.*\['x', 'y'\]"),
        ((X, Y, Y), {}, r"3 positional arguments.*\['x', 'y'\]"),
    ],
)
def test_wrong_calls(signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(CallError, match=message):
        signature.flatten(args, kwargs)


def test_an_unknown_argument_that_is_none_is_ignored(signature: Signature) -> None:
    """transformers passes many names as None."""
    assert len(signature.flatten((X, Y), {"labels": None})) == len(signature.flatten((X, Y), {}))


def test_defaults_of_a_plain_graph_may_be_left_out() -> None:
    def body(x: torch.Tensor, scale: float = 2.0) -> torch.Tensor:
        return x * scale

    signature = Signature.of(fx.symbolic_trace(body))
    assert signature.flatten((X,), {})[1] == 2.0
    assert signature.flatten((X,), {"scale": 3.0})[1] == 3.0


class Nested(nn.Module):
    def forward(self, pair: dict[str, torch.Tensor], rest: list[torch.Tensor]) -> dict[str, Any]:
        return {"sum": pair["a"] + rest[0], "all": [pair["b"], (rest[0],)]}


def test_nested_arguments_and_outputs() -> None:
    args = ({"a": X, "b": Y}, [X + 1])
    signature = Signature.of(torch.export.export(Nested(), args).module())
    assert [t.shape for t in signature.flatten(args, {})] == [X.shape, Y.shape, X.shape]
    out = signature.unflatten([X, Y, X + 1], args, {})
    assert list(out) == ["sum", "all"]
    assert isinstance(out["all"], list)
    assert isinstance(out["all"][1], tuple)


def test_another_structure_is_refused() -> None:
    args = ({"a": X, "b": Y}, [X])
    signature = Signature.of(torch.export.export(Nested(), args).module())
    with pytest.raises(CallError, match="structure"):
        signature.flatten(({"a": X, "b": Y}, [X, X]), {})
    with pytest.raises(CallError, match="structure"):
        signature.flatten(({"a": X}, [X]), {})


def test_leaves_by_path() -> None:
    tree = {"ids": X, "flags": {"cache": True, "depth": 2}, "none": None, "name": "n", "more": [X, 0.5]}
    assert constant_leaves(tree) == {"flags.cache": True, "flags.depth": 2, "name": "n", "more.1": 0.5}
    assert [path for path, _ in tensor_leaves(tree)] == ["ids", "more.0"]


def test_tensors_inside_objects_are_found() -> None:
    class Cache:
        def __init__(self) -> None:
            self.keys, self.length, self.layers = X, 3, [Y]

    assert [path for path, _ in tensor_leaves({"past": Cache()})] == ["past.keys", "past.layers.0"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [(None, None), (X, ((X,), {})), ((X, Y), ((X, Y), {})), ([X], ((X,), {})), ({"x": X}, ((), {"x": X}))],
    ids=["none", "tensor", "tuple", "list", "dict"],
)
def test_example_inputs(given: Any, expected: Any) -> None:
    found = example_arguments(given)
    assert (found is None) == (expected is None)
    assert found is None or (len(found[0]), list(found[1])) == (len(expected[0]), list(expected[1]))


def test_other_example_inputs_are_refused() -> None:
    with pytest.raises(GraphError, match="example_inputs is a int"):
        example_arguments(3)


def test_shapes_come_from_the_trace_or_from_examples() -> None:
    gm = fx.symbolic_trace(Model())
    signature = Signature.of(gm)
    with pytest.raises(NeedsExampleInputsError, match=r"'x'.*\['x', 'y'\]"):
        graph_inputs(gm, signature, {}, None)
    inputs = graph_inputs(gm, signature, {}, [X, Y])
    assert [(i.name, i.sizes, i.symbols, i.dtype) for i in inputs] == [
        ("x", (2, 3), (None, None), torch.float32),
        ("y", (2, 4), (None, None), torch.float32),
    ]


def test_names_of_nested_inputs() -> None:
    gm = torch.export.export(Nested(), ({"a": X, "b": Y}, [X])).module()
    assert [i.name for i in graph_inputs(gm, Signature.of(gm), {}, None)] == ["pair.a", "pair.b", "rest.0"]


def test_make_fx_inputs_go_by_the_callers_names() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    gm = make_fx(lambda ids, mask: ids * mask)(X, X)
    signature = Signature.of(gm)
    flat = signature.flatten((), {"mask": X + 1, "ids": X})
    assert torch.equal(flat[1], X + 1)


def test_weights_given_as_inputs_are_bound() -> None:
    """dynamo lifts parameters to placeholders; a parameter among the examples is one too."""
    model = Model()
    gm = fx.symbolic_trace(lambda x, w: x @ w.t())
    gm.register_parameter("w", model.proj.weight)
    bound = bound_weights(gm, [X, model.proj.weight])
    assert {n.target: t is model.proj.weight for n, t in bound.items()} == {"w": True}
    assert bound_weights(gm, [X, torch.randn(4, 3)]) == {}
    assert [i.name for i in graph_inputs(gm, Signature.of(gm), bound, [X, model.proj.weight])] == ["x"]


def test_a_graph_that_takes_its_weights_as_inputs_is_refused() -> None:
    program = torch.export.export(Model(), (X, Y))
    with pytest.raises(GraphError, match=r"'p_proj_weight' and 1 more.*exported_program\.module\(\)"):
        refuse_lifted(program.graph_module)
    refuse_lifted(program.module())
    refuse_lifted(fx.symbolic_trace(Model()))
