"""Expert computations: every spelling of rows times the weight of each row's own expert, seen as one product.

Told by dataflow: grouped matmuls over a 3-D weight, products with ``w[ids]`` (one expert a row), with all of ``w``
(every row through every expert) and with one ``w[e]``, whatever op spells them (bmm, matmul, einsum, linear) and
however the weight lies ([E, N, K] or [E, K, N]). Used when sites are found, when rows are planned and in the rewrite.

Terms are letters, one a dim, as an einsum has them: ``k`` in-features, ``n`` out-features, ``e`` all experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxlora.passes.graph import argument, op_name, operand
from fxlora.passes.rows.labels import Label, Mixed, RowMap
from fxlora.passes.rows.worlds import TensorFacts
from fxlora.passes.weights import CASTS, PASS_ON, Weights

if TYPE_CHECKING:
    from fxlora.passes.reads import Read, Reader
    from fxlora.passes.rows.propagate import Prover
    from fxlora.passes.rows.worlds import World

GROUPED = {"_grouped_mm", "grouped_mm", "grouped_mm_fallback"}
# Strides of the stand-in for a weight: a dim is known by its stride, whatever views moved it.
_STRIDES = (10007, 20011, 30011, 40009, 50021, 60013, 70001, 80021, 90001)
_X_LETTERS, _ID_LETTERS = "ABCDEFGH", "pqrstuvw"
_UNIT = "_"


@dataclass(frozen=True)
class Routing:
    """Which expert the rows of a call go to; nothing set: every row to every expert.

    Attributes:
        offsets: Where each expert's rows end, [E]; rows are sorted by expert.
        ids: An expert for each of its elements.
        index: One expert for all rows.
        read_at: The call that reads offsets or ids.
    """

    offsets: fx.Node | None = None
    ids: fx.Node | None = None
    index: int | None = None
    read_at: fx.Node | None = field(default=None, compare=False)


@dataclass(frozen=True)
class ExpertProduct:
    """The product of one call, letter by letter.

    Attributes:
        routing: See :class:`Routing`.
        x_term: Letters of x; ``_`` for a dim of size 1 that the product broadcasts.
        index_term: Letters of ``routing.ids``, or ``e``; empty with offsets and with one expert.
        out_term: Letters of the result.
    """

    routing: Routing
    x_term: str
    index_term: str
    out_term: str

    @property
    def rows_term(self) -> str:
        """The letters that together number the rows, in the result's order."""
        return self.out_term.replace("n", "")

    @property
    def is_flat(self) -> bool:
        """True where x is [T, K] and the result [T, N] as they are."""
        return self.x_term == f"{self.rows_term}k" and self.out_term == f"{self.rows_term}n" and len(self.x_term) == 2

    def size_source(self, letter: str) -> tuple[str, int] | None:
        """Where the size of a row letter can be read: ``("x", dim)`` or ``("ids", dim)``; None for a constant."""
        if letter in self.x_term:
            return "x", self.x_term.index(letter)
        if letter in self.index_term and letter != "e":
            return "ids", self.index_term.index(letter)
        return None


@dataclass(frozen=True)
class Packing:
    """Several matrices side by side along N: `count` blocks, or (strided) taking turns."""

    count: int
    strided: bool


@dataclass(frozen=True)
class _Operand:
    """A weight operand: the letters of its dims (``a``, ``b`` the stored ones, None for broadcast dims), and what
    picked experts.
    """

    term: tuple[str | None, ...]
    routing: Routing
    ids_term: str = ""


def gathered_root(weights: Weights, node: Any) -> fx.Node | None:
    """The 3-D weight behind an operand that was gathered per row, None for any other operand."""
    found = _trail(weights, node)
    tensor = weights.tensor_of(found[0]) if found else None
    return found[0] if found is not None and tensor is not None and tensor.dim() == 3 else None


