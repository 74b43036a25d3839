"""Rows under matmul, einsum and attention.

A summed dim that tells requests apart mixes them, and batch dims of both operands must agree. Only where adapters are
chosen per
token (packed batches) may the keys of an attention tell tokens apart: isolation is then the mask's job, and reported
as assumed.
"""

from __future__ import annotations

import string
from typing import TYPE_CHECKING, Any

from torch import fx

from fxlora.passes.graph import argument, op_name, operand
from fxlora.passes.rows.labels import Label, Mixed, Rows, join

if TYPE_CHECKING:
    from fxlora.passes.rows.propagate import Prover

_LETTERS = string.ascii_uppercase + string.ascii_lowercase


def matmul(p: Prover, node: fx.Node, left: fx.Node, right: fx.Node) -> Rows:
    """Rows of ``left @ right`` with torch.matmul's dims (mm, bmm, mv, addmm alike)."""
    rows_l, rows_r = p.rows(left), p.rows(right)
    for r in (rows_l, rows_r):
        if isinstance(r, Mixed):
            return r
    n_l, n_r = p.ndim(left), p.ndim(right)
    if n_l == 0 or n_r == 0:
        return Mixed("matmul of numbers")
    out = p.ndim(node)
    summed_l, summed_r = n_l - 1, max(n_r - 2, 0)
    batch = max(n_l, n_r, 2) - 2
    place_l = {d: d + batch - (n_l - 2) for d in range(n_l - 1)} if n_l > 1 else {}
    place_r = {d: d + batch - (n_r - 2) for d in range(n_r - 2)} if n_r > 1 else {}
    if n_r > 1:
        place_r[n_r - 1] = out - 1
    return _contract(p, node, rows_l, rows_r, {summed_l}, {summed_r}, place_l, place_r)


def pairs(p: Prover, node: fx.Node, left: fx.Node, right: fx.Node) -> Rows:
    """Rows of what is computed for each pair of a row of [*, M, K] and one of [*, N, K], over K."""
    for r in (p.rows(left), p.rows(right)):
        if isinstance(r, Mixed):
            return r
    out, n_l, n_r = p.ndim(node), p.ndim(left), p.ndim(right)
    place_l = {d: d + out - n_l for d in range(n_l - 1)}
    place_r = {**{d: d + out - n_r for d in range(n_r - 2)}, n_r - 2: out - 1}
    return _contract(p, node, p.rows(left), p.rows(right), {n_l - 1}, {n_r - 1}, place_l, place_r)


def einsum(p: Prover, node: fx.Node) -> Rows:
    """Rows of an einsum of any operands, letter by letter."""
    parsed = parse_einsum(p, node)
    if parsed is None:
        return Mixed("einsum whose equation is not plain letters")
    terms, result, operands = parsed
    rows = [p.rows(x) for x in operands]
    placed: list[Rows] = []
    for term, r in zip(terms, rows, strict=True):
        if isinstance(r, Mixed):
            return r
        if isinstance(r, Label) and len(set(term)) != len(term):
            return Mixed("einsum over a diagonal")
        placed.append(r)
    if len(operands) == 2:
        place = [{d: result.index(c) for d, c in enumerate(term) if c in result} for term in terms]
        summed = [{d for d, c in enumerate(term) if c not in result} for term in terms]
        return _contract(p, node, placed[0], placed[1], summed[0], summed[1], place[0], place[1])
    out: list[Rows] = []
    for term, r in zip(terms, placed, strict=True):
        if isinstance(r, Label):
            if any(term[d] not in result for d in r.dims):
                return Mixed("einsum sums over the request dim")
            moved = sorted((result.index(term[d]), j) for j, d in enumerate(r.dims))
            if [j for _, j in moved] != sorted(j for _, j in moved):
                return Mixed("einsum reorders row dims")
            out.append(Label(r.map, tuple(d for d, _ in moved)))
        else:
            out.append(r)
    return join(out, p.ndim(node), p.count, "einsum")


def parse_einsum(p: Prover, node: fx.Node) -> tuple[list[str], str, list[fx.Node]] | None:
    """Terms, result and operands of an einsum; an ellipsis becomes digits. None where it is neither form of one."""
    equation, given = operand(node), node.args[1:]
    if isinstance(equation, fx.Node):
        equation, given = _lettered(node.args)
    if not isinstance(equation, str):
        return None
    operands: list[Any] = list(given[0]) if len(given) == 1 and isinstance(given[0], list | tuple) else list(given)
    equation = equation.replace(" ", "")
    left, arrow, result = equation.partition("->")
    terms = left.split(",")
    if len(terms) != len(operands) or not all(isinstance(x, fx.Node) for x in operands):
        return None
    spare = "01234567"  # letters of the ellipsis, which no equation can name
    width = 0
    for i, (term, x) in enumerate(zip(terms, operands, strict=True)):
        if "..." in term:
            count = p.ndim(x) - len(term.replace("...", ""))
            width = max(width, count)
            terms[i] = term.replace("...", spare[8 - count :] if count else "")
    if not arrow:
        letters = "".join(terms)
        result = spare[8 - width :] * bool(width) + "".join(
            sorted(c for c in set(letters) if letters.count(c) == 1 and c.isalpha())
        )
    result = result.replace("...", spare[8 - width :] if width else "")
    return terms, result, operands


