"""Whether a module is its weight's linear, or embedding, and no more: PEFT adapts modules, a site is a weight.

Stage: with the sites. PEFT adds to what a module returns, from what the module is given. That is what a site does where
the module is the read of its weight alone. A subclass that also scales, a hook, or a weight that two modules share make
the two differ, and an adapter that names the module is then refused, with the reason found here.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxlora.passes.graph import op_name, operand
from fxlora.passes.rows.worlds import TensorFacts, UnknownShapeError, World
from fxlora.passes.weights import CASTS, Weights

_LAYOUTS = frozenset(("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "_unsafe_view", "view_as"))
_SAME_VALUES = _LAYOUTS | CASTS | {"_to_copy", "native_dropout", "dropout"}
_ADDS = frozenset(("add", "add_", "iadd"))
_SCALES = frozenset(("mul", "mul_", "imul"))
_ADAPTED = (torch.nn.Linear, torch.nn.Embedding)


class Calls:
    """The calls of a graph by the call of the innermost module that made them, as tracing recorded it."""

    def __init__(
        self, gm: fx.GraphModule, weights: Weights, world: World, models: Sequence[torch.nn.Module] = ()
    ) -> None:
        self.weights, self.world = weights, world
        self.models = [model for model in models if not isinstance(model, fx.GraphModule)]
        self.within: dict[str, list[fx.Node]] = {}
        for node in gm.graph.nodes:
            if node.op in ("call_function", "call_method") and (entry := _innermost(node)) is not None:
                self.within.setdefault(entry[0], []).append(node)

    def refusal(self, uses: Sequence[fx.Node], paths: Sequence[str], kind: str) -> str:
        """Why an adapter of the module at one of these parameter paths does not mean the weight; empty if it does."""
        owners = [path.removesuffix(".weight") for path in paths if path.endswith(".weight")]
        own: dict[int, str] = {}
        for node in uses:
            key, path, named = _innermost(node) or ("", "", None)
            module_class = _adapted_class(named)
            if module_class is None or not any(_is_end(path, owner) for owner in owners):
                continue
            extra = self._beside(key, node, uses, kind, _SCALES if _scales(module_class, kind) else frozenset())
            if extra:
                return f"the module does more than the {kind} of its weight ({extra}), and PEFT adapts it as a whole"
            if (module := self._module_at(_bare(path))) is not None:
                own.setdefault(id(module), _bare(path))
        if len(own) > 1:
            names = " and ".join(sorted(own.values()))
            return f"{names} are modules that share one weight, and PEFT adapts each of them by itself"
        return ""

    def past_the_module(
        self, uses: Sequence[fx.Node], paths: Sequence[str], kind: str
    ) -> tuple[frozenset[fx.Node], dict[str, str]]:
        """Of a weight whose modules make uses themselves: those that other code makes, past the layers that PEFT puts
        around them. And by parameter path of a module that makes none, where its weight is read instead. Neither where
        the model that would tell is not at hand.
        """
        adapted = torch.nn.Embedding if kind == "embedding" else torch.nn.Linear
        found = {path: self._module_at(path.removesuffix(".weight")) for path in paths if path.endswith(".weight")}
        owners = {path: id(module) for path, module in found.items() if isinstance(module, adapted)}
        past, called = {}, set()
        for node in uses if owners else ():
            path, reader = self._reader(node)
            if reader is not None and id(reader) in owners.values():
                called.add(id(reader))
            elif reader is not None:
                name = paths[0].removesuffix(".weight")
                past[node] = f"{path or 'the model'} reads the weight of {name} past its module"
        reasons = {path: next(iter(past.values())) for path, owner in owners.items() if past and owner not in called}
        return frozenset(past if called else ()), reasons

    def _reader(self, node: fx.Node) -> tuple[str, torch.nn.Module | None]:
        """Path of the module whose code made a node, and the module, if it is known: the model itself where tracing
        recorded modules, but none around this node."""
        entry = _innermost(node)
        if entry is None and not self.within:
            return "", None
        path = "" if entry is None else _bare(entry[1])
        return path, self._module_at(path)

    def _beside(self, key: str, use: fx.Node, uses: Sequence[fx.Node], kind: str, allowed: frozenset[str]) -> str:
        """The first op in a call of a module that is neither the use nor a change of layout, bias or dtype."""
        for node in self.within[key]:
            name = op_name(node)
            if node is use or name in _SAME_VALUES or not self._is_tensor(node):
                continue
            others = [n for n in node.all_input_nodes if self.weights.root(n)[0] is None]
            if node in uses:
                return f"{name} twice"
            biased = kind == "linear" and name in _ADDS and len(others) < len(node.all_input_nodes)
            if others and not biased and name not in allowed and operand(node) is not None:
                return name.lstrip("?")
        return ""

    def _module_at(self, path: str) -> torch.nn.Module | None:
        """The module of the model itself: tracing does not say which paths lead to one module."""
        for model in self.models:
            try:
                return model.get_submodule(path)
            except AttributeError:
                continue
        return None

    def _is_tensor(self, node: fx.Node) -> bool:
        try:
            return isinstance(self.world.facts(node), TensorFacts)
        except UnknownShapeError:
            return False


def _innermost(node: fx.Node) -> tuple[str, str, Any] | None:
    """(key of the call, path of the module, its class or the class's name) of the module that made a node."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    entry = list(stack.values())[-1]
    if not isinstance(entry, tuple) or len(entry) < 2:
        return None
    # Dynamo counts the calls of a module by path, so the paths that lead to it tell calls apart too.
    key = " ".join(f"{name}:{entry[0] if isinstance(entry, tuple) else entry}" for name, entry in stack.items())
    return key, str(entry[0]), entry[1]


def _adapted_class(module: Any) -> type | None:
    """The class of a module, given by itself or by its name, if PEFT puts a layer around its kind."""
    if isinstance(module, str):  # export writes the class by its name
        owner, _, name = module.rpartition(".")
        module = getattr(sys.modules.get(owner), name, None)
    return module if isinstance(module, type) and issubclass(module, _ADAPTED) else None


def _scales(module: type, kind: str) -> bool:
    """Whether an embedding multiplies by its `embed_scale`, by which PEFT multiplies what it adds."""
    code = getattr(inspect.unwrap(getattr(module, "forward", _scales)), "__code__", None)
    return kind == "embedding" and code is not None and "embed_scale" in code.co_names


def _bare(path: str) -> str:
    return path.partition("].")[2] or path if path.startswith("L[") else path


def _is_end(path: str, owner: str) -> bool:
    """Whether a path as tracing writes it (`L['self'].layers.0.q`) and a path of the model name one module."""
    bare = _bare(path)
    return bare == owner or bare.endswith(f".{owner}") or owner.endswith(f".{bare}")
