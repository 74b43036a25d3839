"""Rows under ops that move elements: views, reshapes, indexing, concatenation. Each mirrors the op on the row map
itself.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxlora.passes.graph import argument, op_name, operand, varargs
from fxlora.passes.rows.labels import Label, Mixed, RowMap, Rows, broadcast_ids, join, remap, shift
from fxlora.passes.rows.worlds import UnknownShapeError

if TYPE_CHECKING:
    from fxlora.passes.rows.propagate import Prover

Emit = Callable[..., fx.Node]


def derive(
    p: Prover,
    node: fx.Node,
    label: Label,
    ids: Sequence[torch.Tensor],
    dims: Sequence[int],
    build: Callable[[Emit, fx.Node], fx.Node],
    text: str,
) -> Label:
    """A label whose map is computed from another's, or the known map equal to it."""
    made = p.table.intern(ids, (label.map,), node, lambda emit, parents: build(emit, parents[0]), text)
    return Label(made, tuple(dims))


def fit(p: Prover, rows: Rows, node: fx.Node) -> Rows:
    """Check a label against the node's sizes; a map of size 1 under a broadcast dim loses that dim."""
    if not isinstance(rows, Label):
        return rows
    for j in reversed(range(len(rows.dims))):
        d = rows.dims[j]
        sizes = [p.shape(node, w)[d] for w in range(p.count)]
        have = [ids.shape[j] for ids in rows.map.ids]
        if sizes == have:
            continue
        if any(n != 1 for n in have):
            return Mixed(f"{op_name(node)}: rows of size {have} do not fit a dim of size {sizes}")
        dims = rows.dims[:j] + rows.dims[j + 1 :]
        rows = derive(p, node, rows, [i.select(j, 0) for i in rows.map.ids], dims, select_first(j), f"select(dim={j})")
    return rows


def select_first(dim: int) -> Callable[[Emit, fx.Node], fx.Node]:
    """Of a map: its first entry along a dim."""
    return lambda emit, parent: emit(torch.select, parent, dim, 0)


def permute(p: Prover, node: fx.Node, rows: Rows, order: Sequence[int]) -> Rows:
    """Rows after ``permute(order)``: out dim i is source dim order[i]."""
    if not isinstance(rows, Label):
        return rows
    pairs = sorted((order.index(d), j) for j, d in enumerate(rows.dims))
    dims, positions = tuple(d for d, _ in pairs), [j for _, j in pairs]
    if positions == sorted(positions):
        return Label(rows.map, dims)
    ids = [i.permute(positions) for i in rows.map.ids]
    return derive(
        p,
        node,
        rows,
        ids,
        dims,
        lambda emit, parent: emit(torch.permute, parent, tuple(positions)),
        f"permute{tuple(positions)}",
    )


def permutation_of(p: Prover, node: fx.Node) -> list[int]:
    """The dim order that a transpose-like op makes."""
    name, ndim = op_name(node), p.ndim(operand(node))
    order = list(range(ndim))
    if name == "permute":
        return [d % ndim for d in varargs(node, 1, "dims")]
    if name == "moveaxis":
        source, target = argument(node, 1, "source"), argument(node, 2, "destination")
        return _moved(ndim, source, target)
    if name == "T":
        return order[::-1]
    if name in ("mT", "H"):
        a, b = ndim - 2, ndim - 1
    elif name == "t":
        a, b = (0, 1) if ndim == 2 else (0, 0)
    else:
        a = argument(node, 1, "dim0", "axis0") % ndim
        b = argument(node, 2, "dim1", "axis1") % ndim
    if ndim:
        order[a], order[b] = order[b], order[a]
    return order


def _moved(ndim: int, source: Any, target: Any) -> list[int]:
    sources = [s % ndim for s in ((source,) if isinstance(source, int) else source)]
    targets = [t % ndim for t in ((target,) if isinstance(target, int) else target)]
    rest = iter(d for d in range(ndim) if d not in sources)
    return [sources[targets.index(d)] if d in targets else next(rest) for d in range(ndim)]


