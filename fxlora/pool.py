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
from typing import Any, NoReturn

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
from fxlora.kernels.registry import SlotBuffers, register_runtime, unregister_runtime
from fxlora.passes.plan import AdapterShape
from fxlora.passes.sites import Site
from fxlora.rooms import (
    EXTENT_ROWS,
    ExpertRoom,
    ExtentAllocator,
    Place,
    Placement,
    Room,
    expected_shapes,
    round_up_rows,
    rows_for,
)

__all__ = ["EXTENT_ROWS", "AdapterPool", "ExtentAllocator", "Placement", "round_up_rows"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _Loaded:
    """One adapter in the pool: its slot, and its place at each site it adds to."""

    slot: int
    places: Mapping[Site, Place]


@dataclass(frozen=True, eq=False)
class _Staged:
    """One entry, checked, and its A and B in the dtype and on the device of its pool."""

    site: Site
    entry: Entry
    a_RK: torch.Tensor
    b_RN: torch.Tensor


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
        expert_pool_rows: int | None = None,
        groups: Sequence[tuple[Site, ...]] | None = None,
        slots: SlotBuffers | None = None,
    ) -> None:
        """Allocates one pool per site and registers them, one handle per group.

        digest: 32 bits that name the plan. pool_rows: rank rows per site, rounded up to 16; by default every slot can
        hold max_rank. expert_pool_rows: rank rows per expert of a site that has several; by default every slot can hold
        rank 16 there, or max_rank if that is lower, and one adapter of max_rank always fits. groups: distinct lists of
        the sites that one op serves, by default each site alone; a site may be in several. slots: what the op
        `batch_slots` reads. Raises CapacityError when one adapter of max_rank would not fit, ValueError for sizes
        below 1.
        """
        if max_adapters < 1 or max_rank < 1:
            raise ValueError(f"max_adapters is {max_adapters} and max_rank is {max_rank}; both are at least 1")
        self.max_adapters, self.max_rank = max_adapters, max_rank
        self._shape = AdapterShape(max_adapters, max_rank, pool_rows, expert_pool_rows)
        self.pool_rows = rows_for(self._shape)
        self._slots = slots
        self._bytes = 0
        self._rooms: dict[Site, Room | ExpertRoom] = {}
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
            rooms: dict[Site, type[Room] | type[ExpertRoom]] = {
                site: ExpertRoom if site.num_experts else Room for site in sites if site not in self._rooms
            }
            sizes = {site: room.bytes_needed(site, self._shape) for site, room in rooms.items()}
            more = sum(sizes.values())
            if rooms:
                _log.info("adapter pools: %d sites of %d rank rows, %d bytes", len(rooms), self.pool_rows, more)
            if experts := [size for site, size in sizes.items() if site.num_experts]:
                _log.info("of these, %d expert sites with %d bytes", len(experts), sum(experts))
            with torch.inference_mode(False):  # else they could only be written in inference mode
                self._rooms |= {site: room(site, self._shape) for site, room in rooms.items()}
            self._bytes += more

    def register(self, digest: int, groups: Sequence[tuple[Site, ...]]) -> Mapping[tuple[Site, ...], int]:
        """One handle for each of these groups. Graphs of one plan share theirs. Raises PoolClosedError."""
        with self._lock:
            self._require_open()
            key = (digest, tuple(groups))
            if not groups:
                return {}
            if key not in self._registered:
                pools: list[Any] = [tuple(self._rooms[site].pool for site in group) for group in groups]
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

    def placements(self, name: str) -> dict[Site, Placement]:
        """Where a loaded adapter lies, site by site; the tensors are views. Raises UnknownAdapterError."""
        with self._lock:
            slot = self.slot_of(name)
            return {site: self._rooms[site].placement(slot, place) for site, place in self._loaded[name].places.items()}

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
            if self._loaded[name].places:
                raise DuplicateAdapterError(f"adapter {name!r} is placed already, in slot {slot}")
            self._place(name, slot, bound)

    def _place(self, name: str, slot: int, bound: BoundAdapter) -> None:
        self._check_entries(bound)
        loaded = [other for other in self.names if other != name]
        places = {site: self._rooms[site].find(entry, loaded) for site, entry in bound.entries.items()}
        staged = [self._stage(name, site, entry) for site, entry in bound.entries.items()]
        self._write(slot, places, staged)
        for item in staged:
            self._rooms[item.site].take(places[item.site], item.entry)
        self._loaded = {**self._loaded, name: _Loaded(slot, places)}
        _log.info("loaded adapter %r into slot %d: %d sites", name, slot, len(places))

    def sites_of(self, name: str) -> tuple[Site, ...]:
        """The sites to which a loaded adapter adds. Raises UnknownAdapterError."""
        with self._lock:
            self.slot_of(name)
            return tuple(self._loaded[name].places)

    def unload(self, name: str) -> None:
        """Frees an adapter's slot and extents. Raises UnknownAdapterError or PoolClosedError."""
        with self._lock:
            self._require_open()
            slot = self.slot_of(name)
            places = self._loaded[name].places
            self._loaded = {other: loaded for other, loaded in self._loaded.items() if other != name}
            for site, place in places.items():
                self._rooms[site].pool.clear(slot)
                self._rooms[site].release(place)
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
        shapes = tuple(entry.a_RK.shape), tuple(entry.b_RN.shape)
        rank = min(entry.rank, *(len(half) for half in (entry.a_RK, entry.b_RN)))
        if not 0 < rank <= self.max_rank:
            raise RankError(f"rank {rank} at site {site.name} ({entry.keys[:1]}); this pool takes 1 to {self.max_rank}")
        if shapes != (expected := expected_shapes(site, entry)):
            raise AdapterShapeError(
                f"A {shapes[0]} and B {shapes[1]} of rank {entry.rank} at site {site.name}; expected {expected[0]} and "
                f"{expected[1]}"
            )
        if not abs(entry.scaling) <= torch.finfo(torch.float32).max:
            raise NonFiniteError(f"scaling {entry.scaling} at site {site.name} does not fit fp32")

    def _free_slot(self) -> int:
        taken = set(self.slots.values())
        slot = next((slot for slot in range(self.max_adapters) if slot not in taken), None)
        if slot is None:
            message = f"all {self.max_adapters} slots are taken by {list(self.names)}; unload one or raise max_adapters"
            raise CapacityError(message, unit="slots", asked=1, free=0, largest_free=0)
        return slot

    def _stage(self, name: str, site: Site, entry: Entry) -> _Staged:
        a_RK = self._convert(name, site, "A", entry.a_RK, entry.keys)
        return _Staged(site, entry, a_RK, self._convert(name, site, "B", entry.b_RN, entry.keys))

    def _convert(self, name: str, site: Site, half: str, tensor: torch.Tensor, keys: tuple[str, ...]) -> torch.Tensor:
        if tensor.dtype != site.dtype:
            _log.debug("%s at site %s: %s stored as %s", half, site.name, tensor.dtype, site.dtype)
        converted = tensor.detach().to(site.device, site.dtype)
        if bad := count_nonfinite(converted):
            raise NonFiniteError(
                f"adapter {name!r}: {bad} values of {half} at site {site.name} ({keys}) are not finite in {site.dtype}"
            )
        return converted

    def _write(self, slot: int, places: Mapping[Site, Place], staged: Sequence[_Staged]) -> None:
        """Writes every entry; if the device fails midway, what was written is unpublished again."""
        try:
            for item in staged:
                self._rooms[item.site].write(slot, places[item.site], item.entry, item.a_RK, item.b_RN)
        except BaseException:
            for item in staged:
                self._rooms[item.site].pool.clear(slot)
            raise
