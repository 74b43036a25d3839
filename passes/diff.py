"""A graph as text, and two graphs as a diff: what dumps and golden tests print."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import fx

from fxlora.passes.graph import op_name


def graph_text(gm: fx.GraphModule) -> str:
    """One line a node: name, op, arguments; handles of adapter memory print as ``<pool>``, since they differ run by
    run.
    """
    return "\n".join(_line(node) for node in gm.graph.nodes) + "\n"


def graph_diff(before: str, after: str) -> str:
    """Unified diff of two graph texts; empty when equal."""
    return "\n".join(difflib.unified_diff(before.splitlines(), after.splitlines(), "before", "after", lineterm="", n=1))


def _line(node: fx.Node) -> str:
    if node.op == "placeholder":
        return f"{node.name} = input {node.target}"
    if node.op == "get_attr":
        return f"{node.name} = weight {node.target}"
    if node.op == "output":
        return f"return {_show(node.args[0])}"
    args = list(node.args)
    name = op_name(node)
    if name.startswith("fxlora::lora"):
        args[-1] = "<pool>"
    shown = [_show(a) for a in args] + [f"{k}={_show(v)}" for k, v in node.kwargs.items()]
    return f"{node.name} = {name}({', '.join(shown)})"


def _show(value: Any) -> str:
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, list | tuple):
        inner = ", ".join(_show(v) for v in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_show(v)}" for k, v in value.items()) + "}"
    if isinstance(value, slice):
        bounds = [value.start, value.stop] + ([] if value.step is None else [value.step])
        return ":".join("" if v is None else _show(v) for v in bounds)
    return str(value) if isinstance(value, str | torch.dtype | torch.device) else repr(value)
