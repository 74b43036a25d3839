"""torch.vmap of elementwise ops and lookups, as the same ops over whole tensors: part of normalising a graph.

torch.compile leaves a vmap in its graph as calls that hide a dim of a tensor, ops that see one slice, and calls that
bring the dim back (transformers makes masks this way, where a mask asks for each place by its indices). Here hidden
dims become leading dims, the levels of nested vmaps in order, so that everything after this sees what mixes requests
and what does not. A vmap of anything else stays as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fxlora.passes.graph import argument, fake_value, is_tensor_node, op_name, operand, rerun
from fxlora.passes.rows.families import is_pointwise
from fxlora.passes.rows.mapped import CLOSES, HIDES, OPENS, SHOWS, vmap_regions

log = logging.getLogger(__name__)
_SILENT = {OPENS, CLOSES, "lazy_load_decompositions"}
_LIKE = {"new_ones", "new_zeros", "new_full", "new_tensor", "new_empty"}
"""Creations that take dtype and device of a tensor, and nothing else."""

Levels = tuple[int, ...]


class _UnknownError(Exception):
    """An op that is not followed into a vmap."""


def open_vmaps(gm: fx.GraphModule) -> int:
    """Replace vmaps, those in one another together; returns how many were."""
    return sum(_open(gm.graph, region) for region in list(vmap_regions(gm.graph)))


def _open(graph: fx.Graph, region: Sequence[fx.Node]) -> bool:
    try:
        levels = _levels(region)
    except _UnknownError:
        return False
    if any(levels.get(node) and user not in levels for node in region for user in node.users):
        return False
    made: dict[fx.Node, fx.Node] = {}
    emitted: list[fx.Node] = []
    try:
        for node in levels:
            with graph.inserting_before(node):
                made[node] = _Whole(graph, node, levels, made, emitted).call()
    except Exception as error:  # of an op, on what tracing recorded
        log.info("a vmap stays as it is: %s", error)
        for node in reversed(emitted):
            graph.erase_node(node)
        return False
    for node in reversed(region):
        if node in made:
            node.replace_all_uses_with(made[node])
        graph.erase_node(node)
    return True


def _levels(region: Sequence[fx.Node]) -> dict[fx.Node, Levels]:
    """Levels of vmap whose dims each value has hidden. Raises _UnknownError."""
    found: dict[fx.Node, Levels] = {}
    for node in region:
        name, mapped = op_name(node), [n for n in node.all_input_nodes if found.get(n)]
        if name in _SILENT:
            continue
        union = tuple(sorted({level for n in mapped for level in found[n]}))
        if name in (HIDES, SHOWS):
            level = argument(node, 2 if name == HIDES else 1, "level")
            union = tuple(sorted({*union, level} if name == HIDES else {*union} - {level}))
        if name in _LIKE and mapped == [operand(node)]:
            union = ()
        elif (mapped or name in (HIDES, SHOWS)) and not _is_followed(node, name, found):
            raise _UnknownError
        found[node] = union
    return found


def _is_followed(node: fx.Node, name: str, levels: dict[fx.Node, Levels]) -> bool:
    """Whether the op does to whole tensors what it does to each slice."""
    if not is_tensor_node(node) or "out" in node.kwargs:
        return False
    if is_pointwise(name):
        return not name.endswith("_") and _is_alike(node, name)
    if name == "index":  # of the first dims of a tensor that no vmap runs over
        items = argument(node, 1, "indices")
        integers = all(is_tensor_node(item) and not _holds(item, torch.bool) for item in items)
        return integers and is_tensor_node(operand(node)) and not levels.get(operand(node))
    return name in (HIDES, SHOWS) and is_tensor_node(operand(node))


def _is_alike(node: fx.Node, name: str) -> bool:
    """Whether no operand's dims decide on the dtype of an elementwise result."""
    dtypes = {fake_value(n).dtype for n in node.all_input_nodes if is_tensor_node(n)} - {torch.bool}
    return len(dtypes) <= 1 or _holds(node, torch.bool) or name in ("to", "type_as")


def _holds(node: fx.Node, dtype: torch.dtype) -> bool:
    return fake_value(node).dtype == dtype


def _ndim(node: fx.Node) -> int:
    return fake_value(node).dim()


class _Whole:
    """One call of a vmap, made of whole tensors."""

    def __init__(
        self,
        graph: fx.Graph,
        node: fx.Node,
        levels: dict[fx.Node, Levels],
        made: dict[fx.Node, fx.Node],
        emitted: list[fx.Node],
    ) -> None:
        self._graph, self._node, self._levels, self._made, self._emitted = graph, node, levels, made, emitted

    def call(self) -> fx.Node:
        """The call, whose result has the dims of its levels first."""
        node, name = self._node, op_name(self._node)
        if name == HIDES:
            return self._hide()
        if name == SHOWS:
            return self._show()
        mapped = [n for n in node.all_input_nodes if self._levels.get(n)]
        if not mapped or name in _LIKE:
            return self._recorded(self._graph.node_copy(node, lambda n: self._made.get(n, n)))
        meeting = argument(node, 1, "indices") if name == "index" else node.all_input_nodes
        width = max(_ndim(n) for n in meeting if is_tensor_node(n))
        aligned = {n: self._aligned(n, width) for n in mapped}
        return self._recorded(self._graph.node_copy(node, lambda n: aligned.get(n) or self._made.get(n, n)))

    def _hide(self) -> fx.Node:
        x, level = operand(self._node), argument(self._node, 2, "level")
        own, levels = self._levels.get(x, ()), self._levels[self._node]
        source = len(own) + argument(self._node, 1, "in_dim") % _ndim(x)
        return self._moved(self._made.get(x, x), source, levels.index(level))

    def _show(self) -> fx.Node:
        x, level = operand(self._node), argument(self._node, 1, "level")
        own, levels = self._levels.get(x, ()), self._levels[self._node]
        place = len(levels) + argument(self._node, 3, "out_dim") % _ndim(self._node)
        whole = self._made.get(x, x)
        if level in own:
            return self._moved(whole, own.index(level), place)
        sizes = [-1] * (len(levels) + _ndim(self._node))
        sizes[place] = argument(self._node, 2, "batch_size")
        longer = self._emit(torch.unsqueeze, whole, place)
        return self._recorded(self._graph.call_method("expand", (longer, *sizes)))

    def _aligned(self, n: fx.Node, width: int) -> fx.Node:
        """A mapped operand with all levels of the result, and as many dims behind them."""
        whole, own = self._made[n], self._levels[n]
        for _ in range(width - _ndim(n)):
            whole = self._emit(torch.unsqueeze, whole, len(own))
        for place, level in enumerate(self._levels[self._node]):
            whole = whole if level in own else self._emit(torch.unsqueeze, whole, place)
        return whole

    def _moved(self, x: fx.Node, source: int, place: int) -> fx.Node:
        return x if source == place else self._emit(torch.movedim, x, source, place)

    def _emit(self, function: Callable[..., torch.Tensor], *args: Any) -> fx.Node:
        return self._recorded(self._graph.call_function(function, args))

    def _recorded(self, made: fx.Node) -> fx.Node:
        """The node, with what tracing would have recorded for it."""
        self._emitted.append(made)
        like = self._node
        if not like.op.startswith("call") or not is_tensor_node(like):  # the same of a slice and of all
            return made
        value = rerun(made)  # never the recorded value, which may be a slice of a vmap that is over
        kept = {key: value for key in ("val", "example_value") if key in like.meta}
        made.meta = {**like.meta, **(kept or {"example_value": value})}
        return made
