"""Walks a graph once and labels every tensor with its rows; the entry to row provenance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from fxlora.passes.graph import attribute, describe, fake_value, op_name, operand
from fxlora.passes.rows.families import VIEWS
from fxlora.passes.rows.inside import look_inside
from fxlora.passes.rows.integers import Integers
from fxlora.passes.rows.labels import Label, MapTable, Mixed, RowMap, Rows
from fxlora.passes.rows.mapped import inside_vmap
from fxlora.passes.rows.masked import Guard
from fxlora.passes.rows.rules import is_known, rows_of
from fxlora.passes.rows.worlds import Sizing, TensorFacts, UnknownShapeError
from fxlora.passes.rows.writes import FUNCTIONAL, apply_write, is_write, mark_statistics, written

_EXPECTED = (UnknownShapeError, IndexError, RuntimeError, TypeError, KeyError, ValueError, AttributeError)


class Prover:
    """Row provenance of one graph.

    Args:
        gm: The graph, normalised.
        sizing: The worlds of the proof.
        seeds: Input node to its request dims: ``(0,)``, or ``(0, 1)`` where adapters are chosen per token.
        primary: The seeded input whose request dims give ``adapter_slots`` its shape.
        bound: Tensors behind placeholders that are weights or buffers.
        reads: Calls that adapters may change, each with what it takes beside its weight.
        strangers: Names of inputs of which nothing is known: neither request dims, nor that they follow the requests.
        supposes: Whether rows that are repeated for several images of each request may be taken to follow each other as
            the only rows of that number do; a walk in which any requests then meet is repeated without it.

    Attributes:
        looks_inside: Whether ops without a rule are taken apart.
        labels: Rows of every node (a tuple for ops with several results); absent means None.
        vmapped: Calls inside a torch.vmap.
        guards: Calls whose rows are checked as the graph runs.
        assumed: Nodes whose isolation is the mask's job, with the words for it.
        reasons: Where each ``Mixed`` first arose.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        sizing: Sizing,
        seeds: Mapping[fx.Node, tuple[int, ...]],
        primary: fx.Node | None,
        bound: Mapping[fx.Node, torch.Tensor] | None = None,
        strangers: Mapping[fx.Node, str] | None = None,
        reads: Mapping[fx.Node, fx.Node] | None = None,
        *,
        supposes: bool = True,
    ) -> None:
        self.graph = gm.graph
        self.worlds = sizing.worlds
        self.frozen = sizing.frozen
        self.count = len(sizing.worlds)
        self.looks_inside = True
        self.packed = any(len(dims) > 1 for dims in seeds.values())
        self.integers = Integers(gm, self.worlds, constant_integers(gm, bound or {}))
        order: dict[fx.Node | None, int] = {None: -1, **{n: i for i, n in enumerate(gm.graph.nodes)}}
        self.table = MapTable(order)
        self.labels: dict[fx.Node, Any] = {}
        self.vmapped = inside_vmap(gm.graph)
        self.roots: dict[fx.Node, fx.Node] = {}
        self.members: dict[fx.Node, list[fx.Node]] = {}
        self.assumed: dict[fx.Node, str] = {}
        self.guards: dict[fx.Node, Guard] = {}
        if strangers is None:
            unbound = (n for n in gm.graph.nodes if n.op == "placeholder" and n not in (bound or {}))
            strangers = {n: str(n.target) for n in unbound if n not in seeds}
        self._strangers, self._reads, self._bound = strangers, reads or {}, bound or {}
        self._row_length: list[int] = []
        self._supposes, self._supposed = supposes, False
        self._again = lambda: Prover(gm, sizing, seeds, primary, bound, strangers, reads, supposes=False)
        if primary is not None:
            self.seed = self._seed(seeds, primary)

    def _seed(self, seeds: Mapping[fx.Node, tuple[int, ...]], primary: fx.Node) -> RowMap:
        ids = []
        for w in range(self.count):
            sizes = [self.shape(primary, w)[d] for d in seeds[primary]]
            ids.append(torch.arange(torch.Size(sizes).numel()).reshape(sizes))
            self._row_length.append(sizes[1] if len(sizes) > 1 else 1)
        seed = self.table.intern(ids, (), None, None, "adapter_slots")
        for node, dims in seeds.items():
            fits = all(
                [self.shape(node, w)[d] for d in dims] == list(ids[w].shape[: len(dims)]) for w in range(self.count)
            )
            if len(dims) == len(seeds[primary]) and fits:
                self.labels[node] = Label(seed, dims)
            else:
                self.labels[node] = Mixed(f"input {node.name} does not have the request dims of {primary.name}")
        return seed

    def count_mixed(self) -> int:
        """Nodes whose rows are not proven."""
        return sum(any(isinstance(rows, Mixed) for rows in _parts(label)) for label in self.labels.values())

    def run(self) -> Prover:
        """Label every node of the graph, in order."""
        for node in self.graph.nodes:
            if node.op in ("placeholder", "get_attr", "output"):
                continue
            self.integers.visit(node)
            self._track_memory(node)
            with self._shared_out(node):
                if not any(self.labels.get(n) is not None for n in node.all_input_nodes):
                    continue
                try:
                    rows = self._rows_after(node)
                except _EXPECTED as error:
                    rows = Mixed(f"{op_name(node).lstrip('?')} could not be followed ({type(error).__name__}: {error})")
            if isinstance(rows, Mixed) and not any(
                r is rows for n in node.all_input_nodes for r in _parts(self.labels.get(n))
            ):
                rows = Mixed(f"{rows.reason}, at {describe(node)}")
            if rows is not None:
                self.labels[node] = self._checked(node, rows)
        met = self._supposed and any(isinstance(r, Mixed) for rows in self.labels.values() for r in _parts(rows))
        return self._again().run() if met else self

    @contextmanager
    def _shared_out(self, node: fx.Node) -> Iterator[None]:
        """What is repeated for each request (learned queries, positions, a timestep) is each request's own for a call
        that adapters may change; for all others it stays the same for all."""
        x = self._reads.get(node)
        if x is None or (rows := self.rows_of_read(x)) is None or self.labels.get(x) is not None:
            yield
            return
        self.labels[x] = rows
        try:
            yield
        finally:
            self.labels[x] = None

    def rows_of_read(self, x: fx.Node) -> Rows:
        """Rows of what a site's call takes: those of the tensor, or of the requests it is repeated for."""
        if (rows := self.rows(x)) is not None or not self.is_tensor(x):
            return rows
        if self.seed.ids[0].dim() > 1:
            return None
        if any(n not in self._bound and not self._is_number(n) for n in self._inputs_behind(x)):
            return None
        own = self._dims_of(x, self.seed)
        if len(own) == 1:
            return Label(self.seed, (own[0],))
        if not self._supposes:
            return None
        # Rows of several images or frames of each request: how they follow each other is checked where they meet them.
        others = [m for m in self.table.before(x) if m is not self.seed and m.ids[0].dim() == 1]
        found = [Label(m, (d,)) for m in others for d in self._dims_of(x, m)]
        if len(found) != 1 or own:
            return None
        self._supposed = True
        return found[0]

    def _dims_of(self, x: fx.Node, row_map: RowMap) -> list[int]:
        """The dims of a tensor that are as long as a map in every world, where it has more than one length."""
        if len({ids.numel() for ids in row_map.ids}) == 1:
            return []
        shapes = [self.shape(x, w) for w in range(self.count)]
        return [d for d in range(self.ndim(x)) if all(shapes[w][d] == ids.numel() for w, ids in enumerate(row_map.ids))]

    def inside(
        self,
        gm: fx.GraphModule,
        sizing: Sizing,
        labels: Mapping[fx.Node, Rows],
        values: Mapping[fx.Node, torch.Tensor],
        world: int,
    ) -> Prover:
        """The prover of what one call does, in one of the worlds: ``labels`` and ``values`` of its placeholders."""
        inner = Prover(gm, sizing, {}, None, values)
        inner.looks_inside, inner.packed = False, self.packed
        inner._row_length = [self._row_length[world]]
        inner.labels.update({node: rows for node, rows in labels.items() if rows is not None})
        return inner

    def look_inside(self, node: fx.Node) -> Any:
        """Rows of a call that no rule names, by the ops it is made of."""
        return look_inside(self, node, is_known)

    def _rows_after(self, node: fx.Node) -> Any:
        if is_write(node):
            return apply_write(self, node)
        if op_name(node) in FUNCTIONAL:
            return written(self, node, operand(node))
        rows = rows_of(self, node)
        mark_statistics(self, node, rows)
        if not is_known(op_name(node)):
            self._share_memory(node, operand(node))  # what an unknown op returns may be its operand, and be written to
        return rows

    def _checked(self, node: fx.Node, rows: Any) -> Any:
        """Labels whose sizes do not fit their node are no labels: a guard against a wrong rule."""
        if not isinstance(rows, Label):
            return rows
        for w in range(self.count):
            facts = self.worlds[w].facts(node)
            shape = facts.shape if isinstance(facts, TensorFacts) else None
            if shape is not None and [shape[d] for d in rows.dims] != list(rows.map.ids[w].shape):
                return Mixed(f"rows do not fit the result of {describe(node)}")
        return rows

    def _track_memory(self, node: fx.Node) -> None:
        name = op_name(node)
        if name in VIEWS or is_write(node) or name == "as_tensor":
            self._share_memory(node, operand(node))
        elif name == "einsum" and len(node.all_input_nodes) == 1:  # of one operand it may be a view
            self._share_memory(node, node.all_input_nodes[0])

    def _share_memory(self, node: fx.Node, source: Any) -> None:
        if isinstance(source, fx.Node):
            root = self.roots.get(source, source)
            self.roots[node] = root
            self.members.setdefault(root, []).append(node)

    def rows(self, value: Any) -> Rows:
        """Rows of one tensor; a tuple result counts as mixed unless all its parts are alike."""
        rows = self.labels.get(value) if isinstance(value, fx.Node) else None
        if isinstance(rows, tuple):
            return rows[0] if all(r == rows[0] for r in rows) else Mixed("several results taken as one")
        return rows

    def shape(self, node: fx.Node, world: int) -> tuple[int, ...]:
        return self.worlds[world].shape(node)

    def ndim(self, node: Any) -> int:
        return len(self.worlds[0].shape(node)) if self.is_tensor(node) else 0

    def dtype(self, node: fx.Node) -> torch.dtype:
        return self.worlds[0].facts(node).dtype

    def is_tensor(self, value: Any) -> bool:
        return isinstance(value, fx.Node) and isinstance(self.worlds[0].facts(value), TensorFacts)

    def number(self, value: Any, world: int) -> Any:
        return self.worlds[world].number(value)

    def size(self, emit: Callable[..., fx.Node], node: fx.Node, dim: int) -> Any:
        """A size for an emitted map: the number where it is the same in every world, else a node that reads it.

        A size that tracing left open is read even where the graph's guards let no world choose another number for it.
        """
        sizes = {self.shape(node, w)[dim] for w in range(self.count)}
        traced = getattr(fake_value(node), "shape", None)
        is_open = traced is not None and len(traced) > dim and isinstance(traced[dim], torch.SymInt)
        return sizes.pop() if len(sizes) == 1 and not is_open else emit(torch.ops.aten.sym_size.int, node, dim)

    def strangers_behind(self, node: fx.Node) -> list[str]:
        """The inputs of which nothing is known that a value is computed from."""
        return sorted(self._strangers[n] for n in self._inputs_behind(node) if n in self._strangers)

    def given_behind(self, node: fx.Node) -> bool:
        """Whether a value is computed from anything that the caller passes, and not from weights and sizes alone."""
        return any(n not in self._bound for n in self._inputs_behind(node))

    def _inputs_behind(self, node: fx.Node) -> list[fx.Node]:
        """The placeholders whose values, and not only whose sizes, a value is computed from."""
        seen, queue = {node}, [node]
        for n in queue:
            new = [m for m in n.all_input_nodes if m not in seen and self.is_tensor(m)]
            seen |= set(new)
            queue += new
        return [n for n in queue if n.op == "placeholder"]

    def _is_number(self, node: fx.Node) -> bool:
        """A single number, such as the timestep of a denoising step, says the same to all requests."""
        return all(torch.Size(self.shape(node, w)).numel() == 1 for w in range(self.count))

    def assume(self, node: fx.Node, words: str) -> None:
        self.assumed.setdefault(node, words)

    def same_requests(self, left: Label, right: Label) -> bool:
        """Packed rows: do both operands' rows belong to the same sequences, batch entry by batch entry?"""
        for w in range(self.count):
            length = self._row_length[w]
            sequences = [(label.map.ids[w] // length).flatten().tolist() for label in (left, right)]
            if len(set(sequences[0])) == len(set(sequences[1])) == 1:
                if sequences[0][0] != sequences[1][0]:
                    return False
                continue
            batch = [(label.map.ids[w] // length) for label in (left, right)]
            firsts = [b.reshape(b.shape[0], -1) for b in batch if b.dim() > 1]
            if left.dims[0] != right.dims[0] or len(firsts) != 2:
                return False
            if any(bool((f != f[:, :1]).any()) for f in firsts) or firsts[0][:, 0].tolist() != firsts[1][:, 0].tolist():
                return False
        return True


def constant_integers(gm: fx.GraphModule, bound: Mapping[fx.Node, torch.Tensor]) -> dict[fx.Node, torch.Tensor]:
    """Integer buffers that the graph reads and never writes: index tables, whose values are part of the model."""
    written_to = {operand(n) for n in gm.graph.nodes if is_write(n)}
    found = {}
    for node in gm.graph.nodes:
        if node not in written_to and (node.op == "get_attr" or node in bound):
            value = bound[node] if node in bound else attribute(gm, str(node.target))
            if (
                isinstance(value, torch.Tensor)
                and value.device.type != "meta"
                and value.numel() < 2**22
                and not value.is_floating_point()
                and not value.is_complex()
            ):
                found[node] = value.detach().cpu()
    return found


def _parts(rows: Any) -> Sequence[Any]:
    return rows if isinstance(rows, tuple) else (rows,)
