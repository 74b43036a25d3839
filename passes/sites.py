"""Sites: where a graph reads a base weight in one role. One weight and role is one site, however many names and uses
it has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

import torch
from torch import fx
from torch.export.unflatten import InterpreterModule
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fxlora.passes.experts import Packing, packing_of
from fxlora.passes.owners import Calls
from fxlora.passes.reads import Read, Reader, Refusal
from fxlora.passes.rows.worlds import World
from fxlora.passes.weights import Weights, tensor_key

NOT_READ = "not read by this graph"


class Role(str, Enum):
    """What a weight is read as."""

    LINEAR = "linear"
    EMBEDDING = "embedding"
    LOGITS = "logits"
    EXPERTS = "experts"


@dataclass(frozen=True, eq=False)
class Site:
    """A base weight in one role.

    Attributes:
        name: Canonical module path, ``model.layers.0.mlp.gate`` (the parameter's path where it is not called
        ``weight``).
        parameter: Canonical parameter path.
        aliases: All other parameter paths of the same tensor.
        role: See :class:`Role`.
        weight: The base tensor object itself.
        in_features: K of a linear, V of an embedding.
        out_features: N.
        dtype: Dtype of the activations (embedding: of the result), which is the pool's dtype.
        device: Where the weight lives.
        uses: The calls that read the weight in this role.
        stored_KN: True when the weight is stored [K, N] ([E, K, N]).
        num_experts: E, where the weight holds a matrix for each of several experts; else 0.
        packing: How an expert weight holds several matrices side by side along N, where the graph takes them apart.
        declared_KN: What the module that owns an expert weight says of its layout (`is_transposed`), which decides what
            PEFT calls in and out; None where no such module is at hand.
        not_the_module: Why an adapter of the module that owns the weight is none of the weight; empty where it is.
        past_the_module: By parameter path, where the weight is read without the module there, so that an adapter of
            that module changes nothing. Where other modules read it themselves, such reads are none of `uses`.
    """

    name: str
    parameter: str
    aliases: tuple[str, ...]
    role: Role
    weight: torch.Tensor
    in_features: int
    out_features: int
    dtype: torch.dtype
    device: torch.device
    uses: tuple[fx.Node, ...] = field(default=(), repr=False)
    stored_KN: bool = field(default=False, repr=False)
    num_experts: int = 0
    packing: Packing | None = None
    declared_KN: bool | None = None
    not_the_module: str = field(default="", repr=False)
    past_the_module: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def kind(self) -> Literal["linear", "embedding", "experts"]:
        """How its calls read the weight: logits are a linear too."""
        if self.role is Role.EXPERTS:
            return "experts"
        return "embedding" if self.role is Role.EMBEDDING else "linear"


@dataclass(frozen=True)
class Skipped:
    """A weight (or module) that is no site, and why."""

    name: str
    reason: str
    aliases: tuple[str, ...] = ()


def module_name(parameter: str) -> str:
    """``a.b.weight -> a.b``; a parameter of another name keeps its own path."""
    parent, _, last = parameter.rpartition(".")
    return parent if last == "weight" and parent else parameter


def find_sites(
    gm: fx.GraphModule,
    weights: Weights,
    world: World,
    modules: Sequence[torch.nn.Module] = (),
    origin: torch.nn.Module | None = None,
) -> tuple[list[Site], list[Skipped]]:
    """All sites of a graph, in graph order, and every weight of two or more dims that is none, with its reason.

    modules: whose paths are names of weights. origin: the model that was traced, where no module of these is it.
    """
    reader = Reader(weights, world)
    uses: dict[Any, list[tuple[fx.Node, Read]]] = {}
    refused: dict[Any, str] = {}
    tensors: dict[Any, torch.Tensor] = {}
    for node in gm.graph.nodes:
        for read in reader.reads(node):
            tensor = weights.tensor_of(read.root)
            if tensor is None:
                continue
            key = tensor_key(tensor)
            tensors[key] = tensor
            if is_traceable_wrapper_subclass(tensor):
                kind = type(tensor).__name__
                refused.setdefault(key, f"its weight is a {kind}, which computes by kernels of its own, as quantized")
            elif isinstance(read, Refusal):
                refused.setdefault(key, read.reason)
            else:
                uses.setdefault((key, read.kind), []).append((node, read))
    sites, calls = [], Calls(gm, weights, world, [*modules, *([] if origin is None else [origin])])
    for (key, kind), reads in uses.items():
        if key in refused:
            continue
        found, past = _of_modules(reads, weights.paths_of(tensors[key]), kind, calls)
        if len({read.stored_KN for _, read in found}) > 1:
            refused[key] = "read both plainly and transposed, so one adapter has no single meaning"
        else:
            sites.append(_site(weights, world, tensors[key], kind, found, modules, calls, past))
    sites = [site for site in sites if tensor_key(site.weight) not in refused]
    return sites, _skipped(weights, sites, refused, modules)


def _of_modules(
    reads: list[tuple[fx.Node, Read]], paths: Sequence[str], kind: str, calls: Calls
) -> tuple[list[tuple[fx.Node, Read]], dict[str, str]]:
    """The reads that an adapter may mean: those of the modules that own the weight, which PEFT adapts; all of them
    where there are none. And `past_the_module` of a site that has them."""
    if reads[0][1].experts:
        return reads, {}
    past, reasons = calls.past_the_module([node for node, _ in reads], paths, kind)
    return [(node, read) for node, read in reads if node not in past], reasons


def _site(
    weights: Weights,
    world: World,
    tensor: torch.Tensor,
    kind: str,
    found: list[tuple[fx.Node, Read]],
    modules: Sequence[torch.nn.Module],
    calls: Calls,
    past: dict[str, str],
) -> Site:
    paths, nodes = weights.paths_of(tensor), [node for node, _ in found]
    read = found[0][1]
    facts = world.facts(nodes[0] if kind == "embedding" else read.x)
    rows, columns = tensor.shape[-2:]
    embedding = kind == "embedding"
    k, n = (rows, columns) if embedding or read.stored_KN else (columns, rows)
    return Site(
        name=module_name(paths[0]),
        parameter=paths[0],
        aliases=paths[1:],
        role=Role(kind),
        weight=tensor,
        in_features=k,
        out_features=n,
        dtype=facts.dtype,
        device=tensor.device,
        uses=tuple(nodes),
        stored_KN=read.stored_KN,
        num_experts=read.experts,
        packing=packing_of(nodes, n, world) if read.experts else None,
        declared_KN=_declared_KN(paths, modules) if read.experts else None,
        not_the_module="" if read.experts else calls.refusal(nodes, paths, kind),
        past_the_module=past,
    )


def _declared_KN(paths: Sequence[str], modules: Sequence[torch.nn.Module]) -> bool | None:
    """``is_transposed`` of the module that owns a parameter; containers that tracing made tell nothing."""
    for path in paths:
        for module in modules:
            try:
                owner = module.get_submodule(path.rpartition(".")[0])
            except AttributeError:
                continue
            if type(owner) is not torch.nn.Module and not isinstance(owner, fx.GraphModule | InterpreterModule):
                return bool(getattr(owner, "is_transposed", False))
    return None


def _skipped(
    weights: Weights, sites: Sequence[Site], refused: dict[Any, str], modules: Sequence[torch.nn.Module]
) -> list[Skipped]:
    served = {tensor_key(site.weight) for site in sites}
    skipped, seen = [], set()
    for path, tensor in weights.names.items():
        key = tensor_key(tensor)
        if key in served or key in seen or tensor.dim() < 2:
            continue
        seen.add(key)
        reason = refused.get(key, NOT_READ)
        paths = weights.paths_of(tensor)
        skipped.append(Skipped(path, reason, tuple(p for p in paths if p != path)))
    return skipped + _missing_modules(modules)


def _missing_modules(modules: Sequence[torch.nn.Module]) -> list[Skipped]:
    """Places where a module stands for one that is elsewhere: None, or an identity among siblings that hold weights."""
    missing: dict[str, str] = {}
    for model in modules:
        for path, module in model.named_modules():
            children = list(module._modules.items())
            weighty = any(c is not None and any(True for _ in c.parameters()) for _, c in children)
            for name, child in children:
                full = f"{path}.{name}" if path else name
                if child is None:
                    missing.setdefault(full, "the module is None in this model")
                elif weighty and isinstance(child, torch.nn.Identity):
                    missing.setdefault(
                        full, "an identity stands here: the layer lives on another pipeline stage, or has no weights"
                    )
    return [Skipped(name, reason) for name, reason in missing.items()]
