"""Rewriting of expert calls: rows of x flattened, one table of the routing, one op, and its result as the call had it.

Only edits; `experts.py` tells what a call computes. The table of a routing is made once for all the sites that share
its rows (gate_up and down of a layer).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx

import fxlora.kernels.ops  # noqa: F401  registers torch.ops.fxlora
from fxlora.passes.plan import PlannedUse
from fxlora.passes.reads import Read, Reader

Call = Callable[..., fx.Node]


class ExpertEmitter:
    """Makes expert ops at the graph's current insertion point."""

    def __init__(self, max_adapters: int) -> None:
        self.max_adapters = max_adapters
        self._tables: dict[Any, fx.Node] = {}

    def op(self, call: Call, use: PlannedUse, read: Read, reader: Reader, row_slots: fx.Node, handle: int) -> fx.Node:
        """The op of one call, and its result with the call's own dims."""
        site = use.site
        assert read.product is not None
        rows = read.product.rows_term
        sizes = partial(_sizes, call, read)
        x_TK = _flatten(call, read.x, read.product.x_term, rows, "k", sizes, site.in_features)
        table = self._table(call, use, read, row_slots, sizes)
        ops = torch.ops.fxlora
        y = call(ops.lora_experts.default, x_TK, _weight(call, read, reader), None, row_slots, None, table, handle)
        y = _unflatten(call, y, rows, read.product.out_term, sizes, site.out_features)
        return _regroup(call, y, read.product.groups, sizes, site.out_features)

    def _table(self, call: Call, use: PlannedUse, read: Read, row_slots: fx.Node, sizes: Any) -> fx.Node:
        """`segment_experts` of the call's rows, made at the first call that has them."""
        product, site = read.product, use.site
        assert product is not None
        routing = product.routing
        key = (row_slots, routing, product.index_term, product.rows_term, site.num_experts)
        if key not in self._tables:
            ids = routing.ids
            if routing.index is not None:
                ids = call(torch.full_like, call(torch.select, row_slots, 1, 0), routing.index)
            elif product.index_term == "e":
                ids = call(torch.arange, site.num_experts, device=site.device)
            elif ids is not None and product.index_term.isdigit():
                ids = call(torch.reshape, ids, (-1,))
            if ids is not None and routing.index is None:
                ids = _flatten(call, ids, product.index_term, product.rows_term, "", sizes, None)
            args = (row_slots, routing.offsets, ids, site.num_experts, self.max_adapters)
            self._tables[key] = call(torch.ops.fxlora.segment_experts.default, *args)
        return self._tables[key]


def _flatten(
    call: Call, tensor: fx.Node, term: str, rows: str, last: str, sizes: Callable[[str], list[Any]], width: int | None
) -> fx.Node:
    """A tensor with letters `term` as one row for each combination of `rows`, and `last` behind them."""
    kept = [letter for letter in term if letter != "_"]
    for d in reversed([d for d, letter in enumerate(term) if letter == "_"]):
        tensor = call(torch.select, tensor, d, 0)
    order = tuple(kept.index(letter) for letter in f"{rows}{last}" if letter in kept)
    if order != tuple(range(len(order))):
        tensor = call(torch.permute, tensor, order)
    missing = [i for i, letter in enumerate(rows) if letter not in kept]
    for i in missing:
        tensor = call(torch.unsqueeze, tensor, i)
    behind = () if width is None else (width,)
    if missing:
        tensor = call(torch.broadcast_to, tensor, (*sizes(rows), *behind))
    return tensor if len(rows) == 1 else call(torch.reshape, tensor, (-1, *behind))


def _unflatten(
    call: Call, y_TN: fx.Node, rows: str, term: str, sizes: Callable[[str], list[Any]], width: int
) -> fx.Node:
    """The op's result with the dims of the call's own: letters `term`."""
    y = y_TN
    if len(rows) != 1:
        shape = sizes(rows)
        free = next((i for i, size in enumerate(shape) if isinstance(size, fx.Node)), None)
        y = call(torch.reshape, y, (*(-1 if i == free else size for i, size in enumerate(shape)), width))
    order = tuple(f"{rows}n".index(letter) for letter in term if letter != "_")
    if order != tuple(range(len(order))):
        y = call(torch.permute, y, order)
    for i in (i for i, letter in enumerate(term) if letter == "_"):
        y = call(torch.unsqueeze, y, i)
    return y


def _regroup(call: Call, y: fx.Node, groups: Sequence[str], sizes: Callable[[str], list[Any]], width: int) -> fx.Node:
    """Letters that the call's own result holds in one dim, put together."""
    merged = [group for group in groups if len(group) > 1]
    if not merged:
        return y
    known = {"_": 1, "n": width, merged[0]: -1}
    return call(torch.reshape, y, tuple(known.get(group) or sizes(group)[0] for group in groups))


def _sizes(call: Call, read: Read, letters: Sequence[str]) -> list[Any]:
    """The size of each row letter: E where all experts are one, else a node that reads it."""
    assert read.product is not None
    found: list[Any] = []
    for letter in letters:
        source = read.product.size_source(letter)
        node = read.x if source is None or source[0] == "x" else read.product.routing.ids
        if source is None:
            found.append(read.experts)
        else:
            found.append(call(torch.ops.aten.sym_size.int, node, source[1]))
    return found


def _weight(call: Call, read: Read, reader: Reader) -> fx.Node:
    """The whole weight as [E, N, K], in the dtype in which the call reads it."""
    weight, wanted = read.root, reader.world.facts(read.operand).dtype
    if reader.world.facts(weight).dtype != wanted:
        weight = call(torch.Tensor.to, weight, wanted)
    return call(torch.transpose, weight, 1, 2) if read.stored_KN else weight
