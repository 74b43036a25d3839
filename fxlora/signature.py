"""How a graph module is called: the caller's arguments to the graph's flat inputs, and its outputs back.

The rewritten graph takes flat inputs and `adapter_slots`; this keeps the caller's own signature around it, for plain fx
graphs, for torch.export's (pytree) and for dynamo's captured ones (bytecode).
"""

from __future__ import annotations

import builtins
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from fxlora.errors import CallError, GraphError, NeedsExampleInputsError
from fxlora.passes.graph import attribute, fake_value
from fxlora.passes.rows.worlds import GraphInput

META_KEY = "fxlora"
_PLAIN = (bool, int, float, str)
_CONSTANTS = (bool, int, float, str, type(None))


@dataclass
class Signature:
    """The calling convention of one graph module.

    names: argument names in traced order. constants: leaves that are no tensors, by path, which the graph was traced
    for. order: the model's own argument order, where the traced one differs.
    """

    gm: fx.GraphModule
    names: list[str]
    constants: Mapping[str, Any]
    order: Sequence[str] = ()

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        codegen: Any = self.gm.graph._codegen
        self._dynamo = hasattr(codegen, "dynamo_bytecode_flatten")
        self._bytecode_flatten: Any = getattr(codegen, "dynamo_bytecode_flatten", None)
        self._bytecode_unflatten: Any = getattr(codegen, "dynamo_bytecode_unflatten", None)
        self._pytree: Any = getattr(codegen, "pytree_info", None)
        self._fixed = self._fixed_arguments()
        supply_builtins(self.gm)

    def _fixed_arguments(self) -> dict[str, Any]:
        """Arguments of an exported graph that are plain values, which export fixed at tracing."""
        names = _leaf_names(self, self.gm) if self._pytree is not None else None
        if names is None:
            return {}
        values = zip(names, _placeholders(self.gm), strict=True)
        return {n: p.meta["val"] for n, p in values if n in self.names and isinstance(p.meta.get("val"), _PLAIN)}

    @classmethod
    def of(cls, gm: fx.GraphModule) -> Signature:
        """Read the signature off a graph module."""
        codegen: Any = gm.graph._codegen
        info = getattr(codegen, "pytree_info", None)
        constants = gm.meta.get(META_KEY, {}).get("constants", {})
        if info is not None:
            return cls(gm, list(info.orig_args), constants)
        if hasattr(codegen, "dynamo_bytecode_flatten"):
            traced = [name for name in codegen.orig_arg_names if name != "self"]
            return cls(gm, traced, constants, gm.meta.get(META_KEY, {}).get("order", ()))
        return cls(gm, [str(n.target).lstrip("*") for n in _placeholders(gm)], constants)

    def flatten(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """The values of the graph's placeholders, in order. Raises CallError for arguments it was not traced with."""
        if self._dynamo:
            called = self._dynamo_arguments(args, kwargs)
            with self._lock:
                return list(self._bytecode_flatten(*called))
        if self._pytree is not None:
            return self._flatten_pytree(args, kwargs)
        bound = self._bound(args, kwargs)
        values = []
        for node, name in zip(_placeholders(self.gm), self.names, strict=True):
            if name not in bound and not node.args:
                raise CallError(f"argument {name!r} is missing; the graph takes {self.names}")
            values.append(bound[name] if name in bound else node.args[0])
        return values

    def unflatten(self, outputs: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What the caller gets, from what the flat graph returned."""
        if self._dynamo:
            called = self._dynamo_arguments(args, kwargs)
            with self._lock:
                return self._bytecode_unflatten(tuple(outputs), called)
        if self._pytree is not None and self._pytree.out_spec is not None:
            return pytree.tree_unflatten(outputs, self._pytree.out_spec)
        return outputs

    def _bound(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        order = list(self.order) or self.names
        if len(args) > len(order):
            raise CallError(f"{len(args)} positional arguments; the graph was traced with {self.names}")
        bound = dict(zip(order, args, strict=False))
        unknown = [name for name in bound if name not in self.names and bound[name] is not None]
        if unknown:
            raise CallError(f"arguments {unknown} are not in the graph, which was traced with {self.names}")
        for given, value in kwargs.items():
            name = self._traced_name(given)
            if name in bound:
                raise CallError(f"argument {name!r} is given twice")
            if name not in self.names and value is not None:
                raise CallError(f"argument {name!r} is not in the graph, which was traced with {self.names}")
            bound[name] = value
        return bound

    def _traced_name(self, name: str) -> str:
        """make_fx numbers its inputs (`ids_1`): the caller's own name means the one input that carries it."""
        if name in self.names or self._dynamo or self._pytree is not None:
            return name
        matches = [own for own in self.names if re.sub(r"_\d+$", "", own) == name]
        return matches[0] if len(matches) == 1 else name

    def _flatten_pytree(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        spec = self._pytree.in_spec
        bound = {**self._fixed, **self._bound(args, kwargs)}
        missing = [name for name in self.names if name not in bound]
        if missing:
            raise CallError(f"arguments {missing} are missing; the graph was traced with {self.names}")
        for name, traced in self._fixed.items():
            if bound[name] != traced:
                raise CallError(f"argument {name} is {bound[name]!r}; the graph was traced with {traced!r}")
        if spec.type is tuple and spec.num_children == 2 and spec.child(1).type is dict:
            positional = spec.child(0).num_children
            called: Any = (
                tuple(bound[name] for name in self.names[:positional]),
                {name: bound[name] for name in spec.child(1).context},
            )
        else:
            called = tuple(bound[name] for name in self.names)
        leaves, given = pytree.tree_flatten(called)
        if given != spec:
            raise CallError(f"the arguments have the structure {given}; the graph was traced with {spec}")
        return leaves

    def _dynamo_arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """Arguments in traced order. What tracing fixed may be left out, never changed."""
        bound = self._bound(args, kwargs)
        given = constant_leaves(bound)
        for path, traced in self.constants.items():
            if path not in bound and "." not in path:
                bound[path] = traced
            elif given.get(path) != traced:
                raise CallError(f"argument {path} is {given.get(path)!r}; the graph was traced with {traced!r}")
        extra = {path: value for path, value in given.items() if path not in self.constants}
        if extra and META_KEY in self.gm.meta:
            raise CallError(f"arguments {extra} are plain values; the graph was traced with other ones there")
        missing = [name for name in self.names if name not in bound]
        if missing:
            raise CallError(f"arguments {missing} are missing; the graph was traced with {self.names}")
        return tuple(bound[name] for name in self.names)


def supply_builtins(gm: fx.GraphModule) -> None:
    """Let dynamo's call bytecode find Python's builtins: torch 2.11 looks for them among the model's globals alone."""
    codegen: Any = gm.graph._codegen
    for hook in ("dynamo_bytecode_flatten", "dynamo_bytecode_unflatten"):
        found = getattr(codegen, hook, None)
        if found is not None:
            found.f_globals = {**vars(builtins), **found.f_globals}


def constant_leaves(bound: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves of the arguments that are plain Python values, by path."""
    leaves, _ = pytree.tree_flatten_with_path(dict(bound))
    return {
        ".".join(_part(key) for key in path): leaf
        for path, leaf in leaves
        if isinstance(leaf, _CONSTANTS) and leaf is not None
    }


def tensor_leaves(tree: Any) -> list[tuple[str, torch.Tensor]]:
    """Tensors of a structure with their paths; objects that pytree does not know are walked by attribute."""
    leaves, _ = pytree.tree_flatten_with_path(tree)
    found: list[tuple[str, torch.Tensor]] = []
    for path, leaf in leaves:
        name = ".".join(_part(key) for key in path)
        if isinstance(leaf, torch.Tensor):
            found.append((name, leaf))
        elif not isinstance(leaf, (*_CONSTANTS, torch.nn.Module, type)) and hasattr(leaf, "__dict__"):
            found += [(f"{name}.{inner}", t) for inner, t in tensor_leaves(_attributes(leaf))]
    return found


def _attributes(value: Any) -> dict[str, Any]:
    return {k: v for k, v in vars(value).items() if isinstance(v, torch.Tensor | list | tuple | dict) or "ache" in k}


def _part(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))))


def _placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if n.op == "placeholder"]


def refuse_lifted(gm: fx.GraphModule) -> None:
    """Raise for the inner graph of an exported program, which takes its weights as inputs and so has no names for
    them.
    """
    lifted = [
        str(n.target) for n in _placeholders(gm) if re.match(r"[pb]_\w", str(n.target)) and fake_value(n) is not None
    ]
    plain = type(gm.graph._codegen) is fx.graph.CodeGen
    if lifted and plain and not list(gm.parameters()):
        raise GraphError(
            f"the graph takes its weights as inputs ({lifted[0]!r} and {len(lifted) - 1} more): give the module that "
            f"holds them, `exported_program.module()`"
        )


def bound_weights(gm: fx.GraphModule, flat: Sequence[Any] | None) -> dict[fx.Node, torch.Tensor]:
    """Tensors behind placeholders that are weights or buffers of the module (dynamo lifts them to inputs)."""
    bound: dict[fx.Node, torch.Tensor] = {}
    own = {id(t) for t in [*gm.parameters(), *gm.buffers()]}
    for i, node in enumerate(_placeholders(gm)):
        value = flat[i] if flat is not None else None
        if isinstance(value, torch.Tensor) and (isinstance(value, torch.nn.Parameter) or id(value) in own):
            bound[node] = value
        elif path := _source_path(node):
            try:
                found = attribute(gm, path)
            except AttributeError:
                continue
            if isinstance(found, torch.Tensor) and id(found) in own:
                bound[node] = found
    return bound


def source_text(node: fx.Node) -> str:
    """Where dynamo says that an input comes from, `L['kwargs']['input_ids']`; empty for other graphs."""
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)


def _source_path(node: fx.Node) -> str:
    """`L['self']._modules['head'].__dict__._parameters['weight']` -> `head.weight`; empty for other inputs."""
    parts = re.findall(r"\['([^']+)'\]|\.(\w+)", source_text(node))[1:]
    names = [a or b for a, b in parts]
    return ".".join(n for n in names if n not in ("_modules", "_parameters", "_buffers", "__dict__"))


def _display(node: fx.Node) -> str:
    text = source_text(node)
    if text:
        parts = [a or b or c for a, b, c in re.findall(r"\['([^']+)'\]|\.(\w+)|\[(\d+)\]", text)]
        return ".".join(p for p in parts if p not in ("kwargs", "args")) or str(node.target)
    return str(node.target).lstrip("*")


def graph_inputs(
    gm: fx.GraphModule, signature: Signature, bound: Mapping[fx.Node, torch.Tensor], flat: Sequence[Any] | None
) -> list[GraphInput]:
    """The caller's inputs of a graph: its placeholders that are no weights, with sizes from tracing or from `flat`.

    They come in the order of the model's arguments, as the first has the requests; dynamo's is that of first uses.
    Raises NeedsExampleInputsError when neither tells the shapes.
    """
    names = _leaf_names(signature, gm)
    inputs = []
    for i, node in enumerate(_placeholders(gm)):
        if node in bound:
            continue
        traced, example = fake_value(node), flat[i] if flat is not None else None
        value = traced if traced is not None or flat is None else example
        if value is None and flat is None and not node.args:
            raise NeedsExampleInputsError(
                f"the graph records no shapes (input {node.target!r}): give `example_inputs`, a tuple or dict of the "
                f"tensors it is called with; it takes {signature.names}"
            )
        name = names[i] if names is not None and i < len(names) else _display(node)
        inputs.append(graph_input(node, name, value, example))
    order = {name: i for i, name in enumerate(signature.order)}
    return sorted(inputs, key=lambda inp: order.get(inp.name.split(".")[0], len(order)))


def _leaf_names(signature: Signature, gm: fx.GraphModule) -> list[str] | None:
    info = signature._pytree
    if info is None:
        return None
    count = len(_placeholders(gm))
    try:
        dummy = pytree.tree_unflatten([object() for _ in range(info.in_spec.num_leaves)], info.in_spec)
        leaves, _ = pytree.tree_flatten_with_path(dummy)
    except Exception:
        return None
    if len(leaves) != count:
        return None
    names = []
    for path, _ in leaves:
        parts = [_part(key) for key in path]
        if len(parts) > 1 and parts[0] == "0":
            parts = [signature.names[int(parts[1])], *parts[2:]]
        elif len(parts) > 1 and parts[0] == "1":
            parts = parts[1:]
        names.append(".".join(parts))
    return names


def graph_input(node: fx.Node, name: str, value: Any, example: Any) -> GraphInput:
    """One input of a graph: its sizes and symbols off `value`, what tracing recorded."""
    if not isinstance(value, torch.Tensor):
        return GraphInput(node, name, (), (), None, example if example is not None else value)
    sizes, symbols = [], []
    for size in value.shape:
        if isinstance(size, torch.SymInt):
            expression = size.node.shape_env.replace(size.node._expr)
            symbols.append(None if expression.is_number else expression)
            sizes.append(int(size.node.hint) if size.node.hint is not None else 2)
        else:
            symbols.append(None)
            sizes.append(int(size))
    return GraphInput(node, name, tuple(sizes), tuple(symbols), value.dtype, example if example is not None else value)


def example_arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """`example_inputs` as call arguments: a tensor, a tuple or list of positional ones, or a dict by name."""
    if example_inputs is None:
        return None
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, list | tuple):
        return tuple(example_inputs), {}
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    raise GraphError(
        f"example_inputs is a {type(example_inputs).__name__}; expected a tensor, a tuple of them or a dict"
    )
