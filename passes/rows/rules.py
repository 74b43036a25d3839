"""One row rule per op family: given the rows of the operands, the rows of the result.

A rule answers ``Mixed`` whenever an output element could depend on two requests. What no rule knows is ``Mixed``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from fxlora.passes.graph import argument, fake_value, op_name, operand, varargs
from fxlora.passes.rows import contractions, indexing, mapped, masked, matrices, moves, samples, views  # noqa: F401  rules
from fxlora.passes.rows.families import (
    ALONG_DIM,
    CREATIONS,
    JOINS,
    LENDS_SHAPE,
    NO_DATA,
    REDUCTIONS,
    RULES,
    SCALARS,
    is_pointwise,
    rule,
)
from fxlora.passes.rows.labels import Label, Mixed, Rows, join, remap, shift
from fxlora.passes.rows.routing import offsets_follow_rows

if TYPE_CHECKING:
    from fxlora.passes.rows.propagate import Prover


def rows_of(p: Prover, node: fx.Node) -> Any:
    """The rows of a call: a Rows, or a tuple of them for an op that returns several tensors."""
    name = op_name(node)
    if name in NO_DATA or (name == "getitem" and op_name(operand(node)) in ("size", "shape")):
        return Mixed("a size that the data of all requests decides") if _is_counted(node) else None
    incoming = [r for n in node.all_input_nodes for r in _flat(p.labels.get(n))]
    if not any(r is not None for r in incoming):
        return None
    if name in LENDS_SHAPE and _of_first(p, node, name) is None:
        return None
    if name in SCALARS and not p.is_tensor(node):
        return Mixed(f"{name} turns rows into a number that all requests see")
    counts = [n for n in node.all_input_nodes if not p.is_tensor(n) and isinstance(p.labels.get(n), Mixed)]
    if counts and not _keeps_sizes(p, node, name, counts):
        return p.labels[counts[0]]
    rows = _apply_rule(p, node, name)
    if rows is None and name not in ("getitem", "values", "indices"):
        return Mixed(f"{name} loses sight of its rows")
    return rows


def _is_counted(node: fx.Node) -> bool:
    """True for sizes that depend on data: how many elements of a mask are true is no request's own."""
    value = fake_value(node)
    sizes = value if isinstance(value, tuple | list) else [value]
    return any(isinstance(size, torch.SymInt) and free_unbacked_symbols(size) for size in sizes)


def _keeps_sizes(p: Prover, node: fx.Node, name: str, counts: Sequence[fx.Node]) -> bool:
    """True where sizes that data decides only name the sizes that the operand has already."""
    if name in ("view", "reshape", "unflatten"):
        return True
    sizes = varargs(node, 1, "size", "shape")
    if name != "expand" or not p.is_tensor(operand(node)):
        return False
    lead = len(sizes) - p.ndim(operand(node))
    at = [d for d, size in enumerate(sizes) if size in counts]
    return all(
        d >= lead and p.shape(operand(node), w)[d - lead] == p.shape(node, w)[d] for d in at for w in range(p.count)
    )


def _apply_rule(p: Prover, node: fx.Node, name: str) -> Any:
    if name in CREATIONS:
        if name in ("as_tensor", "tensor") and p.is_tensor(operand(node)):
            return p.rows(operand(node))
        return Mixed(f"{name} of values that depend on requests")
    found = RULES.get(name)
    if node in p.vmapped and not mapped.is_followed(name):
        return Mixed(f"{name.lstrip('?')} inside vmap")
    if not is_known(name):
        return p.look_inside(node)
    if name not in JOINS and not is_pointwise(name) and not only_operand(p, node):
        rows = p.look_inside(node)
        if not isinstance(rows, Mixed):
            return rows
        return Mixed(f"{name} with other operands than the first that depend on requests")
    if found is not None:
        return found(p, node)
    if not isinstance(operand(node), fx.Node) and not is_pointwise(name):
        return Mixed(f"{name} of several tensors")
    if name in REDUCTIONS:
        return reduce(p, node)
    if name in ALONG_DIM:
        return along_dim(p, node)
    if is_pointwise(name):
        return pointwise(p, node)
    return Mixed(f"no row rule for {name.lstrip('?')}")


def _of_first(p: Prover, node: fx.Node, name: str) -> Rows:
    """Rows of the operand that gives the values, where the other lends only shape, dtype or device."""
    if name in CREATIONS:
        return next((r for n in node.all_input_nodes if n is not operand(node) and (r := p.rows(n)) is not None), None)
    return p.rows(operand(node))


