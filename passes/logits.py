"""The logits pass: finds lm_head by structure and rewrites it to its own op.

A linear is the logits site when its weight is also the embedding's (tied), when it is the model's output embedding,
or when the
graph's first output is reached from it by row-preserving elementwise ops alone (soft-capping, scaling, slicing).
Never by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fxlora.passes.graph import fake_value, op_name, operand, output_leaves
from fxlora.passes.rows.families import is_pointwise
from fxlora.passes.sites import Role, Site
from fxlora.passes.weights import Weights, tensor_key

_KEEPS_ROWS = {
    "getitem",
    "slice",
    "narrow",
    "view",
    "reshape",
    "contiguous",
    "squeeze",
    "unsqueeze",
    "to",
    "flatten",
    "index_select",
    "index",
}


def mark_logits(
    gm: fx.GraphModule, sites: Sequence[Site], weights: Weights, output_embedding: torch.Tensor | None
) -> list[Site]:
    """The same sites, with the role of logits sites set."""
    embedded = {tensor_key(site.weight) for site in sites if site.role is Role.EMBEDDING}
    last = _last_linear(gm, sites)
    head = None if output_embedding is None else tensor_key(output_embedding)
    marked = []
    for site in sites:
        key = tensor_key(site.weight)
        is_logits = site.role is Role.LINEAR and (key in embedded or key == head or (head is None and site is last))
        naming = _naming(site, weights) if key in embedded else {}
        marked.append(replace(site, role=Role.LOGITS, **naming) if is_logits else site)
    return marked


def _naming(site: Site, weights: Weights) -> dict[str, Any]:
    """A tied weight's logits site goes by the name under which the model calls it last, its embedding by the first."""
    paths = weights.paths_of(site.weight)
    return {"parameter": paths[-1], "aliases": paths[:-1], "name": paths[-1].removesuffix(".weight")}


def _last_linear(gm: fx.GraphModule, sites: Sequence[Site]) -> Site | None:
    by_use = {use: site for site in sites if site.role is Role.LINEAR for use in site.uses}
    leaves = output_leaves(gm.graph)
    node: object = leaves[0][1] if leaves else None
    while isinstance(node, fx.Node):
        if node in by_use:
            return by_use[node]
        name = op_name(node)
        keeps = name in _KEEPS_ROWS or is_pointwise(name)
        source = operand(node) if isinstance(operand(node), fx.Node) else next(iter(node.all_input_nodes), None)
        others = [n for n in node.all_input_nodes if n is not source and n.op.startswith("call") and not _is_size(n)]
        if not node.op.startswith("call") or not keeps or others:
            return None
        node = source
    return None


def _is_size(node: fx.Node) -> bool:
    return isinstance(fake_value(node), torch.SymInt | int)
