"""What dynamo's graphs say of their inputs: which are weights of an attached model, which the caller passed, and as
what.

Stage: first under torch.compile, dynamo's graph -> bound weights and named inputs -> passes. Placeholder names depend
on how a call was written; the source dynamo records for each does not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxlora.passes.graph import fake_value
from fxlora.passes.rows.worlds import GraphInput
from fxlora.signature import graph_input, source_text

_TOKEN = re.compile(r"\['([^']*)'\]|\[(\d+)\]|\.(\w+)")
_CONTAINERS = ("_modules", "_parameters", "_buffers")
_RESUMED = "torch_dynamo_resume_in"


@dataclass(frozen=True)
class DynamoInputs:
    """The placeholders of one graph, told apart.

    Attributes:
        bound: Tensors behind placeholders that belong to a module: Parameters, buffers, other attributes.
        given: What the caller passed: placeholder, source, value.
        parameters: Position of each Parameter among the graph's arguments, and its path as the graph was traced.
        after_break: Why the graph is a later part of a forward, empty if nothing says so.
    """

    bound: dict[fx.Node, torch.Tensor]
    given: list[tuple[fx.Node, str, Any]]
    parameters: dict[int, str]
    after_break: str

    def arguments(self, names: Sequence[str]) -> list[GraphInput]:
        """What the caller passed, by argument, in the order of the forward's own arguments (`names`).

        Others follow; lists of positions come behind whatever has a batch.
        """
        order = {name: i for i, name in enumerate(names)}
        inputs = [
            graph_input(node, _argument_path(text, names) or node.name, fake_value(node), value)
            for node, text, value in self.given
        ]
        return sorted(inputs, key=lambda inp: (order.get(inp.name.split(".")[0], len(order)), len(inp.sizes) < 2))


def read_inputs(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> DynamoInputs:
    """Tell apart what the placeholders of dynamo's graph stand for.

    example_inputs: their values, Parameters themselves among them.
    """
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    texts = [source_text(node) for node in placeholders]
    values = list(zip(texts, example_inputs, strict=True))
    parameters = {i: _parameter_path(text) for i, (text, value) in enumerate(values) if isinstance(value, nn.Parameter)}
    roots = {_module_root(texts[i]) for i in parameters} - {""}
    bound: dict[fx.Node, torch.Tensor] = {}
    given: list[tuple[fx.Node, str, Any]] = []
    for i, (node, (text, value)) in enumerate(zip(placeholders, values, strict=True)):
        if i in parameters or (isinstance(value, torch.Tensor) and _is_attribute(text, roots)):
            bound[node] = value
        else:
            given.append((node, text, value))
    return DynamoInputs(bound, given, parameters, _after_break(gm, texts))


def _after_break(gm: fx.GraphModule, texts: Iterable[str]) -> str:
    stacked = next((text for text in texts if "___stack" in text), "")
    if stacked:
        return f"its input {stacked} is a result of the part before"
    for node in gm.graph.nodes:
        if _RESUMED in (node.meta.get("stack_trace") or ""):
            return "it resumes after a graph break"
    return ""


def _tokens(text: str) -> list[str]:
    """`L['kwargs']['past'].layers[0].keys` -> kwargs, past, layers, 0, keys."""
    return [next(part for part in match if part) for match in _TOKEN.findall(text) if any(match)]


def _module_root(text: str) -> str:
    """What a source calls the module from which it goes down: `L['self']`; empty for other sources."""
    cuts = [text.find(f".{container}[") for container in _CONTAINERS]
    found = [cut for cut in cuts if cut >= 0]
    return text[: min(found)] if found else ""


def _is_attribute(text: str, roots: Iterable[str]) -> bool:
    return any(text == root or text.startswith((f"{root}.", f"{root}[")) for root in roots)


def _parameter_path(text: str) -> str:
    return ".".join(token for token in _tokens(text)[1:] if token not in (*_CONTAINERS, "__dict__"))


def _argument_path(text: str, argument_names: Sequence[str]) -> str:
    """`L['kwargs']['ids']`, `L['args'][0]` and `L['ids']` are all `ids`, if that is the first argument's name."""
    tokens = _tokens(text)
    if len(tokens) > 1 and tokens[0] == "kwargs":
        tokens = tokens[1:]
    elif len(tokens) > 1 and tokens[0] == "args" and tokens[1].isdigit() and int(tokens[1]) < len(argument_names):
        tokens = [argument_names[int(tokens[1])], *tokens[2:]]
    return ".".join(tokens)
