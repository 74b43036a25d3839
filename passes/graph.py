"""Read-only questions to an fx graph, the same for every form it comes in (torch functions, methods, aten).

The first stage of the flow: everything after it speaks of canonical op names, never of node targets.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

# Spellings of one op in python operators, methods and aten, mapped to one name.
_SAME_OP = {
    "truediv": "div",
    "true_divide": "div",
    "divide": "div",
    "floordiv": "floor_divide",
    "multiply": "mul",
    "subtract": "sub",
    "iadd": "add_",
    "isub": "sub_",
    "imul": "mul_",
    "itruediv": "div_",
    "ifloordiv": "floor_divide_",
    "iand": "logical_and_",
    "ior": "logical_or_",
    "ipow": "pow_",
    "imatmul": "matmul_",
    "and_": "bitwise_and",
    "or_": "bitwise_or",
    "invert": "bitwise_not",
    "inv": "bitwise_not",
    "mod": "remainder",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "numpy_T": "T",
    "matrix_H": "mT",
    "adjoint": "mT",
    "_unsafe_view": "view",
    "movedim": "moveaxis",
    "concat": "cat",
    "concatenate": "cat",
    "tile": "repeat",
    "_softmax": "softmax",
    "_log_softmax": "log_softmax",
    "special_softmax": "softmax",
    "view_copy": "view",
    "_reshape_alias": "reshape",
    "unsafe_chunk": "chunk",
    "unsafe_split": "split",
    "absolute": "abs",
    "clip": "clamp",
    "broadcast_to": "expand",
    "mm_": "mm",
    "__matmul__": "matmul",
    "row_stack": "vstack",
    "__getitem__": "getitem",
    "_to_copy": "to",
    "convert_element_type": "to",
    "arctan2": "atan2",
    "greater": "gt",
    "less": "lt",
    "greater_equal": "ge",
    "less_equal": "le",
    "not_equal": "ne",
    "negative": "neg",
    "fix": "trunc",
    "_unsafe_index": "index",
    "split_with_sizes": "split",
    "slice_copy": "slice",
    "select_copy": "select",
    "expand_copy": "expand",
    "permute_copy": "permute",
    "squeeze_copy": "squeeze",
    "unsqueeze_copy": "unsqueeze",
    "transpose_copy": "transpose",
    "t_copy": "t",
    "alias_copy": "alias",
    "unbind_copy": "unbind",
}
_TRUSTED_NAMESPACES = {"aten", "prims", "fxlora"}
# Ops outside torch whose meaning is known: PyTorch fallbacks registered by transformers.
_TRUSTED_OPS = {"transformers::grouped_mm_fallback"}
_TRUSTED_MODULES = ("torch", "_operator", "operator", "math", "builtins")


def op_name(node: fx.Node) -> str:
    """The canonical op name of a call, ``"?..."`` for a function whose meaning is unknown, ``""`` for other nodes.

    ``getattr(x, "T")`` is the op ``T``; attribute reads such as ``shape`` keep their name.
    """
    if node.op == "call_method":
        return _SAME_OP.get(node.target, node.target)  # type: ignore[arg-type, return-value]
    if node.op != "call_function":
        return f"?{node.target}" if node.op == "call_module" else ""
    target = node.target
    if target is getattr:
        return _SAME_OP.get(node.args[1], node.args[1])  # type: ignore[arg-type, return-value]
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        qualified = target._schema.name if isinstance(target, torch._ops.OpOverload) else target._qualified_op_name
        namespace, _, name = qualified.partition("::")
        if namespace not in _TRUSTED_NAMESPACES and qualified not in _TRUSTED_OPS:
            return f"?{qualified}"
        name = name.split(".")[0]
        return f"fxlora::{name}" if namespace == "fxlora" else _SAME_OP.get(name, name)
    name = getattr(target, "__name__", str(target))
    owner = getattr(target, "__module__", None) or type(getattr(target, "__self__", target)).__module__ or ""
    if not owner.split(".")[0].startswith(_TRUSTED_MODULES):
        return f"?{owner}.{name}"
    return _SAME_OP.get(name, name)


def argument(node: fx.Node, position: int, *names: str, default: Any = None) -> Any:
    """The argument at ``position`` or under one of ``names`` (torch accepts ``input``/``self``, ``dim``/``axis``
    alike).
    """
    if position < len(node.args):
        return node.args[position]
    for name in names:
        if name in node.kwargs:
            return node.kwargs[name]
    return default


def operand(node: fx.Node) -> Any:
    """The first operand of a call, however it was passed."""
    return argument(node, 0, "input", "self", "x", "a", "tensor", "tensors", "query")


def varargs(node: fx.Node, position: int, *names: str) -> tuple[Any, ...]:
    """Sizes or dims given as ``f(x, 1, 2)``, ``f(x, (1, 2))`` or by keyword, as one tuple."""
    rest = node.args[position:]
    if len(rest) == 1 and isinstance(rest[0], list | tuple | torch.Size):
        return tuple(rest[0])
    if rest:
        return tuple(rest)
    for name in names:
        if name in node.kwargs:
            value = node.kwargs[name]
            return tuple(value) if isinstance(value, list | tuple | torch.Size) else (value,)
    return ()


def fake_value(node: fx.Node) -> Any:
    """What tracing recorded for a node (a fake tensor, a SymInt, a tuple of them), or None."""
    value = node.meta.get("example_value")
    return node.meta.get("val") if value is None else value


def is_tensor_node(value: Any) -> bool:
    """True for a node that tracing recorded a tensor for."""
    return isinstance(value, fx.Node) and isinstance(fake_value(value), torch.Tensor)


def attribute(module: torch.nn.Module, path: str) -> Any:
    """``getattr`` along a dotted path."""
    return operator.attrgetter(path)(module)


def output_leaves(graph: fx.Graph) -> list[tuple[str, fx.Node]]:
    """Each node the graph returns, with its path in the returned structure (``logits``, ``0``, ``hidden_states.1``)."""

    def walk(value: Any, path: str) -> Iterator[tuple[str, fx.Node]]:
        if isinstance(value, fx.Node):
            yield path or "output", value
        elif isinstance(value, dict):
            for key, item in value.items():
                yield from walk(item, f"{path}.{key}" if path else str(key))
        elif isinstance(value, list | tuple):
            for i, item in enumerate(value):
                yield from walk(item, f"{path}.{i}" if path else str(i))

    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    return list(walk(output.args[0], ""))


def module_path(node: fx.Node) -> str:
    """The path of the module whose forward made this node, as tracing recorded it (may be empty)."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    entry = list(stack.values())[-1]
    return str(entry[0] if isinstance(entry, tuple) else entry)


def source_line(node: fx.Node) -> str:
    """The line of model code behind a node (``file:line: code``), or an empty string."""
    lines = [
        line.strip() for line in (node.meta.get("stack_trace") or node.stack_trace or "").splitlines() if line.strip()
    ]
    for i in range(len(lines) - 1, -1, -1):
        if lines[i].startswith("File "):
            code = lines[i + 1] if i + 1 < len(lines) else ""
            return f"{lines[i].removeprefix('File ').replace(chr(34), '')}: {code}"
    return ""


def describe(node: fx.Node) -> str:
    """A node as an error message names it: its op, and where in the model it stands."""
    where = source_line(node)
    name = op_name(node).lstrip("?") or node.op
    return f"{name} (node {node.name}{', ' + where if where else ''})"
