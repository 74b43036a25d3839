"""A graph as text, and two graphs as a diff: what dumps and golden tests print."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx

from fxlora.passes.graph import op_name

POOL, HANDLE = "<pool>", "group"


class NodeState(NamedTuple):
    """One node at one time: later edits of the graph do not reach it. ``node`` is the node itself, erased or not."""

    node: fx.Node
    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        return self.node.name

    @property
    def meta(self) -> dict[str, Any]:
        return self.node.meta


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A graph at one time. Cheap to take: arguments of nodes are immutable, so they are kept and not copied."""

    nodes: tuple[NodeState, ...]

    @classmethod
    def of(cls, gm: fx.GraphModule) -> Snapshot:
        return cls(tuple(NodeState(n, n.op, n.target, n.args, n.kwargs) for n in gm.graph.nodes))

    def text(self) -> str:
        """What `graph_text` gave at the time."""
        return "\n".join(_line(node) for node in self.nodes) + "\n"


def graph_text(gm: fx.GraphModule) -> str:
    """One line a node: name, op, arguments; handles of adapter memory print as ``<pool>``, since they differ run by
    run.
    """
    return Snapshot.of(gm).text()


def graph_diff(before: str, after: str) -> str:
    """Unified diff of two graph texts; empty when equal."""
    return "\n".join(difflib.unified_diff(before.splitlines(), after.splitlines(), "before", "after", lineterm="", n=1))


def _line(node: NodeState) -> str:
    if node.op == "placeholder":
        return f"{node.name} = input {node.target}"
    if node.op == "get_attr":
        return f"{node.name} = weight {node.target}"
    if node.op == "output":
        return f"return {show(node.args[0])}"
    return f"{node.name} = {call_text(node)}"


def call_text(node: NodeState, name_of: Callable[[fx.Node], str] = lambda node: node.name) -> str:
    """A call as ``op(arguments)``; ``name_of`` says how to name the nodes among them."""
    args, kwargs = list(node.args), dict(node.kwargs)
    for i, name in enumerate(argument_names(node)):
        if name == HANDLE and i < len(args):
            args[i] = POOL
        elif name == HANDLE and name in kwargs:
            kwargs[name] = POOL
    shown = [show(a, name_of) for a in args] + [f"{k}={show(v, name_of)}" for k, v in kwargs.items()]
    return f"{op_name(node)}({', '.join(shown)})"  # type: ignore[arg-type]


def argument_names(node: NodeState) -> tuple[str, ...]:
    """Names of the arguments of a call of an fxlora op, as its schema has them; empty for every other node."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.name.startswith("fxlora::"):
        return ()
    return tuple(argument.name for argument in schema.arguments)


def show(value: Any, name_of: Callable[[fx.Node], str] = lambda node: node.name) -> str:
    """An argument of a call as text."""
    if isinstance(value, fx.Node):
        return name_of(value)
    if isinstance(value, list | tuple):
        inner = ", ".join(show(v, name_of) for v in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {show(v, name_of)}" for k, v in value.items()) + "}"
    if isinstance(value, slice):
        bounds = [value.start, value.stop] + ([] if value.step is None else [value.step])
        return ":".join("" if v is None else show(v, name_of) for v in bounds)
    return str(value) if isinstance(value, str | torch.dtype | torch.device) else repr(value)
