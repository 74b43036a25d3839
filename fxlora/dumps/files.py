"""A networkx graph as a file and back: JSON (node_link_data) and GraphML, both without loss."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import networkx as nx

from fxlora.errors import DumpFormatError, DumpPathError

_ENCODED = "json_attributes"


def json_text(graph: nx.MultiDiGraph) -> str:
    """networkx's node-link form, as JSON."""
    return json.dumps(nx.node_link_data(graph, edges="edges"), ensure_ascii=False, separators=(",", ":")) + "\n"


def graphml_text(graph: nx.MultiDiGraph) -> str:
    """GraphML, which Gephi, yEd and Cytoscape read. Lists are JSON in a string; the graph says which attributes are."""
    encoded: set[str] = set()

    def scalars(facts: dict[str, Any]) -> dict[str, Any]:
        encoded.update(key for key, value in facts.items() if isinstance(value, list | dict))
        return {key: json.dumps(v) if isinstance(v, list | dict) else v for key, v in facts.items()}

    flat = nx.MultiDiGraph(**scalars(graph.graph))
    flat.add_nodes_from((node, scalars(facts)) for node, facts in graph.nodes(data=True))
    flat.add_edges_from((a, b, key, scalars(facts)) for a, b, key, facts in graph.edges(keys=True, data=True))
    flat.graph[_ENCODED] = " ".join(sorted(encoded))
    stream = io.BytesIO()
    nx.write_graphml_xml(flat, stream, encoding="utf-8", prettyprint=True)
    return stream.getvalue().decode("utf-8") + "\n"


def read_graph(path: Path) -> nx.MultiDiGraph:
    """What `fxlora.load_graph` gives."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DumpPathError(f"{path} cannot be read: {error}") from error
    try:
        if path.suffix == ".graphml":
            return _decoded(nx.parse_graphml(text, edge_key_type=str, force_multigraph=True))
        return nx.node_link_graph(json.loads(text), edges="edges", directed=True, multigraph=True)
    except Exception as error:
        raise DumpFormatError(
            f"{path} holds no graph that fxlora.dump wrote as .json or .graphml ({type(error).__name__}: {error})"
        ) from error


def _decoded(flat: nx.MultiDiGraph) -> nx.MultiDiGraph:
    encoded = set(flat.graph.pop(_ENCODED).split())
    for key in ("node_default", "edge_default"):
        flat.graph.pop(key, None)

    def values(facts: dict[str, Any]) -> dict[str, Any]:
        return {key: json.loads(v) if key in encoded and isinstance(v, str) else v for key, v in facts.items()}

    graph = nx.MultiDiGraph(**values(flat.graph))
    graph.add_nodes_from((node, values(facts)) for node, facts in flat.nodes(data=True))
    for a, b, key, facts in flat.edges(keys=True, data=True):
        own = values(facts)
        graph.add_edge(a, b, key=own.pop("id", key), **own)
    return graph
