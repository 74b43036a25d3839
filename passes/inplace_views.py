"""In-place views (`x.unsqueeze_(1)`) as views: part of normalising a graph, before any shape is read.

Such a call changes what its operand looks like, and tracing records the last look alone. As an ordinary view, whose
result later calls read instead, every node has one shape. The memory behind is the same either way.
"""

from __future__ import annotations

import torch
from torch import fx

from fxlora.passes.graph import fake_value, op_name, operand, rerun
from fxlora.passes.rows.families import MAY_RETURN_OPERAND
from fxlora.passes.rows.writes import is_write

_VIEWS = {"unsqueeze_", "squeeze_", "transpose_", "swapaxes_", "swapdims_", "t_"}


def functional_views(gm: fx.GraphModule) -> int:
    """Replace in-place views of values that the graph itself made; returns how many were."""
    replaced = 0
    for node in list(gm.graph.nodes):
        if op_name(node) in _VIEWS and _is_own(node) and _forget_last_look(operand(node)):
            _replace(gm.graph, node)
            replaced += 1
    return replaced


def _is_own(node: fx.Node) -> bool:
    """Does nothing later read the changed tensor by another name, and did no caller give it?"""
    found, queue = {operand(node)}, [operand(node)]
    for n in queue:
        if not isinstance(n, fx.Node) or not n.op.startswith("call"):
            return False
        same = [user for user in n.users if operand(user) is n and _hands_on(user)]
        same += [operand(n)] if _hands_on(n) else []
        queue += [other for other in same if other not in found]
        found |= set(same)
    after = _after(node)
    return not any(user in after for n in found - {operand(node), node} for user in n.users)


def _hands_on(node: fx.Node) -> bool:
    """May the result be the very tensor that was given?"""
    name = op_name(node)
    return name in MAY_RETURN_OPERAND or is_write(node) or name.startswith("?")


def _after(node: fx.Node) -> set[fx.Node]:
    nodes = list(node.graph.nodes)
    return set(nodes[nodes.index(node) + 1 :])


def _forget_last_look(x: fx.Node) -> bool:
    """Record anew what a call made, by running it on what its operands were recorded as."""
    recorded = fake_value(x)
    if recorded is None:
        return True
    try:
        made = rerun(x)
    except Exception:
        return False
    if not isinstance(made, torch.Tensor) or made is recorded:
        return False
    _record(x, made)
    return True


def _record(node: fx.Node, value: torch.Tensor) -> None:
    node.meta |= dict.fromkeys([key for key in ("val", "example_value") if key in node.meta], value)


def _replace(graph: fx.Graph, node: fx.Node) -> None:
    x, base = operand(node), op_name(node).removesuffix("_")
    after = _after(node)
    with graph.inserting_before(node):
        made = graph.call_method(base, node.args, node.kwargs)
    made.meta = dict(node.meta)
    if fake_value(node) is not None:
        _record(made, rerun(made))
    for user in list(x.users):
        if user in after:
            user.replace_input_with(x, made)
    node.replace_all_uses_with(made)
    graph.erase_node(node)
