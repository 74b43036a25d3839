"""Adapter memory of each site, and the handles by which ops find it.

Stage: run time, between the adapter pool that writes (`fxlora/pool.py`) and the ops that read. A rewritten graph
holds one int64 per op call and never the pools themselves, so that compile caches hit across processes and CUDA-graph
replays copy no pool (GraphModule buffers are copied at each replay).

Letters: K in-features, N out-features, V vocabulary, R rank, S slots, P pool rows.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar, cast

import torch

from fxlora.kernels.errors import OpInputError, PlanMismatchError, PoolWriteError, RuntimeGoneError
from fxlora.kernels.expert_pool import ExpertPool
from fxlora.kernels.extent import Extent, check_slot, extent_of, finite_as

T = TypeVar("T")
PoolKind = Literal["linear", "embedding"]

_DIGEST_BITS, _ORDINAL_BITS, _GROUP_BITS = 32, 16, 15


@dataclass(eq=False)
class SitePool:
    """Rank rows of every adapter loaded at one site, and the table that says which rows belong to which slot.

    a: [P, K] of the site's dtype (embedding: [V, P], so that one token's ranks are adjacent). b: [P, N], same dtype.
    start: int32 [S], first pool row of the slot. rank: int32 [S], 0 for a slot that adds nothing here.
    scaling: fp32 [S]. All five keep their addresses for life and are updated in place.
    max_rank: highest rank that `write` accepts, P if None. Device bodies size their intermediate by it.
    extents: the same table on the host, for CPU bodies.
    """

    a: torch.Tensor
    b: torch.Tensor
    start: torch.Tensor
    rank: torch.Tensor
    scaling: torch.Tensor
    kind: PoolKind = "linear"
    max_rank: int | None = None
    extents: list[Extent | None] = field(default_factory=list, repr=False)

    @staticmethod
    def bytes_needed(
        *,
        kind: PoolKind,
        pool_rows: int,
        in_features: int,
        out_features: int,
        max_adapters: int,
        dtype: torch.dtype,
        device: torch.device | str,
        max_rank: int | None = None,
    ) -> int:
        """Bytes that `allocate` with the same arguments would take."""
        del kind, device, max_rank
        return pool_rows * (in_features + out_features) * dtype.itemsize + 12 * max_adapters

    @classmethod
    def allocate(
        cls,
        *,
        kind: PoolKind,
        pool_rows: int,
        in_features: int,
        out_features: int,
        max_adapters: int,
        dtype: torch.dtype,
        device: torch.device | str,
        max_rank: int | None = None,
    ) -> SitePool:
        """Empty pool: every slot has rank 0. `in_features` is K, or V for an embedding."""
        shape_a = (pool_rows, in_features) if kind == "linear" else (in_features, pool_rows)
        return cls(
            a=torch.zeros(shape_a, dtype=dtype, device=device),
            b=torch.zeros(pool_rows, out_features, dtype=dtype, device=device),
            start=torch.zeros(max_adapters, dtype=torch.int32, device=device),
            rank=torch.zeros(max_adapters, dtype=torch.int32, device=device),
            scaling=torch.zeros(max_adapters, dtype=torch.float32, device=device),
            kind=kind,
            max_rank=max_rank,
            extents=[None] * max_adapters,
        )

    @property
    def a_PK(self) -> torch.Tensor:
        """A as [P, K] ([P, V] for an embedding), whatever the layout in memory."""
        return self.a if self.kind == "linear" else self.a.t()

    @property
    def rank_bound(self) -> int:
        """No slot of this site ever has a higher rank."""
        return self.b.shape[0] if self.max_rank is None else self.max_rank

    @property
    def bytes(self) -> int:
        """Bytes held on the device."""
        return sum(t.numel() * t.element_size() for t in (self.a, self.b, self.start, self.rank, self.scaling))

    def write(self, slot: int, *, start: int, a_RK: torch.Tensor, b_RN: torch.Tensor, scaling: float) -> None:
        """Copies one adapter into rows `start .. start + R` and publishes it as `slot`, its rank last.

        a_RK: [R, K] (embedding: [R, V]); b_RN: [R, N]; any float dtype and device, converted to the pool's.
        Raises PoolWriteError when the slot, the rows or the shapes do not fit, or when B is not finite in the pool's
        dtype; nothing is written then.
        """
        rank = self._check(slot, start, a_RK, b_RN)
        b_RN = finite_as(b_RN, self.b)
        self.clear(slot)
        if not rank:
            return
        rows = slice(start, start + rank)
        a_view, b_view = self.a_PK[rows], self.b[rows]
        a_view.copy_(a_RK.detach())
        b_view.copy_(b_RN)
        self.start[slot] = start
        self.scaling[slot] = scaling
        self.rank[slot] = rank
        self.extents[slot] = self._extent(start, rank, float(scaling))

    def _extent(self, start: int, rank: int, scaling: float) -> Extent:
        if self.kind == "linear":
            return extent_of(self.a, self.b, start, start, rank, scaling)
        a_VR = self.a[:, start : start + rank]
        return Extent(a_VR, a_VR, slice(0, rank), self.b[start : start + rank], scaling)

    def clear(self, slot: int) -> None:
        """Makes `slot` add nothing at this site. The rows keep their values until they are written again."""
        check_slot(slot, len(self.extents))
        self.rank[slot] = 0
        self.extents[slot] = None

    def _check(self, slot: int, start: int, a_RK: torch.Tensor, b_RN: torch.Tensor) -> int:
        pool_rows, in_features = self.a_PK.shape
        rank = a_RK.shape[0]
        check_slot(slot, len(self.extents))
        if a_RK.shape != (rank, in_features) or b_RN.shape != (rank, self.b.shape[1]):
            raise PoolWriteError(
                f"A {tuple(a_RK.shape)} and B {tuple(b_RN.shape)} do not fit a site that reads {in_features} "
                f"and writes {self.b.shape[1]} features: expected [R, {in_features}] and [R, {self.b.shape[1]}]"
            )
        if rank > self.rank_bound:
            raise PoolWriteError(f"rank {rank} is above the {self.rank_bound} that this site was allocated for")
        if start < 0 or start + rank > pool_rows:
            raise PoolWriteError(f"rows {start} to {start + rank} are outside the {pool_rows} rows of this pool")
        return rank


Group = tuple[SitePool | None, ...]
ExpertGroup = tuple[ExpertPool | None]
SlotBuffers = Mapping[torch.device, torch.Tensor]
"""By device: int32 [max_tokens], the slot of each request (or token) of the running batch, -1 past its end."""

_lock = threading.Lock()
_made: Counter[int] = Counter()
_groups: dict[int, Group | ExpertGroup] = {}
_derived: dict[int, object] = {}
_slot_buffers: dict[int, SlotBuffers] = {}  # by handle without its group bits


def register_runtime(
    digest: int, groups: Sequence[Group | ExpertGroup], slots: SlotBuffers | None = None
) -> tuple[int, ...]:
    """Makes the pools of one runtime reachable by handle: one int64 for each group, in order.

    digest: 32 bits that name the plan. A member without a pool is None (base only); an expert weight is a group of
    its own. slots: what `batch_slots` reads through any of the handles, if the graph has no input for them.
    Handle bits, from the top: digest (32), ordinal of the runtime among those of that digest made in this process (16),
    index of the group (15). The first runtime of a plan gets the same handles in every process; no handle is used twice
    in one. The registry keeps the pools alive until `unregister_runtime`.
    """
    if not 0 <= digest < 1 << _DIGEST_BITS:
        raise ValueError(f"digest {digest:#x} does not fit {_DIGEST_BITS} bits")
    if len(groups) > 1 << _GROUP_BITS:
        raise ValueError(f"{len(groups)} groups do not fit {_GROUP_BITS} bits")
    with _lock:
        ordinal = _made[digest]
        if ordinal >= 1 << _ORDINAL_BITS:
            raise ValueError(f"plan {digest:#010x} was registered {ordinal} times in this process: no handles left")
        _made[digest] += 1
        first = ((digest << _ORDINAL_BITS) | ordinal) << _GROUP_BITS
        handles = tuple(range(first, first + len(groups)))
        _groups.update(zip(handles, (tuple(group) for group in groups), strict=True))
        if slots is not None:
            _slot_buffers[first >> _GROUP_BITS] = slots
    return handles


def unregister_runtime(handles: Iterable[int]) -> None:
    """Forgets handles; a later call through one raises RuntimeGoneError. Unknown handles are ignored."""
    with _lock:
        for handle in handles:
            _groups.pop(handle, None)
            _derived.pop(handle, None)
            _slot_buffers.pop(handle >> _GROUP_BITS, None)


def slots_behind(handle: int) -> SlotBuffers:
    """The slot buffers of a handle's runtime. Raises as `pools_of`, and PlanMismatchError for a runtime without any."""
    buffers = _slot_buffers.get(handle >> _GROUP_BITS)
    if buffers is None:
        pools_of(handle)
        raise PlanMismatchError(handle, "its graph takes the slots of a batch as an input")
    return buffers


