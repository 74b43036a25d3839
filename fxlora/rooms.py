"""One site's adapter memory and who holds which rows of it: what `pool.py` has for every site.

Stage: last of an adapter's way, below the pool. A room is asked for a place, checked, written and given back; it never
knows an adapter's name.

Letters: E experts, K in-features (V for an embedding), N out-features, R rank, P pool rows of a site, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fxlora.entries import Entry
from fxlora.errors import CapacityError
from fxlora.kernels.expert_pool import ExpertPool
from fxlora.kernels.registry import SitePool
from fxlora.passes.plan import AdapterShape
from fxlora.passes.sites import Site

EXTENT_ROWS = 16
"""Extents start and end on multiples of this, the smallest R a tensor-core tile takes."""

EXPERT_RANK = 16
"""Rank that every slot can hold at every expert by default, where max_rank is not lower: experts multiply it by E."""


def round_up_rows(rows: int) -> int:
    """`rows` as a whole number of extent granules."""
    return -(-rows // EXTENT_ROWS) * EXTENT_ROWS


class ExtentAllocator:
    """First fit over `rows` rows, in granules of 16. Rows of an extent are adjacent; freeing merges neighbours."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._taken: dict[int, int] = {}

    @property
    def free(self) -> int:
        """Rows that no extent holds."""
        return self.rows - sum(self._taken.values())

    @property
    def largest_free(self) -> int:
        """Rows of the largest extent that `find` could give."""
        return max((end - start for start, end in self._gaps()), default=0)

    def find(self, rows: int) -> int | None:
        """Start of the first gap of `rows` rows, rounded up to granules; None if there is none. Takes nothing."""
        need = round_up_rows(rows)
        return next((start for start, end in self._gaps() if end - start >= need), None)

    def take(self, start: int, rows: int) -> None:
        """Takes an extent that `find` gave for as many rows."""
        self._taken[start] = round_up_rows(rows)

    def release(self, start: int) -> None:
        """Gives an extent back by its start."""
        del self._taken[start]

    def _gaps(self) -> list[tuple[int, int]]:
        gaps, last = [], 0
        for start in sorted(self._taken):
            if start > last:
                gaps.append((last, start))
            last = start + self._taken[start]
        return [*gaps, (last, self.rows)] if last < self.rows else gaps


@dataclass(frozen=True)
class Place:
    """Where one adapter's rows of a room begin: A and B begin together but at expert sites."""

    a_start: int
    b_start: int


@dataclass(frozen=True, eq=False)
class Placement:
    """Where one adapter lies at one site: its first pool row, the rows of its extent, and how many the pool has.

    a_rows, b_rows: views of its A [rows, K] and B [rows, N], `rank` rows for each part of the weight that it adapts.
    """

    start: int
    rows: int
    pool_rows: int
    rank: int
    scaling: float
    a_rows: torch.Tensor
    b_rows: torch.Tensor


class Room:
    """The memory of a linear, an embedding or a logits weight: one extent an adapter, A and B at the same rows."""

    def __init__(self, site: Site, shape: AdapterShape) -> None:
        self.site, self.extents = site, ExtentAllocator(rows_for(shape))
        self.pool = SitePool.allocate(**_sizes(site, shape))

    @staticmethod
    def bytes_needed(site: Site, shape: AdapterShape) -> int:
        """Bytes that the memory of a site takes."""
        return SitePool.bytes_needed(**_sizes(site, shape))

    def find(self, entry: Entry, loaded: list[str]) -> Place:
        """A free place for an entry; takes nothing. Raises CapacityError."""
        start = _find(self.extents, self.site, "", len(entry.a_RK), entry.rank, loaded)
        return Place(start, start)

    def take(self, place: Place, entry: Entry) -> None:
        """Takes a place that `find` gave for this entry."""
        self.extents.take(place.a_start, len(entry.a_RK))

    def release(self, place: Place) -> None:
        """Gives a place back."""
        self.extents.release(place.a_start)

    def placement(self, slot: int, place: Place) -> Placement:
        """What of the memory a slot holds, at its place."""
        rank = int(self.pool.rank[slot])
        rows = slice(place.a_start, place.a_start + rank)
        size, scaling = len(self.pool.b), float(self.pool.scaling[slot])
        tensors = (self.pool.a_PK[rows], self.pool.b[rows])
        return Placement(place.a_start, round_up_rows(rank), size, rank, scaling, *tensors)

    def write(self, slot: int, place: Place, entry: Entry, a: torch.Tensor, b: torch.Tensor) -> None:
        """Copies A and B, converted, to a place and publishes the slot."""
        self.pool.write(slot, start=place.a_start, a_RK=a, b_RN=b, scaling=entry.scaling)