def read_product(
    reader: Reader, node: fx.Node, name: str, other: fx.Node
) -> tuple[ExpertProduct, bool, fx.Node, Any] | str:
    """The product that a call makes of a 3-D weight: (product, whether stored [E, K, N], x, addend), or why none."""
    seen = _operand(reader, other)
    if isinstance(seen, str):
        return f"expert weights, {seen}"
    if name in GROUPED:
        found = _grouped(reader, node, other, seen)
    elif name in ("bmm", "matmul", "mm"):
        found = _matmul(reader, seen, other, operand(node), argument(node, 1, "other", "mat2", "tensor"))
    elif name in ("baddbmm", "addmm"):
        found = _added(reader, node, name, other, seen)
    elif name == "linear":
        found = _linear(reader, node, other, seen)
    elif name == "einsum":
        found = _einsum(reader, node, other, seen)
    else:
        found = f"read by {name.lstrip('?')}"
    if isinstance(found, str):
        return f"expert weights, {found}"
    x, x_term, w_term, out_term, routing, addend = found
    return _checked(reader, node, x, x_term, w_term, out_term, routing, addend)


# What one spelling gives: x, its letters, the operand's letters, the result's letters, the routing, an addend.
_Found = tuple[fx.Node, list[str], list[str], list[str], Routing, Any]


def _checked(
    reader: Reader,
    node: fx.Node,
    x: fx.Node,
    x_term: list[str],
    w_term: list[str],
    out_term: list[str],
    routing: Routing,
    addend: Any,
) -> tuple[ExpertProduct, bool, fx.Node, Any] | str:
    """The product, if it sums over one stored dim of the weight alone and keeps every other letter once."""
    stored = {"a", "b"}
    summed = stored & set(x_term)
    made = stored & set(out_term)
    if len(summed) != 1 or len(made) != 1 or summed == made:
        return "expert weights, in a product that is no linear over them"
    k, n = summed.pop(), made.pop()
    index = "".join(letter for letter in w_term if letter not in stored)
    kept = [letter for letter in x_term if letter not in (k, _UNIT)]
    if sorted(out_term) != sorted({*kept, *index, n}) or len(set(kept)) != len(kept):
        return "expert weights, in a product that sums over rows or experts"
    swap = {k: "k", n: "n"}
    terms = ["".join(swap.get(letter, letter) for letter in term) for term in (x_term, out_term)]
    product = ExpertProduct(routing, terms[0], index, terms[1])
    sizes = dict(zip(terms[0], reader.world.shape(x), strict=True))
    if any(sizes.get(c, size) != size for c, size in zip(terms[1], reader.world.shape(node), strict=True) if c != "n"):
        return "expert weights, in a product that broadcasts its rows"
    return product, k == "a", x, addend


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
    sizes = dict(zip("eab", tensor.shape, strict=True))
    view: Any = _stand_in("eab", sizes)
    routing, ids_term = Routing(), ""
    for node in found[1]:
        if op_name(node) in CASTS:
            continue
        if not reader.gathers(node):
            view = reader.viewed(node, view)
            continue
        term, ids = _letters(view, sizes), reader.gather_index(node)
        if term is None or "e" not in term or ids_term or ids is None or view.storage_offset():
            return f"{op_name(node)} of a part of them"
        dim = argument(node, 1, "dim") % len(term) if op_name(node) == "index_select" else 0
        if term[dim] != "e":
            return f"{op_name(node)} along another dim than the experts"
        ids_term = _ID_LETTERS[: reader.ndim(ids)]
        sizes |= dict(zip(ids_term, reader.world.shape(ids), strict=True))
        letters = [*term[:dim], *ids_term, *term[dim + 1 :]]
        view = _stand_in(letters, sizes)
        routing = Routing(ids=ids, read_at=node)
    term = _letters(view, sizes)
    if term is None or not {"a", "b"} <= set(term):
        return "of which a part or a reshape is read"
    if "e" not in term and not ids_term:
        index, rest = divmod(view.storage_offset(), _STRIDES[0])
        if rest:
            return "of which a part is read"
        routing = Routing(index=index)
    elif view.storage_offset() or any(letter not in term for letter in ids_term):
        return "of which a part is read"
    return _Operand(term, routing, ids_term)


