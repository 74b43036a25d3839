"""A graph as one networkx MultiDiGraph of typed nodes: what every format is drawn from.

Kinds of nodes:
    input     an argument of the call. Its id, like that of every node of the graph, is its name in the graph.
    weight    a parameter or buffer: `names` has all of its names, `roles` each role it is read in. One node per tensor.
    call      one op: `call` is its text, in which `%name` stands for a node (`%%` for a percent sign). `repeats` has
              the modules around it that were called before, and how often.
              `shape` and `dtype` say what it returns, `shapes` where that are several, `size` where it is a number.
    row_map   a call that computes which request each row belongs to.
    output    what the graph returns.
    site      a weight in one role, `site:<name>:<role>`: edges come from its weight and lead to its calls.
    adapter   `adapter:<slot>`: edges lead to its sites, with rank, scaling, norms and place in adapter memory.
The graph's own attribute `modules` has the class of each module.
Kinds of edges: data (`arg` says where in the arguments), weight, use, adapter. An attribute without a value is absent.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import networkx as nx
import torch
from torch import fx

from fxlora.dumps.adapters import AdapterView
from fxlora.dumps.modules import module_kinds, module_paths, repeats, shared_item, source_of
from fxlora.dumps.record import Record
from fxlora.passes.diff import NodeState, Snapshot, argument_names, call_text, show
from fxlora.passes.graph import fake_value, op_name, operand
from fxlora.passes.pipeline import SLOTS_NAME
from fxlora.passes.rows.labels import Label, Mixed
from fxlora.passes.sites import Site
from fxlora.passes.weights import tensor_key


def build_graph(record: Record, snapshot: Snapshot, adapters: Sequence[AdapterView] = ()) -> nx.MultiDiGraph:
    """The graph of one side of a record. Adds sites and adapters where the record has them."""
    graph = nx.MultiDiGraph(title=record.title or "graph", stage=_stage(record, snapshot))
    item = shared_item(snapshot.nodes)
    graph.graph["modules"] = {plain(path): kind for path, kind in module_kinds(snapshot.nodes, item).items()}
    ids = _add_weights(graph, record, snapshot)
    for i, state in enumerate(snapshot.nodes):
        if state.node not in ids:
            ids[state.node] = state.name
            graph.add_node(state.name, **_present(_facts(record, state, i)))
    paths = {node: names[0] for node in record.tensors if (names := record.paths_of(node))}
    modules = module_paths(snapshot.nodes, paths, item)
    for state in snapshot.nodes:
        _add_call(graph, state, ids, modules.get(state.node, ""), repeats(state, item))
    _mark_row_maps(graph, snapshot, ids)
    _add_sites(graph, record, snapshot, ids)
    for view in adapters:
        _add_adapter(graph, view)
    return graph


def _stage(record: Record, snapshot: Snapshot) -> str:
    """`after` or `before` the rewrite; `graph` for one that no pass has seen."""
    return "after" if snapshot is record.after else "before" if record.reports else "graph"


def site_id(site: Site) -> str:
    """The id of a site's node."""
    return plain(f"site:{site.name}:{site.role.value}")


def plain(text: str) -> str:
    """Text that any format can hold: control characters are escaped."""
    return text if text.isprintable() else "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def _add_weights(graph: nx.MultiDiGraph, record: Record, snapshot: Snapshot) -> dict[fx.Node, str]:
    ids: dict[fx.Node, str] = {}
    known: dict[Any, str] = {}
    for i, state in enumerate(snapshot.nodes):
        tensor = record.tensors.get(state.node)
        if tensor is None:
            continue
        key = tensor_key(tensor)
        ids[state.node] = known.setdefault(key, state.name)
        if ids[state.node] == state.name:
            names = [plain(name) for name in record.paths_of(state.node)]
            facts = {"kind": "weight", "label": names[0], "names": names, "order": i, **_tensor_facts(tensor)}
            facts |= {"bytes": tensor.numel() * tensor.element_size()}
            facts |= {"parameter": isinstance(tensor, torch.nn.Parameter)}
            graph.add_node(state.name, **facts)
    return ids


