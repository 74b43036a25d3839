"""The sizes at which rows are proven: every free dim gets sizes of its own, never the caller's.

A proof holds in several *worlds*. A world fixes each free dim to a number (all distinct, all >= 2) and knows the shape
of every node there, by evaluating recorded symbolic shapes or, where a graph records none, by running it on fake
tensors. A graph that runs at no other sizes is *frozen*: proven, and callable, at its traced shapes alone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import fx

from fxlora.passes.errors import RowsNotProvenError
from fxlora.passes.graph import fake_value
from fxlora.passes.rows.fake_run import GraphInput, TensorFacts, run_fake

log = logging.getLogger(__name__)

WORLDS = 3
# Where the request dim cannot vary it may be small: random indices are then drawn this often.
_FIXED_WORLDS = 16
# Sizes of the request dim and of the other free dims. Large request sizes make two unrelated maps unlikely to agree.
_BATCH_SIZES = (29, 36, 34)
_SMALL_BATCH_SIZES = (5, 8, 9, 14)
# Some convolutions are traced for fewer than 16 images, of which a request may have two (with and without guidance).
_TINY_BATCH_SIZES = (5, 3, 4)
_OTHER_SIZES = ((7, 11, 13, 17, 19, 23, 5, 43), (10, 5, 17, 13, 23, 7, 19, 41), (12, 17, 7, 19, 5, 11, 43, 23))


_TORCH_FOLDER = str(Path(torch.__file__).parent)


class UnknownShapeError(Exception):
    """A node's shape depends on data, or was never recorded."""


