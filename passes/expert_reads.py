"""How a call reads expert weights: every spelling of rows times the weights of their experts, seen as one product.

Told by dataflow: grouped matmuls over a 3-D weight, products with ``w[ids]`` (one expert a row), with all of ``w``
(every row through every expert) and with one ``w[e]``, whatever op spells them (bmm, matmul, einsum, linear) and
however the weight lies ([E, N, K] or [E, K, N]). What reads such a weight in another way is told in words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxlora.passes.experts import UNIT, ExpertProduct, Routing
from fxlora.passes.graph import argument, op_name, operand
from fxlora.passes.rows.moves import factor
from fxlora.passes.weights import CASTS, PASS_ON, Weights

if TYPE_CHECKING:
    from fxlora.passes.reads import Reader

_GROUPED = {"_grouped_mm", "grouped_mm", "grouped_mm_fallback"}
_PRODUCTS = {"bmm", "matmul", "mm", "baddbmm", "addmm", "linear", "einsum"}
# Strides of the stand-in for a weight: a dim is known by its stride, whatever views moved it.
_STRIDES = (10007, 20011, 30011, 40009, 50021, 60013, 70001, 80021, 90001, 100003, 110017, 120011, 130003)
_X_LETTERS, _ID_LETTERS, _DIGITS = "ABCDEFGH", "pqrst", "12345"
_RESHAPES = {"view", "reshape", "flatten", "unflatten"}


@dataclass(frozen=True)
class _Operand:
    """A weight operand: the letters of its dims (``a``, ``b`` the stored ones, None for broadcast dims), what picked
    experts, and the letters that a reshape put into one dim, by the digit that stands for it.
    """

    term: tuple[str | None, ...]
    routing: Routing
    ids_term: str
    merged: Mapping[str, str]


def gathered_root(weights: Weights, node: Any) -> fx.Node | None:
    """The 3-D weight behind an operand that was gathered per row, None for any other operand."""
    found = _trail(weights, node)
    tensor = weights.tensor_of(found[0]) if found else None
    return found[0] if found is not None and tensor is not None and tensor.dim() == 3 else None


def read_product(
    reader: Reader, node: fx.Node, name: str, other: fx.Node
) -> tuple[ExpertProduct, bool, fx.Node, Any] | str:
    """The product that a call makes of a 3-D weight: (product, whether stored [E, K, N], x, addend), or why none."""
    if name not in _GROUPED | _PRODUCTS:
        return f"a 3-D weight, read by {name.lstrip('?')}"
    seen = _operand(reader, other)
    if isinstance(seen, str):
        return f"expert weights, {seen}"
    if name in _GROUPED:
        found = _grouped(reader, node, other, seen)
    elif name in ("bmm", "matmul", "mm"):
        found = _matmul(reader, seen, other, operand(node), argument(node, 1, "other", "mat2", "tensor"))
    elif name in ("baddbmm", "addmm"):
        found = _added(reader, node, name, other, seen)
    elif name == "linear":
        found = _linear(reader, node, other, seen)
    else:
        found = _einsum(reader, node, other, seen)
    if isinstance(found, str):
        return f"expert weights, {found}"
    return _checked(reader, node, seen, found)


# What one spelling gives: x, its letters, the result's letters, the routing, an addend.
_Found = tuple[fx.Node, list[str], list[str], Routing, Any]


def _checked(
    reader: Reader, node: fx.Node, seen: _Operand, found: _Found
) -> tuple[ExpertProduct, bool, fx.Node, Any] | str:
    """The product, if it sums over one stored dim of the weight alone and keeps every other letter once."""
    x, x_term, out_term, routing, addend = found
    rows_as_one = next((d for d, parts in seen.merged.items() if parts == seen.ids_term and d in x_term), None)
    merged = {digit: parts for digit, parts in seen.merged.items() if digit != rows_as_one}
    whole = [letter for term in out_term for letter in merged.get(term, term)]
    stored = {"a", "b"}
    summed, made = stored & set(x_term), stored & set(whole)
    several = set(merged) & set(x_term) or len(set(merged) & set(out_term)) > 1
    if len(summed) != 1 or len(made) != 1 or summed == made or several:
        return "expert weights, in a product that is no linear over them"
    k, n = summed.pop(), made.pop()
    index = rows_as_one or seen.ids_term or ("e" if routing == Routing() else "")
    ones = {c for c, size in zip(x_term, reader.world.shape(x), strict=True) if size == 1} - {k, *index}
    swap = {k: "k", n: "n", **dict.fromkeys(ones, UNIT)}
    x_letters, out_letters = ([swap.get(letter, letter) for letter in term] for term in (x_term, whole))
    rows = [letter for letter in x_letters if letter not in ("k", UNIT)]
    kept = [letter for letter in out_letters if letter != UNIT]
    if sorted(kept) != sorted({*rows, *index, "n"}) or len(set(rows)) != len(rows):
        return "expert weights, in a product that sums over rows or experts"
    sizes = dict(zip(x_term, reader.world.shape(x), strict=True))
    shape = dict(zip(out_term, reader.world.shape(node), strict=True))
    if any(sizes.get(letter, size) != size for letter, size in shape.items()):
        return "expert weights, in a product that broadcasts its rows"
    x, x_letters = _peeled(reader, x, x_letters)
    groups = tuple("".join(swap.get(c, c) for c in merged.get(term, term)) for term in out_term)
    return ExpertProduct(routing, "".join(x_letters), index, "".join(out_letters), groups), k == "a", x, addend


def _peeled(reader: Reader, x: fx.Node, term: list[str]) -> tuple[fx.Node, list[str]]:
    """x before the calls that only gave it dims of size 1."""
    while op_name(x) == "unsqueeze":
        dim = argument(x, 1, "dim") % len(term)
        if term[dim] != UNIT:
            break
        x, term = operand(x), term[:dim] + term[dim + 1 :]
    return x, term


def _trail(weights: Weights, node: Any) -> tuple[fx.Node, list[fx.Node]] | None:
    """The weight behind an operand and the calls from it to the operand, gathers among them."""
    path: list[fx.Node] = []
    while isinstance(node, fx.Node):
        if weights.is_weight(node):
            return node, path[::-1]
        if not node.op.startswith("call") or op_name(node) not in PASS_ON:
            return None
        path.append(node)
        node = operand(node)
    return None


def _operand(reader: Reader, other: fx.Node) -> _Operand | str:
    """How an operand sees a 3-D weight, told by running its views on a stand-in whose dims are known by stride."""
    found = _trail(reader.weights, other)
    tensor = reader.weights.tensor_of(found[0]) if found else None
    if found is None or tensor is None or tensor.dim() != 3:
        return "behind calls that are no views"
    sizes: dict[str, int] = dict(zip("eab", tensor.shape, strict=True))
    view: Any = _stand_in("eab", sizes)
    routing, ids_term, merged = Routing(), "", dict[str, str]()
    for node in found[1]:
        name = op_name(node)
        if name in CASTS:
            continue
        if not reader.gathers(node) and name not in _RESHAPES:
            view = reader.viewed(node, view)
            continue
        term = _letters(view, sizes)
        if term is None:
            return f"{name} of a part of them"
        if "e" not in term and not ids_term and routing.index is None:
            routing = Routing(index=int(view.storage_offset()) // _STRIDES[0])
        elif view.storage_offset():
            return f"{name} of a part of them"
        if name in _RESHAPES:
            letters = _regrouped(term, tuple(view.shape), reader.world.shape(node), sizes, merged)
            if letters is None:
                return "of which a part or a reshape is read"
            view = _stand_in(letters, sizes)
            continue
        ids = reader.gather_index(node)
        dim = argument(node, 1, "dim") % len(term) if name == "index_select" else 0
        if ids is None or term[dim] != "e":
            return f"{name} of a part of them"
        ids_term = _ID_LETTERS[: reader.ndim(ids)]
        sizes |= dict(zip(ids_term, reader.world.shape(ids), strict=True))
        view = _stand_in([*term[:dim], *ids_term, *term[dim + 1 :]], sizes)
        routing = Routing(ids=ids, read_at=node)
    return _operand_of(view, sizes, merged, routing, ids_term)


def _operand_of(
    view: Any, sizes: dict[str, int], merged: dict[str, str], routing: Routing, ids_term: str
) -> _Operand | str:
    term = _letters(view, sizes)
    letters = "" if term is None else "".join(merged.get(letter, letter) for letter in term if letter is not None)
    if term is None or not {"a", "b"} <= set(letters):
        return "of which a part or a reshape is read"
    if "e" not in letters and not ids_term and routing.index is None:
        index, rest = divmod(int(view.storage_offset()), _STRIDES[0])
        return "of which a part is read" if rest else _Operand(term, Routing(index=index), "", merged)
    if view.storage_offset() or any(letter not in letters for letter in ids_term):
        return "of which a part is read"
    return _Operand(term, routing, ids_term, {digit: merged[digit] for digit in merged if digit in term})


def _regrouped(
    term: Sequence[str | None],
    source: Sequence[int],
    target: Sequence[int],
    sizes: dict[str, int],
    merged: dict[str, str],
) -> list[str | None] | None:
    """The letters after a reshape: of dims put into one, a digit that stands for them; None for any other reshape."""
    letters: list[str | None] = []
    for before, after in factor(source, target):
        mine = [term[d] for d in before if term[d] is not None]
        if any(term[d] is None and source[d] != 1 for d in before) or (mine and not after):
            return None
        if len(mine) == 1 and len(after) == 1:
            letters.append(mine[0])
        elif len(mine) > 1 and len(after) == 1:
            digit = next(d for d in _DIGITS if d not in merged)
            merged[digit] = "".join(merged.get(str(letter), str(letter)) for letter in mine)
            sizes[digit] = math.prod(sizes[str(letter)] for letter in mine)
            letters.append(digit)
        elif len(mine) == 1 and [target[d] for d in after] == [sizes[c] for c in merged.get(str(mine[0]), "")]:
            letters += merged[str(mine[0])]
        elif not mine:
            letters += [None] * len(after)
        else:
            return None
    return letters


def _stand_in(letters: Sequence[str | None], sizes: dict[str, int]) -> torch.Tensor:
    shape = [1 if letter is None else sizes[letter] for letter in letters]
    strides = [_STRIDES[_place(letter)] if letter is not None else 0 for letter in letters]
    return torch.empty_strided(shape, strides, device="meta")


def _place(letter: str) -> int:
    return ("eab" + _DIGITS + _ID_LETTERS).index(letter)


def _letters(view: Any, sizes: dict[str, int]) -> tuple[str | None, ...] | None:
    """The letter of each dim of a view, None for dims of size 1 and broadcast ones; None for a part of the weight."""
    if not isinstance(view, torch.Tensor):
        return None
    by_stride = {_STRIDES[_place(letter)]: letter for letter in sizes}
    term: list[str | None] = []
    for size, stride in zip(view.shape, view.stride(), strict=True):
        letter = by_stride.get(stride)
        if letter is not None and sizes[letter] == size and letter not in term:
            term.append(letter)
        elif size == 1 or stride == 0:
            term.append(None)
        else:
            return None
    return tuple(term)


def _size(reader: Reader, other: fx.Node, seen: _Operand, letter: str) -> int:
    return reader.world.shape(other)[seen.term.index(letter)]


def _grouped(reader: Reader, node: fx.Node, other: fx.Node, seen: _Operand) -> _Found | str:
    x = argument(node, 0, "input", "self", "mat_a")
    weight, offsets = argument(node, 1, "weight", "mat2", "mat_b"), argument(node, 2, "offs")
    extras = [argument(node, 3, "bias"), argument(node, 4, "out_dtype")]
    if weight is not other or x is other:
        return "given to a grouped matmul as its rows"
    if any(extra is not None for extra in extras):
        return "in a grouped matmul with a bias or an output dtype"
    if offsets is None:
        return _matmul(reader, seen, other, x, weight)
    if reader.ndim(x) != 2 or len(seen.term) != 3 or seen.term[0] != "e":
        return "in a grouped matmul of other than rows by experts"
    k, n = str(seen.term[1]), str(seen.term[2])
    return x, ["A", k], ["A", n], Routing(offsets=offsets, read_at=node), None


def _matmul(reader: Reader, seen: _Operand, other: fx.Node, left: Any, right: Any) -> _Found | str:
    """``left @ right`` with torch.matmul's dims, one of them the weight."""
    if left is other and right is other:
        return "multiplied with themselves"
    x, on_left = (right, True) if left is other else (left, False)
    if not reader.is_tensor(x) or reader.ndim(x) < 2 or len(seen.term) < 2:
        return "multiplied with a vector"
    shape, w_term = reader.world.shape(x), list(seen.term)
    x_term: list[str] = list(_X_LETTERS[: len(shape)])
    k, n = (w_term[-1], w_term[-2]) if on_left else (w_term[-2], w_term[-1])
    if k is None or n is None:
        return "multiplied along other dims than in- and out-features"
    contracted = -2 if on_left else -1
    free = x_term[-1 if on_left else -2]
    x_term[contracted] = k
    batch: list[str] = []
    for i in range(3, max(len(shape), len(w_term)) + 1):
        theirs = w_term[-i] if i <= len(w_term) else None
        mine = x_term[-i] if i <= len(shape) else None
        if theirs is not None and mine is not None:
            x_term[-i] = UNIT if shape[-i] == 1 and _size(reader, other, seen, theirs) != 1 else theirs
        if theirs is None and mine is None:
            return "multiplied with fewer dims than they have"
        batch.insert(0, str(theirs or mine))
    out_term = [*batch, n, free] if on_left else [*batch, free, n]
    return x, x_term, out_term, seen.routing, None


