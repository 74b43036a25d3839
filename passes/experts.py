"""Expert products: rows times the weight of each row's own expert, whatever call spells them (`expert_reads.py`).

Stage: between the reads and the plan: which request each row of a product belongs to, and how its result holds several
matrices.

Terms are letters, one a dim, as an einsum has them: ``k`` in-features, ``n`` out-features, ``e`` all experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxlora.passes.graph import argument, describe, op_name, operand
from fxlora.passes.rows.families import is_pointwise
from fxlora.passes.rows.labels import Label, Mixed, RowMap
from fxlora.passes.rows.worlds import TensorFacts, UnknownShapeError

if TYPE_CHECKING:
    from fxlora.passes.memory import Memory
    from fxlora.passes.reads import Read
    from fxlora.passes.rows.propagate import Prover
    from fxlora.passes.rows.worlds import World

UNIT = "_"


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
        x_term: Letters of x, ``_`` for dims of size 1.
        index_term: Letters of ``routing.ids``, or ``e``; empty with offsets and with one expert.
        out_term: Letters of the result, ``_`` for dims of size 1.
        groups: The same, dim by dim: the call's own result may hold several letters in one dim.
    """

    routing: Routing
    x_term: str
    index_term: str
    out_term: str
    groups: tuple[str, ...] = ()

    @property
    def rows_term(self) -> str:
        """The letters that together number the rows, in the result's order."""
        return self.out_term.replace("n", "").replace(UNIT, "")

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


def rewritten_routings(calls: Sequence[tuple[fx.Node, Read]], memory: Memory) -> dict[fx.Node, str]:
    """Calls whose routing is written in place after it was first read, with the reason: one table serves them all."""
    first: dict[fx.Node, int] = {}
    sources = {}
    for node, read in calls:
        routing = read.product.routing if read.product is not None else Routing()
        source = routing.offsets if routing.ids is None else routing.ids
        if source is not None and routing.read_at is not None:
            sources[node] = source
            first[source] = min(memory.order[routing.read_at], first.get(source, memory.order[node]))
    found = {}
    for node, source in sources.items():
        write = memory.write_between([source], first[source], memory.order[node])
        if write is not None:
            found[node] = f"the experts of its rows are written in place, by {describe(write)}, while calls read them"
    return found


def plan_rows(p: Prover, node: fx.Node, read: Read, rows: Label) -> RowMap | str:
    """The map of an expert call's rows, or why none is proven. rows: those of x; without dims, all of one request."""
    result = p.rows(node)
    assert read.product is not None
    if any(read.product.x_term[d] == "k" for d in rows.dims):
        return "requests run along the dim that the weight sums over"
    if isinstance(result, Mixed) and rows.dims:
        return f"its rows mix requests: {result.reason}"
    return _row_map(p, read, rows)


def _row_map(p: Prover, read: Read, rows: Label) -> RowMap:
    """The request of each row of a product, in the order of its rows; `rows` are those of x."""
    product, x = read.product, read.x
    assert product is not None
    letters = [product.x_term[d] for d in rows.dims]
    ids_node = product.routing.ids
    wanted = product.rows_term
    order = [letters.index(letter) for letter in wanted if letter in letters]
    units = [i for i, letter in enumerate(letters) if letter == UNIT]
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


_KEEPS_COLUMNS = {"squeeze", "unsqueeze", "permute", "transpose", "reshape", "view", "contiguous", "to"}


def _keeps_columns(node: fx.Node) -> bool:
    """Whether columns of the last dim stay where they are if its size does."""
    name = op_name(node)
    return name in _KEEPS_COLUMNS or is_pointwise(name.removesuffix("_"))


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
            elif _keeps_columns(node) and world.shape(node)[-1:] == (out_features,):
                stack += node.users
        found.add(seen.pop() if len(seen) == 1 else None)
    return found.pop() if len(found) == 1 else None


def _taken_apart(node: fx.Node, width: int, world: World) -> Packing | None:
    """What a chunk, split or slice of the last dim says of how matrices lie along it."""
    source = operand(node)
    if not isinstance(source, fx.Node) or not node.op.startswith("call"):
        return None
    try:
        name, facts = op_name(node), world.facts(node)
    except UnknownShapeError:
        return None
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
