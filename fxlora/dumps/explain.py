"""Which adapter the rows of one request get at every site, and the chain of ops that proved it, as text."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from fxlora.batch import slots_of
from fxlora.dumps.record import Record
from fxlora.dumps.tree import fold_names
from fxlora.errors import BatchSizeError, BatchTypeError
from fxlora.passes.sites import Site

if TYPE_CHECKING:
    from fxlora.pool import AdapterPool, Placement


def explain(record: Record, row: int | tuple[int, ...] | None, adapters: Any, request_dims: int) -> str:
    """The text of `LoraModule.explain`."""
    pool = record.pool
    assert pool is not None
    where = _where(row, request_dims)
    sizes = _sizes(adapters, request_dims, where)
    if any(not 0 <= i < n for i, n in zip(where, sizes, strict=False)) or len(where) > request_dims:
        raise BatchSizeError(f"row {row} is outside of a batch of {list(sizes)} requests")
    slots = slots_of(adapters, pool, request_dims=tuple(range(request_dims)), sizes=sizes)
    names = {slot: name for name, slot in pool.slots.items()}
    chosen = [where] if where else [(i,) for i in range(sizes[0])]
    lines = []
    for index in chosen:
        found = sorted(set(slots[index].flatten().tolist()))
        for slot in found:
            lines += _request(record, pool, index, slot, names.get(slot))
    return "\n".join(lines + _skipped(record)) + "\n"


def _where(row: Any, request_dims: int) -> tuple[int, ...]:
    """The request, and perhaps the token, that `row` names."""
    where = () if row is None else tuple(row) if isinstance(row, list | tuple) else (row,)
    try:
        return tuple(map(operator.index, where))
    except TypeError:
        wanted = "the number of a request" + (", or (request, token)" if request_dims > 1 else "")
        adapter = "; the adapters of the batch are named by adapters=" if isinstance(row, str) else ""
        raise BatchTypeError(f"row is {row!r}; expected {wanted}, or None for every request{adapter}") from None


def _sizes(adapters: Any, request_dims: int, where: tuple[int, ...]) -> tuple[int, ...]:
    """The batch that `adapters` is for; one name for all, or None, is for as many requests as `row` asks for."""
    if hasattr(adapters, "shape"):
        return tuple(adapters.shape)
    sizes: list[int] = []
    level = adapters
    for d in range(request_dims):
        if isinstance(level, list | tuple):
            sizes.append(len(level))
            level = next((item for item in level if isinstance(item, list | tuple)), None)
        else:
            sizes.append(where[d] + 1 if d < len(where) else 1)
    return tuple(sizes)


def _request(record: Record, pool: AdapterPool, index: tuple[int, ...], slot: int, name: str | None) -> list[str]:
    request = ", token ".join(map(str, index))
    places = pool.placements(name) if name is not None else {}
    words = f"adapter {name!r}, slot {slot}" if name is not None else f"no adapter, slot {slot}: the base model alone"
    lines = [f"request {request}: {words}"]
    for rows, number in record.row_maps().items():
        lines.append(f"  {_map(number, rows)}")
        sites = list(dict.fromkeys(use.site for use in record.uses if use.rows is rows))
        lines += [f"    {line}" for line in _folded((site, _adds(places, site)) for site in sites)]
    return lines


def _map(number: int, rows: Any) -> str:
    return f"rows {number}: {' -> '.join(rows.chain())}"


def _adds(places: Mapping[Site, Placement], site: Site) -> str:
    place = places.get(site)
    return f"{site.role.value}: " + (f"rank {place.rank}, scaling {place.scaling:g}" if place else "adds nothing here")


def _folded(items: Iterable[tuple[Site, str]]) -> list[str]:
    """A line for the sites that differ in the numbers of their names alone."""
    groups: dict[tuple[str, str], list[str]] = {}
    for site, words in items:
        groups.setdefault((re.sub(r"\d+", "#", site.name), words), []).append(site.name)
    return [f"{_name(names)}, {words}" for (_, words), names in groups.items()]


def _name(names: list[str]) -> str:
    return fold_names(names) + (f" ({len(names)} sites)" if len(names) > 1 else "")


def _skipped(record: Record) -> list[str]:
    if not record.skipped:
        return []
    groups: dict[tuple[str, str], list[str]] = {}
    for item in record.skipped:
        key = (re.sub(r"\d+", "#", item.name), re.sub(r"\d+", "#", item.reason))
        groups.setdefault(key, []).append(item.name)
    reasons = {item.name: item.reason for item in record.skipped}
    return ["no site", *(f"  {fold_names(names)}: {reasons[names[0]]}" for names in groups.values())]
