"""Any graph module to one form: leaf modules inlined, one node per weight tensor.

Only the reading of weights is made uniform; the ops keep the spelling of the form they came in.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxlora.passes.errors import AlreadyAppliedError, GraphError
from fxlora.passes.graph import attribute, op_name, place_in_model
from fxlora.passes.weights import tensor_key


class _InliningTracer(fx.Tracer):
    """Traces through every module, so that a leaf such as ``nn.Linear`` shows its functional and its weight."""

    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        return False


def refuse_applied(gm: fx.GraphModule) -> None:
    """Raise when the graph already holds fxlora ops."""
    for node in gm.graph.nodes:
        if op_name(node).startswith("fxlora::"):
            raise AlreadyAppliedError(
                f"the graph already holds fxlora ops (first: node {node.name}); expected the graph module as it was "
                "traced. Apply once, and load further adapters with `lora.load_adapter`."
            )


def refuse_autocast(gm: fx.GraphModule) -> None:
    """Raise when the graph enters autocast, which chooses dtypes of linears where the ops keep that of their input."""
    for node in gm.graph.nodes:
        if node.target is torch.amp.autocast_mode._enter_autocast and node.args[2]:
            raise GraphError(
                f"autocast is on in the model's own code (node {node.name}), and would change the dtype of its "
                "linears: let the model do without, and load it in the dtype that it is to be served in"
            )


def copy_graph(gm: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """A copy of the graph over the same weights and modules, with a plain flat signature; and old node to new node."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(gm.graph, mapping)
    graph.output(output)
    return fx.GraphModule(gm, graph), mapping


def inline_modules(gm: fx.GraphModule) -> list[str]:
    """Replace every ``call_module`` that can be traced by its own graph; returns the paths that stay opaque."""
    opaque = []
    for node in list(gm.graph.nodes):
        if node.op == "call_function":
            _inline_graph(gm, node)
        if node.op != "call_module":
            continue
        module = gm.get_submodule(str(node.target))
        if not (_inline_batch_norm(gm, node, module) or _inline(gm, node, module)) and node.users:
            opaque.append(str(node.target))
    return opaque


# Calls that do no more than run a graph they are given, once: where the graph stands among the arguments, and where the
# arguments of the graph begin.
_RUN_A_GRAPH = {
    "tag_activation_checkpoint": (0, 1),
    "wrap_with_set_grad_enabled": (1, 2),
    "invoke_subgraph": (0, 2),
}


def _inline_graph(gm: fx.GraphModule, node: fx.Node) -> None:
    """A call that runs a graph of its own, such as a checkpointed block, replaced by that graph."""
    graph_at, first = _RUN_A_GRAPH.get(getattr(node.target, "__name__", ""), (0, 0))
    if not first or len(node.args) < first or not isinstance(node.target, torch._ops.HigherOrderOperator):
        return
    source = node.args[graph_at]
    inner = attribute(gm, str(source.target)) if isinstance(source, fx.Node) and source.op == "get_attr" else None
    if not isinstance(inner, fx.GraphModule):
        return
    assert isinstance(source, fx.Node)
    inner, _ = copy_graph(inner)  # the caller's stays as it is
    inline_modules(inner)
    values = node.args[first:]
    placeholders = [n for n in inner.graph.nodes if n.op == "placeholder"]
    if len(values) != len(placeholders):
        return
    inputs = dict(zip(placeholders, values, strict=True))
    if _put_inside(gm, node, inner.graph, inputs, str(source.target)) and not source.users:
        gm.graph.erase_node(source)


