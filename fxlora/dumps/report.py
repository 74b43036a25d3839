"""The HTML report: one file that opens anywhere, offline, with everything a dump knows.

The page, its style and its scripts lie in `report_page/` beside this file; the data is JSON inside the page. Names of
nodes, modules and adapters are data to the scripts, never markup.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import networkx as nx

from fxlora.dumps.adapters import AdapterView
from fxlora.dumps.graph import calls_of_sites, plain, site_id
from fxlora.dumps.links import became
from fxlora.dumps.record import Record
from fxlora.dumps.text import kind_of
from fxlora.dumps.tree import REFERENCE, Visit, visit_tree
from fxlora.passes.sites import Site

_KINDS = ("call", "weight", "input", "output", "row_map")
_DIGITS = 6
SCRIPTS = ["helpers", "stage", "state", "overview", "sites", "drawing", "rows", "details", "tree", "search", "start"]
"""The scripts of the page in the order in which they run, in one scope."""


class _Table:
    """Texts that many nodes share, by number; 0 is the empty text."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {"": 0}

    def __call__(self, text: str) -> int:
        return self.numbers.setdefault(text, len(self.numbers))


def report_html(
    record: Record,
    graphs: Mapping[str, nx.MultiDiGraph],
    adapters: Sequence[AdapterView],
    *,
    focus: str | None = None,
) -> str:
    """The whole page as text."""
    folder = files("fxlora.dumps") / "report_page"
    names = ("page.html", "style.css", *(f"{name}.js" for name in SCRIPTS))
    page, style, *scripts = ((folder / name).read_text(encoding="utf-8") for name in names)
    data = json.dumps(report_data(record, graphs, adapters, focus=focus), ensure_ascii=False, separators=(",", ":"))
    parts = {
        "STYLE": style,
        "SCRIPT": "\n".join(scripts),
        "DATA": _embedded(data),
        "TITLE": _escaped(record.title or "graph"),
    }
    pieces = page.split("/*fxlora:")
    made = [pieces[0]]
    for piece in pieces[1:]:
        name, _, rest = piece.partition("*/")
        made += [parts[name], rest]
    return "".join(made)


def _embedded(data: str) -> str:
    """JSON that no HTML parser can mistake for the end of its script, or for a comment."""
    return data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def report_data(
    record: Record,
    graphs: Mapping[str, nx.MultiDiGraph],
    adapters: Sequence[AdapterView],
    *,
    focus: str | None = None,
) -> dict[str, Any]:
    """What the page shows, as plain data: texts by number, nodes by index."""
    table = _Table()
    snapshots = {"before": record.before, "after": record.after}
    stages, indices = [], {}
    for stage, graph in graphs.items():
        names = [node for node, kind in graph.nodes(data="kind") if kind in _KINDS]
        indices[stage] = {name: i for i, name in enumerate(names)}
        nodes = [_node(graph, name, indices[stage], table) for name in names]
        stages.append({"name": stage, "nodes": nodes, "tree": _tree(visit_tree(graph), indices[stage])})
    before, after = indices["before"], indices.get("after", {})
    linked = [[before[a], [after[b] for b in made]] for a, made in became(record).items() if a in before]
    numbers = {site: i for i, site in enumerate(record.sites)}
    uses: dict[str, dict[Site, list[int]]] = {}
    for stage, snapshot in snapshots.items():
        for site, node in calls_of_sites(record, snapshot) if snapshot else ():
            made = uses.setdefault(stage, {}).setdefault(site, [])
            if (i := indices[stage][node.name]) not in made:
                made.append(i)
    return {
        "title": record.title or "graph",
        "focus": focus,
        "summary": _summary(record, graphs),
        "stages": stages,
        "became": linked,
        "sites": [
            _site(site, graphs["before"], {stage: found.get(site, []) for stage, found in uses.items()})
            for site in record.sites
        ],
        "groups": [{"sites": [numbers[s] for s in g.sites], "why": g.reason} for g in record.groups],
        "maps": [{"steps": rows.chain()} for rows in record.row_maps()],
        "adapters": [_adapter(view, numbers) for view in adapters],
        "skipped": [_skip(record, item, before) for item in record.skipped],
        "passes": [[r.name, round(1000 * r.seconds, 2), r.nodes_before, r.nodes_after] for r in record.reports],
        "notes": [*record.notes],
        "refusal": record.refusal,
        "modules": {path: table(kind) for path, kind in list(graphs.values())[-1].graph["modules"].items()},
        "texts": list(table.numbers),
    }