class ExpertRoom:
    """The memory of an expert weight: A and B have extents of their own, since either may be shared by all experts."""

    def __init__(self, site: Site, shape: AdapterShape) -> None:
        rows = expert_rows_for(site.num_experts, shape)
        self.site, self.a_extents, self.b_extents = site, ExtentAllocator(rows), ExtentAllocator(rows)
        self.pool = ExpertPool.allocate(**_expert_sizes(site, shape))

    @staticmethod
    def bytes_needed(site: Site, shape: AdapterShape) -> int:
        """Bytes that the memory of a site takes."""
        return ExpertPool.bytes_needed(**_expert_sizes(site, shape))

    def find(self, entry: Entry, loaded: list[str]) -> Place:
        """A free place for an entry; takes nothing. Raises CapacityError."""
        a_start = _find(self.a_extents, self.site, "A of ", len(entry.a_RK), entry.rank, loaded)
        return Place(a_start, _find(self.b_extents, self.site, "B of ", len(entry.b_RN), entry.rank, loaded))

    def take(self, place: Place, entry: Entry) -> None:
        """Takes a place that `find` gave for this entry."""
        self.a_extents.take(place.a_start, len(entry.a_RK))
        self.b_extents.take(place.b_start, len(entry.b_RN))

    def release(self, place: Place) -> None:
        """Gives a place back."""
        self.a_extents.release(place.a_start)
        self.b_extents.release(place.b_start)

    def placement(self, slot: int, place: Place) -> Placement:
        """What of the memory a slot holds, at its place; the extent is that of A."""
        pool, experts = self.pool, self.site.num_experts
        rank, size = int(pool.rank[slot]), len(pool.a)
        a_rows, b_rows = (rank * (experts if int(step[slot]) else 1) for step in (pool.a_step, pool.b_step))
        a, b = pool.a[place.a_start : place.a_start + a_rows], pool.b[place.b_start : place.b_start + b_rows]
        return Placement(place.a_start, round_up_rows(a_rows), size, rank, float(pool.scaling[slot]), a, b)

    def write(self, slot: int, place: Place, entry: Entry, a: torch.Tensor, b: torch.Tensor) -> None:
        """Copies A and B, converted, to a place and publishes the slot."""
        a_step, b_step = (0 if shared else entry.rank for shared in entry.shared)
        self.pool.write(
            slot,
            a_start=place.a_start,
            a_step=a_step,
            b_start=place.b_start,
            b_step=b_step,
            rank=entry.rank,
            a_rows=a,
            b_rows=b,
            scaling=entry.scaling,
        )


def expected_shapes(site: Site, entry: Entry) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of A and B that an entry of its rank must have at a site."""
    a_rows, b_rows = entry.rank, entry.rank
    if site.num_experts:
        a_rows, b_rows = (entry.rank * (1 if shared else site.num_experts) for shared in entry.shared)
    return (a_rows, site.in_features), (b_rows, site.out_features)


def rows_for(shape: AdapterShape) -> int:
    """Rank rows of an ordinary site. Raises CapacityError when one adapter of max_rank would not fit."""
    needed = round_up_rows(shape.max_rank)
    if shape.pool_rows is None:
        return shape.max_adapters * needed
    rows = round_up_rows(shape.pool_rows)
    if rows < needed:
        _refuse(f"pool_rows={shape.pool_rows} cannot hold one adapter of max_rank {shape.max_rank}", needed, rows)
    return rows


def expert_rows_for(num_experts: int, shape: AdapterShape) -> int:
    """Rank rows of all experts of a site together. Raises CapacityError when one adapter of max_rank would not fit."""
    needed = round_up_rows(num_experts * shape.max_rank)
    if shape.expert_pool_rows is None:
        every_slot = round_up_rows(num_experts * min(shape.max_rank, EXPERT_RANK))
        return max(shape.max_adapters * every_slot, needed)
    rows = round_up_rows(num_experts * shape.expert_pool_rows)
    if rows < needed:
        given = f"expert_pool_rows={shape.expert_pool_rows}"
        _refuse(f"{given} at {num_experts} experts cannot hold one adapter of max_rank {shape.max_rank}", needed, rows)
    return rows


def _refuse(words: str, needed: int, rows: int) -> None:
    raise CapacityError(
        f"{words}, which takes {needed} rows", unit="pool rows", asked=needed, free=rows, largest_free=rows
    )


def _find(extents: ExtentAllocator, site: Site, half: str, rows: int, rank: int, loaded: list[str]) -> int:
    start = extents.find(rows)
    if start is None:
        asked, free, largest = round_up_rows(rows), extents.free, extents.largest_free
        experts = f" over {site.num_experts} experts" if site.num_experts else ""
        option = "expert_pool_rows" if site.num_experts else "pool_rows"
        message = (
            f"{half}rank {rank}{experts} at site {site.name} asks for {asked} adjacent pool rows; {free} of "
            f"{extents.rows} are free, {largest} adjacent. Loaded: {loaded}; unload one or raise {option}"
        )
        raise CapacityError(message, unit="pool rows", asked=asked, free=free, largest_free=largest)
    return start


def _sizes(site: Site, shape: AdapterShape) -> dict[str, Any]:
    return {"kind": site.kind, "pool_rows": rows_for(shape), **_common(site, shape)}


def _expert_sizes(site: Site, shape: AdapterShape) -> dict[str, Any]:
    rows = expert_rows_for(site.num_experts, shape)
    return {"num_experts": site.num_experts, "pool_rows_a": rows, "pool_rows_b": rows, **_common(site, shape)}


def _common(site: Site, shape: AdapterShape) -> dict[str, Any]:
    return {
        "in_features": site.in_features,
        "out_features": site.out_features,
        "max_adapters": shape.max_adapters,
        "max_rank": shape.max_rank,
        "dtype": site.dtype,
        "device": site.device,
    }