def factor(source: Sequence[int], target: Sequence[int]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Smallest groups of source and target dims that hold the same elements: ``[6, 4] -> [2, 3, 4]`` is (0)(0,1),
    (1)(2).
    """
    groups: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    if 0 in (*source, *target):
        raise UnknownShapeError("a view of an empty tensor")
    i = o = 0
    while i < len(source) or o < len(target):
        if i < len(source) and o < len(target) and source[i] == target[o]:
            groups.append(((i,), (o,)))
            i, o = i + 1, o + 1
            continue
        if o < len(target) and target[o] == 1:
            groups.append(((), (o,)))
            o += 1
            continue
        if i < len(source) and source[i] == 1:
            groups.append(((i,), ()))
            i += 1
            continue
        first_i, first_o, have, want = i, o, 1, 1
        while have != want or i == first_i or o == first_o:
            if have <= want:
                have *= source[i]
                i += 1
            else:
                want *= target[o]
                o += 1
        groups.append((tuple(range(first_i, i)), tuple(range(first_o, o))))
    return groups


def reshape(p: Prover, node: fx.Node, x: fx.Node, rows: Rows) -> Rows:
    """Rows after a view: a group of dims that holds a row dim expands the map over its other dims, then reshapes it
    alike.
    """
    if not isinstance(rows, Label):
        return rows
    groupings = [factor(p.shape(x, w), p.shape(node, w)) for w in range(p.count)]
    if any(g != groupings[0] for g in groupings):
        return Mixed(f"{op_name(node)} regroups dims differently at different sizes")
    touched = [(gi, go) for gi, go in groupings[0] if set(gi) & set(rows.dims)]
    kept = [d for gi, _ in touched for d in gi]
    dims = [d for _, go in touched for d in go]
    if all(len(gi) == len(go) == 1 for gi, go in touched):
        return Label(rows.map, tuple(dims))
    ids = []
    for w in range(p.count):
        source, target = p.shape(x, w), p.shape(node, w)
        expanded = broadcast_ids(rows, len(source), w).expand(
            [source[d] if d in kept else 1 for d in range(len(source))]
        )
        ids.append(expanded.reshape([target[d] for d in dims]))
    label = rows

    def build(emit: Emit, parent: fx.Node) -> fx.Node:
        for position, d in enumerate(kept):
            if d not in label.dims:
                parent = emit(torch.unsqueeze, parent, position)
        parent = emit(torch.broadcast_to, parent, tuple(p.size(emit, x, d) for d in kept))
        return emit(torch.reshape, parent, tuple(p.size(emit, node, d) for d in dims))

    made = derive(p, node, rows, ids, dims, build, f"reshape({_sizes(p, node, dims)})")
    return drop_constant(p, node, made)


def drop_constant(p: Prover, node: fx.Node, rows: Label) -> Label:
    """The label without the dims along which all elements belong to one request (a split that undoes an expansion)."""
    for j in reversed(range(len(rows.dims))):
        if all(i.shape[j] > 1 and bool((i == i.narrow(j, 0, 1)).all()) for i in rows.map.ids):
            rest = rows.dims[:j] + rows.dims[j + 1 :]
            rows = derive(
                p, node, rows, [i.select(j, 0) for i in rows.map.ids], rest, select_first(j), f"select(dim={j})"
            )
    return rows


def cat(p: Prover, node: fx.Node, parts: Sequence[fx.Node], dim: int) -> Rows:
    """Rows after concatenation: along a row dim the maps are concatenated, else all parts must have equal rows."""
    rows = [p.rows(x) for x in parts if p.shape(x, 0) != (0,)]
    parts = [x for x in parts if p.shape(x, 0) != (0,)]
    for r in rows:
        if isinstance(r, Mixed):
            return r
    labels = [r for r in rows if isinstance(r, Label)]
    if not labels:
        return None
    wanted = max(labels, key=lambda label: len(label.dims)).dims
    if not any(dim in label.dims for label in labels):
        joined = join(rows, p.ndim(node), p.count, op_name(node))
        if not isinstance(joined, Mixed) or len(labels) < len(parts):
            return joined
        wanted = tuple(sorted({*wanted, dim}))  # each part is one request's along this dim, but not all the same one's
    full = [_spread(p, x, r, wanted) for x, r in zip(parts, rows, strict=True)]
    if any(f is None for f in full):
        return Mixed("cat along the request dim of rows with and without a request")
    position = wanted.index(dim)
    ids = [torch.cat([f.map.ids[w] for f in full if f], position) for w in range(p.count)]
    made = p.table.intern(
        ids,
        [f.map for f in full if f],
        node,
        lambda emit, parents: emit(torch.cat, list(parents), position),
        f"cat(dim={position})",
    )
    return Label(made, wanted)


def stack(p: Prover, node: fx.Node, parts: Sequence[fx.Node], dim: int) -> Rows:
    """Rows after stacking along a new dim, which tells requests apart where the parts are of different ones."""
    rows = [remap(p.rows(x), lambda d: d + (d >= dim)) for x in parts]
    joined = join(rows, p.ndim(node), p.count, "stack")
    labels = [r for r in rows if isinstance(r, Label)]
    if not isinstance(joined, Mixed) or len(labels) < len(parts) or any(r.dims != labels[0].dims for r in labels):
        return joined
    dims = tuple(sorted({*labels[0].dims, dim}))
    position = dims.index(dim)
    ids = [torch.stack([label.map.ids[w] for label in labels], position) for w in range(p.count)]
    made = p.table.intern(
        ids,
        [label.map for label in labels],
        node,
        lambda emit, parents: emit(torch.stack, list(parents), position),
        f"stack(dim={position})",
    )
    return Label(made, dims)


def _spread(p: Prover, x: fx.Node, rows: Rows, dims: tuple[int, ...]) -> Label | None:
    """The label with its map expanded over ``dims``."""
    if not isinstance(rows, Label) or not set(rows.dims) <= set(dims):
        return None
    if rows.dims == dims:
        return rows
    return expand_over(p, x, rows, dims)


def expand_over(p: Prover, x: fx.Node, rows: Label, dims: Sequence[int], order: Sequence[int] | None = None) -> Label:
    """The same rows with a map that runs over all of ``dims`` of ``x`` (of ``x`` permuted by ``order``, if given)."""
    ids = []
    source = list(range(p.ndim(x))) if order is None else list(order)
    for w in range(p.count):
        shape = [p.shape(x, w)[d] for d in source]
        full = broadcast_ids(rows, len(shape), w).expand([shape[d] if d in dims else 1 for d in range(len(shape))])
        ids.append(full.reshape([shape[d] for d in dims]))

    def build(emit: Emit, parent: fx.Node) -> fx.Node:
        for position, d in enumerate(dims):
            if d not in rows.dims:
                parent = emit(torch.unsqueeze, parent, position)
        return emit(torch.broadcast_to, parent, tuple(p.size(emit, x, source[d]) for d in dims))

    return derive(p, x, rows, ids, dims, build, f"expand({_sizes(p, x, [source[d] for d in dims])})")


def _sizes(p: Prover, x: fx.Node, dims: Sequence[int]) -> str:
    """Sizes of dims as text, `*` for those that differ from world to world."""
    found = [{p.shape(x, w)[d] for w in range(p.count)} for d in dims]
    return ", ".join(str(*sizes) if len(sizes) == 1 else "*" for sizes in found)


def pieces(p: Prover, node: fx.Node, rows: Rows, dim: int) -> Rows | tuple[Rows, ...]:
    """Rows of each part of a chunk, split or unbind."""
    if not isinstance(rows, Label):
        return rows
    unbinds = op_name(node) == "unbind"
    if dim not in rows.dims:
        return remap(rows, lambda d: d - (unbinds and d > dim))
    facts = [p.worlds[w].facts(node) for w in range(p.count)]
    if not all(isinstance(f, tuple) and len(f) == len(facts[0]) for f in facts):
        return Mixed(f"{op_name(node)} of the request dim into a number of parts that depends on its size")
    position = rows.dims.index(dim)
    out: list[Rows] = []
    for k in range(len(facts[0])):
        ids = []
        for w in range(p.count):
            before = sum(1 if unbinds else part.shape[dim] for part in facts[w][:k])
            ids.append(
                rows.map.ids[w].select(position, before)
                if unbinds
                else rows.map.ids[w].narrow(position, before, facts[w][k].shape[dim])
            )
        dims = tuple(d - (d > dim) for d in rows.dims if d != dim) if unbinds else rows.dims
        out.append(derive(p, node, rows, ids, dims, _piece(p, node, position, dim, k, unbinds), f"part {k}"))
    return tuple(out)


def _piece(
    p: Prover, node: fx.Node, position: int, dim: int, k: int, unbinds: bool
) -> Callable[[Emit, fx.Node], fx.Node]:
    def build(emit: Emit, parent: fx.Node) -> fx.Node:
        if unbinds:
            return emit(torch.select, parent, position, k)
        sizes = [emit(torch.ops.aten.sym_size.int, emit(operator.getitem, node, i), dim) for i in range(k + 1)]
        start: Any = 0
        for size in sizes[:-1]:
            start = emit(operator.add, start, size)
        return emit(torch.narrow, parent, position, start, sizes[-1])

    return build


def repeat_interleave(p: Prover, node: fx.Node, rows: Rows) -> Rows:
    """Rows after ``repeat_interleave`` by a fixed count."""
    repeats, dim = argument(node, 1, "repeats"), argument(node, 2, "dim")
    if not isinstance(rows, Label):
        return rows
    if dim is None:
        return Mixed("repeat_interleave of flattened rows")
    dim %= p.ndim(operand(node))
    if dim not in rows.dims:
        return fit(p, rows, node)
    if p.is_tensor(repeats):
        return Mixed("repeat_interleave along the request dim by a tensor")
    position = rows.dims.index(dim)
    ids = [i.repeat_interleave(int(p.number(repeats, w)), position) for w, i in enumerate(rows.map.ids)]
    return derive(
        p,
        node,
        rows,
        ids,
        rows.dims,
        lambda emit, parent: emit(torch.repeat_interleave, parent, repeats, position),
        f"repeat_interleave({repeats})",
    )


def repeat(p: Prover, node: fx.Node, rows: Rows) -> Rows:
    """Rows after ``repeat``/``tile``: the map repeats alike along row dims."""
    if not isinstance(rows, Label):
        return rows
    counts = list(varargs(node, 1, "repeats", "dims"))
    source, out = p.ndim(operand(node)), p.ndim(node)
    counts = [1] * (out - len(counts)) + counts
    lead = out - source
    own = [counts[d + lead] for d in rows.dims]
    if all(c == 1 for c in own):
        return shift(rows, lead)
    ids = [i.repeat([int(p.number(c, w)) for c in own]) for w, i in enumerate(rows.map.ids)]
    dims = [d + lead for d in rows.dims]
    return derive(
        p,
        node,
        rows,
        ids,
        dims,
        lambda emit, parent: emit(torch.Tensor.repeat, parent, tuple(own)),
        f"repeat{tuple(own)}",
    )


def flat_rows(p: Prover, x: fx.Node, rows: Label, lead: int, order: Sequence[int] | None = None) -> RowMap:
    """The map of the ``prod(lead dims)`` rows of ``x`` (of ``x`` permuted by ``order``), one entry a row."""
    dims = tuple(range(lead))
    if lead == 0:
        return rows.map
    full = rows if rows.dims == dims else expand_over(p, x, rows, dims, order)
    if lead == 1:
        return full.map
    ids = [i.reshape(math.prod(i.shape)) for i in full.map.ids]
    return derive(p, x, full, ids, (0,), lambda emit, parent: emit(torch.reshape, parent, (-1,)), "flatten").map
