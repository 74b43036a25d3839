"""A graph as DOT, module by module: what lies deeper than `depth` is one box, repeats are one box, never every node.

Where even that is too much (a graph without modules), calls between two sites are one box: graphviz lays out such a
quotient of a large model in well under a second, the flat graph not in minutes.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections import Counter
from typing import Any

import networkx as nx

from fxlora.dumps.explorer import adapter_lines
from fxlora.dumps.text import kind_of, like_words
from fxlora.dumps.tree import Visit, fold_names, sites_of, visit_tree
from fxlora.errors import DumpPackageError

_BOXES_MAX = 80
_CALLS_MAX = 300
_FILL = {"site": "#cfe6f5", "row_map": "#fbe3b5", "input": "#e8e8e8", "output": "#e8e8e8"}


def dot_text(graph: nx.MultiDiGraph, *, depth: int | None = None, focus: str | None = None) -> str:
    """DOT of a graph. Raises DumpPackageError without pydot.

    depth: levels of modules to open; by default as many as stay below 80 boxes. focus: one module, with what it reads
    from outside and what reads it.
    """
    pydot = _pydot()
    tree = visit_tree(graph)
    if focus:
        tree = next(visit for visit in _all(tree) if visit.path == focus)
    if depth is None:
        depth = 1
        while _boxes(tree, depth) < _boxes(tree, depth + 1) <= _BOXES_MAX:
            depth += 1
    quotient = _Quotient(graph, tree, depth, runs=_boxes(tree, depth) > _CALLS_MAX)
    dot = pydot.Dot("fxlora", graph_type="digraph", rankdir="TB", fontname="Helvetica", compound="true")
    dot.set_node_defaults(fontname="Helvetica", fontsize="10", shape="box", style="filled,rounded", fillcolor="white")
    dot.set_edge_defaults(color="#666666", fontsize="9")
    quotient.draw(pydot, dot)
    return str(dot.to_string())


def rendered(dot: str, form: str) -> bytes:
    """DOT laid out by graphviz, as svg or png. Raises DumpPackageError where graphviz is not installed."""
    program = shutil.which("dot")
    if program is None:
        raise DumpPackageError(f"a .{form} needs graphviz' program `dot`, which is not on PATH: apt install graphviz")
    done = subprocess.run([program, f"-T{form}"], input=dot.encode(), capture_output=True, check=True)
    return done.stdout


def _pydot() -> Any:
    try:
        import pydot
    except ImportError as error:
        raise DumpPackageError("a .dot needs pydot: pip install 'fxlora[dump]'") from error
    return pydot


def _all(visit: Visit) -> list[Visit]:
    return [visit, *(inner for item in visit.visits for inner in _all(item))]


def _boxes(visit: Visit, depth: int) -> int:
    """How many boxes a tree opened to a depth has; repeats count once each time they follow each other."""
    count, last = 0, None
    for item in visit.items:
        if not isinstance(item, Visit) or (item.like is None and depth <= 0):
            count, last = count + 1, None
        elif item.like is None:
            count, last = count + _boxes(item, depth - 1), None
        elif item.like is not last:
            count, last = count + 1, item.like
    return count


class _Quotient:
    """Boxes of a tree opened to a depth, and which box each node of the graph lies in."""

    def __init__(self, graph: nx.MultiDiGraph, tree: Visit, depth: int, *, runs: bool) -> None:
        self.graph, self.depth, self.runs = graph, depth, runs
        self.box_of: dict[str, str] = {}
        self.labels: dict[str, tuple[str, str]] = {}
        self.clusters: list[Any] = []
        self.content = self._open(tree, 0)
        inside = set(self.box_of)
        for node, kind in graph.nodes(data="kind"):
            if node in self.box_of or kind in ("weight", "site", "adapter"):
                continue
            if kind == "row_map":
                self._box(node, "row maps", "row maps", "row_map")
            elif inside.intersection([*graph.successors(node), *graph.predecessors(node)]):
                self._box(node, f"n:{node}", self._outside(node), kind if kind in _FILL else "input")

    def _outside(self, node: str) -> str:
        facts = self.graph.nodes[node]
        return "\n".join(line for line in (facts.get("module", ""), facts["label"], kind_of(facts)) if line)

    def _box(self, node: str, box: str, label: str, kind: str) -> None:
        self.box_of[node] = box
        self.labels.setdefault(box, (label, kind))

    def _open(self, visit: Visit, level: int) -> list[Any]:
        """Box names and (visit, content) of modules that are drawn open, in order."""
        content: list[Any] = []
        repeats: dict[Visit, list[Visit]] = {}
        for inner in visit.visits:
            if inner.like is not None:
                repeats.setdefault(inner.like, []).append(inner)
        for i, item in enumerate(self._with_runs(visit.items) if self.runs else visit.items):
            if isinstance(item, list):
                label = self._run_label(item)
                for call in item:
                    self._box(call, f"r:{item[0]}", label, "call")
                content.append(f"r:{item[0]}")
            elif not isinstance(item, Visit):
                self._box(item, f"n:{item}", self._call_label(item), "site" if sites_of(self.graph, item) else "call")
                content.append(f"n:{item}")
            elif item.like is not None or level >= self.depth:
                first = item.like or item
                alike = repeats.get(first, []) if item.like is not None else [item]
                box = f"v:{first.path}:{item.like is not None}:{'' if item.like is not None else i}"
                label, kind = self.labels.get(box) or (self._visit_label(alike, item.like), self._kind(item))
                for call in item.calls():
                    self._box(call, box, label, kind)
                if box not in content:
                    content.append(box)
            else:
                content.append((item, self._open(item, level + 1)))
        return content

    def _with_runs(self, items: list[Any]) -> list[Any]:
        """The items of a visit, with calls that follow each other and serve no site as one list."""
        found: list[Any] = []
        for item in items:
            plain = not isinstance(item, Visit) and self.graph.nodes[item]["kind"] == "call"
            if not plain or sites_of(self.graph, item):
                found.append(item)
            elif found and isinstance(found[-1], list):
                found[-1].append(item)
            else:
                found.append([item])
        return found

    def _run_label(self, calls: list[str]) -> str:
        ops = Counter(self.graph.nodes[call]["label"] for call in calls)
        most = ", ".join(op for op, _ in ops.most_common(3))
        return f"{len(calls)} calls\n{most}{', ...' if len(ops) > 3 else ''}" if len(calls) > 1 else most

    def _kind(self, visit: Visit) -> str:
        return "site" if any(sites_of(self.graph, call) for call in visit.calls()) else "call"

    def _call_label(self, node: str) -> str:
        facts = self.graph.nodes[node]
        sites = [self.graph.nodes[site]["label"].rpartition(".")[2] for site in sites_of(self.graph, node)]
        adapters = [text for site in sites_of(self.graph, node)[:1] for text in adapter_lines(self.graph, site)]
        lines: list[str] = [facts["label"], " + ".join(sites), kind_of(facts), *adapters]
        return "\n".join(line for line in lines if line)

    def _visit_label(self, visits: list[Visit], like: Visit | None) -> str:
        calls = list(visits[0].calls())
        served = sum(len(sites_of(self.graph, call)) for call in calls)
        name = fold_names(list(dict.fromkeys(visit.name for visit in visits)))
        each = " each" if len(visits) > 1 else ""
        lines = [name, like_words(visits) if like else "", f"{len(calls)} calls{each}"]
        lines.append(f"{served} sites{each}" if served else "")
        return "\n".join(line for line in lines if line)

    def draw(self, pydot: Any, dot: Any) -> None:
        numbers = {box: f"n{i}" for i, box in enumerate(self.labels)}

        def add(parent: Any, box: str) -> None:
            label, kind = self.labels[box]
            fill = {"fillcolor": quoted(_FILL[kind])} if kind in _FILL else {}
            parent.add_node(pydot.Node(numbers[box], label=quoted(label), **fill))

        def fill(parent: Any, content: list[Any]) -> None:
            for item in content:
                if isinstance(item, str):
                    add(parent, item)
                    continue
                visit, inner = item
                cluster = pydot.Cluster(f"c{len(self.clusters)}", label=quoted(visit.name), color="#999999")
                self.clusters.append(cluster)
                fill(cluster, inner)
                parent.add_subgraph(cluster)

        fill(dot, self.content)
        drawn = {box for box in numbers if self._is_inside(box)}
        for box in numbers:
            if box not in drawn:
                add(dot, box)
        edges = Counter(
            (self.box_of[a], self.box_of[b])
            for a, b, kind in self.graph.edges(data="kind")
            if kind == "data" and a in self.box_of and b in self.box_of and self.box_of[a] != self.box_of[b]
        )
        sizes = {node for node, size in self.graph.nodes(data="size") if size}
        tensors = {(self.box_of.get(a), self.box_of.get(b)) for a, b in self.graph.edges() if a not in sizes}
        for (a, b), count in edges.items():
            if a in drawn or b in drawn:
                style = {"label": quoted(str(count))} if count > 1 else {}
                if (a, b) not in tensors:
                    style |= {"style": "dashed", "color": quoted("#bbbbbb")}
                dot.add_edge(pydot.Edge(numbers[a], numbers[b], **style))

    def _is_inside(self, box: str) -> bool:
        def holds(content: list[Any]) -> bool:
            return any(item == box if isinstance(item, str) else holds(item[1]) for item in content)

        return holds(self.content)


def quoted(text: str) -> str:
    """A DOT string: quotes and backslashes stay text, lines are centred."""
    return json.dumps(text, ensure_ascii=False)
