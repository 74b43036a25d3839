"""The calls of a graph as a tree of modules, in graph order, with repeats folded into the first of their kind.

A module that the graph comes back to later is visited again. Two visits under one parent are alike when their names
differ in numbers alone and they make the same calls, with the same shapes, on weights of the same names below them;
inputs must be the same nodes, except for what one sibling hands to the next. Numbers are alike when they are equal,
wherever they were computed: tracers compute a size once, in the first layer that asks for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import networkx as nx

REFERENCE = re.compile(r"%%|%(\w+)")


@dataclass(eq=False)
class Visit:
    """One stay in a module. items: ids of its own calls, and visits of modules inside, in graph order.

    like: the earlier sibling that this one repeats. number: how often the module was called before.
    """

    path: str
    name: str
    items: list[Any] = field(default_factory=list)
    like: Visit | None = None
    number: int = 0

    @property
    def visits(self) -> list[Visit]:
        return [item for item in self.items if isinstance(item, Visit)]

    def calls(self) -> Iterator[str]:
        """Ids of all calls inside, in graph order."""
        for item in self.items:
            if isinstance(item, Visit):
                yield from item.calls()
            else:
                yield item


def visit_tree(graph: nx.MultiDiGraph) -> Visit:
    """The tree of all calls and the output; row maps are left out, they belong to no module."""
    root = Visit("", "")
    stack = [root]
    for node, facts in graph.nodes(data=True):
        if facts["kind"] not in ("call", "output"):
            continue
        parts = facts["module"].split(".") if facts.get("module") else []
        numbers = facts.get("repeats", {})
        depth = 0
        while depth < min(len(parts), len(stack) - 1):
            inner = stack[depth + 1]
            if inner.name != parts[depth] or inner.number != numbers.get(inner.path, 0):
                break
            depth += 1
        del stack[depth + 1 :]
        for part in parts[depth:]:
            path = f"{stack[-1].path}.{part}" if stack[-1].path else part
            made = Visit(path, part, number=numbers.get(path, 0))
            stack[-1].items.append(made)
            stack.append(made)
        stack[-1].items.append(node)
    _splice(root, graph.graph["modules"])
    _fold(graph, root, {node: sites_of(graph, node) for node in graph})
    return root


def _splice(visit: Visit, modules: Mapping[str, str]) -> None:
    """Containers that are never called themselves (a list of layers) give way to what they hold."""
    items: list[Any] = []
    for item in visit.items:
        if isinstance(item, Visit):
            _splice(item, modules)
            if item.path not in modules and item.visits == item.items and _numbered(item.visits):
                for inner in item.visits:
                    inner.name = f"{item.name}.{inner.name}"
                items += item.items
                continue
        items.append(item)
    visit.items = items


def _numbered(visits: Iterable[Visit]) -> bool:
    return all(visit.name.split(".")[0].isdigit() for visit in visits)


def _fold(graph: nx.MultiDiGraph, visit: Visit, sites: Mapping[str, Sequence[str]]) -> None:
    """Mark every visit that repeats an earlier sibling, inside out. sites: those that each node serves."""
    siblings = visit.visits
    for sibling in siblings:
        _fold(graph, sibling, sites)
    if len(siblings) < 2:
        return
    home = {node: sibling for sibling in siblings for node in sibling.calls()}
    forms: dict[Any, list[tuple[Visit, list[str]]]] = {}
    for sibling in siblings:
        form, outside = _form(graph, sibling, sites)
        known = forms.setdefault((re.sub(r"\d+", "#", sibling.name), form), [])
        for first, others in known:
            if all(
                mine == theirs or (mine in home and home[mine] is not sibling)
                for mine, theirs in zip(outside, others, strict=True)
            ):
                sibling.like = first
                break
        else:
            known.append((sibling, outside))


def _form(graph: nx.MultiDiGraph, visit: Visit, sites: Mapping[str, Sequence[str]]) -> tuple[Any, list[str]]:
    """What a visit does, in words that do not depend on where it stands, and the nodes that it reads from outside."""
    calls = [node for node in visit.calls() if "size" not in graph.nodes[node]]
    inside = {node: i for i, node in enumerate(calls)}
    outside: dict[str, int] = {}

    def word(match: re.Match[str]) -> str:
        node = match[1]
        if node is None:
            return "%%"
        facts = graph.nodes[node]
        if "size" in facts:
            return str(facts["size"])
        if node in inside:
            return f"@{inside[node]}"
        if facts["kind"] == "weight":
            own = [name for name in facts["names"] if name.startswith(f"{visit.path}.")]
            if own:
                return f"@.{own[0][len(visit.path) :]}:{facts.get('shape')}"
        return f"@out{outside.setdefault(node, len(outside))}"

    lines = []
    for node in calls:
        facts = graph.nodes[node]
        module = facts.get("module", "")[len(visit.path) :]
        shape = repr(facts.get("shape", facts.get("shapes")))
        served = [graph.nodes[site] for site in sites[node]]
        uses = "".join(f" {_below(s['label'], visit.path)} {s['role']} {s.get('rows')}" for s in served)
        lines.append(f"{module} {REFERENCE.sub(word, facts['call'])} {facts.get('dtype')}{shape}{uses}")
    return tuple(lines), list(outside)


def _below(name: str, path: str) -> str:
    return name[len(path) :] if name.startswith(f"{path}.") else name


def sites_of(graph: nx.MultiDiGraph, call: str) -> list[str]:
    """The sites that a call serves."""
    return [site for site, _, kind in graph.in_edges(call, data="kind") if kind == "use"]


def fold_names(names: Sequence[str]) -> str:
    """One name for names that differ in one number: layers.1, layers.2, layers.3 -> layers.1-3."""
    split = [re.split(r"(\d+)", name) for name in names]
    if len(names) < 2 or len({len(parts) for parts in split}) > 1:
        return ", ".join(names)
    differ = [i for i, parts in enumerate(zip(*split, strict=True)) if len(set(parts)) > 1]
    if len(differ) != 1 or not all(parts[differ[0]].isdigit() for parts in split):
        return ", ".join(names)
    spans: list[list[int]] = []
    for number in (int(parts[differ[0]]) for parts in split):
        if spans and spans[-1][1] + 1 == number:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    text = ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans)
    first = list(split[0])
    first[differ[0]] = text
    return "".join(first)
