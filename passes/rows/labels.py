"""The lattice of row provenance: what one abstract value says about a tensor.

``None``: the tensor holds nothing of any request (weights, positions). ``Label``: each element belongs to one
request, told by
a row map over some of its dims. ``Mixed``: requests are mixed, or nothing is proven. A ``RowMap`` is an int tensor
*expression*
(built lazily, so unused maps cost no graph node) together with its value in every world; equal in all worlds is equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx


@dataclass(eq=False)
class RowMap:
    """An int32 tensor of request numbers, as an expression over graph nodes.

    Attributes:
        build: Makes the graph nodes: called with ``emit(target, *args, **kwargs) -> Node`` and the parents' nodes.
        parents: Maps this one is computed from.
        origin: The graph node after which this map can first be computed; None for the seed.
        ids: Its value per world.
    """

    build: Callable[[Callable[..., fx.Node], Sequence[fx.Node]], fx.Node] | None
    parents: tuple[RowMap, ...]
    origin: fx.Node | None
    ids: tuple[torch.Tensor, ...]
    text: str = "seed"

    def chain(self) -> list[str]:
        """How the map came about, seed first."""
        return [*(self.parents[0].chain() if self.parents else []), self.text]


@dataclass(frozen=True)
class Label:
    """Element ``t[i]`` belongs to request ``map[i[dims]]``; ``dims`` ascend."""

    map: RowMap
    dims: tuple[int, ...]


@dataclass(frozen=True)
class Mixed:
    """Elements depend on several requests, or on an op whose rows are unknown; ``reason`` names the op."""

    reason: str


Rows = Label | Mixed | None


def broadcast_ids(label: Label, ndim: int, world: int) -> torch.Tensor:
    """The ids of a label as a tensor of ``ndim`` dims, 1 where the label does not vary."""
    ids = label.map.ids[world]
    shape = [1] * ndim
    for i, d in enumerate(label.dims):
        shape[d] = ids.shape[i]
    return ids.reshape(shape)


@dataclass
class MapTable:
    """Keeps one RowMap for all that are equal in every world, the one that can be computed first."""

    order: dict[fx.Node | None, int]
    _known: dict[Any, RowMap] = field(default_factory=dict)

    def intern(
        self, ids: Sequence[torch.Tensor], parents: Sequence[RowMap], origin: fx.Node | None, build: Any, text: str
    ) -> RowMap:
        key = _key(ids)
        known = self._known.get(key)
        if known is None or self.order[known.origin] > self.order[origin]:
            self._known[key] = RowMap(build, tuple(parents), origin, tuple(ids), text)
        return self._known[key]

    def find(self, ids: Sequence[torch.Tensor], before: fx.Node) -> RowMap | None:
        """The known map equal to ``ids`` that can be computed before a node."""
        known = self._known.get(_key(ids))
        return known if known is not None and self.order[known.origin] < self.order[before] else None

    def before(self, node: fx.Node) -> list[RowMap]:
        """All maps that can be computed before a node, the seed first."""
        return [m for m in self._known.values() if self.order[m.origin] < self.order[node]]

    def canonical(self, row_map: RowMap) -> RowMap:
        """The map equal to this one that can be computed first."""
        return self._known[_key(row_map.ids)]


def _key(ids: Sequence[torch.Tensor]) -> Any:
    return tuple((tuple(i.shape), tuple(i.flatten().tolist())) for i in ids)


def shift(rows: Rows, by: int) -> Rows:
    """The same rows on a tensor with ``by`` more leading dims."""
    if isinstance(rows, Label) and by:
        return Label(rows.map, tuple(d + by for d in rows.dims))
    return rows


def remap(rows: Rows, new_dim: Callable[[int], int]) -> Rows:
    """The same rows after an op that keeps the dims' order; ``new_dim`` maps old to new."""
    if isinstance(rows, Label):
        return Label(rows.map, tuple(new_dim(d) for d in rows.dims))
    return rows


def join(rows: Sequence[Rows], ndim: int, worlds: int, where: str) -> Rows:
    """Rows of an elementwise result: the operands' rows, which must be equal wherever they meet."""
    labels = []
    for r in rows:
        if isinstance(r, Mixed):
            return r
        if r is not None and r not in labels:
            labels.append(r)
    if len(labels) <= 1:
        return labels[0] if labels else None
    best = max(labels, key=lambda label: (max(i.numel() for i in label.map.ids), -len(label.dims)))
    for world in range(worlds):
        ids = broadcast_ids(best, ndim, world)
        for label in labels:
            other = broadcast_ids(label, ndim, world)
            fits = all(o in (1, b) for o, b in zip(other.shape, ids.shape, strict=True))
            if not fits or not bool((other == ids).all()):
                return Mixed(f"{where} combines rows of different requests")
    sizes = broadcast_ids(best, ndim, 0).shape
    return min(
        (
            label
            for label in labels
            if all(sizes[d] == n for d, n in zip(label.dims, label.map.ids[0].shape, strict=True))
        ),
        key=lambda label: label.map.ids[0].numel(),
    )
