"""A graph as text, module by module with repeats folded, and what each pass did to it.

Golden tests compare the same text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import networkx as nx

from fxlora.dumps.record import Record
from fxlora.dumps.tree import REFERENCE, Visit, fold_names, sites_of, visit_tree
from fxlora.passes.diff import Snapshot, graph_diff
from fxlora.passes.graph import op_name

_DTYPES = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "complex": "c"}


def graph_text(graph: nx.MultiDiGraph, *, depth: int | None = None, focus: str | None = None) -> str:
    """The whole graph, or the module `focus` alone; below `depth` levels a module is one line."""
    tree = visit_tree(graph)
    shown = [tree] if not focus else [v for v in _all(tree) if v.path == focus]
    lines = [_headline(graph)]
    if not focus:
        lines += _inputs(graph) + _row_maps(graph)
    for visit in shown:
        if visit.path:
            lines.append(visit.path)
        lines += _lines(graph, visit, 1 if visit.path else 0, depth)
    return "\n".join(lines) + "\n"


def _all(visit: Visit) -> list[Visit]:
    return [visit, *(inner for item in visit.visits for inner in _all(item))]


def _headline(graph: nx.MultiDiGraph) -> str:
    kinds = Counter(kind for _, kind in graph.nodes(data="kind"))
    ops = sum(1 for node, kind in graph.nodes(data="kind") if kind == "call" and sites_of(graph, node))
    nodes = sum(count for kind, count in kinds.items() if kind not in ("site", "adapter"))
    words = [_count(nodes, "node")]
    words += [f"{_count(kinds['site'], 'site')} in {_count(ops, 'call')}"] if kinds["site"] else []
    adapters = [facts["label"] for _, facts in graph.nodes(data=True) if facts["kind"] == "adapter"]
    words += [f"adapters {', '.join(adapters)}"] if adapters else []
    stage = {"after": " (after the rewrite)", "before": " (before the rewrite)"}.get(graph.graph["stage"], "")
    return f"{graph.graph['title']}{stage}: {'; '.join(words)}"


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def _inputs(graph: nx.MultiDiGraph) -> list[str]:
    found = [(node, facts) for node, facts in graph.nodes(data=True) if facts["kind"] == "input"]
    return ["inputs", *(f"  {node}{_also(node, facts['label'])} {kind_of(facts)}".rstrip() for node, facts in found)]


def _also(node: str, label: str) -> str:
    return f" ({label})" if label != node else ""


def _row_maps(graph: nx.MultiDiGraph) -> list[str]:
    found = [(node, facts) for node, facts in graph.nodes(data=True) if facts["kind"] == "row_map"]
    return ["row maps", *(f"  {node} = {_call(graph, facts, '')}" for node, facts in found)] if found else []


def _lines(graph: nx.MultiDiGraph, visit: Visit, level: int, depth: int | None) -> list[str]:
    pad, lines, folded = "  " * level, [], []

    def flush() -> None:
        for first in dict.fromkeys(v.like for v in folded):
            assert first is not None
            alike = [v for v in folded if v.like is first]
            names = fold_names(list(dict.fromkeys(v.name for v in alike)))
            lines.append(f"{pad}{names} {like_words(alike)}")
        folded.clear()

    for item in visit.items:
        if isinstance(item, Visit) and item.like is not None:
            folded.append(item)
            continue
        flush()
        if not isinstance(item, Visit):
            facts = graph.nodes[item]
            name = "" if facts["kind"] == "output" else f"{item} = "
            kind = kind_of(facts)
            lines.append(
                f"{pad}{name}{_call(graph, facts, visit.path)}"
                f"{f' : {kind}' if kind else ''}{_marks(graph, item, visit.path)}"
            )
        elif depth is not None and level >= depth:
            calls = list(item.calls())
            served = sum(len(sites_of(graph, call)) for call in calls)
            lines.append(f"{pad}{item.name}: {_count(len(calls), 'call')}, {_count(served, 'site')}")
        else:
            lines += [f"{pad}{item.name}", *_lines(graph, item, level + 1, depth)]
    flush()
    return lines


def like_words(alike: Sequence[Visit]) -> str:
    """`as layers.0`; for the same module called again, how often."""
    first = alike[0].like
    assert first is not None
    if all(visit.path == first.path for visit in alike):
        return "again" if len(alike) == 1 else f"again, {len(alike)} times"
    return f"as {first.name}"


def _call(graph: nx.MultiDiGraph, facts: dict[str, object], path: str) -> str:
    """The text of a call, with weights by their names: those of its own module as `self.weight`."""

    def word(match: re.Match[str]) -> str:
        if match[1] is None:
            return "%"
        other = graph.nodes[match[1]]
        if other["kind"] != "weight":
            return match[1]
        own = [name for name in other["names"] if path and name.startswith(f"{path}.")]
        return f"self.{own[0][len(path) + 1 :]}" if own else other["label"]

    return REFERENCE.sub(word, str(facts["call"]))


def kind_of(facts: dict[str, object]) -> str:
    """Dtype and shape of a node: `f32[s0, 48]`, several of them in brackets; of a number the number itself."""
    if "size" in facts:
        return str(facts["size"])
    dtype = re.sub(r"^[a-z]+", lambda m: _DTYPES.get(m[0], m[0]), str(facts.get("dtype", "")))
    if "shapes" in facts:
        shapes = facts["shapes"]
        assert isinstance(shapes, Sequence)
        return f"({', '.join(f'{dtype}{_shape(shape)}' for shape in shapes)})"
    return f"{dtype}{_shape(facts['shape'])}" if "shape" in facts else ""


def _shape(shape: object) -> str:
    assert isinstance(shape, Sequence)
    return f"[{', '.join(map(str, shape))}]"


def _marks(graph: nx.MultiDiGraph, call: str, path: str) -> str:
    """What a call serves: sites by their names below the module that holds it, role and row maps."""
    sites = [graph.nodes[site] for site in sites_of(graph, call)]
    if not sites:
        return ""
    parent = path.rpartition(".")[0]
    names = [site["label"].removeprefix(f"{parent}." if parent else "") for site in sites]
    roles = ", ".join(dict.fromkeys(site["role"] for site in sites))
    maps = list(dict.fromkeys(number for site in sites for number in site.get("row_maps", ())))
    rows = f", rows {', '.join(map(str, maps))}" if maps else ""
    return f"  # {' + '.join(names)}: {roles}{rows}"


def diff_text(record: Record) -> str:
    """What each pass did: seconds, nodes before and after, calls by op, and the lines that changed."""
    if not record.reports:
        return "no pass has run on this graph\n"
    width = max(len(report.name) for report in record.reports)
    lines = [f"{'pass':{width}}  {'ms':>8}  {'before':>7}  {'after':>7}  changed"]
    parts = []
    for report in record.reports:
        changed = report.before is not report.after and report.before is not None and report.after is not None
        lines.append(
            f"{report.name:{width}}  {1000 * report.seconds:8.1f}  {report.nodes_before:7}  {report.nodes_after:7}  "
            f"{'yes' if changed else '-'}"
        )
        if changed:
            assert report.before is not None
            assert report.after is not None
            diff = graph_diff(report.before.text(), report.after.text())
            parts += ["", f"== {report.name}", *_op_changes(report.before, report.after), diff]
    if record.refusal:
        parts += ["", f"refused: {record.refusal}"]
    return "\n".join([*lines, *parts]) + "\n"


def _op_changes(before: Snapshot, after: Snapshot) -> list[str]:
    """`+146 fxlora::lora_linear`, `-240 linear`: how the number of calls of each op changed."""
    counts = [Counter(op_name(s) or s.op for s in snapshot.nodes) for snapshot in (before, after)]  # type: ignore[arg-type]
    changes = {op: counts[1][op] - counts[0][op] for op in sorted({*counts[0], *counts[1]})}
    return [f"{change:+} {op}" for op, change in changes.items() if change]
