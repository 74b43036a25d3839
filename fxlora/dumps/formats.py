"""The formats of a dump: one table, and what all formats of one record share."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import Any

import networkx as nx
import torch

from fxlora.dumps.adapters import AdapterView
from fxlora.dumps.dot import dot_text, rendered
from fxlora.dumps.explorer import explorer_text
from fxlora.dumps.files import graphml_text, json_text
from fxlora.dumps.graph import build_graph
from fxlora.dumps.links import became
from fxlora.dumps.record import Record
from fxlora.dumps.report import report_html
from fxlora.dumps.text import diff_text, graph_text
from fxlora.errors import DumpFocusError


@dataclass(frozen=True, eq=False)
class Dump:
    """One record as it is to be shown: which adapters, how deep, which module."""

    record: Record
    adapters: Sequence[AdapterView] = ()
    depth: int | None = None
    focus: str | None = None

    def __post_init__(self) -> None:
        if self.focus is None:
            return
        modules = {facts["module"] for _, facts in self.graph.nodes(data=True) if facts.get("module")}
        known = {path.rsplit(".", cut)[0] for path in modules for cut in range(path.count(".") + 1)}
        if self.focus not in known:
            near = get_close_matches(self.focus, sorted(known), n=3) or sorted(known)[:5]
            raise DumpFocusError(f"focus={self.focus!r} is no module of this graph; nearest: {near}")

    @cached_property
    def graph(self) -> nx.MultiDiGraph:
        """The graph as it is now."""
        return build_graph(self.record, self.record.graph, self.adapters)

    @cached_property
    def graphs(self) -> Mapping[str, nx.MultiDiGraph]:
        """By stage: the graph before, and where there is one the graph after."""
        if self.record.after is None:
            return {"before": self.graph}
        return {"before": build_graph(self.record, self.record.before, self.adapters), "after": self.graph}

    @cached_property
    def dot(self) -> str:
        return dot_text(self.graph, depth=self.depth, focus=self.focus)


def _text(dump: Dump) -> str:
    return graph_text(dump.graph, depth=dump.depth, focus=dump.focus)


def _code(dump: Dump) -> str:
    """The graph as Python. Handles of adapter memory appear as the number of their group: they differ run by run."""
    code = dump.record.gm.print_readable(print_output=False)
    handles = list(dump.record.pool.handles.values()) if dump.record.pool is not None else []
    if handles:
        numbers = {str(handle): str(i) for i, handle in enumerate(handles)}
        code = re.sub("|".join(rf"\b{handle}\b" for handle in numbers), lambda m: numbers[m[0]], code)
        code = f"# The last argument of each fxlora op is its handle; here it is the number of its group.\n{code}"
    return re.sub(r"(# File: )\S*site-packages/", r"\1", code).rstrip() + "\n"


FORMATS: Mapping[str, Callable[[Dump], str | bytes]] = {
    ".txt": _text,
    ".diff.txt": lambda dump: diff_text(dump.record),
    ".raw.py": _code,
    ".json": lambda dump: json_text(dump.graph),
    ".graphml": lambda dump: graphml_text(dump.graph),
    ".dot": lambda dump: dump.dot,
    ".svg": lambda dump: rendered(dump.dot, "svg"),
    ".png": lambda dump: rendered(dump.dot, "png"),
    ".me.json": lambda dump: explorer_text(dump.graphs, became(dump.record)),
    ".html": lambda dump: report_html(dump.record, dump.graphs, dump.adapters, focus=dump.focus),
}

ABOUT: Mapping[str, str] = {
    ".html": "the report: open it in a browser",
    ".txt": "the graph module by module, repeats folded",
    ".diff.txt": "what each pass did, and how long it took",
    ".raw.py": "the graph as Python code",
    ".json": "networkx node-link data; `fxlora.load_graph` reads it",
    ".graphml": "for Gephi, yEd and Cytoscape",
    ".dot": "modules as boxes, for graphviz",
    ".svg": "the same, drawn",
    ".me.json": "for Google's Model Explorer: `model-explorer FILE`",
}
"""What a folder holds, in the order of its index."""


def format_of(name: str) -> str | None:
    """The longest known suffix of a file name."""
    return max((suffix for suffix in FORMATS if name.endswith(suffix)), key=len, default=None)


def missing_for(suffix: str) -> str:
    """What a format needs and this machine lacks; empty where it has all."""
    from importlib.util import find_spec

    if suffix in (".dot", ".svg", ".png") and find_spec("pydot") is None:
        return "pydot is not installed (pip install 'fxlora[dump]')"
    if suffix in (".svg", ".png") and shutil.which("dot") is None:
        return "graphviz is not installed (its program `dot` is not on PATH)"
    return ""


def of_weights(record: Record) -> dict[str, torch.Tensor]:
    """Every parameter path of a record -> the tensor, for binding."""
    found: dict[str, Any] = {}
    for node, tensor in record.tensors.items():
        found.update(dict.fromkeys(record.paths_of(node), tensor))
    return found
