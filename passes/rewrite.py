"""Rewriting: each planned group of calls becomes one fxlora op, and row maps become ordinary int nodes, each once.

Only edits. Arguments are read off the node when it is rewritten, since its input may itself have been rewritten before.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import fx

import fxlora.kernels.ops  # noqa: F401  registers torch.ops.fxlora
from fxlora.passes.graph import op_name, operand, place_in_model
from fxlora.passes.guards import emit_guards
from fxlora.passes.memory import may_write
from fxlora.passes.plan import Group, Plan, PlannedUse
from fxlora.passes.reads import Read, Reader
from fxlora.passes.rewrite_experts import ExpertEmitter
from fxlora.passes.row_maps import MapEmitter
from fxlora.passes.rows.labels import RowMap
from fxlora.passes.sites import Role, Site
from fxlora.passes.weights import PASS_ON, TRANSPOSES


def rewrite_sites(
    gm: fx.GraphModule,
    plan: Plan,
    reader: Reader,
    seed: RowMap,
    slots: fx.Node,
    handles: Mapping[tuple[Site, ...], int],
) -> dict[fx.Node, fx.Node]:
    """Replace every planned call, one op for each group; returns what stands in each call's place."""
    emit_guards(gm.graph, plan.guards, seed, slots, reader)
    emitter = MapEmitter(gm.graph, seed, slots, plan.shape.max_adapters)
    row_inputs = [_row_inputs(emitter, group) for group in plan.groups]
    experts = ExpertEmitter(plan.shape.max_adapters)
    results: dict[fx.Node, fx.Node] = {}
    moved: set[fx.Node] = set()
    for group, inputs in zip(plan.groups, row_inputs, strict=True):
        first = group.uses[0].node
        for node in group.moved:
            if node not in moved:  # else it stands before an earlier group already
                first.prepend(node)
        moved.update(group.moved)
        reads = [reader.read_as(use.node, use.site.kind) for use in group.uses]
        with gm.graph.inserting_before(first):
            made = _make_op(gm.graph, group, reads, reader, inputs, handles[group.sites], experts)
        for use, read, result in zip(group.uses, reads, made, strict=True):
            results[use.node] = _replace_use(gm.graph, use, read, result, results, reader)
    return results


def _row_inputs(emitter: MapEmitter, group: Group) -> tuple[fx.Node, fx.Node | None]:
    rows = group.uses[0].rows
    if group.uses[0].site.kind == "experts":
        return emitter.row_slots(rows), None  # the table of an expert op needs the routing too
    return emitter.row_inputs(rows)


def _make_op(
    graph: fx.Graph,
    group: Group,
    reads: list[Read],
    reader: Reader,
    row_inputs: tuple[fx.Node, fx.Node | None],
    handle: int,
    experts: ExpertEmitter,
) -> list[fx.Node]:
    """The op of a group at the current place, and the node of each member's result."""
    row_slots, segments = row_inputs
    first, read = group.uses[0], reads[0]
    if first.site.kind == "experts":
        return [experts.op(partial(_call, graph, first), first, read, reader, row_slots, handle)]
    rest = (row_slots, None, segments, handle)
    if first.site.kind == "embedding":
        return [_call(graph, first, torch.ops.fxlora.lora_embedding.default, read.x, read.operand, *rest)]
    x = read.x if read.x_order is None else _call(graph, first, torch.permute, read.x, read.x_order)
    weights = [
        _as_NK(member, reader.ndim(member.operand), partial(_call, graph, use))
        for use, member in zip(group.uses, reads, strict=True)
    ]
    if first.site.role is Role.LOGITS:
        return [_call(graph, first, torch.ops.fxlora.lora_logits.default, x, weights[0], read.bias, *rest)]
    biases = [member.bias for member in reads]
    op = _call(graph, first, torch.ops.fxlora.lora_linear.default, x, weights, biases, *rest)
    return [_call(graph, use, operator.getitem, op, i) for i, use in enumerate(group.uses)]


def _replace_use(
    graph: fx.Graph,
    use: PlannedUse,
    read: Read,
    out: fx.Node,
    results: Mapping[fx.Node, fx.Node],
    reader: Reader,
) -> fx.Node:
    """Put a member's result, in the order of dims of the call's own, in the place of the call."""
    node = use.node
    with graph.inserting_before(node):
        if read.out_order is not None:
            out = _call(graph, use, torch.permute, out, read.out_order)
        if read.addend is not None:
            out = _call(graph, use, torch.add, out, results.get(read.addend, read.addend))
    out.meta |= {k: v for k, v in node.meta.items() if k in ("val", "example_value")}
    reader.take_place(out, node)
    node.replace_all_uses_with(out)
    unread = node.all_input_nodes if use.site.kind == "experts" else [read.x]  # of experts, copies of their weights too
    graph.erase_node(node)
    for source in unread:
        _erase_unread(graph, source)
    return out


def _call(graph: fx.Graph, use: PlannedUse, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A call that stands for (a part of) a use: it comes from the same line of the model."""
    made = graph.call_function(target, args, kwargs)
    made.meta = place_in_model(use.node.meta)
    return made


def _erase_unread(graph: fx.Graph, node: Any) -> None:
    """Erase views and casts that only a replaced call has read: its group reads an equal one."""
    while isinstance(node, fx.Node) and op_name(node) in PASS_ON and not node.users and not may_write(node):
        source = operand(node)
        graph.erase_node(node)
        node = source


def _as_NK(read: Read, ndim: int, call: Callable[..., fx.Node]) -> fx.Node:
    """The weight operand as [N, K]: the weight itself where the call only transposed it, else a view of the operand."""
    weight = read.operand
    direct = weight is not read.root and len(weight.all_input_nodes) == 1 and weight.all_input_nodes[0] is read.root
    if read.operand_is_KN and direct and not read.stored_KN and op_name(weight) in TRANSPOSES:
        return read.root
    for _ in range(ndim - 2):
        weight = call(torch.select, weight, 0, 0)
    return call(torch.transpose, weight, 0, 1) if read.operand_is_KN else weight
