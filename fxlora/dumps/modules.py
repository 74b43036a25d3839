"""Which module each node of a graph belongs to, and where in the model's source it was written.

Tracers record both, each in a form of its own; a graph that records no modules (make_fx) gets them from the weights
that its calls read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fxlora.passes.diff import NodeState

_TORCH = str(Path(torch.__file__).parent)
_PART = re.compile(r"\['([^']+)'\]|\[(\d+)\]|([^.\[\]()',\s]+)")
_FRAME = re.compile(r'File "(.+)", line (\d+), in ')
_FROM_VARIABLE = re.compile(r"\b[LG]\['")
_ITEM = re.compile(r"\b[LG]\['[^']+'\](\[\d+\])+")


def shared_item(nodes: Sequence[NodeState]) -> str:
    """`L['args'][0]` where all modules of a graph hang on this one item of a sequence; else empty.

    That is how dynamo names a model whose forward is behind a wrapper that takes `*args`.
    """
    found = {match[0] if (match := _ITEM.search(path)) else "" for state in nodes for path, _ in _recorded(state)}
    return found.pop() if len(found) == 1 else ""


def module_stack(state: NodeState, item: str = "") -> list[tuple[str, str]]:
    """(path, class) of the modules around a node, outermost first, as tracing recorded them; may be empty.

    item: of shared_item.
    """
    found = []
    for path, kind in _recorded(state):
        name = kind.__name__ if isinstance(kind, type) else str(kind).rpartition(".")[2]
        found.append((_clean(path.replace(item, "")), name))
    return found


def repeats(state: NodeState, item: str = "") -> dict[str, int]:
    """Modules around a node that were called before: path to how often. Tracers number the calls: `layer@1`."""
    found = {}
    for key, (path, _) in zip(state.meta.get("nn_module_stack") or (), _recorded(state), strict=True):
        number = str(key).rpartition("@")[2]
        if "@" in str(key) and number.isdigit():
            found[_clean(path.replace(item, ""))] = int(number)
    return found


def _recorded(state: NodeState) -> list[tuple[str, Any]]:
    """(path, class or its name) of each module around a node."""
    entries = (state.meta.get("nn_module_stack") or {}).values()
    return [(str(entry[0]), entry[1]) if isinstance(entry, tuple) else (str(entry), "") for entry in entries]


@lru_cache(maxsize=65536)
def _clean(path: str) -> str:
    """`L['self'].model.layers.1`, `L['fn'].__self__.model.layers.1` and `model.layers.1@2` -> `model.layers.1`.

    Dynamo names modules from a local or global variable on, `L['x']` or `G['x']`.
    """
    parts = [a or b or c for a, b, c in _PART.findall(path.partition("@")[0])]
    parts = [part for part in parts if part not in ("getattr", "_modules")]
    if _FROM_VARIABLE.search(path):
        parts = parts[2:]
        while parts and parts[0].startswith("__"):
            parts.pop(0)
    return ".".join(parts)


def module_paths(nodes: Sequence[NodeState], weight_paths: Mapping[fx.Node, str], item: str) -> dict[fx.Node, str]:
    """The module of every call. A call without one lies where its neighbours' modules meet. item: of shared_item."""
    known: list[str | None] = []
    calls = [state for state in nodes if state.op.startswith("call")]
    for state in calls:
        stack = module_stack(state, item)
        owner = next((weight_paths[n] for n in _nodes(state) if n in weight_paths), None)
        known.append(stack[-1][0] if stack else None if owner is None else owner.rpartition(".")[0])
    following: list[str] = []
    for path in reversed(known):
        following.append(path if path is not None else following[-1] if following else "")
    following.reverse()
    paths, last = {}, ""
    for state, path, after in zip(calls, known, following, strict=True):
        paths[state.node] = common(last, after) if path is None else path
        last = last if path is None else path
    return paths


def common(one: str, other: str) -> str:
    """The path of the innermost module that holds both."""
    shared = []
    for a, b in zip(one.split("."), other.split("."), strict=False):
        if a != b:
            break
        shared.append(a)
    return ".".join(shared)


def _nodes(state: NodeState) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg((state.args, state.kwargs), found.append)
    return found


def module_kinds(nodes: Sequence[NodeState], item: str) -> dict[str, str]:
    """The class of every module that the stacks name. item: of shared_item."""
    return {path: kind for state in nodes for path, kind in module_stack(state, item) if path}


def source_of(meta: Mapping[str, Any]) -> str:
    """The model's own line behind a node, `file:line: code`, innermost outside of torch; empty where unknown."""
    file, line, code = _own_line(meta.get("stack_trace") or "")
    return f"{_short(file)}:{line}: {code}" if file else ""


@lru_cache(maxsize=65536)
def _own_line(trace: str) -> tuple[str, str, str]:
    """File, line and code; layers share their traces, so few are read."""
    lines = [line.strip() for line in trace.splitlines() if line.strip()]
    best = ("", "", "")
    for i, line in enumerate(lines):
        frame = _FRAME.match(line)
        if frame and (not best[0] or not frame[1].startswith(_TORCH)):
            code = lines[i + 1] if i + 1 < len(lines) and not _FRAME.match(lines[i + 1]) else ""
            best = (frame[1], frame[2], code)
    return best


def _short(file: str) -> str:
    """A file as it is called from anywhere: below site-packages, or below the working directory."""
    _, found, inside = file.partition("site-packages/")
    if found:
        return inside
    try:
        return str(Path(file).relative_to(Path.cwd()))
    except ValueError:
        return file