def pools_of(handle: int) -> Group:
    """The pools behind a handle, one for each member of the group.

    Raises RuntimeGoneError when its runtime was unregistered, PlanMismatchError when no such plan, runtime or group was
    ever registered in this process.
    """
    group = _groups.get(handle)
    return cast("Group", group if group is not None else _raise_missing(handle))


def expert_pool_of(handle: int) -> ExpertPool | None:
    """The pool of the expert weight behind a handle. Raises as `pools_of`, and OpInputError for a group of others."""
    (pool, *others) = pools_of(handle) or (None, None)
    if others or not isinstance(pool, ExpertPool | None):
        raise OpInputError(f"handle {handle:#018x} is that of linears or embeddings, not of an expert weight")
    return pool


def derived_of(handle: int, make: Callable[[Group], T]) -> T:
    """make(pools_of(handle)), made once and forgotten with the handle. One `make` only serves a handle."""
    found = _derived.get(handle)
    if found is None:
        found = make(pools_of(handle))
        with _lock:
            if handle in _groups:  # not if it was unregistered meanwhile
                _derived[handle] = found
    return cast("T", found)


def _raise_missing(handle: int) -> Group:
    digest = handle >> (_ORDINAL_BITS + _GROUP_BITS)
    ordinal = (handle >> _GROUP_BITS) & ((1 << _ORDINAL_BITS) - 1)
    made = _made.get(digest, 0)
    if not made:
        raise PlanMismatchError(handle, f"no runtime of plan {digest:#010x} exists")
    if ordinal >= made:
        raise PlanMismatchError(
            handle, f"plan {digest:#010x} has {made} runtimes, the handle asks for number {ordinal}"
        )
    group = handle & ((1 << _GROUP_BITS) - 1)
    first = handle - group
    if any(other >> _GROUP_BITS == first >> _GROUP_BITS for other in _groups):
        raise PlanMismatchError(handle, f"runtime {ordinal} of plan {digest:#010x} has no group {group}")
    raise RuntimeGoneError(handle, digest, ordinal)
