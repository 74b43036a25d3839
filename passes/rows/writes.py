"""Rows under in-place ops: what a write does to its target, to the tensor it is a view of, and to other views of it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxlora.passes.graph import argument, op_name, operand
from fxlora.passes.rows import indexing, masked, moves
from fxlora.passes.rows.families import INPLACE_AT, KEEPS_STATISTICS, is_pointwise
from fxlora.passes.rows.labels import Label, Mixed, Rows, broadcast_ids, join, shift
from fxlora.passes.rows.worlds import UnknownShapeError

if TYPE_CHECKING:
    from fxlora.passes.rows.propagate import Prover

_ALONG = {"index_copy_", "index_add_", "index_fill_", "scatter_", "scatter_add_", "scatter_reduce_", "index_reduce_"}
_INDEXED_VIEWS = {"getitem", "slice", "select", "narrow"}
FUNCTIONAL = {name.rstrip("_") for name in _ALONG} | {"index_put"}
_FREE = -1  # an element no request has written


def is_write(node: fx.Node) -> bool:
    """True for ops that change their first operand in place (or an ``out=`` tensor)."""
    if not node.op.startswith("call"):
        return False
    name = op_name(node)
    schema = _schema(node)
    if schema is not None:
        return bool(schema.is_mutable)
    if name.startswith("?"):
        return node.op != "call_module" or not str(node.target).endswith("_guards_fn")
    if name in INPLACE_AT and argument(node, INPLACE_AT[name], "inplace", default=False) is True:
        return True
    return (
        name == "setitem"
        or node.kwargs.get("out") is not None
        or (name.endswith("_") and not name.endswith("__") and name != "requires_grad_")
    )


def _schema(node: fx.Node) -> Any:
    """The schema of an aten or custom op; of its first overload where the graph names none."""
    target = node.target
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = getattr(target, target.overloads()[0])
    return target._schema if isinstance(target, torch._ops.OpOverload) else None


def also_written(node: fx.Node) -> list[fx.Node]:
    """Operands beside the first that a call may change: by its schema, or as nothing is known of a Python function."""
    schema = _schema(node)
    if schema is None:
        return list(node.all_input_nodes) if op_name(node).startswith("?") else []
    found = []
    for i, spec in enumerate(schema.arguments):
        if (i or isinstance(operand(node), list | tuple)) and spec.alias_info is not None and spec.alias_info.is_write:
            value = argument(node, i, spec.name)
            found += [v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, fx.Node)]
    return found


def apply_write(p: Prover, node: fx.Node) -> Rows:
    """Update the labels of everything a write reaches; returns the rows of the node itself (its target's)."""
    if isinstance(out := node.kwargs.get("out"), fx.Node):
        rows: Rows = Mixed("an out= argument") if any(p.rows(n) for n in node.all_input_nodes) else None
        _spread(p, out, rows)
        return rows
    for other in also_written(node):
        _spread(p, other, Mixed(f"written by {op_name(node).lstrip('?')}"))
    target = operand(node)
    if isinstance(target, list | tuple):
        for n in target:
            _spread(p, n, Mixed(f"written by {op_name(node)}"))
    if not p.is_tensor(target):
        return (
            Mixed(f"{op_name(node)} writes into something that is no tensor")
            if any(p.rows(n) for n in node.all_input_nodes)
            else None
        )
    if not any(p.rows(n) is not None for n in node.all_input_nodes):
        return None
    _spread(p, target, written(p, node, target))
    return p.rows(target)


def mark_statistics(p: Prover, node: fx.Node, rows: Any) -> None:
    """A norm that keeps running statistics has written them whenever it may have been in training mode."""
    if op_name(node) in KEEPS_STATISTICS and (isinstance(rows, Mixed) or op_name(node) == "instance_norm"):
        for n in node.all_input_nodes[1:]:
            _spread(p, n, Mixed(f"statistics of the batch, kept by {op_name(node)}"))


def written(p: Prover, node: fx.Node, target: fx.Node) -> Rows:
    """Rows of the target of a write, after it."""
    name = op_name(node)
    if not name.endswith("_") and name != "setitem":
        name += "_"
    if name == "setitem" and (key := _key(argument(node, 1))) and any(indexing.is_mask(p, i) for i in key):
        return masked.write(p, node, target, key, argument(node, 2))
    if name == "setitem":
        return store(p, node, target, _items(p, target, argument(node, 1)), argument(node, 2))
    if name in ("index_put_", "_unsafe_index_put_"):
        indices = [slice(None) if i is None else i for i in argument(node, 1, "indices")]
        if any(indexing.is_mask(p, i) for i in indices):
            return masked.write(p, node, target, indices, argument(node, 2, "values"))
        return store(p, node, target, _items(p, target, tuple(indices)), argument(node, 2, "values"))
    if name in _ALONG:
        return _along(p, node, target)
    if is_pointwise(name[:-1]) or name in ("copy_", "zero_", "fill_", "uniform_", "normal_", "exponential_"):
        ndim = p.ndim(target)
        rows: list[Rows] = []
        for n in node.all_input_nodes:
            if p.is_tensor(n) and p.ndim(n) > ndim:
                return Mixed(f"{name} of a larger tensor")
            rows.append(shift(p.rows(n), ndim - p.ndim(n)) if p.is_tensor(n) else p.rows(n))
        return moves.fit(p, join(rows, ndim, p.count, name), target)
    seen = p.look_inside(node)
    return Mixed(f"{seen.reason}, in place") if isinstance(seen, Mixed) else seen


def _key(key: Any) -> list[Any]:
    return list(key) if isinstance(key, tuple) else [key]


def _items(p: Prover, target: fx.Node, key: Any) -> list[Any]:
    return indexing.expand_items(_key(key), p.ndim(target))


def _along(p: Prover, node: fx.Node, target: fx.Node) -> Rows:
    """index_copy_, scatter_ and their kin: where neither side tells requests apart along the written dim, rows join."""
    name = op_name(node).rstrip("_")
    dim = argument(node, 1, "dim") % max(p.ndim(target), 1)
    index, source = argument(node, 2, "index"), argument(node, 3, "source", "src", "value", "tensor")
    if (
        name.startswith("index_")
        and p.is_tensor(source)
        and any(isinstance(p.rows(n), Label) for n in (target, source))
    ):
        items: list[Any] = [slice(None)] * p.ndim(target)
        items[dim] = index
        return store(p, node, target, items, source)
    rows = [p.rows(target)]
    for n in (index, source):
        if not p.is_tensor(n):
            continue
        own = p.rows(n)
        if isinstance(own, Label) and p.ndim(n) != p.ndim(target):
            return Mixed(f"{name} at positions that depend on a request")
        rows.append(own)
    if any(isinstance(r, Label) and dim in r.dims for r in rows):
        return Mixed(f"{name} along the request dim")
    return moves.fit(p, join(rows, p.ndim(target), p.count, name), target)


def store(p: Prover, node: fx.Node, target: fx.Node, items: Sequence[Any], value: Any, value_rows: Rows = None) -> Rows:
    """Rows of ``target`` after ``target[items] = value``; ``value_rows`` overrides the value's rows."""
    by_source = [item for item in items if item is not None]
    if any(indexing.is_mask(p, i) for i in items):
        return Mixed("a write through a view that a mask picked")
    where, start, width = indexing.layout(p, items)
    out = len(where) + width + sum(item is None for item in items)
    own = p.rows(target)
    parts: list[Rows] = [value_rows if value_rows is not None else shift(p.rows(value), out - p.ndim(value))]
    follows = False
    for d, item in enumerate(by_source):
        if p.is_tensor(item) and p.rows(item) is not None:
            if (isinstance(own, Label) and d in own.dims) or _tells_rows(parts[0], start, width):
                follows = True
            else:
                parts.append(shift(p.rows(item), start + width - p.ndim(item)))
    new = join(parts, out, p.count, op_name(node))
    if isinstance(own, Mixed) or isinstance(new, Mixed):
        return own if isinstance(own, Mixed) else new
    if own is None and new is None:
        return None
    made, covered = _store_ids(p, node, target, by_source, where, out, own, new)
    if follows and (own is not None or not covered) and not _stays_home(p, by_source, parts[0], own, made):
        return Mixed("a write whose positions depend on several requests")
    if own is not None and any(indexing.is_index(p, i) for i in by_source):
        return join([made, own], p.ndim(target), p.count, op_name(node))  # positions may leave rows as they were
    return made


def _stays_home(p: Prover, items: Sequence[Any], value: Rows, own: Label | None, made: Rows) -> bool:
    """Does every request choose positions among its own rows alone? Then what stays unwritten is its own choice too."""
    if not isinstance(value, Label) or not isinstance(made, Label) or (own is not None and made != own):
        return False
    indices = [p.rows(item) for item in items if p.is_tensor(item) and p.rows(item) is not None]
    return all(isinstance(rows, Label) and rows.map is value.map for rows in indices)


def _tells_rows(rows: Rows, start: int, width: int) -> bool:
    """Do the value's rows run along the index? Then the index only says where they go, and the map follows it."""
    return isinstance(rows, Label) and any(start <= d < start + width for d in rows.dims)


def _store_ids(
    p: Prover,
    node: fx.Node,
    target: fx.Node,
    items: Sequence[Any],
    where: dict[int, int],
    out: int,
    own: Label | None,
    new: Label | None,
) -> tuple[Rows, bool]:
    """Write the value's ids into the target's, element by element, over the dims that matter; then find the map that
    fits.
    """
    ndim = p.ndim(target)
    idle = {
        d
        for d, item in enumerate(items)
        if indexing.is_whole(item) and not (own and d in own.dims) and not (new and where[d] in new.dims)
    }
    results = []
    for w in range(p.count):
        shape = [1 if d in idle else n for d, n in enumerate(p.shape(target, w))]
        if torch.Size(shape).numel() > 2**22:
            return Mixed("a write too large to follow"), False
        ids = (
            torch.full(shape, _FREE, dtype=torch.long)
            if own is None
            else broadcast_ids(own, ndim, w).long().expand(shape).clone()
        )
        value = torch.tensor(_FREE) if new is None else broadcast_ids(new, out, w).long()
        if new is not None:
            at = tuple(
                slice(None) if d in idle else indexing.concrete(p, item, shape[d], w) for d, item in enumerate(items)
            )
            region = ids[at]
            if region.dim() != value.dim():
                return Mixed("a write whose value does not align"), False
            ids[at] = value.expand(region.shape)
            if not torch.equal(ids[at], value.expand(region.shape)):
                return Mixed("a write of rows of different requests to one place"), False
        results.append(ids)
    dims = [d for d in range(ndim) if d not in idle]
    covered = all(bool((ids != _FREE).all()) for ids in results)
    same = [d for d in dims if all(bool((ids == ids.narrow(d, 0, 1)).all()) for ids in results)]
    if covered and len(same) < len(dims):  # along these dims the whole tensor is written alike
        dims = [d for d in dims if d not in same]
        results = [ids[tuple(slice(0, 1) if d in same else slice(None) for d in range(ndim))] for ids in results]
    if covered:
        squeezed = [ids.reshape([ids.shape[d] for d in dims]) for ids in results]
        found = p.table.find(squeezed, node)
        if found is not None:
            return Label(found, tuple(dims)), True
    known = [Label(row_map, tuple(range(row_map.ids[0].dim()))) for row_map in p.table.before(node)]
    return match(p, results, [label for label in (own, new) if label is not None] + known), covered


def match(p: Prover, ids: Sequence[torch.Tensor], candidates: Sequence[Label]) -> Rows:
    """The candidate whose map, laid over some dims, equals ``ids`` wherever a request wrote."""
    ndim = ids[0].dim()
    for label in candidates:
        for dims in [label.dims, *combinations(range(ndim), len(label.dims))]:
            trial = Label(label.map, tuple(dims))
            if max(trial.dims, default=0) < ndim and all(_covers(trial, ids[w], w) for w in range(p.count)):
                return trial
    return Mixed("a write that leaves rows of different requests in one place")


def _covers(label: Label, ids: torch.Tensor, world: int) -> bool:
    laid = broadcast_ids(label, ids.dim(), world)
    if any(a != b for a, b in zip(laid.shape, ids.shape, strict=True) if a != 1):
        return False
    return bool(((laid == ids) | (ids == _FREE)).all())


def _spread(p: Prover, target: fx.Node, rows: Rows) -> None:
    """Set the target's rows, and what follows for the tensor it is a view of and for that tensor's other views."""
    before = p.rows(target)
    p.labels[target] = rows
    root = p.roots.get(target, target)
    if rows == before and not isinstance(rows, Mixed):
        return
    if root is not target:
        old_root = p.rows(root)
        new_root = _lift(p, target, root, rows)
        p.labels[root] = new_root
        if new_root == old_root and not isinstance(new_root, Mixed):
            return
    for member in p.members.get(root, ()):
        if member not in (target, root):
            p.labels[member] = Mixed("memory written in place through another view")


def _lift(p: Prover, target: fx.Node, root: fx.Node, rows: Rows) -> Rows:
    """Rows of the root after its view ``target`` got ``rows``: followed through plain indexing, else unknown."""
    source = operand(target)
    if source is not root or op_name(target) not in _INDEXED_VIEWS or isinstance(rows, Mixed):
        return Mixed("memory written in place through a view")
    try:
        return store(p, target, root, indexing.index_items(p, target), target, value_rows=rows)
    except UnknownShapeError:
        return Mixed("memory written in place through a view")