@dataclass
class World:
    """One assignment of sizes. ``facts(node)`` is a TensorFacts, an int, a tuple of these, or None.

    rankings: positions drawn for calls that rank data (topk, sort), the same whenever they are asked for.
    """

    values: dict[fx.Node, Any] = field(default_factory=dict)
    symbols: dict[Any, int] | None = None
    generator: torch.Generator = field(default_factory=torch.Generator)
    rankings: dict[fx.Node, torch.Tensor] = field(default_factory=dict)
    _exprs: dict[Any, int] = field(default_factory=dict)

    def facts(self, node: fx.Node) -> Any:
        if node not in self.values:
            if self.symbols is None:
                raise UnknownShapeError(f"no shape is known for {node.name}")
            self.values[node] = self._convert(fake_value(node))
        return self.values[node]

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        facts = self.facts(node)
        if not isinstance(facts, TensorFacts):
            raise UnknownShapeError(f"{node.name} is no tensor")
        return facts.shape

    def number(self, value: Any) -> Any:
        """An int argument as a number: ints stay, size nodes are read in this world."""
        return self.facts(value) if isinstance(value, fx.Node) else value

    def _convert(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return TensorFacts(tuple(self.size(s) for s in value.shape), value.dtype, value.device)
        if isinstance(value, torch.SymInt):
            return self.size(value)
        if isinstance(value, list | tuple):
            return tuple(self._convert(item) for item in value)
        return value

    def settle(self, symbol: Any, size: int) -> None:
        """Give a size that data decides the value it has in this world; shapes are read anew."""
        assert self.symbols is not None
        if self.symbols.get(symbol) != size:
            self.symbols[symbol] = sympy.Integer(size)  # type: ignore[assignment]
            self.values.clear()
            self._exprs.clear()

    def size(self, size: Any) -> int:
        if isinstance(size, int):
            return size
        expression = size.node._expr
        if expression not in self._exprs:
            number = expression.xreplace(self.symbols)
            if not number.is_number:
                raise UnknownShapeError(f"size {expression} depends on data")
            self._exprs[expression] = int(number)
        return self._exprs[expression]


@dataclass(frozen=True)
class Sizing:
    """The worlds of one proof, and for which calls it holds.

    Attributes:
        worlds: See above.
        frozen: It holds at the traced shapes alone.
        fixed: Per input the sizes that must not change, by dim.
        guards: What the model's own branches demand of the other sizes: sympy expressions over the inputs' symbols.
        alike: Pairs of symbols that are one size in every world, so that it holds where a call gives them one.
    """

    worlds: tuple[World, ...]
    frozen: bool
    fixed: Mapping[fx.Node, Mapping[int, int]] = field(default_factory=dict)
    guards: tuple[Any, ...] = ()
    alike: tuple[tuple[Any, Any], ...] = ()


def shape_env_of(gm: fx.GraphModule) -> Any:
    """The ShapeEnv behind a graph's symbolic sizes, None for graphs without any."""
    for node in gm.graph.nodes:
        value = fake_value(node)
        for size in [value] if isinstance(value, torch.SymInt) else getattr(value, "shape", ()):
            if isinstance(size, torch.SymInt):
                return size.node.shape_env
    return None


def has_all_values(gm: fx.GraphModule) -> bool:
    """True when tracing recorded a value for every call that makes a tensor."""
    calls = ("call_function", "call_method", "placeholder")
    return all("val" in n.meta or "example_value" in n.meta or not n.users for n in gm.graph.nodes if n.op in calls)


def size_worlds(
    gm: fx.GraphModule,
    inputs: Sequence[GraphInput],
    batch: Mapping[fx.Node, tuple[int, ...]],
    bound: Mapping[fx.Node, torch.Tensor],
    alike: tuple[tuple[Any, Any], ...] = (),
) -> Sizing:
    """Choose the worlds for a graph whose request dims are ``batch`` (per seeded input). alike: see `Sizing`."""
    env = shape_env_of(gm)
    if env is not None and has_all_values(gm):
        traced = next(inp.sizes[dims[0]] for inp in inputs if (dims := batch.get(inp.node)))
        held = _held_batch(inputs, batch)
        small = ((sizes, _FIXED_WORLDS) for sizes in (_SMALL_BATCH_SIZES, _TINY_BATCH_SIZES))
        free = ((_BATCH_SIZES, WORLDS), *small) if held is None else ()
        for sizes, count in (*free, ((traced if held is None else held,), _FIXED_WORLDS)):
            sets = [
                _symbol_sizes(env, inputs, batch, world, sizes[world % len(sizes)], alike) for world in range(count)
            ]
            if all(s is not None for s in sets):
                if all(inp.symbols[dims[0]] is None for inp in inputs if (dims := batch.get(inp.node))):
                    sets = [sets[i % WORLDS] for i in range(_FIXED_WORLDS)]
                worlds = tuple(World(symbols=s, generator=_generator(i)) for i, s in enumerate(sets))
                only = sizes[0] if len(sizes) == 1 else None
                return Sizing(worlds, False, fixed_sizes(inputs, batch, only), model_guards(env), alike)
        log.info("no sizes but the traced ones satisfy the graph's guards: proven for these alone")
    else:
        opaque = any(n.op == "call_module" and n.users for n in gm.graph.nodes)  # may check sizes only when opened
        for dims in ("rows", "all", "batch") if opaque else ("all", "rows", "batch"):
            sized = _refaked(gm, inputs, batch, bound, dims)
            if sized is not None:
                guards = () if env is None else model_guards(env)
                return Sizing(sized, False, _held_sizes(inputs, batch, dims), guards)
    try:
        values = run_fake(gm, inputs, {inp.node: inp.sizes for inp in inputs}, bound)
    except Exception as error:
        raise RowsNotProvenError(
            "the graph does not run on shapes alone (a size or a choice depends on data), so no row can be proven: "
            f"{type(error).__name__}: {error}"
        ) from error
    frozen = tuple(World(values=values, generator=_generator(index)) for index in range(_FIXED_WORLDS))
    return Sizing(frozen, True, {inp.node: dict(enumerate(inp.sizes)) for inp in inputs})


def symbols_alike(inputs: Sequence[GraphInput]) -> tuple[tuple[Any, Any], ...]:
    """Dims that inputs traced in one shape have at one place, and that tracing did not have to compare.

    Tokens and their mask [requests, choices, tokens], say, of which the model only ever makes lists of rows.
    """
    first: dict[tuple[tuple[int, ...], int], Any] = {}
    pairs = []
    for inp in inputs:
        for d, symbol in enumerate(inp.symbols):
            known = None if symbol is None else first.setdefault((inp.sizes, d), symbol)
            if known is not None and known != symbol:
                pairs.append((known, symbol))
    return tuple(dict.fromkeys(pairs))


def model_guards(env: Any) -> tuple[Any, ...]:
    """Conditions on sizes that decided a branch in the model's own code.

    Those that torch's internals asked for do not count: they chose how to run an op, not what it computes.
    """
    guards = []
    for guard in env.guards:
        place = getattr(getattr(guard, "sloc", None), "framework_loc", None)
        asked_by = str(getattr(place, "filename", place))
        if "_dynamo" in asked_by or _TORCH_FOLDER not in asked_by:
            guards.append(guard.expr)
    return tuple(guards)


def _held_batch(inputs: Sequence[GraphInput], batch: Mapping[fx.Node, tuple[int, ...]]) -> int | None:
    """How many requests there are, where tracing fixed that for some inputs and left it open for others."""
    seeded = [(inp, batch[inp.node][0]) for inp in inputs if batch.get(inp.node)]
    fixed = {inp.sizes[d] for inp, d in seeded if inp.symbols[d] is None}
    return fixed.pop() if len(fixed) == 1 and any(inp.symbols[d] is not None for inp, d in seeded) else None


def fixed_sizes(
    inputs: Sequence[GraphInput], batch: Mapping[fx.Node, tuple[int, ...]], held: int | None
) -> dict[fx.Node, dict[int, int]]:
    """Dims that tracing made plain numbers, and the request dims, where they are held."""
    fixed = {inp.node: {d: n for d, n in enumerate(inp.sizes) if inp.symbols[d] is None} for inp in inputs}
    for node, dims in batch.items():
        fixed[node] |= {} if held is None else {dims[0]: held}
    return fixed


def _held_sizes(
    inputs: Sequence[GraphInput], batch: Mapping[fx.Node, tuple[int, ...]], free: str
) -> dict[fx.Node, dict[int, int]]:
    shapes = [_input_shapes(inputs, batch, free, world) for world in range(WORLDS)]
    return {
        inp.node: {d: n for d, n in enumerate(inp.sizes) if all(shape[inp.node][d] == n for shape in shapes)}
        for inp in inputs
    }


def _generator(world: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 + world)


def _symbol_sizes(
    env: Any,
    inputs: Sequence[GraphInput],
    batch: Mapping[fx.Node, tuple[int, ...]],
    world: int,
    batch_size: int,
    alike: tuple[tuple[Any, Any], ...],
) -> dict[Any, int] | None:
    """Numbers for all symbols that satisfy ranges and guards, or None."""
    replacements = dict(env.replacements)
    batch_symbols = [
        inp.symbols[dims[0]] for inp in inputs if (dims := batch.get(inp.node)) and inp.symbols[dims[0]] is not None
    ]
    free = [s for s in env.var_to_range if s not in replacements]
    packed = any(len(dims) > 1 for dims in batch.values())
    row_symbols = [
        inp.symbols[dims[1]]
        for inp in inputs
        if len(dims := batch.get(inp.node, ())) > 1 and inp.symbols[dims[1]] is not None
    ]
    for attempt in range(4):
        chosen: dict[Any, Any] = dict.fromkeys(batch_symbols, batch_size)
        if packed:
            chosen |= dict.fromkeys(batch_symbols, 3 + world) | dict.fromkeys(row_symbols, batch_size)
        hints = env.backed_var_to_val if hasattr(env, "backed_var_to_val") else env.var_to_val
        others = iter(_OTHER_SIZES[world % WORLDS] * 50)
        numbers = {s: hints[s] for s in free if not s.is_integer and s in hints}  # symbolic floats are no sizes
        for i, symbol in enumerate(s for s in free if s not in chosen and s not in numbers):
            hint = int(hints[symbol]) if symbol in hints else 2
            # Apart from each other if the guards allow; else as far from each other as traced; else as traced.
            apart = (next(others), hint + (i + 1) * (world + 1), hint + 3 * (world + 1), hint)
            chosen[symbol] = apart[attempt] if symbol in hints else _into(env.var_to_range.get(symbol), apart[attempt])
        chosen |= {other: chosen[symbol] for symbol, other in alike if symbol in chosen and other in chosen}
        chosen = {s: sympy.Integer(size) for s, size in chosen.items()}
        chosen |= _asserted(env, chosen)
        solved = {**chosen, **{s: sympy.sympify(value) for s, value in numbers.items()}}
        for symbol, expression in replacements.items():
            value = _substitute(expression, chosen, replacements)
            if value is not None:
                solved[symbol] = value
        if all(_in_range(env.var_to_range.get(s), v) for s, v in solved.items()) and _guards_hold(env, solved):
            return solved
    return None


def _into(bounds: Any, size: int) -> int:
    """The size that data gives, as near to this one as its bounds allow."""
    return size if bounds is None else int(max(bounds.lower, min(bounds.upper, size)))


def _asserted(env: Any, chosen: Mapping[Any, Any]) -> dict[Any, Any]:
    """Sizes that data gives and the graph asserts to be equal to others."""
    found = {}
    for symbol, asserts in getattr(env, "deferred_runtime_asserts", {}).items():
        for said in asserts:
            sides = said.expr.args if isinstance(said.expr, sympy.Eq) else ()
            others = [side for side in sides if side != symbol]
            value = others[0].xreplace(chosen) if len(others) == 1 and len(sides) == 2 else None
            if symbol in chosen and value is not None and value.is_Integer:
                found[symbol] = value
    return found


def _substitute(expression: Any, chosen: Mapping[Any, int], replacements: Mapping[Any, Any]) -> Any:
    for _ in range(4):
        expression = expression.xreplace(chosen).xreplace(replacements)
    expression = expression.xreplace(chosen)
    if not expression.is_number:
        return None
    return sympy.Integer(int(expression)) if expression.is_integer else expression  # symbolic floats are no sizes


def _in_range(bounds: Any, value: Any) -> bool:
    return bounds is None or bool(bounds.lower <= value and value <= bounds.upper)


def _guards_hold(env: Any, symbols: Mapping[Any, int]) -> bool:
    for guard in env.guards:
        truth = guard.expr.xreplace(symbols)
        if truth in (True, False) and not bool(truth):
            return False
    return True


def _refaked(
    gm: fx.GraphModule,
    inputs: Sequence[GraphInput],
    batch: Mapping[fx.Node, tuple[int, ...]],
    bound: Mapping[fx.Node, torch.Tensor],
    free: str,
) -> tuple[World, ...] | None:
    """Run the graph on fake tensors at sizes of our own; ``free`` says which input dims vary: all, rows (the first
    two) or batch.
    """
    worlds = []
    for index in range(WORLDS):
        shapes = _input_shapes(inputs, batch, free, index)
        try:
            values = run_fake(gm, inputs, shapes, bound)
        except Exception as error:
            log.debug("the graph does not run with %s dims free: %s", free, error)
            return None
        worlds.append(World(values=values, generator=_generator(index)))
    return tuple(worlds)


def _input_shapes(
    inputs: Sequence[GraphInput], batch: Mapping[fx.Node, tuple[int, ...]], free: str, world: int
) -> dict[fx.Node, tuple[int, ...]]:
    sizes: dict[Any, int] = {}
    others = iter(_OTHER_SIZES[world] * 50)
    symbolic = any(symbol is not None for inp in inputs for symbol in inp.symbols)
    shapes = {}
    for inp in inputs:
        dims = batch.get(inp.node, ())
        shape = []
        for d, size in enumerate(inp.sizes):
            key = ("request", dims.index(d)) if d in dims else ("other", size)
            fixed = size == 1 if key[0] == "other" else len(dims) > 1 and dims.index(d) == 0 and size == 1
            fixed = fixed or (symbolic and inp.symbols[d] is None)
            fixed = fixed or (free == "batch" and key != ("request", 0)) or (free == "rows" and d > 1)
            if fixed:
                shape.append(size)
                continue
            if key not in sizes:
                packed_batch = key == ("request", 0) and len(dims) > 1
                sizes[key] = 3 + world if packed_batch else _BATCH_SIZES[world] if key[0] == "request" else next(others)
            shape.append(sizes[key])
        shapes[inp.node] = tuple(shape)
    return shapes
