"""Values of the integer tensors that index rows, by random interpretation.

Integer nodes on the way to an index are run for real, at each world's sizes. What only data decides (routing, sorted
scores,
indices the caller passes) is drawn at random: distinct and covering, so that two maps are equal by luck with
probability near 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from fxlora.passes.graph import argument, fake_value, invoke, op_name, operand
from fxlora.passes.rows.worlds import TensorFacts, UnknownShapeError, World
from fxlora.passes.rows.writes import also_written, is_write

_UNINITIALISED = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted"}
_RANKINGS = {"topk", "sort", "argsort", "argmax", "argmin", "max", "min", "median", "mode", "kthvalue", "msort"}
_INDEXING = {
    "getitem",
    "index",
    "index_select",
    "gather",
    "take_along_dim",
    "index_copy",
    "index_copy_",
    "index_add",
    "index_add_",
    "scatter",
    "scatter_",
    "scatter_add",
    "scatter_add_",
    "setitem",
    "index_put",
    "index_put_",
    "repeat_interleave",
    "sort",
    "topk",
    "argsort",
    "embedding",
    "narrow",
    "select",
    "index_fill",
    "index_fill_",
}
_MUTATIONS = {"setitem"}
_LOOKUPS = {"getitem", "index", "index_select", "embedding"}
_TABLE_RANGE = 8  # numbers that a table of fewer (one not loaded yet: all zeros) is taken to hold
_SELECTIONS = {"where", "nonzero", "argwhere", "nonzero_numpy"}
_GROUPED = {"_grouped_mm", "grouped_mm", "grouped_mm_fallback"}
# How rows per expert are counted: some of it in floating point, exactly.
_COUNTING = {"histc", "bincount", "one_hot", "cumsum", "sum", "float", "double", "to", "type", "clone", "contiguous"}

# Where these compare with a literal, sizes of the proof must reach well beyond it to show both outcomes.
_THRESHOLDS = {
    *(
        "clamp",
        "clamp_min",
        "clamp_max",
        "minimum",
        "maximum",
        "floor_divide",
        "remainder",
        "fmod",
        "div",
        "where",
        "min",
    ),
    *("max", "lt", "le", "gt", "ge", "eq", "ne", "bitwise_and", "bitwise_or", "bitwise_right_shift", "rshift", "and_"),
}
_LARGEST_LITERAL = 12


def _forget(target: Any, values: dict[fx.Node, Any]) -> None:
    """A tensor was overwritten with what is not known: its value, and those of all views of it, are gone."""
    gone = values.get(target) if isinstance(target, fx.Node) else None
    if not isinstance(gone, torch.Tensor):
        return
    memory = gone.untyped_storage().data_ptr()
    for node, value in list(values.items()):
        if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() == memory:
            del values[node]


def _covering_order(shape: Sequence[int], dim: int, generator: torch.Generator) -> torch.Tensor:
    """A random order along a dim at every place of the others, in which each position comes first somewhere."""
    order = torch.rand(tuple(shape), generator=generator).argsort(dim).movedim(dim, -1)
    size = order.shape[-1]
    rows = order.reshape(-1, size).clone()
    if 1 < size <= rows.shape[0]:
        picked = torch.randperm(rows.shape[0], generator=generator)[:size]
        places = (rows[picked] == torch.arange(size)[:, None]).int().argmax(-1)
        rows[picked, places] = rows[picked, 0]
        rows[picked, 0] = torch.arange(size)
    return rows.reshape(order.shape).movedim(-1, dim)


def _literals(node: fx.Node) -> list[Any]:
    return [*node.args, *node.kwargs.values()]


def _is_integer(facts: Any) -> bool:
    return isinstance(facts, TensorFacts) and not facts.dtype.is_floating_point and not facts.dtype.is_complex


class Integers:
    """Concrete values of integer nodes, one set per world."""

    def __init__(self, gm: fx.GraphModule, worlds: Sequence[World], known: dict[fx.Node, torch.Tensor]) -> None:
        self.worlds = worlds
        self.values: list[dict[fx.Node, Any]] = [{n: t.clone() for n, t in known.items()} for _ in worlds]
        self.drawn: list[dict[fx.Node, torch.Tensor]] = [{} for _ in worlds]
        self.needed = self._needed(gm.graph)

    def _needed(self, graph: fx.Graph) -> set[fx.Node]:
        """Integer nodes that some index, directly or through others, is computed from; and the writes into them."""
        needed: set[fx.Node] = set()
        stack = []
        for node in graph.nodes:
            if op_name(node) in _INDEXING:
                stack += [n for n in node.all_input_nodes if n not in needed and self._integer(n)]
            if op_name(node) in _GROUPED and isinstance(argument(node, 2, "offs"), fx.Node):
                stack.append(argument(node, 2, "offs"))
        writes: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            if is_write(node):
                target = operand(node)
                while isinstance(target, fx.Node):
                    writes.setdefault(target, []).append(node)
                    target = operand(target) if target.op.startswith("call") else None
        while stack:
            node = stack.pop()
            if node in needed:
                continue
            needed.add(node)
            for other in [*node.all_input_nodes, *writes.get(node, [])]:
                followed = self._integer(other) or op_name(other) in _RANKINGS | _MUTATIONS | _COUNTING
                if other not in needed and followed:
                    stack.append(other)
        return needed

    def _integer(self, node: fx.Node) -> bool:
        try:
            facts = self.worlds[0].facts(node)
        except UnknownShapeError:
            return False
        return _is_integer(facts) or (isinstance(facts, tuple) and any(_is_integer(f) for f in facts))

    def visit(self, node: fx.Node) -> None:
        """Evaluate one node, in graph order, in every world; unknown inputs leave it unknown."""
        if node.op == "output" or (node not in self.needed and not is_write(node)):
            return
        for world, values, drawn in zip(self.worlds, self.values, self.drawn, strict=True):
            if node in values:
                continue
            result = self._evaluate(node, world, values)
            if result is not None:
                values[node] = result
                settle_sizes(world, node, result)
            elif is_write(node):
                for target in (operand(node), *also_written(node)):
                    _forget(target, values)
                    _forget(target, drawn)

    def _evaluate(self, node: fx.Node, world: World, values: dict[fx.Node, Any]) -> Any:
        name = op_name(node)
        if not node.op.startswith("call") or name.startswith("?"):
            return None
        tensors = [n for n in node.all_input_nodes if isinstance(self._facts(world, n), TensorFacts | tuple)]
        if name in _UNINITIALISED:
            facts = world.facts(node)
            return torch.zeros(facts.shape, dtype=facts.dtype)
        if name.rstrip("_") in _THRESHOLDS and any(
            type(a) is int and abs(a) > _LARGEST_LITERAL for a in _literals(node)
        ):
            return self._compared(node, name, world, values) if all(n in values for n in tensors) else None
        if all(n in values for n in tensors):
            return self._run(node, world, values)
        if name in _RANKINGS:
            try:
                return self._draw_ranking(node, name, world)
            except RuntimeError:
                return None
        if name in _LOOKUPS:
            return self._draw_lookup(node, world, values)
        return None

    def _compared(self, node: fx.Node, name: str, world: World, values: dict[fx.Node, Any]) -> Any:
        """Equality with a large literal, where this world shows both outcomes (one expert's number among all)."""
        result = self._run(node, world, values) if name in ("eq", "ne") else None
        shows = isinstance(result, torch.Tensor) and bool(result.any()) and not bool(result.all())
        return result if shows else None

    @staticmethod
    def _facts(world: World, node: fx.Node) -> Any:
        try:
            return world.facts(node)
        except UnknownShapeError:
            return None

    def _run(self, node: fx.Node, world: World, values: dict[fx.Node, Any]) -> Any:
        def concrete(n: fx.Node) -> Any:
            return values[n] if n in values else world.facts(n)

        try:
            args: tuple[Any, ...] = fx.map_arg(node.args, concrete)
            kwargs = {
                k: v for k, v in fx.map_arg(dict(node.kwargs), concrete).items() if k not in ("device", "pin_memory")
            }
            args = tuple("cpu" if isinstance(a, torch.device) else a for a in args)
            if op_name(node) == "histc":
                counted: Any = args[0]
                args = (counted.float(), *args[1:])  # on the CPU it counts floats alone
            result = invoke(node, args, kwargs)
            return args[0] if op_name(node) == "setitem" else result
        except Exception:
            return None

    def _draw_ranking(self, node: fx.Node, name: str, world: World) -> Any:
        """Indices that data decides: a random choice of distinct positions along the ranked dim."""
        source = world.facts(operand(node))
        facts = world.facts(node)
        if not isinstance(source, TensorFacts):
            return None
        indices = facts[1] if isinstance(facts, tuple) and len(facts) > 1 else facts
        if not _is_integer(indices) or not source.shape:
            return None
        default = -1
        dim = argument(node, 2 if name in ("topk", "kthvalue") else 1, "dim", default=default)
        if not isinstance(dim, int):
            return None
        if node not in world.rankings:
            order = _covering_order(source.shape, dim, world.generator)
            if tuple(order.shape) != indices.shape:
                keep = indices.shape[dim] if len(indices.shape) == len(source.shape) else 1
                order = order.narrow(dim, 0, keep)
                order = order.reshape(indices.shape)
            world.rankings[node] = order.to(indices.dtype).contiguous()
        drawn = world.rankings[node]
        return (None, drawn) if isinstance(facts, tuple) else drawn

    def _draw_lookup(self, node: fx.Node, world: World, values: dict[fx.Node, Any]) -> torch.Tensor | None:
        """What a table of the model holds at places that data decides: any numbers between its least and its greatest.

        An expert for each token of the vocabulary, say. A number that no expert has is drawn, too, if the table holds
        one.
        """
        tables = [values[n] for n in node.all_input_nodes if n in values and n.op in ("get_attr", "placeholder")]
        facts = world.facts(node)
        if len(tables) != 1 or len(node.all_input_nodes) != 2 or not _is_integer(facts) or facts.dtype == torch.bool:
            return None
        (table,) = tables
        if not isinstance(table, torch.Tensor) or not table.numel() or table.dtype != facts.dtype:
            return None
        low, high, most = int(table.min()), int(table.max()), torch.iinfo(table.dtype).max
        if high == most:
            return None  # no number, but the mark of none
        if node not in world.rankings:
            high = min(max(high, low + _TABLE_RANGE - 1), most - 1)
            drawn = torch.randint(low, high + 1, tuple(facts.shape), generator=world.generator).to(facts.dtype)
            if drawn.numel() > 2:
                drawn.view(-1)[:2] = torch.tensor([high, low], dtype=facts.dtype)
            world.rankings[node] = drawn
        return world.rankings[node]

    def index_values(self, node: fx.Node, size: int, world_index: int) -> torch.Tensor:
        """The value of an index into ``size`` positions; drawn (distinct, covering) where only the caller knows it."""
        world, drawn = self.worlds[world_index], self.drawn[world_index]
        known = self.values[world_index].get(node, drawn.get(node))
        if isinstance(known, torch.Tensor):
            return known
        facts = world.facts(node)
        if not _is_integer(facts) or facts.dtype == torch.bool:
            raise UnknownShapeError(f"{node.name} selects rows by data")
        count = torch.Size(facts.shape).numel()
        pool = torch.arange(size)
        if count < size - 2:
            pool = pool[1:-1]
        rounds = [
            pool[torch.randperm(len(pool), generator=world.generator)] for _ in range(-(-count // max(len(pool), 1)))
        ]
        # Kept apart from computed values: what is computed from such an index must not rest on how it was drawn.
        drawn[node] = torch.cat(rounds)[:count].reshape(facts.shape) if rounds else torch.empty(facts.shape).long()
        return drawn[node]


def settle_sizes(world: World, node: fx.Node, value: Any) -> None:
    """Sizes that data decides (of ``where``, ``nonzero``) are, in a world, those of the values there."""
    if world.symbols is None or op_name(node) not in _SELECTIONS:
        return
    recorded = fake_value(node)
    pairs = zip(recorded, value, strict=True) if isinstance(value, tuple) else [(recorded, value)]
    for fake, real in pairs:
        if not isinstance(fake, torch.Tensor) or not isinstance(real, torch.Tensor) or fake.dim() != real.dim():
            return
        for size, number in zip(fake.shape, real.shape, strict=True):
            if isinstance(size, torch.SymInt) and free_unbacked_symbols(size) == {size.node._expr}:
                world.settle(size.node._expr, int(number))


def settle_worlds(gm: fx.GraphModule, worlds: Sequence[World], known: dict[fx.Node, torch.Tensor]) -> None:
    """Find every size that data decides, in every world, before any shape is read there."""
    if any(op_name(node) in _SELECTIONS and len(node.all_input_nodes) == 1 for node in gm.graph.nodes):
        integers = Integers(gm, worlds, known)
        for node in gm.graph.nodes:
            integers.visit(node)
