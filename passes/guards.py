"""What rows rest on and no graph can prove, checked as the graph runs: part of the rewrite, before any op is placed.

A `masked_scatter` hands out its source in order. Where request A has more places than vectors of its own it would get
those of request B: such a place becomes NaN instead, so that no request ever sees what is another's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import fx

from fxlora.passes.graph import operand
from fxlora.passes.reads import Reader
from fxlora.passes.row_maps import MapEmitter
from fxlora.passes.rows.labels import RowMap
from fxlora.passes.rows.masked import Guard


def emit_guards(graph: fx.Graph, guards: Mapping[fx.Node, Guard], seed: RowMap, slots: fx.Node, reader: Reader) -> None:
    """Put a check behind every guarded call; later calls read what it lets pass."""
    if not guards:
        return
    after = slots if slots.op != "placeholder" else [n for n in graph.nodes if n.op == "placeholder"][-1]
    with graph.inserting_before(after.next):
        ones = graph.call_function(torch.reshape, (graph.call_function(torch.ones_like, (slots,)), (-1,)))
        counted = graph.call_function(torch.cumsum, (ones, 0))
        requests = graph.call_function(torch.Tensor.reshape_as, (counted, slots))  # 1, 2, 3 ...: 0 is nobody
    emitter = MapEmitter(graph, seed, requests)
    for node, guard in guards.items():
        places, given = emitter.node(guard.places), emitter.node(guard.given)
        emit = emitter.after([node, places, given])
        lead = emit(torch.select, operand(node), -1, 0)
        mask = emit(torch.Tensor.expand_as, emit(torch.select, guard.mask, -1, 0), lead)
        mask = emit(torch.reshape, mask, (-1,))
        taken = emit(torch.clamp, emit(torch.sub, emit(torch.cumsum, mask, 0), 1), 0)
        owners = emit(torch.index_select, emit(torch.nn.functional.pad, given, (0, 1)), 0, taken)
        wrong = emit(torch.bitwise_and, emit(torch.ne, owners, places), mask)
        wrong = emit(torch.unsqueeze, emit(torch.Tensor.reshape_as, wrong, lead), -1)
        passed = emit(torch.masked_fill, node, wrong, math.nan)
        passed.meta = dict(node.meta)
        reader.take_place(passed, node)
        node.replace_all_uses_with(passed, delete_user_cb=lambda user, passed=passed: user is not passed)