def _added(reader: Reader, node: fx.Node, name: str, other: fx.Node, seen: _Operand) -> _Found | str:
    if argument(node, 3, "beta", default=1) != 1 or argument(node, 4, "alpha", default=1) != 1:
        return f"{name} with alpha or beta"
    first, second = argument(node, 1, "batch1", "mat1"), argument(node, 2, "batch2", "mat2")
    found = _matmul(reader, seen, other, first, second)
    return found if isinstance(found, str) else (*found[:4], operand(node))


def _linear(reader: Reader, node: fx.Node, other: fx.Node, seen: _Operand) -> _Found | str:
    x = operand(node)
    if argument(node, 1, "weight") is not other or x is other or len(seen.term) != 2:
        return "read by linear as other than one expert's weight"
    n, k = str(seen.term[0]), str(seen.term[1])
    lead = list(_X_LETTERS[: reader.ndim(x) - 1])
    return x, [*lead, k], [*lead, n], seen.routing, argument(node, 2, "bias")


def _einsum(reader: Reader, node: fx.Node, other: fx.Node, seen: _Operand) -> _Found | str:
    from fxlora.passes.rows.contractions import parse_einsum

    parsed = parse_einsum(reader, node)  # type: ignore[arg-type]
    if parsed is None or len(parsed[2]) != 2 or parsed[2].count(other) != 1:
        return "in an einsum of other than one weight and one activation"
    terms, result, operands = parsed
    at = operands.index(other)
    w_chars, x_chars, x = terms[at], terms[1 - at], operands[1 - at]
    shape = reader.world.shape(x)
    if len(set(w_chars)) != len(w_chars) or len(set(x_chars)) != len(x_chars):
        return "in an einsum over a diagonal"
    known = {char: letter for char, letter in zip(w_chars, seen.term, strict=True) if letter is not None}
    fresh = iter(_X_LETTERS)
    letters = {char: known[char] if char in known else next(fresh) for char in [*x_chars, *result]}
    sizes = {char: _size(reader, other, seen, letter) for char, letter in known.items()}
    if any(char in sizes and sizes[char] != size for char, size in zip(x_chars, shape, strict=True)):
        return "in an einsum that broadcasts"
    x_term, out_term = [letters[char] for char in x_chars], [letters[char] for char in result]
    return x, x_term, out_term, seen.routing, None
