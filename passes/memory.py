"""Which values of a graph may share memory, and what is written in place between two of its calls.

Stage: before the rewrite, asked by passes that move a call. Row provenance follows writes too, but asks whose rows
they bring; here any write counts, and whatever is not known to be apart counts as shared.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from fxlora.passes.graph import op_name, operand
from fxlora.passes.reads import Reader
from fxlora.passes.rows.families import CREATIONS, KEEPS_STATISTICS, VIEWS, is_pointwise
from fxlora.passes.rows.rules import is_known
from fxlora.passes.rows.worlds import TensorFacts, UnknownShapeError
from fxlora.passes.rows.writes import also_written, is_write

# Known ops that may hand on an operand or a view of it, though most of their forms make a tensor of their own.
_MAY_SHARE = VIEWS | CREATIONS | {"einsum", "values", "indices", "native_dropout", "max", "min"}
# Ops whose result may be a view of their first operand, never of an index.
_OF_FIRST = {"getitem", "index", "index_select", "select", "slice", "narrow"}
_INPUTS = "inputs"


class Memory:
    """Values that may share memory, in classes, and every write in graph order.

    Attributes:
        order: Place of every node in the graph.
    """

    def __init__(self, graph: fx.Graph, reader: Reader) -> None:
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self._reader = reader
        self._above: dict[Any, Any] = {}
        for node in graph.nodes:
            for other in self._sources(node):
                own, theirs = self._top(node), self._top(other)
                if own != theirs:
                    self._above[own] = theirs
        self._writes = [(i, node, written_by(node)) for node, i in self.order.items() if may_write(node)]

    def write_between(self, values: Iterable[fx.Node], after: int, before: int) -> fx.Node | None:
        """The first call strictly between two places that may write the memory of one of the values."""
        inside = [(node, targets) for i, node, targets in self._writes if after < i < before]
        if not inside:
            return None
        tops = {self._top(value) for value in values}
        for node, targets in inside:
            if targets is None or any(self._top(target) in tops for target in targets):
                return node
        return None

    def _top(self, value: Any) -> Any:
        while value in self._above:
            value = self._above[value]
        return value

    def _sources(self, node: fx.Node) -> list[Any]:
        """What a node's value may share memory with, of what stands before it."""
        tensor = self._reader.weights.tensor_of(node)
        if tensor is not None:
            return [storage_key(tensor)]
        if node.op == "placeholder":
            return [_INPUTS] if self._holds_memory(node) else []
        if not node.op.startswith("call") or not self._holds_memory(node):
            return []
        name = op_name(node)
        if is_known(name) and name not in _MAY_SHARE and not is_write(node):
            return []
        if name in _OF_FIRST or (is_write(node) and is_pointwise(name.removesuffix("_"))):
            return [n for n in [operand(node)] if isinstance(n, fx.Node) and self._holds_memory(n)]
        return [n for n in node.all_input_nodes if self._holds_memory(n)]

    def _holds_memory(self, node: fx.Node) -> bool:
        try:
            facts = self._reader.world.facts(node)
        except UnknownShapeError:
            return True
        return facts is None or isinstance(facts, TensorFacts | tuple)


def storage_key(tensor: torch.Tensor) -> Any:
    """One key for all tensors over one storage; one for all those whose storage cannot be told."""
    try:
        return ("storage", tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return ("storage", None)


def may_write(node: fx.Node) -> bool:
    """True for every call that is not known to leave all memory as it is."""
    if not node.op.startswith("call"):
        return False
    name = op_name(node)
    if is_write(node) or name in KEEPS_STATISTICS or node.kwargs.get("out") is not None:
        return True
    if node.op == "call_function" and not node.all_input_nodes:
        return False  # it is handed nothing of the graph: dynamo leaves questions about the device in it
    return not (is_known(name) or name in VIEWS or _has_schema(node))


def written_by(node: fx.Node) -> list[fx.Node] | None:
    """The values that a call may write; None for a call that may write anything."""
    if not _has_schema(node) and (op_name(node).startswith("?") or not (is_write(node) or is_known(op_name(node)))):
        return None
    first, out = operand(node), node.kwargs.get("out")
    given = [first, *(out if isinstance(out, list | tuple) else [out]), *also_written(node)]
    if isinstance(first, list | tuple):
        given += first
    if op_name(node) in KEEPS_STATISTICS:
        given += node.all_input_nodes[1:]
    return [value for value in given if isinstance(value, fx.Node)]


def _has_schema(node: fx.Node) -> bool:
    """Ops with a schema say what they write."""
    return isinstance(node.target, torch._ops.OpOverload | torch._ops.OpOverloadPacket)
