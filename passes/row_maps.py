"""Row maps as graph nodes: what the rewrite turns the maps of the plan into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

import fxlora.kernels.ops  # noqa: F401  registers torch.ops.fxlora
from fxlora.passes.rows.labels import RowMap


class MapEmitter:
    """Turns row maps into graph nodes, each right after the last thing it needs, each once."""

    def __init__(self, graph: fx.Graph, seed: RowMap, slots: fx.Node, max_adapters: int = 0) -> None:
        self.graph, self.max_adapters = graph, max_adapters
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.nodes: dict[RowMap, fx.Node] = {seed: slots}
        self.place: dict[fx.Node, tuple[int, int]] = {slots: (self.order[slots], 0)}
        self.slots: dict[RowMap, fx.Node] = {}
        self.inputs: dict[RowMap, tuple[fx.Node, fx.Node]] = {}
        self._last = max((n for n in graph.nodes if n.op == "placeholder"), key=lambda n: self.order[n])

    def node(self, row_map: RowMap) -> fx.Node:
        """The node of a map, made on first request together with its parents."""
        if row_map not in self.nodes:
            parents = [self.node(p) for p in row_map.parents]
            emit = self.after([*parents, row_map.origin or self._last])
            assert row_map.build is not None
            self.nodes[row_map] = row_map.build(emit, parents)
        return self.nodes[row_map]

    def row_inputs(self, row_map: RowMap) -> tuple[fx.Node, fx.Node]:
        """``row_slots`` int32 [T, 1] and ``segments`` of a map of T rows, shared by all its sites."""
        if row_map not in self.inputs:
            slots = self.row_slots(row_map)
            emit = self.after([slots])
            self.inputs[row_map] = (slots, emit(torch.ops.fxlora.segment_rows.default, slots, self.max_adapters))
        return self.inputs[row_map]

    def row_slots(self, row_map: RowMap) -> fx.Node:
        """``row_slots`` of a map alone, for ops whose rows are sorted otherwise."""
        if row_map not in self.slots:
            flat = self.node(row_map)
            self.slots[row_map] = self.after([flat])(torch.reshape, flat, (-1, 1))
        return self.slots[row_map]

    def after(self, needed: list[fx.Node]) -> Callable[..., fx.Node]:
        """What makes nodes right after the last of those needed."""
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
