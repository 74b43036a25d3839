"""Which expert a row goes to must follow from the row's own request: the offsets of grouped matmuls, proven by values.

Rows of a grouped matmul lie sorted by expert, and offsets count the rows of the whole batch. Row m of x is request m's
alone only if the expert that the offsets give it is the one that its own token chose: an integer that the graph
computes, moved as x was moved, must equal it in every world.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import fx

from fxlora.passes.rows.labels import Label

if TYPE_CHECKING:
    from fxlora.passes.rows.propagate import Prover

_MAX_ANCESTORS = 400


def offsets_follow_rows(p: Prover, x: fx.Node, rows: Label, offsets: fx.Node) -> bool:
    """True when the offsets give every row of x an expert that its own request chose."""
    if p.labels.get(offsets) is None:
        return True  # counted from nothing that any request has a say in
    if all(ids.numel() == 1 for ids in p.seed.ids):
        return True  # the graph was traced for one request, whose routing is its own
    wanted = []
    for w in range(p.count):
        given = _experts_by_offsets(p, x, offsets, w)
        if given is None:
            return False
        wanted.append(given)
    chosen = [node for node in _ancestors(offsets) if _has_rows(p, node, rows)]
    moves = [node for node in _ancestors(x) if _has_rows(p, node, rows)]
    experts = p.shape(offsets, 0)[0]
    for node in chosen:
        label = p.rows(node)
        if not isinstance(label, Label) or label.dims != (0,):
            continue
        # Numbers past the last expert all mean none.
        named = [p.integers.values[w][node].long().clamp(max=experts) for w in range(p.count)]
        if label == rows and all(map(torch.equal, named, wanted)):
            return True
        for move in moves:
            orders = [p.integers.values[w][move].long() for w in range(p.count)]
            if any(o.numel() and not 0 <= int(o.min()) <= int(o.max()) < o.numel() for o in orders):
                continue
            moved = [ids[order] for ids, order in zip(label.map.ids, orders, strict=True)]
            experts_moved = [ids[order] for ids, order in zip(named, orders, strict=True)]
            if all(map(torch.equal, experts_moved, wanted)) and all(map(torch.equal, moved, rows.map.ids)):
                return True
    return False


def _experts_by_offsets(p: Prover, x: fx.Node, offsets: fx.Node, w: int) -> torch.Tensor | None:
    ends = p.integers.values[w].get(offsets)
    if not isinstance(ends, torch.Tensor) or ends.dim() != 1:
        return None
    return torch.searchsorted(ends.long(), torch.arange(p.shape(x, w)[0]), right=True)


def _has_rows(p: Prover, node: fx.Node, rows: Label) -> bool:
    """Is the node an integer for each row, its value known in every world?"""
    for w in range(p.count):
        value = p.integers.values[w].get(node)
        if not isinstance(value, torch.Tensor) or value.shape != rows.map.ids[w].shape or value.is_floating_point():
            return False
    return True


def _ancestors(node: fx.Node) -> Iterator[fx.Node]:
    """A node and what it is computed from, nearest first, so far as that is the routing of one layer."""
    seen, queue = {node}, [node]
    while queue and len(seen) < _MAX_ANCESTORS:
        at = queue.pop(0)
        yield at
        for other in at.all_input_nodes:
            if other not in seen:
                seen.add(other)
                queue.append(other)
