"""Read-only questions to an fx graph, the same for every form it comes in (torch functions, methods, aten).

The first stage of the flow: everything after it speaks of canonical op names, never of node targets.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves


# Spellings of one op in python operators, methods and aten, mapped to one name.
def _spellings(text: str) -> dict[str, str]:
    """`name: spelling spelling` lines as spelling -> name."""
    found = {}
    for line in text.strip().splitlines():
        name, _, spellings = line.partition(":")
        found.update(dict.fromkeys(spellings.split(), name.strip()))
    return found


_SAME_OP = _spellings(
    """
    add: __add__ __radd__
    div: truediv true_divide divide __truediv__
    floor_divide: floordiv __floordiv__
    mul: multiply __mul__ __rmul__
    sub: subtract __sub__
    rsub: __rsub__
    pow: __pow__
    eq: __eq__
    add_: iadd
    sub_: isub
    mul_: imul
    div_: itruediv
    floor_divide_: ifloordiv
    bitwise_and_: iand
    bitwise_or_: ior
    pow_: ipow
    matmul_: imatmul
    bitwise_and: and_ __and__ __rand__
    bitwise_or: or_ __or__ __ror__
    bitwise_xor: __xor__ xor __rxor__
    bitwise_not: invert inv __invert__
    remainder: mod __mod__
    transpose: swapaxes swapdims transpose_copy
    T: numpy_T
    data: _get_data_attr
    mT: matrix_H adjoint
    view: _unsafe_view view_copy
    moveaxis: movedim
    cat: concat concatenate
    repeat: tile
    softmax: _softmax special_softmax
    log_softmax: _log_softmax special_log_softmax
    logsumexp: special_logsumexp
    reshape: _reshape_alias
    chunk: unsafe_chunk
    split: unsafe_split split_with_sizes
    abs: absolute
    clamp: clip
    expand: broadcast_to expand_copy
    matmul: __matmul__
    vstack: row_stack
    getitem: __getitem__
    to: _to_copy convert_element_type
    atan2: arctan2
    gt: greater __gt__
    lt: less __lt__
    ge: greater_equal __ge__
    le: less_equal __le__
    ne: not_equal __ne__
    neg: negative __neg__
    trunc: fix
    index: _unsafe_index
    slice: slice_copy
    select: select_copy
    permute: permute_copy
    squeeze: squeeze_copy
    unsqueeze: unsqueeze_copy
    t: t_copy
    alias: alias_copy
    unbind: unbind_copy
    remainder_: imod
    bitwise_xor_: ixor
    bitwise_left_shift_: ilshift
    bitwise_right_shift_: irshift
    cat_: iconcat
    """
)
_TRUSTED_NAMESPACES = {"aten", "prims", "fxlora"}
# Ops outside torch whose meaning is known: PyTorch fallbacks registered by transformers, the cache of packed requests.
_TRUSTED_OPS = {"transformers::grouped_mm_fallback", "fxlora_cache::paged_cache_update"}
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
    if owner.split(".")[0] not in _TRUSTED_MODULES:
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


def invoke(node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a call gives of these arguments in the place of its own. Raises what the op raises."""
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def rerun(node: fx.Node) -> Any:
    """What a call gives of what tracing recorded for its operands. Raises what the op raises."""
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), fake_value)
    modes = [v.fake_mode for v in tree_leaves((args, kwargs)) if isinstance(v, FakeTensor)]
    with torch.no_grad(), modes[0] if modes else nullcontext():
        return invoke(node, args, kwargs)


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


def place_in_model(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What tracing recorded of where in the model a node stands, for nodes that take its place."""
    return {key: value for key, value in meta.items() if key in ("stack_trace", "nn_module_stack")}


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
