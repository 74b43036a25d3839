"""Rows under indexing: getitem, slice, select, index_select and their kin, mirrored on the row map along its own
dims.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxlora.passes.graph import argument, op_name, operand
from fxlora.passes.rows.labels import Label, Mixed, Rows, join, shift
from fxlora.passes.rows.moves import derive, fit
from fxlora.passes.rows.worlds import UnknownShapeError

if TYPE_CHECKING:
    from fxlora.passes.rows.propagate import Prover


def index_items(p: Prover, node: fx.Node) -> list[Any]:
    """The indexing of getitem, index, slice, select, narrow, index_select as a list with one item per source dim (and
    None).
    """
    name, x = op_name(node), operand(node)
    ndim = p.ndim(x)
    whole: list[Any] = [slice(None)] * ndim
    if name in ("slice", "select", "index_select", "narrow"):
        dim = argument(node, 1, "dim", default=0) % ndim
        if name == "slice":
            whole[dim] = slice(
                argument(node, 2, "start"), argument(node, 3, "end"), argument(node, 4, "step", default=1)
            )
        elif name == "narrow":
            start, length = argument(node, 2, "start"), argument(node, 3, "length")
            if isinstance(start, fx.Node) or isinstance(length, fx.Node):
                raise UnknownShapeError("narrow with computed bounds")
            whole[dim] = slice(start, None if start < 0 and start + length == 0 else start + length)
        else:
            whole[dim] = argument(node, 2, "index")
        return whole
    given = argument(node, 1, "indices", "index")
    if name == "index":
        return [slice(None) if i is None else i for i in given] + whole[len(given) :]
    items = list(given) if isinstance(given, tuple) else [given]
    return expand_items(items, ndim)


def expand_items(items: list[Any], ndim: int) -> list[Any]:
    """Replace an Ellipsis by the slices it stands for, and append those left out."""
    used = sum(i is not None and i is not Ellipsis for i in items)
    out: list[Any] = []
    for item in items:
        out += [slice(None)] * (ndim - used) if item is Ellipsis else [item]
    return out + [slice(None)] * (ndim - sum(i is not None for i in out))


def is_whole(item: Any) -> bool:
    """True for a slice that keeps a dim as it is."""
    return (
        isinstance(item, slice)
        and item.start in (None, 0)
        and item.step in (None, 1)
        and (item.stop is None or (isinstance(item.stop, int) and item.stop >= 2**31))
    )


def layout(p: Prover, items: Sequence[Any]) -> tuple[dict[int, int], int, int]:
    """Where dims go: source dim of each slice -> out dim; first out dim of the broadcast index tensors; how many they
    have.
    """
    tensors = [i for i, item in enumerate(items) if is_index(p, item)]
    width = max((1 if isinstance(items[i], list) else p.ndim(items[i]) for i in tensors), default=0)
    kept = [i for i, item in enumerate(items) if not _is_int(p, item)]
    places = [kept.index(i) for i in tensors]
    adjacent = not places or places == list(range(places[0], places[0] + len(places)))
    out = 0 if adjacent else width
    where: dict[int, int] = {}
    start, source = 0, 0
    for i, item in enumerate(items):
        if item is None:
            out += 1
            continue
        if i in tensors:
            if adjacent and i == tensors[0]:
                start, out = out, out + width
        elif not _is_int(p, item):
            where[source] = out
            out += 1
        source += 1
    return where, start, width


def is_index(p: Prover, item: Any) -> bool:
    """True for an index tensor, or a list of numbers that stands for one."""
    return p.is_tensor(item) or (isinstance(item, list) and all(type(i) is int for i in item))


def is_mask(p: Prover, item: Any) -> bool:
    """True for what selects elements by data, so that how many is not known."""
    return (
        isinstance(item, bool)
        or (isinstance(item, list) and not is_index(p, item))
        or (p.is_tensor(item) and p.dtype(item) in (torch.bool, torch.uint8))
    )


def _is_int(p: Prover, item: Any) -> bool:
    return (isinstance(item, int) and not isinstance(item, bool)) or (
        isinstance(item, fx.Node) and not p.is_tensor(item)
    )


def index(p: Prover, node: fx.Node, x: fx.Node, items: Sequence[Any]) -> Rows:
    """Rows after indexing: the same indexing of the map along row dims; elsewhere the rows of the index join in."""
    if any(is_mask(p, i) for i in items):
        return Mixed("indexing by a mask") if any(p.rows(n) for n in node.all_input_nodes) else None
    rows = p.rows(x)
    where, start, width = layout(p, items)
    by_source = [item for item in items if item is not None]
    row_dims = set(rows.dims) if isinstance(rows, Label) else set()
    parts: list[Rows] = []
    for d, item in enumerate(by_source):
        if p.is_tensor(item) and d not in row_dims:
            parts.append(shift(p.rows(item), start + width - p.ndim(item)))
    if isinstance(rows, Label):
        moved = _index_map(p, node, rows, by_source, where, start, width)
        if isinstance(moved, Mixed):
            return moved
        parts.append(fit(p, moved, node))
    else:
        parts.append(rows)
    return join(parts, p.ndim(node), p.count, op_name(node))


def _index_map(
    p: Prover, node: fx.Node, rows: Label, items: Sequence[Any], where: dict[int, int], start: int, width: int
) -> Rows:
    picked = [items[d] for d in rows.dims]
    if all(is_whole(i) for i in picked):
        return Label(rows.map, tuple(where[d] for d in rows.dims))
    if any(_beyond(p, item, rows.map.ids[w].shape[j]) for j, item in enumerate(picked) for w in range(p.count)):
        return Mixed(f"{op_name(node)} with a bound beyond the sizes of the proof")
    inner, inner_start, inner_width = layout(p, picked)
    dims: dict[int, int] = {out: where[rows.dims[j]] for j, out in inner.items()}
    dims |= {inner_start + i: start + width - inner_width + i for i in range(inner_width)}
    order = [dims[i] for i in range(len(dims))]
    if order != sorted(order):
        return Mixed(f"{op_name(node)} reorders row dims by index tensors")
    ids = []
    for w in range(p.count):
        value = rows.map.ids[w]
        at = tuple(concrete(p, item, value.shape[j], w) for j, item in enumerate(picked))
        ids.append(value[at])
    text = f"[{', '.join(_spell(i) for i in picked)}]"
    return derive(p, node, rows, ids, order, lambda emit, parent: emit(operator.getitem, parent, tuple(picked)), text)


def _beyond(p: Prover, item: Any, size: int) -> bool:
    """A literal slice bound that only larger sizes would reach: what it does there is not seen here."""
    if not isinstance(item, slice) or p.frozen:
        return False
    return any(type(bound) is int and size <= abs(bound) < 2**31 for bound in (item.start, item.stop))


def concrete(p: Prover, item: Any, size: int, w: int) -> Any:
    """One index item of a dim of ``size`` as numbers of one world."""
    if isinstance(item, slice):
        return slice(*(p.number(bound, w) for bound in (item.start, item.stop, item.step)))
    if isinstance(item, list):
        return torch.tensor(item)
    if p.is_tensor(item):
        return p.integers.index_values(item, size, w).long()
    return p.number(item, w)


def _spell(item: Any) -> str:
    if isinstance(item, slice):
        return (
            ":"
            if is_whole(item)
            else f"{'' if item.start is None else item.start}:{'' if item.stop is None else item.stop}"
        )
    return str(item)


def selected(p: Prover, node: fx.Node) -> Any:
    """Rows of the positions of a mask's true elements: each belongs to the request of its element."""
    rows = p.rows(operand(node))
    if not isinstance(rows, Label):
        return rows
    places = []
    for w in range(p.count):
        value = p.integers.values[w].get(node)
        if not isinstance(value, tuple | torch.Tensor):
            return Mixed(f"{op_name(node)} whose positions are not known")
        places.append(value if isinstance(value, tuple) else value.unbind(-1))
    ids = [rows.map.ids[w][tuple(places[w][d] for d in rows.dims)] for w in range(p.count)]
    in_one, dims = p.is_tensor(node), rows.dims

    def build(emit: Any, parent: fx.Node) -> fx.Node:
        columns = [emit(torch.select, node, 1, d) if in_one else emit(operator.getitem, node, d) for d in dims]
        return emit(operator.getitem, parent, tuple(columns))

    label = derive(p, node, rows, ids, (0,), build, "of selected elements")
    return label if in_one else (label,) * len(places[0])
