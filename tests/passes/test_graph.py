"""Questions to an fx graph: canonical op names over every form, arguments however they are passed, outputs by path."""

from __future__ import annotations

import math
import operator
import types
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from fxlora.passes.graph import (
    argument,
    attribute,
    describe,
    fake_value,
    is_tensor_node,
    module_path,
    op_name,
    operand,
    output_leaves,
    source_line,
    varargs,
)
from tests.passes.build import call

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (torch.add, "add"),
        (operator.add, "add"),
        (operator.iadd, "add_"),
        (operator.truediv, "div"),
        (operator.matmul, "matmul"),
        (operator.getitem, "getitem"),
        (operator.mod, "remainder"),
        (torch.swapaxes, "transpose"),
        (torch.concat, "cat"),
        (torch.tile, "repeat"),
        (torch.broadcast_to, "expand"),
        (F.linear, "linear"),
        (F.softmax, "softmax"),
        (math.floor, "floor"),
        (aten.add.Tensor, "add"),
        (aten.add, "add"),
        (aten._softmax.default, "softmax"),
        (aten._to_copy.default, "to"),
        (aten._unsafe_view.default, "view"),
        (aten.split_with_sizes.default, "split"),
        (aten.native_layer_norm.default, "native_layer_norm"),
        (aten.sym_size.int, "sym_size"),
        (torch.ops.fxlora.lora_linear.default, "fxlora::lora_linear"),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", "op"),
)
def test_spellings_of_one_op_share_a_name(target: Any, name: str) -> None:
    assert op_name(call(target, "%x", "%y")) == name


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("view", "view"),
        ("swapdims", "transpose"),
        ("movedim", "moveaxis"),
        ("add_", "add_"),
        ("__eq__", "eq"),
        ("__radd__", "add"),
        ("__rsub__", "rsub"),
    ],
)
def test_methods_are_named_alike(method: str, name: str) -> None:
    assert op_name(call(method, "%x", method=True)) == name


@pytest.mark.parametrize(("read", "name"), [("T", "T"), ("mT", "mT"), ("shape", "shape"), ("H", "H")])
def test_attribute_reads_are_ops(read: str, name: str) -> None:
    assert op_name(call(getattr, "%x", read)) == name


def foreign(module: str, name: str) -> Any:
    """A python function that only looks like a torch op."""
    made = types.FunctionType((lambda x: x).__code__, {}, name)
    made.__module__ = module
    return made


@pytest.mark.parametrize("module", ["mymodel.layers", "transformers.modeling", "__main__", "kernels.torch"])
@pytest.mark.parametrize("name", ["softmax", "linear", "add"])
def test_a_foreign_function_is_unknown_whatever_its_name(module: str, name: str) -> None:
    assert op_name(call(foreign(module, name), "%x")) == f"?{module}.{name}"


@pytest.mark.parametrize("module", ["torch_geometric.utils", "torchvision.ops", "mathutils", "operators"])
def test_packages_that_only_start_like_torch_are_foreign(module: str) -> None:
    assert op_name(call(foreign(module, "softmax"), "%x")) == f"?{module}.softmax"


def test_foreign_op_namespaces_are_unknown() -> None:
    library = torch.library.Library("fxlora_test_graph", "DEF")
    library.define("softmax(Tensor x) -> Tensor")
    assert op_name(call(torch.ops.fxlora_test_graph.softmax.default, "%x")) == "?fxlora_test_graph::softmax"
    assert op_name(call(torch.ops.fxlora_test_graph.softmax, "%x")) == "?fxlora_test_graph::softmax"


def test_nodes_that_call_nothing_have_no_name() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    assert op_name(x) == ""
    assert op_name(graph.call_module("layer", (x,))) == "?layer"
    assert op_name(graph.output(x)) == ""


def test_argument_by_position_name_or_default() -> None:
    assert argument(call(torch.sum, "%x", 1), 1, "dim", "axis") == 1
    assert argument(call(torch.sum, "%x", axis=2), 1, "dim", "axis") == 2
    assert argument(call(torch.sum, "%x"), 1, "dim", default="none") == "none"
    assert argument(call(torch.sum, "%x", dim=None), 1, "dim", default="none") is None


@pytest.mark.parametrize("name", ["input", "self", "tensors", "query"])
def test_operand_under_any_name(name: str) -> None:
    node = call(torch.relu, **{name: "%x"})
    found = operand(node)
    assert isinstance(found, fx.Node)
    assert found.name == "x"


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        ((2, 3), {}, (2, 3)),
        (((2, 3),), {}, (2, 3)),
        (([2, 3],), {}, (2, 3)),
        ((torch.Size([2, 3]),), {}, (2, 3)),
        ((5,), {}, (5,)),
        ((), {"dims": (0, 1)}, (0, 1)),
        ((), {"dims": 1}, (1,)),
        ((), {}, ()),
    ],
)
def test_varargs(args: tuple[Any, ...], kwargs: dict[str, Any], expected: tuple[int, ...]) -> None:
    assert varargs(call("flip", "%x", *args, method=True, **kwargs), 1, "dims") == expected


def test_output_leaves_name_their_place() -> None:
    graph = fx.Graph()
    x, y, z = (graph.placeholder(n) for n in "xyz")
    graph.output({"logits": x, "states": [y, (z, None)], "scale": 2})
    assert [(path, n.name) for path, n in output_leaves(graph)] == [
        ("logits", "x"),
        ("states.0", "y"),
        ("states.1.0", "z"),
    ]
    single = fx.Graph()
    single.output(single.placeholder("x"))
    assert [path for path, _ in output_leaves(single)] == ["output"]


def test_source_line_is_the_models_own_last_line() -> None:
    node = call(torch.relu, "%x")
    assert source_line(node) == ""
    node.meta["stack_trace"] = (
        '  File "a.py", line 1, in f\n    g(x)\n  File "b.py", line 2, in g\n    return relu(x)\n'
    )
    assert source_line(node) == "b.py, line 2, in g: return relu(x)"
    assert describe(node) == "relu (node relu, b.py, line 2, in g: return relu(x))"
    node.meta["stack_trace"] = 'File "b.py", line 2, in g'
    assert source_line(node) == "b.py, line 2, in g: "


def test_describe_names_unknown_functions_without_the_mark() -> None:
    assert describe(call(foreign("mine", "mix"), "%x")) == "mine.mix (node mix)"


def test_recorded_values_of_both_tracers() -> None:
    node = call(torch.relu, "%x")
    assert fake_value(node) is None
    assert not is_tensor_node(node)
    node.meta["val"] = torch.zeros(1)
    assert is_tensor_node(node)
    node.meta["example_value"] = 3
    assert fake_value(node) == 3
    assert not is_tensor_node("x")


def test_module_path_is_the_innermost() -> None:
    node = call(torch.relu, "%x")
    assert module_path(node) == ""
    node.meta["nn_module_stack"] = {"a": ("layers", nn.ModuleList), "b": ("layers.0", nn.Linear)}
    assert module_path(node) == "layers.0"


def test_attribute_walks_dots() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 3)})
    assert attribute(model, "a.weight") is model["a"].weight