def is_known(name: str) -> bool:
    """True for ops that some rule speaks of."""
    listed = name in RULES or name in NO_DATA or name in REDUCTIONS or name in ALONG_DIM
    return listed or is_pointwise(name)


def only_operand(p: Prover, node: fx.Node) -> bool:
    """True when the first operand is the only one that depends on requests, and is read once."""
    first = operand(node)
    read: list[fx.Node] = []
    fx.map_arg((node.args, dict(node.kwargs)), read.append)
    return sum(n is first for n in read) == 1 and all(p.labels.get(n) is None for n in read if n is not first)


def _flat(rows: Any) -> list[Rows]:
    return list(rows) if isinstance(rows, tuple) else [rows]


def pointwise(p: Prover, node: fx.Node) -> Any:
    """Elementwise ops: the operands must agree wherever they meet."""
    facts = p.worlds[0].facts(node)
    out = len(facts[0].shape) if isinstance(facts, tuple) else p.ndim(node)
    parts: list[Rows] = []
    nodes = [operand(node)] if op_name(node) in ("to", "type_as", "type") else node.all_input_nodes
    for n in nodes:
        rows = p.rows(n)
        if isinstance(rows, Label) and p.ndim(n) > out:
            return Mixed(f"{op_name(node)} of a larger tensor")
        parts.append(shift(rows, out - p.ndim(n)) if isinstance(rows, Label) else rows)
    joined = join(parts, out, p.count, op_name(node))
    return (joined,) * len(facts) if isinstance(facts, tuple) else moves.fit(p, joined, node)


def dims_of(p: Prover, node: fx.Node, position: int) -> list[int] | None:
    """The dims an op works along; None for all."""
    dim = argument(node, position, "dim", "axis", "dims")
    if dim is None or isinstance(dim, str):
        return None
    ndim = max(p.ndim(operand(node)), 1)
    listed = [dim] if isinstance(dim, int) else list(dim)
    return [d % ndim for d in listed] or None


def reduce(p: Prover, node: fx.Node) -> Any:
    """Reductions: never over a dim that tells requests apart."""
    name, rows = op_name(node), p.rows(operand(node))
    if name in ("max", "min") and p.is_tensor(argument(node, 1, "other")):
        return pointwise(p, node)
    if not only_operand(p, node):
        return Mixed(f"{name} of several tensors")
    if not isinstance(rows, Label):
        return rows
    position = 2 if name in ("norm", "vector_norm", "linalg_vector_norm", "kthvalue") else 1
    if position < len(node.args) and isinstance(node.args[position], bool):
        position = len(node.args)  # var(x, unbiased)
    dims = dims_of(p, node, position)
    ndim = p.ndim(operand(node))
    reduced = list(range(ndim)) if dims is None else dims
    if any(rows.map.ids[w].shape[rows.dims.index(d)] != 1 for d in reduced if d in rows.dims for w in range(p.count)):
        return Mixed(f"{name} over the request dim mixes requests")
    for d in sorted((d for d in reduced if d in rows.dims), reverse=True):
        j = rows.dims.index(d)
        rest = rows.dims[:j] + rows.dims[j + 1 :]
        rows = moves.derive(
            p, node, rows, [i.select(j, 0) for i in rows.map.ids], rest, moves.select_first(j), "select"
        )
    facts = p.worlds[0].facts(node)
    first = facts[0] if isinstance(facts, tuple) else facts
    if len(first.shape) == ndim:
        return rows
    return remap(rows, lambda d: d - sum(r < d for r in reduced))


def along_dim(p: Prover, node: fx.Node) -> Any:
    """Ops that combine or move elements along given dims only (softmax, cumsum, roll, flip, ...)."""
    name, rows = op_name(node), p.rows(operand(node))
    if not isinstance(rows, Label):
        return rows
    default = ALONG_DIM[name]
    if name in ("flip",):
        dims: list[int] | None = [d % p.ndim(operand(node)) for d in varargs(node, 1, "dims")]
    elif name == "multinomial":
        dims = [p.ndim(operand(node)) - 1]
    elif name in ("roll", "rot90", "normalize", "gumbel_softmax"):
        dims = dims_of(p, node, 4 if name == "gumbel_softmax" else 2)
    else:
        dims = dims_of(p, node, 1)
    if dims is None and default is not None:
        dims = [default % p.ndim(operand(node))]
    if dims is None or any(d in rows.dims for d in dims):
        return Mixed(f"{name} along the request dim mixes requests")
    facts = p.worlds[0].facts(node)
    return (rows,) * len(facts) if isinstance(facts, tuple) else moves.fit(p, rows, node)