def _lettered(args: tuple[Any, ...]) -> tuple[str | None, tuple[Any, ...]]:
    """`einsum(x, [0, 1], y, [1, 2], [0, 2])` as an equation and its operands."""
    lists = [*args[1::2], *(args[-1:] if len(args) % 2 else [])]
    if not all(isinstance(item, list | tuple) for item in lists):
        return None, ()
    if not all(n is Ellipsis or (type(n) is int and 0 <= n < 52) for item in lists for n in item):
        return None, ()
    terms = ["".join("..." if n is Ellipsis else _LETTERS[n] for n in item) for item in lists]
    count = len(args) // 2
    return ",".join(terms[:count]) + ("->" + terms[-1] if len(args) % 2 else ""), args[0 : 2 * count : 2]


def _contract(
    p: Prover,
    node: fx.Node,
    left: Rows,
    right: Rows,
    summed_l: set[int],
    summed_r: set[int],
    place_l: dict[int, int],
    place_r: dict[int, int],
) -> Rows:
    if left is None and right is None:
        return None
    name = op_name(node)
    mixes = [isinstance(r, Label) and bool(set(r.dims) & s) for r, s in ((left, summed_l), (right, summed_r))]
    both = isinstance(left, Label) and isinstance(right, Label)
    if mixes[0] or (mixes[1] and not (p.packed and both)):
        return Mixed(f"{name} sums over the request dim")
    placed_l, placed_r = _place(left, place_l, name), _place(right, place_r, name)
    joined = join([placed_l, placed_r], p.ndim(node), p.count, name)
    if not (isinstance(left, Label) and isinstance(right, Label) and p.packed):
        return joined
    if isinstance(joined, Label) and not mixes[1]:
        return joined
    if not p.same_requests(left, right):
        return Mixed(f"{name} combines rows of different sequences")
    p.assume(node, "tokens of one packed sequence attend to each other as the mask allows")
    return placed_l


def _place(rows: Rows, place: dict[int, int], name: str) -> Rows:
    """Rows with their dims where the result has them; summed dims fall away."""
    if not isinstance(rows, Label):
        return rows
    moved = [(place[d], j) for j, d in enumerate(rows.dims) if d in place]
    if moved != sorted(moved):
        return Mixed(f"{name} reorders row dims")
    if len(moved) != len(rows.dims):
        return None
    return Label(rows.map, tuple(d for d, _ in moved))


def attention(p: Prover, node: fx.Node) -> Rows:
    """Rows of scaled_dot_product_attention: a row is its query's; keys, values and mask must be the same request's."""
    query, key, value = operand(node), argument(node, 1, "key"), argument(node, 2, "value")
    mask = argument(node, 3, "attn_mask", "attn_bias")
    ndim = p.ndim(query)
    if not ndim == p.ndim(key) == p.ndim(value):
        return Mixed("attention over operands of different ndim")
    parts: list[Rows] = []
    for x in (query, key, value):
        rows = p.rows(x)
        if isinstance(rows, Mixed):
            return rows
        if isinstance(rows, Label) and p.ndim(x) - 1 in rows.dims:
            return Mixed("attention sums over the request dim")
        parts.append(rows)
    query_rows = parts[0]
    for x, rows in zip((key, value), parts[1:], strict=True):
        same = isinstance(query_rows, Label) and isinstance(rows, Label) and p.same_requests(query_rows, rows)
        if p.packed and rows is not None and not same:
            return Mixed("attention over keys of other sequences")
        if isinstance(rows, Label) and p.ndim(x) - 2 in rows.dims:
            if not p.packed:
                return Mixed("attention over keys of several requests")
            p.assume(node, "tokens of one packed sequence attend to each other as the mask allows")
    if p.packed:
        return (
            query_rows
            if query_rows is not None or parts[1:] == [None, None]
            else Mixed("attention of shared queries over packed keys")
        )
    rows = join(parts, ndim, p.count, "attention")
    if p.is_tensor(mask):
        mask_rows = p.rows(mask)
        if isinstance(mask_rows, Label):
            lead = ndim - p.ndim(mask)
            if p.ndim(mask) - 1 in mask_rows.dims:
                return Mixed("attention mask whose keys belong to several requests")
            mask_rows = Label(mask_rows.map, tuple(d + lead for d in mask_rows.dims))
        rows = join([rows, mask_rows], ndim, p.count, "attention")
    return rows
