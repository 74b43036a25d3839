"""Rows of ops that no rule names, by what torch itself makes of them: the call is traced, and its inside is proven.

Traced at the sizes of each world, since a decomposition may follow sizes. What comes out must be rows that the graph
around it knows: the inside leaves no node for a map of its own. Ops that torch does not take apart have no rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._decomp import global_decomposition_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fxlora.passes.graph import invoke, op_name, operand
from fxlora.passes.inplace_views import functional_views
from fxlora.passes.rows.labels import Label, Mixed, RowMap, Rows
from fxlora.passes.rows.worlds import Sizing, TensorFacts, World
from fxlora.passes.rows.writes import is_write

if TYPE_CHECKING:
    from fxlora.passes.rows.propagate import Prover

_MAX_NODES = 4000


def look_inside(p: Prover, node: fx.Node, is_known: Callable[[str], bool]) -> Any:
    """Rows of a call by the ops it is made of; Mixed where that is not to be seen.

    Args:
        is_known: Whether some rule speaks of an op, which is then left whole.
    """
    name = op_name(node).lstrip("?")
    unknown = Mixed(f"no row rule for {name}")
    operands = [n for n in node.all_input_nodes if p.is_tensor(n)]
    labels = {n: p.rows(n) for n in node.all_input_nodes}
    mixed = next((rows for rows in labels.values() if isinstance(rows, Mixed)), None)
    if mixed is not None or not p.looks_inside or op_name(node).startswith("?"):
        return mixed or unknown
    graphs: dict[Any, fx.GraphModule | None] = {}
    found = []
    for w, world in enumerate(p.worlds):
        key = str([world.facts(n) for n in node.all_input_nodes])
        if key not in graphs:
            graphs[key] = _traced(node, world, operands, is_known)
        inner = graphs[key]
        if inner is None or _is_whole(inner, name):
            return unknown
        parts = _rows_inside(p, node, inner, operands, w)
        if isinstance(parts, Mixed):
            return parts
        found.append(parts)
    made = [_known(p, node, parts) for parts in zip(*found, strict=True)]
    return tuple(made) if isinstance(p.worlds[0].facts(node), tuple) else made[0]


def _traced(
    node: fx.Node, world: World, operands: Sequence[fx.Node], is_known: Callable[[str], bool]
) -> fx.GraphModule | None:
    """The graph of one call at the sizes of a world, None where it cannot be traced."""
    mode = FakeTensorMode()

    def call(*tensors: torch.Tensor) -> list[Any]:
        values = dict(zip(operands, tensors, strict=True))
        args = fx.map_arg(node.args, lambda n: values[n] if n in values else world.facts(n))
        kwargs = fx.map_arg(dict(node.kwargs), lambda n: values[n] if n in values else world.facts(n))
        result = invoke(node, args, kwargs)
        return list(result) if isinstance(result, list | tuple) else [result]

    try:
        with torch.no_grad():
            with mode:
                examples = [_example(world.facts(n)) for n in operands]
            functional = torch.func.functionalize(call, remove="mutations")
            inner = make_fx(functional, _decompositions(is_known), tracing_mode="fake")(*examples)
            functional_views(inner)
            return inner
    except Exception:
        return None


def _example(facts: TensorFacts) -> torch.Tensor:
    return torch.empty(facts.shape, dtype=facts.dtype, device=facts.device)


@functools.cache
def _decompositions(is_known: Callable[[str], bool]) -> Mapping[Any, Callable[..., Any]]:
    """torch's decompositions of the ops that no rule names."""
    return {
        op: made
        for op, made in global_decomposition_table["post_autograd"].items()
        if not is_known(str(getattr(op, "_schema", op)).partition("(")[0].partition("::")[2].partition(".")[0])
    }


def _is_whole(inner: fx.GraphModule, name: str) -> bool:
    """Did tracing leave the call as it was?"""
    calls = [op_name(n) for n in inner.graph.nodes if n.op.startswith("call")]
    return len(calls) > _MAX_NODES or name in calls


def _rows_inside(
    p: Prover, node: fx.Node, inner: fx.GraphModule, operands: Sequence[fx.Node], w: int
) -> list[Rows] | Mixed:
    """Rows of each result in one world, their maps by that world's ids alone."""
    placeholders = [n for n in inner.graph.nodes if n.op == "placeholder"]
    outside = dict(zip(placeholders, operands, strict=True))
    labels = {n: _in_world(p.rows(x), w) for n, x in outside.items()}
    values = {n: value for n, x in outside.items() if isinstance(value := p.integers.values[w].get(x), torch.Tensor)}
    world = World({n: _facts(n.meta.get("val")) for n in inner.graph.nodes}, generator=p.worlds[w].generator)
    inside = p.inside(inner, Sizing((world,), True), labels, values, w).run()
    for n in inner.graph.nodes:
        root = inside.roots.get(operand(n), operand(n)) if is_write(n) else None
        if root in outside and not (is_write(node) and outside[root] is operand(node)):
            return Mixed(f"{op_name(node)} writes into what it is given")
    for words in inside.assumed.values():
        p.assume(node, words)
    returned = next(n.args[0] for n in inner.graph.nodes if n.op == "output")
    roots = [inside.roots.get(value, value) for value in returned]
    if any(root in outside and outside[root] is not operand(node) for root in roots):
        return Mixed(f"{op_name(node)} hands on an operand beside its first")  # a write to it would go unseen
    return [inside.rows(value) for value in returned]


def _in_world(rows: Rows, w: int) -> Rows:
    if not isinstance(rows, Label):
        return rows
    return Label(RowMap(None, (), None, (rows.map.ids[w],), "outside"), rows.dims)


def _facts(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return TensorFacts(tuple(int(s) for s in value.shape), value.dtype, value.device)
    return tuple(_facts(v) for v in value) if isinstance(value, list | tuple) else value


def _known(p: Prover, node: fx.Node, parts: Sequence[Rows]) -> Rows:
    """One result's rows in all worlds as rows that the graph outside can compute."""
    mixed = next((rows for rows in parts if isinstance(rows, Mixed)), None)
    if mixed is not None:
        return Mixed(f"{mixed.reason}, inside {op_name(node)}")
    labels = [rows for rows in parts if isinstance(rows, Label)]
    if not labels:
        return None
    if len(labels) == len(parts) and all(label.dims == labels[0].dims for label in labels):
        found = p.table.find([label.map.ids[0] for label in labels], node)
        if found is not None:
            return Label(found, labels[0].dims)
    return Mixed(f"{op_name(node)} rearranges rows of requests")