def _stand_in(letters: Sequence[str | None], sizes: dict[str, int]) -> torch.Tensor:
    shape = [1 if letter is None else sizes[letter] for letter in letters]
    strides = [_STRIDES[_place(letter)] if letter is not None else 0 for letter in letters]
    return torch.empty_strided(shape, strides, device="meta")


def _place(letter: str) -> int:
    return "eab".index(letter) if letter in "eab" else 3 + _ID_LETTERS.index(letter)


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
    return x, ["A", k], [k, n], ["A", n], Routing(offsets=offsets, read_at=node), None


def _matmul(reader: Reader, seen: _Operand, other: fx.Node, left: Any, right: Any) -> _Found | str:
    """``left @ right`` with torch.matmul's dims, one of them the weight."""
    if left is other and right is other:
        return "multiplied with themselves"
    x, on_left = (right, True) if left is other else (left, False)
    if not reader.is_tensor(x) or reader.ndim(x) < 2 or len(seen.term) < 2:
        return "multiplied with a vector"
    shape, w_term = reader.world.shape(x), list(seen.term)
    x_term = list(_X_LETTERS[: len(shape)])
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
            x_term[-i] = _UNIT if shape[-i] == 1 and _size(reader, other, seen, theirs) != 1 else theirs
        if theirs is None and mine is None:
            return "multiplied with fewer dims than they have"
        batch.insert(0, str(theirs or mine))
    out_term = [*batch, n, free] if on_left else [*batch, free, n]
    return x, x_term, [letter for letter in w_term if letter is not None], out_term, seen.routing, None


def _added(reader: Reader, node: fx.Node, name: str, other: fx.Node, seen: _Operand) -> _Found | str:
    if argument(node, 3, "beta", default=1) != 1 or argument(node, 4, "alpha", default=1) != 1:
        return f"{name} with alpha or beta"
    first, second = argument(node, 1, "batch1", "mat1"), argument(node, 2, "batch2", "mat2")
    found = _matmul(reader, seen, other, first, second)
    return found if isinstance(found, str) else (*found[:5], operand(node))


def _linear(reader: Reader, node: fx.Node, other: fx.Node, seen: _Operand) -> _Found | str:
    x = operand(node)
    if argument(node, 1, "weight") is not other or x is other or len(seen.term) != 2:
        return "read by linear as other than one expert's weight"
    n, k = str(seen.term[0]), str(seen.term[1])
    lead = list(_X_LETTERS[: reader.ndim(x) - 1])
    return x, [*lead, k], [n, k], [*lead, n], seen.routing, argument(node, 2, "bias")


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
    return x, x_term, list(known.values()), out_term, seen.routing, None


def plan_rows(p: Prover, node: fx.Node, read: Read) -> RowMap | str:
    """The map of an expert call's rows, or why none is proven."""
    rows, result = p.rows(read.x), p.rows(node)
    assert read.product is not None and isinstance(rows, Label)
    if any(read.product.x_term[d] == "k" for d in rows.dims):
        return "requests run along the dim that the weight sums over"
    if isinstance(result, Mixed):
        return f"its rows mix requests: {result.reason}"
    return row_map(p, read)