def _node(graph: nx.MultiDiGraph, name: str, index: Mapping[str, int], table: _Table) -> list[Any]:
    """[name, kind, label, module, type, source, rows, mixed, call or names], texts by number, end cut where empty."""
    facts = graph.nodes[name]
    if facts["kind"] == "weight":
        last: Any = facts["names"]
    else:
        last = REFERENCE.sub(lambda m: f"%{index[m[1]]};" if m[1] else m[0], facts.get("call", ""))
    row = [name, _KINDS.index(facts["kind"]), *(table(facts.get(key, "")) for key in ("label", "module"))]
    row += [table(kind_of(facts)), table(facts.get("source", "")), table(facts.get("rows", ""))]
    return [*row, int(facts.get("mixed", False)), last]


def _tree(visit: Visit, index: Mapping[str, int]) -> list[Any]:
    """[name, path, index among the siblings of the visit that it repeats or -1, items]; items are nodes or visits."""
    siblings = visit.visits
    place = {sibling: i for i, sibling in enumerate(siblings)}

    def item(inner: Any) -> Any:
        if not isinstance(inner, Visit):
            return index[inner]
        name, path, _, items = _tree(inner, index)
        return [name, path, place[inner.like] if inner.like is not None else -1, items]

    return [visit.name, visit.path, -1, [item(inner) for inner in visit.items]]


def _summary(record: Record, graphs: Mapping[str, nx.MultiDiGraph]) -> dict[str, Any]:
    counts = {stage: sum(1 for _, k in g.nodes(data="kind") if k in _KINDS) for stage, g in graphs.items()}
    pool = record.pool
    memory = {}
    if pool is not None:
        memory = {
            "slots": pool.max_adapters,
            "max_rank": pool.max_rank,
            "pool_rows": pool.pool_rows,
            "bytes": pool.bytes,
        }
    traced = record.reports[0].nodes_before if record.reports else counts["before"]
    return {"nodes": counts, "traced": traced, "memory": memory, "ops": len(record.groups)}


def _number(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{_DIGITS}g}")


def _site(site: Site, graph: nx.MultiDiGraph, calls: Mapping[str, list[int]]) -> dict[str, Any]:
    facts = graph.nodes[site_id(site)]
    return {
        "name": site.name,
        "parameter": site.parameter,
        "aliases": list(site.aliases),
        "role": site.role.value,
        "shape": list(site.weight.shape),
        "k": site.in_features,
        "n": site.out_features,
        "dtype": str(site.dtype).removeprefix("torch."),
        "uses": len(site.uses),
        "maps": facts.get("row_maps", []),
        "source": facts.get("source", ""),
        "calls": dict(calls),
    }


def _adapter(view: AdapterView, numbers: Mapping[Site, int]) -> dict[str, Any]:
    places = [
        [numbers[s], p.rank, p.scaling, _number(p.delta_norm), _number(p.weight_norm), p.start, p.rows, p.pool_rows]
        for s, p in view.places.items()
    ]
    unbound = [[item.key, item.reason, item.nearest] for item in view.unbound]
    return {"name": view.name, "slot": view.slot, "places": places, "unbound": unbound, "error": view.error}


def _skip(record: Record, item: Any, index: Mapping[str, int]) -> dict[str, Any]:
    """A weight that is no site. Where it was found and then refused, the calls whose rows could not be told."""
    calls = [
        index[node.name]
        for site in record.found
        if site.parameter == item.name and site not in record.sites
        for node in site.uses
        if node.name in index
    ]
    return {"name": plain(item.name), "aliases": list(item.aliases), "reason": item.reason, "calls": calls}
