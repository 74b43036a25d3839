"""Device memory of the loaded adapters: slots, and one contiguous extent of rank rows per adapter and site.

Stage: last of an adapter's way, BoundAdapter -> pool, which the ops read through handles (`kernels/registry.py`).
Addresses are fixed from construction on, so loading never recompiles or recaptures.

Letters: K in-features (V for an embedding), N out-features, R rank, P pool rows of a site, S slots.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NoReturn, TypedDict

import torch

from fxlora.adapter import count_nonfinite
from fxlora.binding import BoundAdapter, Entry
from fxlora.errors import (
    AdapterError,
    AdapterShapeError,
    CapacityError,
    DuplicateAdapterError,
    NonFiniteError,
    PoolClosedError,
    RankError,
    Unbound,
    UnboundTensorError,
    UnknownAdapterError,
)
from fxlora.kernels.registry import PoolKind, SitePool, SlotBuffers, register_runtime, unregister_runtime
from fxlora.passes.sites import Role, Site

_log = logging.getLogger(__name__)

EXTENT_ROWS = 16
"""Extents start and end on multiples of this, the smallest R a tensor-core tile takes."""


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


@dataclass(frozen=True, eq=False)
class _Room:
    """One site's memory and who holds which rows of it."""

    pool: SitePool
    extents: ExtentAllocator


@dataclass(frozen=True, eq=False)
class _Loaded:
    """One adapter in the pool: its slot, and the start of its extent at each site it adds to."""

    slot: int
    starts: Mapping[Site, int]


@dataclass(frozen=True, eq=False)
class _Staged:
    """One entry, checked, in the dtype and on the device of its pool."""

    site: Site
    a_RK: torch.Tensor
    b_RN: torch.Tensor
    scaling: float