@rule("where", "nonzero", "argwhere", "nonzero_numpy")
def where(p: Prover, node: fx.Node) -> Any:
    """The positions of true elements; of three operands, an elementwise choice."""
    return (
        pointwise(p, node)
        if len(node.args) + len(node.kwargs) > 1 and op_name(node) == "where"
        else (indexing.selected(p, node))
    )


@rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(p: Prover, node: fx.Node) -> Any:
    """Normalisation over the last dims."""
    rows = p.rows(operand(node))
    over = len(argument(node, 1, "normalized_shape"))
    if isinstance(rows, Label) and any(d >= p.ndim(operand(node)) - over for d in rows.dims):
        return Mixed(f"{op_name(node)} over the request dim mixes requests")
    return rows


@rule("linear")
def linear(p: Prover, node: fx.Node) -> Rows:
    """A row of the result is a row of the input."""
    x, rows = operand(node), p.rows(operand(node))
    if isinstance(rows, Label) and p.ndim(x) - 1 in rows.dims:
        return Mixed("linear sums over the request dim")
    return rows


@rule("_grouped_mm", "grouped_mm", "grouped_mm_fallback")
def grouped_mm(p: Prover, node: fx.Node) -> Rows:
    """Row m of x times one expert's weight: the row stays its request's, whichever expert it goes to."""
    x, weight = argument(node, 0, "input", "self", "mat_a"), argument(node, 1, "mat2", "mat_b", "weight")
    rows = p.rows(x)
    others = [n for n in node.all_input_nodes if n not in (x, argument(node, 2, "offs"))]
    if p.ndim(x) != 2 or weight is x or any(p.rows(n) is not None for n in others):
        return Mixed("grouped_mm of other than rows by expert weights")
    if isinstance(rows, Label) and rows.dims not in ((0,), ()):
        return Mixed("grouped_mm sums over the request dim")
    offsets = argument(node, 2, "offs")
    if isinstance(rows, Label) and isinstance(offsets, fx.Node) and not offsets_follow_rows(p, x, rows, offsets):
        return Mixed("grouped_mm whose offsets are not proven to follow from each row's own choice of expert")
    return rows


@rule("matmul", "mm", "bmm", "mv", "dot")
def matmul(p: Prover, node: fx.Node) -> Rows:
    """Matrix products."""
    return contractions.matmul(p, node, operand(node), argument(node, 1, "other", "mat2", "vec", "tensor"))


@rule("addmm", "baddbmm", "addmv")
def addmm(p: Prover, node: fx.Node) -> Rows:
    """A matrix product plus a bias."""
    product = contractions.matmul(
        p, node, argument(node, 1, "mat1", "batch1", "mat"), argument(node, 2, "mat2", "batch2", "vec")
    )
    bias = operand(node)
    return join([product, shift(p.rows(bias), p.ndim(node) - p.ndim(bias))], p.ndim(node), p.count, op_name(node))


@rule("bucketize", "isin")
def looked_up(p: Prover, node: fx.Node) -> Rows:
    """Where each element stands among values that are no request's."""
    return p.rows(operand(node))


@rule("einsum")
def einsum(p: Prover, node: fx.Node) -> Rows:
    """Einstein sums."""
    return contractions.einsum(p, node)


@rule(
    "scaled_dot_product_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_attention_math",
)
def attention(p: Prover, node: fx.Node) -> Any:
    """Scaled dot product attention."""
    rows = contractions.attention(p, node)
    facts = p.worlds[0].facts(node)
    if not isinstance(facts, tuple):
        return rows
    rest = [Mixed("inner result of attention") if isinstance(rows, Label) else rows] * (len(facts) - 1)
    return (rows, *rest)


@rule("paged_cache_update")
def paged_cache_update(p: Prover, node: fx.Node) -> Any:
    """Keys and values of many requests out of a paged cache: whose they are is told by the mask of their reader."""
    for x in node.all_input_nodes:
        if isinstance(rows := p.rows(x), Mixed):
            return rows
    if not p.packed:
        return Mixed("a paged cache holds tokens of several requests, and adapters are chosen per request")
    p.assume(node, "tokens of one packed sequence attend to each other, and to a paged cache, as the mask allows")
    return (None, None)
