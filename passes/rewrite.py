"""Rewriting: each planned call becomes one fxlora op, and row maps become ordinary int nodes, each once.

Only edits. Arguments are read off the node when it is rewritten, since its input may itself have been rewritten before.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

import fxlora.kernels.ops  # noqa: F401  registers torch.ops.fxlora
from fxlora.passes.graph import op_name
from fxlora.passes.plan import Plan, PlannedUse
from fxlora.passes.reads import Read, Reader
from fxlora.passes.rows.labels import RowMap
from fxlora.passes.sites import Role, Site
from fxlora.passes.weights import TRANSPOSES


class MapEmitter:
    """Turns row maps into graph nodes, each right after the last thing it needs, each once."""

    def __init__(self, graph: fx.Graph, seed: RowMap, slots: fx.Node, max_adapters: int) -> None:
        self.graph, self.max_adapters = graph, max_adapters
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.nodes: dict[RowMap, fx.Node] = {seed: slots}
        self.place: dict[fx.Node, tuple[int, int]] = {slots: (self.order[slots], 0)}
        self.inputs: dict[RowMap, tuple[fx.Node, fx.Node]] = {}
        self._last = max((n for n in graph.nodes if n.op == "placeholder"), key=lambda n: self.order[n])

    def node(self, row_map: RowMap) -> fx.Node:
        """The node of a map, made on first request together with its parents."""
        if row_map not in self.nodes:
            parents = [self.node(p) for p in row_map.parents]
            emit = self._emitter([*parents, row_map.origin or self._last])
            assert row_map.build is not None
            self.nodes[row_map] = row_map.build(emit, parents)
        return self.nodes[row_map]

    def row_inputs(self, row_map: RowMap) -> tuple[fx.Node, fx.Node]:
        """``row_slots`` int32 [T, 1] and ``segments`` of a map of T rows, shared by all its sites."""
        if row_map not in self.inputs:
            flat = self.node(row_map)
            emit = self._emitter([flat])
            slots = emit(torch.reshape, flat, (-1, 1))
            self.inputs[row_map] = (slots, emit(torch.ops.fxlora.segment_rows.default, slots, self.max_adapters))
        return self.inputs[row_map]

    def _emitter(self, needed: list[fx.Node]) -> Callable[..., fx.Node]:
        state = {"after": max(needed, key=self._placed)}

        def emit(target: Any, *args: Any) -> fx.Node:
            after = state["after"]
            index, sequence = self._placed(after)
            first = after if after.op != "placeholder" else self._last
            with self.graph.inserting_after(first):
                node = self.graph.call_function(target, args)
            self.place[node] = (max(index, self.order.get(first, index)), sequence + 1)
            state["after"] = node
            return node

        return emit

    def _placed(self, node: fx.Node) -> tuple[int, int]:
        return self.place.get(node) or (self.order[node], 0)


def rewrite_sites(
    gm: fx.GraphModule, plan: Plan, reader: Reader, seed: RowMap, slots: fx.Node, handles: Mapping[Site, int]
) -> int:
    """Replace every planned call; returns how many were replaced."""
    emitter = MapEmitter(gm.graph, seed, slots, plan.shape.max_adapters)
    row_inputs = {use.node: emitter.row_inputs(use.rows) for use in plan.uses}
    for use in plan.uses:
        _rewrite_use(gm.graph, use, reader, row_inputs[use.node], handles[use.site])
    return len(plan.uses)


def _rewrite_use(
    graph: fx.Graph, use: PlannedUse, reader: Reader, row_inputs: tuple[fx.Node, fx.Node], handle: int
) -> None:
    node, site = use.node, use.site
    read = reader.read_as(node, site.kind)
    row_slots, segments = row_inputs
    with graph.inserting_before(node):

        def call(target: Any, *args: Any) -> fx.Node:
            made = graph.call_function(target, args)
            made.meta = {k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack")}
            return made

        if site.kind == "embedding":
            out = call(torch.ops.fxlora.lora_embedding.default, read.x, read.operand, row_slots, None, segments, handle)
        else:
            x = read.x if read.x_order is None else call(torch.permute, read.x, read.x_order)
            weight = _as_NK(read, reader.ndim(read.operand), call)
            if site.role is Role.LOGITS:
                out = call(
                    torch.ops.fxlora.lora_logits.default, x, weight, read.bias, row_slots, None, segments, handle
                )
            else:
                group = call(
                    torch.ops.fxlora.lora_linear.default, x, [weight], [read.bias], row_slots, None, segments, handle
                )
                out = call(operator.getitem, group, 0)
            if read.out_order is not None:
                out = call(torch.permute, out, read.out_order)
            if read.addend is not None:
                out = call(torch.add, out, read.addend)
    out.meta |= {k: v for k, v in node.meta.items() if k in ("val", "example_value")}
    reader.take_place(out, node)
    node.replace_all_uses_with(out)
    graph.erase_node(node)


def _as_NK(read: Read, ndim: int, call: Callable[..., fx.Node]) -> fx.Node:
    """The weight operand as [N, K]: the weight itself where the call only transposed it, else a view of the operand."""
    weight = read.operand
    direct = weight is not read.root and len(weight.all_input_nodes) == 1 and weight.all_input_nodes[0] is read.root
    if read.operand_is_KN and direct and not read.stored_KN and op_name(weight) in TRANSPOSES:
        return read.root
    for _ in range(ndim - 2):
        weight = call(torch.select, weight, 0, 0)
    return call(torch.transpose, weight, 0, 1) if read.operand_is_KN else weight
