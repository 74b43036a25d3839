"""A record for Google's Model Explorer: one file with the graph before and after, whose sites link to each other.

Format: https://github.com/google-ai-edge/model-explorer (graph_builder.py): values are strings, `namespace` nests by
slashes, and a value of the form {"type": "node_ids"} is a link.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import networkx as nx

from fxlora.dumps.text import kind_of
from fxlora.dumps.tree import sites_of

_COLOURS = {"site": "#0072B2", "row_map": "#E69F00", "weight": "#DDDDDD"}


def explorer_text(graphs: Mapping[str, nx.MultiDiGraph], became: Mapping[str, list[str]]) -> str:
    """graphs: by stage. became: the calls of the graph before, and what stands for each of them after.

    What takes the place of a call has its id in both graphs, so that the viewer's side-by-side view moves in step.
    """
    title = next(iter(graphs.values())).graph["title"]
    ids = {made[0]: call for call, made in became.items()}
    ops: dict[str, list[str]] = {}
    for call, (_, *op) in became.items():
        for node in op:
            ops.setdefault(node, []).append(call)
    links = {"before": {call: [ids.get(n, n) for n in made] for call, made in became.items()}}
    links["after"] = ops | {node: [call] for node, call in ids.items()}
    made = [
        {"id": stage, "nodes": _nodes(graph, links.get(stage, {}), ids if stage == "after" else {})}
        for stage, graph in graphs.items()
    ]
    return json.dumps({"label": title, "graphs": made}, ensure_ascii=False, separators=(",", ":")) + "\n"


def _nodes(graph: nx.MultiDiGraph, links: Mapping[str, list[str]], ids: Mapping[str, str]) -> list[dict[str, Any]]:
    made = []
    for node, facts in graph.nodes(data=True):
        if facts["kind"] in ("site", "adapter"):
            continue
        sites = sites_of(graph, node)
        attrs = {"node": node, "kind": facts["kind"], "call": facts.get("call", ""), "source": facts.get("source", "")}
        attrs |= {"names": ", ".join(facts.get("names", ())), "roles": ", ".join(facts.get("roles", ()))}
        attrs |= {"rows": facts.get("rows", ""), "sites": ", ".join(graph.nodes[s]["label"] for s in sites)}
        attrs |= {"adapters": "; ".join(text for s in sites for text in adapter_lines(graph, s))}
        entry: dict[str, Any] = {
            "id": ids.get(node, node),
            "label": facts["label"],
            "namespace": _namespace(graph, node, facts),
            "attrs": [{"key": key, "value": value} for key, value in attrs.items() if value],
            "incomingEdges": [
                {"sourceNodeId": ids.get(source, source), "sourceNodeOutputId": "0", "targetNodeInputId": str(i)}
                for i, source in enumerate(s for s, _, kind in graph.in_edges(node, data="kind") if kind == "data")
            ],
        }
        if kind_of(facts):
            shape = {"key": "tensor_shape", "value": kind_of(facts)}
            entry["outputsMetadata"] = [{"id": "0", "attrs": [shape]}]
        if node in links:
            entry["attrs"].append({"key": "linked", "value": {"type": "node_ids", "nodeIds": links[node]}})
        colour = _COLOURS.get("site" if sites else facts["kind"])
        if colour:
            entry["style"] = {"backgroundColor": colour}
        made.append(entry)
    return made


def _namespace(graph: nx.MultiDiGraph, node: str, facts: Mapping[str, Any]) -> str:
    """Weights stand beside what reads them first; row maps in a group of their own."""
    if facts["kind"] == "row_map":
        return "row maps"
    if facts["kind"] == "weight":
        readers = [reader for _, reader, kind in graph.out_edges(node, data="kind") if kind == "data"]
        return graph.nodes[readers[0]].get("module", "").replace(".", "/") if readers else ""
    return str(facts.get("module", "")).replace(".", "/")


def adapter_lines(graph: nx.MultiDiGraph, site: str) -> list[str]:
    """`sql: rank 8, scaling 2` for each adapter at a site."""
    return [
        f"{graph.nodes[adapter]['label']}: rank {facts['rank']}, scaling {facts['scaling']:g}"
        for adapter, _, facts in graph.in_edges(site, data=True)
        if facts["kind"] == "adapter"
    ]
