"""Row rules of ops that move elements: which move of the row map mirrors each of them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxlora.passes.graph import argument, op_name, operand
from fxlora.passes.rows import indexing, moves, samples
from fxlora.passes.rows.families import rule
from fxlora.passes.rows.labels import Label, Mixed, Rows, join, remap, shift

if TYPE_CHECKING:
    from fxlora.passes.rows.propagate import Prover


@rule("getitem")
def getitem(p: Prover, node: fx.Node) -> Any:
    """Indexing, or one result of an op that returns several."""
    source = operand(node)
    if not p.is_tensor(source):
        rows = p.labels.get(source)
        key = argument(node, 1)
        if isinstance(rows, tuple):
            return rows[key] if isinstance(key, int) else Mixed("computed choice among results")
        return rows
    return indexing.index(p, node, source, indexing.index_items(p, node))


@rule("values", "indices")
def named_result(p: Prover, node: fx.Node) -> Any:
    """`sort(x).values`: one result of an op that returns two, by name."""
    rows = p.labels.get(operand(node))
    if p.is_tensor(operand(node)):
        return Mixed(f"no row rule for {op_name(node)} of a tensor")
    return rows[op_name(node) == "indices"] if isinstance(rows, tuple) else rows


@rule("index", "slice", "select", "index_select", "narrow")
def index(p: Prover, node: fx.Node) -> Rows:
    """Indexing by slices, numbers and tensors."""
    return indexing.index(p, node, operand(node), indexing.index_items(p, node))


@rule("embedding")
def embedding(p: Prover, node: fx.Node) -> Rows:
    """A table row for each id: rows of the ids."""
    first, second = operand(node), argument(node, 1, "weight", "indices", "input")
    ids, weight = (first, second) if not p.dtype(first).is_floating_point else (second, first)
    if p.rows(weight) is not None:
        return Mixed("embedding table that depends on a request")
    return p.rows(ids)


@rule("gather", "take_along_dim")
def gather(p: Prover, node: fx.Node) -> Rows:
    """Elements picked along one dim."""
    x, indices = operand(node), argument(node, 2 if op_name(node) == "gather" else 1, "index", "indices")
    dim = argument(node, 1 if op_name(node) == "gather" else 2, "dim")
    rows = p.rows(x)
    if dim is None:
        return Mixed("gather over flattened rows")
    dim %= p.ndim(x)
    if isinstance(rows, Label):
        if dim in rows.dims:
            if rows.dims != (0,) or p.ndim(x) != 1:
                return Mixed(f"{op_name(node)} along the request dim")
            return indexing.index(p, node, x, [indices])
        for w in range(p.count):
            if any(p.shape(indices, w)[d] != p.shape(x, w)[d] for d in rows.dims):
                return Mixed(f"{op_name(node)} of a part of the rows")
    return join([rows, p.rows(indices)], p.ndim(node), p.count, op_name(node))


@rule("sort", "topk", "argsort", "msort")
def ranking(p: Prover, node: fx.Node) -> Any:
    """Along other dims rows stay; a sort of one-dimensional rows permutes the map by the order it found."""
    name, x = op_name(node), operand(node)
    rows = p.rows(x)
    if not isinstance(rows, Label):
        return rows
    dim = argument(node, 2 if name == "topk" else 1, "dim", default=0 if name == "msort" else -1)
    if not isinstance(dim, int) or isinstance(dim, bool):
        dim = argument(node, 2, "dim", default=-1)
    if dim % p.ndim(x) not in rows.dims:
        return rows
    order = Mixed(f"positions that a {name} over several requests chose")
    if name == "argsort":
        return order
    values: list[Any] = [p.integers.values[w].get(node) for w in range(p.count)]
    if p.ndim(x) != 1 or not all(isinstance(v, tuple) and isinstance(v[1], torch.Tensor) for v in values):
        return (Mixed(f"{name} over the request dim"), order)
    ids = [rows.map.ids[w][values[w][1]] for w in range(p.count)]

    def build(emit: moves.Emit, parent: fx.Node) -> fx.Node:
        return emit(operator.getitem, parent, emit(operator.getitem, node, 1))

    return (moves.derive(p, node, rows, ids, (0,), build, f"{name} order"), order)


@rule("cat", "stack")
def cat(p: Prover, node: fx.Node) -> Rows:
    """Concatenation and stacking."""
    parts: Sequence[fx.Node] = operand(node)
    dim = argument(node, 1, "dim", "axis", default=0)
    if op_name(node) == "stack":
        return moves.stack(p, node, parts, dim % p.ndim(node))
    return moves.cat(p, node, parts, dim % p.ndim(node))


@rule("vstack", "hstack", "dstack", "column_stack")
def stack_along(p: Prover, node: fx.Node) -> Rows:
    """Concatenation along a dim that the op names, of operands that have it."""
    parts: Sequence[fx.Node] = operand(node)
    dim = {"vstack": 0, "dstack": 2}.get(op_name(node), 1)
    if any(p.ndim(x) != p.ndim(node) or p.ndim(x) <= dim for x in parts):
        return Mixed(f"{op_name(node)} of operands of too few dims")
    return moves.cat(p, node, parts, dim)


@rule("diff")
def diff(p: Prover, node: fx.Node) -> Rows:
    """Differences of neighbours along one dim, of a tensor and what is put before and after it."""
    ndim = p.ndim(node)
    dim = argument(node, 2, "dim", default=-1) % ndim
    parts = (operand(node), argument(node, 3, "prepend"), argument(node, 4, "append"))
    rows = join([p.rows(x) for x in parts], ndim, p.count, "diff")
    if isinstance(rows, Label) and dim in rows.dims:
        return Mixed("diff along the request dim mixes requests")
    return rows


@rule("chunk", "split", "unbind", "tensor_split")
def pieces(p: Prover, node: fx.Node) -> Any:
    """Splits into parts."""
    x = operand(node)
    dim = argument(node, 1 if op_name(node) == "unbind" else 2, "dim", default=0)
    return moves.pieces(p, node, p.rows(x), dim % p.ndim(x))


@rule("transpose", "permute", "t", "T", "mT", "H", "moveaxis")
def transpose(p: Prover, node: fx.Node) -> Rows:
    """Dims in another order."""
    return moves.permute(p, node, p.rows(operand(node)), moves.permutation_of(p, node))


@rule("view", "reshape", "flatten", "unflatten", "view_as", "reshape_as", "ravel")
def reshape(p: Prover, node: fx.Node) -> Rows:
    """The same elements under other dims."""
    x = operand(node)
    if op_name(node) in ("view", "reshape") and (len(node.args) > 1 and isinstance(node.args[1], torch.dtype)):
        return Mixed("view as another dtype")
    return moves.reshape(p, node, x, p.rows(x))


@rule("unsqueeze")
def unsqueeze(p: Prover, node: fx.Node) -> Rows:
    """A new dim of size 1."""
    dim = argument(node, 1, "dim") % p.ndim(node)
    return remap(p.rows(operand(node)), lambda d: d + (d >= dim))


@rule("squeeze")
def squeeze(p: Prover, node: fx.Node) -> Rows:
    """Dims of size 1 removed."""
    return moves.reshape(p, node, operand(node), p.rows(operand(node)))


@rule("expand", "expand_as")
def expand(p: Prover, node: fx.Node) -> Rows:
    """Dims of size 1 broadcast."""
    x = operand(node)
    return moves.fit(p, shift(p.rows(x), p.ndim(node) - p.ndim(x)), node)


@rule("repeat_interleave")
def repeat_interleave(p: Prover, node: fx.Node) -> Rows:
    """Each element repeated in place."""
    return moves.repeat_interleave(p, node, p.rows(operand(node)))


@rule("repeat")
def repeat(p: Prover, node: fx.Node) -> Rows:
    """The whole repeated."""
    return moves.repeat(p, node, p.rows(operand(node)))


@rule("unfold")
def unfold(p: Prover, node: fx.Node) -> Rows:
    """Sliding windows along a dim."""
    rows, dim = p.rows(operand(node)), argument(node, 1, "dimension")
    if node.target is torch.nn.functional.unfold:
        return samples.per_sample(p, node)
    if isinstance(rows, Label) and dim % p.ndim(operand(node)) in rows.dims:
        return Mixed("unfold along the request dim")
    return rows


@rule("pad", "constant_pad_nd")
def pad(p: Prover, node: fx.Node) -> Rows:
    """Padding at the ends of dims."""
    x, rows = operand(node), p.rows(operand(node))
    widths = list(argument(node, 1, "pad"))
    for i in range(0, len(widths), 2):
        dim = p.ndim(x) - 1 - i // 2
        if isinstance(rows, Label) and dim in rows.dims and (widths[i] != 0 or widths[i + 1] != 0):
            return Mixed("pad along the request dim")
    return rows


@rule("diagonal", "linalg_diagonal")
def diagonal(p: Prover, node: fx.Node) -> Rows:
    """The diagonal over two dims, which becomes the last dim."""
    x, rows = operand(node), p.rows(operand(node))
    defaults = (-2, -1) if op_name(node) == "linalg_diagonal" else (0, 1)
    over = [argument(node, 2 + i, f"dim{i + 1}", default=d) % p.ndim(x) for i, d in enumerate(defaults)]
    if isinstance(rows, Label) and any(d in over for d in rows.dims):
        return Mixed("diagonal over the request dim")
    return remap(rows, lambda d: d - sum(o < d for o in over))


@rule("tril", "triu", "one_hot")
def keep_rows(p: Prover, node: fx.Node) -> Rows:
    """Ops that leave every element in its place (one_hot appends a dim)."""
    return p.rows(operand(node))


@rule("view_as_complex", "view_as_real")
def complex_view(p: Prover, node: fx.Node) -> Rows:
    """Real and complex views of the last dim."""
    rows, last = p.rows(operand(node)), p.ndim(operand(node)) - 1
    if op_name(node) == "view_as_complex" and isinstance(rows, Label) and last in rows.dims:
        return Mixed("view_as_complex along the request dim")
    return rows