def _facts(record: Record, state: NodeState, order: int) -> dict[str, Any]:
    kind = {"placeholder": "input", "output": "output"}.get(state.op, "call")
    label = kind
    if kind == "input":
        label = plain(record.input_names.get(state.node, str(state.target)))
    if kind == "call":
        label = plain(_op(record, state))
    facts = {"kind": kind, "label": label, "order": order, "source": plain(source_of(state.meta))}
    if state.node in record.shapes:
        dtype, shape = record.shapes[state.node]
        facts |= {"shape": shape, "dtype": str(dtype).removeprefix("torch.")}
    else:
        facts |= _tensor_facts(fake_value(state.node))
    rows = record.labels.get(state.node)
    return facts | {"rows": plain(rows_text(rows)), "mixed": True if isinstance(rows, Mixed) else None}


def _op(record: Record, state: NodeState) -> str:
    """The name of a call's op; for the call of a module its class."""
    if state.op == "call_module":
        return type(record.gm.get_submodule(str(state.target))).__name__
    return op_name(state)  # type: ignore[arg-type]


def rows_text(rows: Any) -> str:
    """Rows of one node in words; empty where it carries none."""
    if isinstance(rows, tuple):
        return " | ".join(dict.fromkeys(filter(None, map(rows_text, rows))))
    if isinstance(rows, Mixed):
        return f"mixed: {rows.reason}"
    if isinstance(rows, Label):
        dims = f"dim{'s' if len(rows.dims) > 1 else ''} {', '.join(map(str, rows.dims))}"
        return f"{dims} by {' -> '.join(rows.map.chain())}"
    return ""


