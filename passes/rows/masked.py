"""Rows under writes through a boolean mask: `x[mask] = value`, `masked_scatter`.

A value that fits beside the mask is a choice element by element. A list of values, one for each true element in order,
is one only where the same mask picked them: else the masks of other requests decide which of them a request gets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import fx

from fxlora.passes.graph import argument, op_name, operand
from fxlora.passes.rows import indexing, moves
from fxlora.passes.rows.families import is_pointwise, rule
from fxlora.passes.rows.labels import Label, Mixed, RowMap, Rows, join, shift
from fxlora.passes.rows.worlds import UnknownShapeError

if TYPE_CHECKING:
    from fxlora.passes.rows.propagate import Prover


def write(p: Prover, node: fx.Node, target: fx.Node, items: Sequence[Any], value: Any) -> Rows:
    """Rows of ``target`` after ``target[items] = value``, one of the items a mask."""
    found = _mask_of(p, items, p.ndim(target))
    if found is None:
        return Mixed("a write through a mask beside other indices")
    mask, first = found
    end = first + p.ndim(mask)
    rows = [p.rows(target), shift(p.rows(mask), first)]
    source = _picked_by(p, node, value, items, first)
    if source is not None:
        if any(p.shape(source, w)[first:end] != p.shape(mask, w) for w in range(p.count)):
            return Mixed("a write of what the same mask picked out of a tensor of other sizes")
        rows.append(shift(p.rows(source), p.ndim(target) - p.ndim(source)))
    elif p.is_tensor(value):
        # The value lies beside [*dims before the mask, one dim for its true elements, *dims behind].
        lead = p.ndim(target) - p.ndim(mask) + 1 - p.ndim(value)
        own = p.rows(value)
        if first >= lead and not _is_one(p, value, first - lead):
            return Mixed(f"{op_name(node)} of a value for each true element of a mask: masks of all requests decide it")
        if isinstance(own, Label):
            own = Label(own.map, tuple(d + lead if d + lead < first else d + lead + end - first - 1 for d in own.dims))
        rows.append(own)
    joined = join(rows, p.ndim(target), p.count, op_name(node))
    return moves.fit(p, joined, target)


def _mask_of(p: Prover, items: Sequence[Any], ndim: int) -> tuple[fx.Node, int] | None:
    """The one mask among whole slices, and the first dim it stands for."""
    masks = [item for item in items if indexing.is_mask(p, item)]
    if len(masks) != 1 or not isinstance(masks[0], fx.Node):
        return None
    others = [item for item in items if item is not masks[0]]
    if not all(item is Ellipsis or indexing.is_whole(item) for item in others) or others.count(Ellipsis) > 1:
        return None
    before = list(items)[: [item is masks[0] for item in items].index(True)]
    skipped = ndim - p.ndim(masks[0]) - len(others) + 1 if Ellipsis in before else 1
    return masks[0], sum(skipped if item is Ellipsis else 1 for item in before)


def _is_one(p: Prover, value: fx.Node, dim: int) -> bool:
    """Is a dim of size 1, which broadcasts, and not a count that may happen to be 1?"""
    try:
        return all(p.shape(value, w)[dim] == 1 for w in range(p.count))
    except UnknownShapeError:
        return False


def _picked_by(p: Prover, node: fx.Node, value: Any, items: Sequence[Any], first: int) -> fx.Node | None:
    """The tensor out of which the same mask picked the value, seen through elementwise ops.

    Their other operands hold nothing of any request: numbers and weights for all alike, or vectors for each true
    element that the caller vouches for, as `masked_scatter` takes them. first: the dim of the true elements.
    """
    listed = False
    while isinstance(value, fx.Node) and is_pointwise(op_name(value)):
        operands = value.all_input_nodes
        picked = operands if len(operands) == 1 else [n for n in operands if p.rows(n) is not None]
        if len(picked) != 1 or p.ndim(picked[0]) != p.ndim(value):
            break
        behind = p.ndim(value) - first  # dims from that of the true elements on
        beside = [n for n in operands if n is not picked[0] and p.is_tensor(n) and p.ndim(n) >= behind]
        lists = [n for n in beside if not _is_one(p, n, p.ndim(n) - behind)]
        if any(p.strangers_behind(n) or not p.given_behind(n) for n in lists):
            return None
        listed, value = listed or bool(lists), picked[0]
    if not isinstance(value, fx.Node) or op_name(value) not in ("getitem", "index"):
        return None
    source, key = operand(value), argument(value, 1, "indices")
    same = [*key] if isinstance(key, tuple | list) else [key]
    if not p.is_tensor(source) or len(same) != len(items):
        return None
    if not all(_same(a, b) for a, b in zip(same, items, strict=True)):
        return None
    if listed:
        p.assume(node, "what inputs without a request dim hold goes to the masked places of the request it belongs to")
    return source


def _same(a: Any, b: Any) -> bool:
    return a is b if isinstance(a, fx.Node) or isinstance(b, fx.Node) else bool(a == b)


@rule("masked_scatter")
def masked_scatter(p: Prover, node: fx.Node) -> Rows:
    """Vectors of a source, in order, at the true elements of a mask, as image features among embeddings.

    That every request has as many as it has places is no property of the graph. Where the source has rows, each place
    is checked as the graph runs (`Guard`); where the caller said that it holds nothing of single requests that is not
    in their order, that is taken on trust.
    """
    target, mask, source = operand(node), argument(node, 1, "mask"), argument(node, 2, "source")
    rows = join(
        [p.rows(target), shift(p.rows(mask), p.ndim(target) - p.ndim(mask))], p.ndim(target), p.count, "masked_scatter"
    )
    filling = p.rows(source)
    if isinstance(rows, Mixed) or isinstance(filling, Mixed):
        return rows if isinstance(rows, Mixed) else filling
    if p.rows(mask) is None and filling is None:
        return rows
    if filling is None:
        if strangers := p.strangers_behind(source):
            return Mixed(
                "masked_scatter fills places of all requests, in order, from inputs that are not known to follow the "
                f"requests: {', '.join(strangers)} (batch_dims names the request dim of an input, or None for one that "
                "holds what belongs to the requests in their order)"
            )
        p.assume(node, "what inputs without a request dim hold fills the masked places of the request it belongs to")
        return rows
    if not isinstance(rows, Label):
        return Mixed("masked_scatter into what belongs to no request")
    last = p.ndim(target) - 1
    whole = all(p.shape(mask, w)[-1] == 1 and p.shape(target, w)[-1] == p.shape(source, w)[-1] for w in range(p.count))
    told = any(isinstance(r, Label) and p.ndim(x) - 1 in r.dims for x, r in ((target, rows), (source, filling)))
    if not whole or told or not p.dtype(target).is_floating_point or not p.looks_inside:
        return Mixed("masked_scatter of other than whole vectors of numbers")
    places = moves.flat_rows(p, target, rows, last)
    given = moves.flat_rows(p, source, filling, p.ndim(source) - 1)
    p.guards[node] = Guard(mask, places, given)
    return rows


@dataclass(frozen=True)
class Guard:
    """What must hold when a ``masked_scatter`` runs: vector i of the source belongs to the i-th true place's request.

    Attributes:
        places: The map of all places, flat; ``given``: of the source's vectors.
    """

    mask: fx.Node
    places: RowMap
    given: RowMap
