"""Rows under torch.vmap and torch's associative scan, as torch.compile leaves them in a graph.

vmap stands there as calls that hide one dim of a tensor and bring it back. What lies between works on each slice alone,
so rows along the other dims move with them; only elementwise ops are followed there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import fx

from fxlora.passes.graph import argument, attribute, op_name, operand
from fxlora.passes.rows.families import is_pointwise, rule
from fxlora.passes.rows.labels import Label, Mixed, Rows, join, remap

if TYPE_CHECKING:
    from fxlora.passes.rows.propagate import Prover

OPENS, CLOSES = "_vmap_increment_nesting", "_vmap_decrement_nesting"
HIDES, SHOWS = "_add_batch_dim", "_remove_batch_dim"


def vmap_regions(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """The nodes of each outermost vmap, from its beginning to its end."""
    depth, region = 0, []
    for node in graph.nodes:
        name = op_name(node)
        depth += name == OPENS
        if depth:
            region.append(node)
        depth -= name == CLOSES
        if region and not depth:
            yield region
            region = []


def inside_vmap(graph: fx.Graph) -> set[fx.Node]:
    """The calls between the beginning and the end of a vmap."""
    return {node for region in vmap_regions(graph) for node in region if node.op.startswith("call")}


def is_followed(name: str) -> bool:
    """Ops whose rows are followed inside a vmap."""
    return is_pointwise(name) or name in (HIDES, SHOWS)


@rule(HIDES)
def hide(p: Prover, node: fx.Node) -> Rows:
    """A tensor without the dim that vmap runs along."""
    x = operand(node)
    rows, dim = p.rows(x), argument(node, 1, "in_dim") % p.ndim(x)
    if isinstance(rows, Label) and dim in rows.dims:
        return Mixed("vmap along the request dim")
    return remap(rows, lambda d: d - (d > dim))


@rule(SHOWS)
def show(p: Prover, node: fx.Node) -> Rows:
    """The tensor with that dim again."""
    dim = argument(node, 3, "out_dim") % p.ndim(node)
    return remap(p.rows(operand(node)), lambda d: d + (d >= dim))


@rule("associative_scan")
def scan(p: Prover, node: fx.Node) -> Any:
    """Running combinations along dim 0, where what combines two elements is elementwise."""
    combine, leaves, extra = operand(node), argument(node, 1, "xs"), argument(node, 2, "additional_inputs") or ()
    owner = p.graph.owning_module
    body = attribute(owner, str(combine.target)) if owner is not None and isinstance(combine, fx.Node) else None
    if not isinstance(body, fx.GraphModule) or not all(map(is_pointwise, _calls(body.graph.nodes))):
        return Mixed("associative_scan of other than elementwise ops")
    parts = [p.rows(x) for x in leaves]
    if any(p.rows(x) is not None for x in extra):
        return Mixed("associative_scan with further operands that depend on requests")
    if any(isinstance(rows, Label) and 0 in rows.dims for rows in parts):
        return Mixed("associative_scan along the request dim")
    rows = join(parts, p.ndim(leaves[0]), p.count, "associative_scan")
    return tuple(rows for _ in leaves)


def _calls(nodes: Iterable[fx.Node]) -> list[str]:
    return [op_name(node) for node in nodes if node.op.startswith("call")]