def _tensor_facts(value: Any) -> dict[str, Any]:
    if isinstance(value, torch.Tensor):
        shape = [size if isinstance(size, int) else _size_text(size) for size in value.shape]
        return {"shape": shape, "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, list | tuple) and value and all(isinstance(v, torch.Tensor) for v in value):
        parts = [_tensor_facts(v) for v in value]
        return {"shapes": [part["shape"] for part in parts], "dtype": parts[0]["dtype"]}
    if isinstance(value, torch.SymInt | int) and not isinstance(value, bool):
        return {"size": _size_text(value)}
    return {}


def _size_text(size: Any) -> str:
    """A size as torch writes it. sympy takes 30 us to print a formula, and a graph has few of them many times."""
    formula = getattr(getattr(size, "node", None), "expr", None)
    return str(size) if formula is None else _printed(formula)


@lru_cache(maxsize=4096)
def _printed(formula: Any) -> str:
    return str(formula)


def _present(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if value is not None and value != ""}


def _add_call(
    graph: nx.MultiDiGraph, state: NodeState, ids: Mapping[fx.Node, str], module: str, again: Mapping[str, int]
) -> None:
    """The text of a call, and an edge from each node among its arguments. again: of repeats."""
    if state.op in ("placeholder", "get_attr"):
        return
    attributes = graph.nodes[ids[state.node]]
    attributes["call"] = template(state, ids, attributes["label"])
    if module:
        attributes["module"] = plain(module)
    if again:
        attributes["repeats"] = {plain(path): number for path, number in again.items()}
    names = argument_names(state)
    for path, node in _operands(state, names):
        graph.add_edge(ids[node], ids[state.node], key=path, kind="data", arg=path)


def template(state: NodeState, ids: Mapping[fx.Node, str], label: str) -> str:
    """The text of a call with `%id` for each node in it."""

    def marked(node: fx.Node) -> str:
        return f"\0{ids[node]}\0"

    text = f"return {show(state.args[0], marked)}" if state.op == "output" else call_text(state, marked)
    if state.op == "call_module":
        text = text.replace(f"?{state.target}", label, 1)
    parts = text.split("\0")
    return "".join(plain(part).replace("%", "%%") if i % 2 == 0 else f"%{part}" for i, part in enumerate(parts))


def _operands(state: NodeState, names: Sequence[str]) -> Iterator[tuple[str, fx.Node]]:
    """Every node among the arguments, with its place: `0`, `1.2`, `bias`, by name where the op has a schema of ours."""

    def walk(value: Any, path: str) -> Iterator[tuple[str, fx.Node]]:
        if isinstance(value, fx.Node):
            yield path, value
        elif isinstance(value, slice):
            yield from walk([value.start, value.stop, value.step], path)
        elif isinstance(value, list | tuple):
            for i, item in enumerate(value):
                yield from walk(item, f"{path}.{i}" if path else str(i))
        elif isinstance(value, Mapping):
            for key, item in value.items():
                yield from walk(item, plain(f"{path}.{key}" if path else str(key)))

    for i, value in enumerate(state.args):
        yield from walk(value, names[i] if i < len(names) else str(i))
    for key, value in state.kwargs.items():
        yield from walk(value, key)


def is_site_op(state: NodeState) -> bool:
    """Is this an op that reads base weights and adapters?"""
    return bool({"weight", "weights"} & set(argument_names(state)))


def _mark_row_maps(graph: nx.MultiDiGraph, snapshot: Snapshot, ids: Mapping[fx.Node, str]) -> None:
    """What is computed from the slots of a batch, up to the ops that read them, are row maps."""
    marked: set[fx.Node] = set()
    for state in snapshot.nodes:
        if state.op == "output" or is_site_op(state):
            continue
        slots = state.op == "placeholder" and state.target == SLOTS_NAME
        if slots or argument_names(state) or any(node in marked for _, node in _operands(state, ())):
            marked.add(state.node)
            if not slots:
                graph.nodes[ids[state.node]]["kind"] = "row_map"
    for state in reversed(snapshot.nodes):  # sizes that only row maps read
        readers = [target for _, target in graph.out_edges(ids[state.node])]
        ours = state.op.startswith("call") and not state.meta.get("nn_module_stack")
        if ours and readers and all(graph.nodes[reader]["kind"] == "row_map" for reader in readers):
            graph.nodes[ids[state.node]]["kind"] = "row_map"


def _add_sites(graph: nx.MultiDiGraph, record: Record, snapshot: Snapshot, ids: Mapping[fx.Node, str]) -> None:
    weights = {tensor_key(record.tensors[node]): name for node, name in ids.items() if node in record.tensors}
    rows = record.row_maps()
    calls = calls_of_sites(record, snapshot)
    for site in record.sites:
        uses = record.uses_of(site)
        maps = list(dict.fromkeys(rows[use.rows] for use in uses))
        chain = list(dict.fromkeys(" -> ".join(use.rows.chain()) for use in uses))
        facts = {
            "kind": "site",
            "label": plain(site.name),
            "role": site.role.value,
            "parameter": plain(site.parameter),
            "aliases": [plain(alias) for alias in site.aliases],
            "in_features": site.in_features,
            "out_features": site.out_features,
            "shape": list(site.weight.shape),
            "dtype": str(site.dtype).removeprefix("torch."),
            "uses": len(site.uses),
            "row_maps": maps,
            "rows": plain("; ".join(chain)),
            "source": plain(next((text for use in site.uses if (text := source_of(use.meta))), "")),
        }
        graph.add_node(site_id(site), **_present(facts))
        weight = weights.get(tensor_key(site.weight))
        if weight is not None:
            graph.add_edge(weight, site_id(site), key="weight", kind="weight")
            roles = graph.nodes[weight].setdefault("roles", [])
            if site.role.value not in roles:
                roles.append(site.role.value)
    for site, node in calls:
        if node in ids:
            count = graph.number_of_edges(site_id(site), ids[node])
            graph.add_edge(site_id(site), ids[node], key=f"use.{count}", kind="use")


def calls_of_sites(record: Record, snapshot: Snapshot) -> list[tuple[Site, fx.Node]]:
    """Each site with each of its calls: its own before the rewrite, after it the ops, members in the ops' order."""
    if snapshot is not record.after:
        return [(site, node) for site in record.sites for node in site.uses]
    states = {state.node: state for state in snapshot.nodes}
    found = []
    for use in record.uses:
        node: Any = record.results.get(use.node)
        while isinstance(node, fx.Node) and not is_site_op(states[node]):
            node = operand(states[node])  # type: ignore[arg-type]
        if isinstance(node, fx.Node):
            found.append((use.site, node))
    return found


def _add_adapter(graph: nx.MultiDiGraph, view: AdapterView) -> None:
    name = f"adapter:{view.slot}" if view.slot is not None else plain(f"adapter:{view.name}")
    facts = {"kind": "adapter", "label": plain(view.name), "slot": view.slot, "origin": plain(view.origin)}
    facts |= {"unbound": [plain(str(item)) for item in view.unbound] or None, "error": plain(view.error)}
    graph.add_node(name, **_present(facts))
    for site, place in view.places.items():
        facts = {"kind": "adapter", "rank": place.rank, "scaling": place.scaling, "start": place.start}
        facts |= {
            "rows": place.rows,
            "pool_rows": place.pool_rows,
            "delta_norm": place.delta_norm,
            "weight_norm": place.weight_norm,
        }
        graph.add_edge(name, site_id(site), key="adapter", **_present(facts))