def _inline_batch_norm(gm: fx.GraphModule, node: fx.Node, module: torch.nn.Module) -> bool:
    """Batch norm in eval mode as its functional: its forward checks the input's dims, which cannot be traced."""
    known = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)
    if (
        type(module) not in known
        or module.training
        or module.running_mean is None
        or module._forward_hooks
        or module._forward_pre_hooks
    ):
        return False
    with gm.graph.inserting_before(node):

        def get(name: str) -> fx.Node | None:
            return None if getattr(module, name) is None else gm.graph.get_attr(f"{node.target}.{name}")

        args: tuple[Any, ...] = (
            node.args[0],
            get("running_mean"),
            get("running_var"),
            get("weight"),
            get("bias"),
            False,
            0.0,
            module.eps,
        )
        made = gm.graph.call_function(torch.nn.functional.batch_norm, args)
    node.replace_all_uses_with(made)
    gm.graph.erase_node(node)
    return True


def _inline(gm: fx.GraphModule, node: fx.Node, module: torch.nn.Module) -> bool:
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    try:
        inner = module.graph if isinstance(module, fx.GraphModule) else _InliningTracer().trace(module)
    except Exception:
        return False
    placeholders = [n for n in inner.nodes if n.op == "placeholder"]
    values: dict[fx.Node, Any] = {}
    for i, placeholder in enumerate(placeholders):
        name = str(placeholder.target)
        if name.startswith("*"):
            return False
        if i < len(node.args):
            values[placeholder] = node.args[i]
        elif name in node.kwargs:
            values[placeholder] = node.kwargs[name]
        else:
            return False  # traced as if it were given, so its default may have taken another branch
    return _put_inside(gm, node, inner, values, str(node.target))


def _put_inside(gm: fx.GraphModule, node: fx.Node, inner: fx.Graph, values: dict[fx.Node, Any], path: str) -> bool:
    """A graph in the place of a call, if what it returns can stand there; ``values``: what its inputs are."""
    returned = next(n.args[0] for n in inner.nodes if n.op == "output")
    picks = all(u.op == "call_function" and u.target is operator.getitem for u in node.users)
    if not isinstance(returned, fx.Node) and not (picks and isinstance(returned, list | tuple | dict)):
        return False
    with gm.graph.inserting_before(node):
        for n in inner.nodes:
            if n.op in ("placeholder", "output"):
                continue
            values[n] = gm.graph.node_copy(n, lambda a: values[a])
            values[n].meta = place_in_model({**node.meta, **n.meta})
            if n.op in ("get_attr", "call_module"):
                values[n].target = f"{path}.{n.target}"
    result: Any = fx.map_arg(returned, lambda a: values[a])
    replace_call(gm, node, result)
    return True


def replace_call(gm: fx.GraphModule, node: fx.Node, result: Any) -> None:
    """Put ``result``, one node or a structure of them, in the place of a call, and erase the call."""
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
    else:
        for user in list(node.users):
            if user.target is operator.getitem:
                user.replace_all_uses_with(result[user.args[1]])
                gm.graph.erase_node(user)
            else:
                user.args = fx.map_arg(user.args, lambda n: result if n is node else n)
                user.kwargs = fx.map_arg(dict(user.kwargs), lambda n: result if n is node else n)
    gm.graph.erase_node(node)


def unify_weights(gm: fx.GraphModule) -> int:
    """Leave exactly one ``get_attr`` node per tensor, the earliest; returns how many were merged away."""
    first: dict[Any, fx.Node] = {}
    merged = 0
    for node in list(gm.graph.nodes):
        if node.op != "get_attr":
            continue
        value = attribute(gm, str(node.target))
        if not isinstance(value, torch.Tensor):
            continue
        kept = first.setdefault(tensor_key(value), node)
        if kept is not node:
            node.replace_all_uses_with(kept)
            gm.graph.erase_node(node)
            merged += 1
    return merged


def count_weight_nodes(gm: fx.GraphModule) -> dict[Any, int]:
    """How many ``get_attr`` nodes read each tensor: the post-check of :func:`unify_weights` is that all are 1."""
    counts: dict[Any, int] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr" and isinstance(value := attribute(gm, str(node.target)), torch.Tensor):
            counts[tensor_key(value)] = counts.get(tensor_key(value), 0) + 1
    return counts