def row_map(p: Prover, read: Read) -> RowMap:
    """The request of each row of an expert product, in the order of its rows; x must carry a label."""
    product, x, rows = read.product, read.x, p.rows(read.x)
    assert product is not None and isinstance(rows, Label)
    letters = [product.x_term[d] for d in rows.dims]
    ids_node = product.routing.ids
    wanted = product.rows_term
    order = [letters.index(letter) for letter in wanted if letter in letters]
    units = [i for i, letter in enumerate(letters) if letter == _UNIT]
    missing = [i for i, letter in enumerate(wanted) if letter not in letters]

    def arranged(ids: Any, select: Any, permute: Any, unsqueeze: Any) -> Any:
        kept = [i for i in range(len(letters)) if i not in units]
        for i in reversed(units):
            ids = select(ids, i, 0)
        places = [kept.index(i) for i in order]
        if places != sorted(places):
            ids = permute(ids, tuple(places))
        for i in missing:
            ids = unsqueeze(ids, i)
        return ids

    values = []
    for w in range(p.count):
        sizes = [_world_size(p, read, letter, w) for letter in wanted]
        full = arranged(rows.map.ids[w], torch.select, torch.permute, torch.unsqueeze).expand(sizes)
        values.append(full.reshape(math.prod(sizes)))

    def build(emit: Callable[..., fx.Node], parents: Sequence[fx.Node]) -> fx.Node:
        made = arranged(
            parents[0],
            lambda *a: emit(torch.select, *a),
            lambda *a: emit(torch.permute, *a),
            lambda *a: emit(torch.unsqueeze, *a),
        )
        if missing:
            sizes = []
            for letter in wanted:
                source = product.size_source(letter)
                values_of = {_world_size(p, read, letter, w) for w in range(p.count)}
                node = x if source is None or source[0] == "x" else ids_node
                fixed = len(values_of) == 1 or source is None
                sizes.append(values_of.pop() if fixed else emit(torch.ops.aten.sym_size.int, node, source[1]))
            made = emit(torch.broadcast_to, made, tuple(sizes))
        return made if len(wanted) == 1 else emit(torch.reshape, made, (-1,))

    if not units and not missing and len(wanted) == 1:
        return rows.map
    origin = max((n for n in (x, ids_node) if n is not None), key=lambda n: p.table.order[n])
    return p.table.intern(values, (rows.map,), origin, build, f"rows of experts ({product.x_term} -> {wanted})")


def _world_size(p: Prover, read: Read, letter: str, world: int) -> int:
    assert read.product is not None
    source = read.product.size_source(letter)
    if source is None:
        return read.experts
    node = read.x if source[0] == "x" else read.product.routing.ids
    assert node is not None
    return p.shape(node, world)[source[1]]


_KEEPS_COLUMNS = {"squeeze", "unsqueeze", "add", "add_", "to", "permute", "transpose", "reshape", "view", "contiguous"}


def packing_of(uses: Sequence[fx.Node], out_features: int, world: World) -> Packing | None:
    """How the graph takes the result of expert calls apart along N; None where it does not, or not in one way."""
    found: set[Packing | None] = set()
    for use in uses:
        seen: set[Packing] = set()
        stack, visited = list(use.users), set()
        while stack:
            node = stack.pop()
            if node in visited:
                continue
            visited.add(node)
            if packing := _taken_apart(node, out_features, world):
                seen.add(packing)
            elif op_name(node) in _KEEPS_COLUMNS and world.shape(node)[-1:] == (out_features,):
                stack += node.users
        found.add(seen.pop() if len(seen) == 1 else None)
    return found.pop() if len(found) == 1 else None


def _taken_apart(node: fx.Node, width: int, world: World) -> Packing | None:
    """What a chunk, split or slice of the last dim says of how matrices lie along it."""
    source = operand(node)
    if not isinstance(source, fx.Node) or not node.op.startswith("call"):
        return None
    name, facts = op_name(node), world.facts(node)
    if name in ("chunk", "split", "tensor_split") and isinstance(facts, tuple):
        parts = {part.shape[-1] for part in facts}
        return Packing(len(facts), False) if parts == {width // len(facts)} and width % len(facts) == 0 else None
    if name not in ("getitem", "slice", "narrow") or not isinstance(facts, TensorFacts):
        return None
    shape, part = world.shape(source), facts.shape[-1]
    if len(facts.shape) != len(shape) or shape[-1] != width or width % max(part, 1) or part == width:
        return None
    if name == "slice":
        last = slice(None, None, argument(node, 4, "step", default=1))
    elif name == "narrow":
        last = slice(None)
    else:
        last = node.args[1][-1] if isinstance(node.args[1], tuple) else None
    if not isinstance(last, slice):
        return None
    return Packing(width // part, last.step not in (None, 1))