class AdapterPool:
    """The loaded adapters of one runtime. Loads and unloads from several threads take turns.

    Writes go to the current stream of the loading thread: a forward on another stream that still uses an adapter must
    have finished before that adapter is unloaded or its slot is loaded again.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        *,
        digest: int,
        max_adapters: int,
        max_rank: int,
        pool_rows: int | None = None,
        groups: Sequence[tuple[Site, ...]] | None = None,
        slots: SlotBuffers | None = None,
    ) -> None:
        """Allocates one pool per site (expert sites have none) and registers them, one handle per group.

        digest: 32 bits that name the plan. pool_rows: rank rows per site, rounded up to 16; by default every slot can
        hold max_rank. groups: distinct lists of the sites that one op serves, by default each site alone; a site may be
        in several. slots: what the op `batch_slots` reads. Raises CapacityError when one adapter of max_rank would not
        fit, ValueError for sizes below 1.
        """
        if max_adapters < 1 or max_rank < 1:
            raise ValueError(f"max_adapters is {max_adapters} and max_rank is {max_rank}; both are at least 1")
        self.max_adapters, self.max_rank = max_adapters, max_rank
        self.pool_rows = _rows_for(max_adapters, max_rank, pool_rows)
        self._slots = slots
        self._bytes = 0
        self._rooms: dict[Site, _Room] = {}
        self._loaded: Mapping[str, _Loaded] = {}
        self._lock = threading.RLock()
        self._registered: dict[tuple[int, tuple[tuple[Site, ...], ...]], Mapping[tuple[Site, ...], int]] = {}
        self._held: list[int] = []
        self._unregister = weakref.finalize(self, unregister_runtime, self._held)
        self.add_sites(sites)
        self.handles = self.register(digest, [(site,) for site in self.sites] if groups is None else groups)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites that own a pool."""
        return tuple(self._rooms)

    def add_sites(self, sites: Sequence[Site]) -> None:
        """Allocates the pools of further sites, empty for the adapters that are loaded. Raises PoolClosedError."""
        with self._lock:
            self._require_open()
            new = [site for site in sites if site.role is not Role.EXPERTS and site not in self._rooms]
            sizes = {site: _sizes_of(site, self.pool_rows, self.max_adapters, self.max_rank) for site in new}
            more = sum(SitePool.bytes_needed(**size) for size in sizes.values())
            if new:
                _log.info("adapter pools: %d sites of %d rank rows, %d bytes", len(new), self.pool_rows, more)
            with torch.inference_mode(False):  # else they could only be written in inference mode
                pools = {site: SitePool.allocate(**size) for site, size in sizes.items()}
            self._rooms |= {site: _Room(pool, ExtentAllocator(self.pool_rows)) for site, pool in pools.items()}
            self._bytes += more

    def register(self, digest: int, groups: Sequence[tuple[Site, ...]]) -> Mapping[tuple[Site, ...], int]:
        """One handle for each of these groups. Graphs of one plan share theirs. Raises PoolClosedError."""
        with self._lock:
            self._require_open()
            key = (digest, tuple(groups))
            if not groups:
                return {}
            if key not in self._registered:
                pools = [tuple(self._rooms[site].pool for site in group) for group in groups]
                handles = register_runtime(digest, pools, self._slots)
                self._held += handles
                self._registered[key] = MappingProxyType(dict(zip(groups, handles, strict=True)))
            return self._registered[key]

    @property
    def slots(self) -> Mapping[str, int]:
        """Slot of every loaded adapter by name, in slot order, as of now."""
        loaded = self._loaded
        return {name: loaded[name].slot for name in sorted(loaded, key=lambda name: loaded[name].slot)}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the loaded adapters, in slot order."""
        return tuple(self.slots)

    @property
    def bytes(self) -> int:
        """Bytes of all pools and slot tables; 0 once closed."""
        return self._bytes if self._unregister.alive else 0

    def slot_of(self, name: str) -> int:
        """Slot of a loaded adapter. Raises UnknownAdapterError."""
        slots = self.slots
        if name not in slots:
            raise UnknownAdapterError(f"no adapter {name!r} is loaded; loaded: {list(slots)}")
        return slots[name]

    def load(self, name: str, bound: BoundAdapter) -> int:
        """Places an adapter and returns its slot. All or nothing: everything is checked before the first byte moves.

        Raises DuplicateAdapterError, CapacityError, RankError, AdapterShapeError, NonFiniteError (also for values that
        the pool's dtype cannot hold), UnboundTensorError (a site without a pool), PoolClosedError, or AdapterError for
        a name that is no string. `bound` is not kept. Takes a second copy of the adapter on the device while it runs.
        """
        if not isinstance(name, str) or not name:
            raise AdapterError(f"an adapter's name is a non-empty string, not {name!r}")
        with self._lock:
            self._require_open()
            if name in self._loaded:
                raise DuplicateAdapterError(
                    f"adapter {name!r} is loaded, in slot {self.slot_of(name)}; unload it first"
                )
            slot = self._free_slot()
            self._place(name, slot, bound)
        return slot

    def fill(self, name: str, bound: BoundAdapter) -> None:
        """Places an adapter that holds a slot and nothing else, as `load` does."""
        with self._lock:
            self._require_open()
            slot = self.slot_of(name)
            if self._loaded[name].starts:
                raise DuplicateAdapterError(f"adapter {name!r} is placed already, in slot {slot}")
            self._place(name, slot, bound)

    def _place(self, name: str, slot: int, bound: BoundAdapter) -> None:
        self._check_entries(bound)
        starts = {site: self._find(site, entry.rank) for site, entry in bound.entries.items()}
        staged = [self._stage(name, site, entry) for site, entry in bound.entries.items()]
        self._write(slot, starts, staged)
        for item in staged:
            self._rooms[item.site].extents.take(starts[item.site], len(item.a_RK))
        self._loaded = {**self._loaded, name: _Loaded(slot, starts)}
        _log.info("loaded adapter %r into slot %d: %d sites", name, slot, len(starts))

    def sites_of(self, name: str) -> tuple[Site, ...]:
        """The sites to which a loaded adapter adds. Raises UnknownAdapterError."""
        with self._lock:
            self.slot_of(name)
            return tuple(self._loaded[name].starts)

    def unload(self, name: str) -> None:
        """Frees an adapter's slot and extents. Raises UnknownAdapterError or PoolClosedError."""
        with self._lock:
            self._require_open()
            slot = self.slot_of(name)
            starts = self._loaded[name].starts
            self._loaded = {other: loaded for other, loaded in self._loaded.items() if other != name}
            for site, start in starts.items():
                self._rooms[site].pool.clear(slot)
                self._rooms[site].extents.release(start)
        _log.info("unloaded adapter %r from slot %d", name, slot)

    def close(self) -> None:
        """Unregisters the handles and lets the memory go; a graph that still reads it raises RuntimeGoneError."""
        with self._lock:
            self._unregister()
            self._rooms.clear()
            self._loaded = {}

    def __reduce__(self) -> NoReturn:
        raise TypeError("an AdapterPool owns device memory and handles of this process: it cannot be copied or pickled")

    def _require_open(self) -> None:
        if not self._unregister.alive:
            raise PoolClosedError("this adapter pool was closed; apply or attach again for a new one")

    def _check_entries(self, bound: BoundAdapter) -> None:
        homeless = [
            Unbound(key, f"site {site.name} ({site.role.value}) owns no pool")
            for site, entry in bound.entries.items()
            if site not in self._rooms
            for key in entry.keys
        ]
        if homeless:
            raise UnboundTensorError(tuple(homeless), bound=len(bound.entries) - len(homeless))
        for site, entry in bound.entries.items():
            self.check_entry(site, entry)

    def check_entry(self, site: Site, entry: Entry) -> None:
        """Raises AdapterShapeError, RankError or NonFiniteError for an entry that no site of this kind takes."""
        rank, shapes = len(entry.a_RK), (tuple(entry.a_RK.shape), tuple(entry.b_RN.shape))
        if shapes != ((rank, site.in_features), (rank, site.out_features)):
            raise AdapterShapeError(
                f"A {shapes[0]} and B {shapes[1]} at site {site.name}; "
                f"expected [R, {site.in_features}] and [R, {site.out_features}]"
            )
        if not 0 < rank <= self.max_rank:
            raise RankError(f"rank {rank} at site {site.name} ({entry.keys[:1]}); this pool takes 1 to {self.max_rank}")
        if not abs(entry.scaling) <= torch.finfo(torch.float32).max:
            raise NonFiniteError(f"scaling {entry.scaling} at site {site.name} does not fit fp32")

    def _free_slot(self) -> int:
        taken = set(self.slots.values())
        slot = next((slot for slot in range(self.max_adapters) if slot not in taken), None)
        if slot is None:
            message = f"all {self.max_adapters} slots are taken by {list(self.names)}; unload one or raise max_adapters"
            raise CapacityError(message, unit="slots", asked=1, free=0, largest_free=0)
        return slot

    def _find(self, site: Site, rank: int) -> int:
        extents = self._rooms[site].extents
        start = extents.find(rank)
        if start is None:
            asked, free, largest = round_up_rows(rank), extents.free, extents.largest_free
            message = (
                f"rank {rank} at site {site.name} asks for {asked} adjacent pool rows; {free} of {extents.rows} are "
                f"free, {largest} adjacent. Loaded: {list(self.names)}; unload one or raise pool_rows"
            )
            raise CapacityError(message, unit="pool rows", asked=asked, free=free, largest_free=largest)
        return start

    def _stage(self, name: str, site: Site, entry: Entry) -> _Staged:
        a_RK = self._convert(name, site, "A", entry.a_RK, entry.keys)
        return _Staged(site, a_RK, self._convert(name, site, "B", entry.b_RN, entry.keys), entry.scaling)

    def _convert(self, name: str, site: Site, half: str, tensor: torch.Tensor, keys: tuple[str, ...]) -> torch.Tensor:
        if tensor.dtype != site.dtype:
            _log.debug("%s at site %s: %s stored as %s", half, site.name, tensor.dtype, site.dtype)
        converted = tensor.detach().to(site.device, site.dtype)
        if bad := count_nonfinite(converted):
            raise NonFiniteError(
                f"adapter {name!r}: {bad} values of {half} at site {site.name} ({keys}) are not finite in {site.dtype}"
            )
        return converted

    def _write(self, slot: int, starts: Mapping[Site, int], staged: Sequence[_Staged]) -> None:
        """Writes every entry; if the device fails midway, what was written is unpublished again."""
        try:
            for item in staged:
                self._rooms[item.site].pool.write(
                    slot, start=starts[item.site], a_RK=item.a_RK, b_RN=item.b_RN, scaling=item.scaling
                )
        except BaseException:
            for item in staged:
                self._rooms[item.site].pool.clear(slot)
            raise


class _PoolSizes(TypedDict):
    """Keywords of SitePool.allocate and bytes_needed."""

    kind: PoolKind
    pool_rows: int
    in_features: int
    out_features: int
    max_adapters: int
    max_rank: int
    dtype: torch.dtype
    device: torch.device


def _sizes_of(site: Site, pool_rows: int, max_adapters: int, max_rank: int) -> _PoolSizes:
    return {
        "kind": site.kind,
        "pool_rows": pool_rows,
        "in_features": site.in_features,
        "out_features": site.out_features,
        "max_adapters": max_adapters,
        "max_rank": max_rank,
        "dtype": site.dtype,
        "device": site.device,
    }


def _rows_for(max_adapters: int, max_rank: int, pool_rows: int | None) -> int:
    needed = round_up_rows(max_rank)
    if pool_rows is None:
        return max_adapters * needed
    rows = round_up_rows(pool_rows)
    if rows < needed:
        message = f"pool_rows={pool_rows} cannot hold one adapter of max_rank {max_rank}, which takes {needed} rows"
        raise CapacityError(message, unit="pool rows", asked=needed, free=rows, largest_free=rows)
    return rows
