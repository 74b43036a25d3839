"""`adapters=` of a call -> the slot of each request (or token), as the graph takes it.

Stage: first of a request's way, adapters= -> slots -> row maps in the graph -> ops. Everything is checked here, before
anything runs. -1 is no adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch

from fxlora.errors import BatchGranularityError, BatchSizeError, BatchTypeError, UnknownAdapterError
from fxlora.pool import AdapterPool

Adapters: TypeAlias = "str | torch.Tensor | list[Adapters] | tuple[Adapters, ...] | None"

NO_ADAPTER = -1

_SLOT_DTYPES = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


def slots_of(
    adapters: Adapters,
    pool: AdapterPool,
    *,
    request_dims: tuple[int, ...],
    sizes: tuple[int, ...],
    device: torch.device | None = None,
) -> torch.Tensor:
    """Slots of a batch, int32, of shape `sizes`, on `device` (default: the CPU, or where a given tensor is).

    adapters: one name or None for all; a list with one entry per request; for two request dims each entry may itself be
    a list, one per token. Or an int tensor of shape `sizes` that holds slots in use and -1 (costs a synchronisation if
    it is on a device). request_dims: the input dims that tell requests apart, (0,) or (0, 1); sizes: their sizes.
    Raises UnknownAdapterError, BatchSizeError, BatchTypeError, or BatchGranularityError for lists nested too deep.
    """
    if len(request_dims) != len(sizes):
        raise BatchSizeError(f"request dims {request_dims} have {len(sizes)} sizes {sizes}; expected one for each")
    slots = pool.slots
    if isinstance(adapters, torch.Tensor):
        return _checked(adapters, slots, sizes).to(device=device or adapters.device, dtype=torch.int32)
    flat = torch.tensor(_flat(adapters, slots, sizes, request_dims, "adapters"), dtype=torch.int32)
    return flat.reshape(sizes).to(device or "cpu")


def request_sizes(adapters: Adapters, dims: int) -> tuple[int, ...]:
    """The sizes for `slots_of` that `adapters` itself shows: () where one entry stands for all.

    dims: 1, or 2 where adapters may be chosen per token; requests that each have one for all their tokens then give
    (requests, 1).
    """
    if isinstance(adapters, torch.Tensor):
        return tuple(adapters.shape)
    if not isinstance(adapters, list | tuple):
        return ()
    if dims < 2:
        return (len(adapters),)
    lengths = {len(entry) for entry in adapters if isinstance(entry, list | tuple)}
    return (len(adapters), max(lengths, default=1))


def _flat(
    entry: object, slots: Mapping[str, int], sizes: tuple[int, ...], request_dims: tuple[int, ...], where: str
) -> list[int]:
    """Slots of everything under one entry, row by row; a name or None stands for all of it."""
    if entry is None or isinstance(entry, str):
        if entry is not None and entry not in slots:
            raise UnknownAdapterError(f"{where} is {entry!r}, which is not loaded; loaded: {list(slots)}")
        slot = NO_ADAPTER if entry is None else slots[entry]
        count = 1
        for size in sizes:
            count *= size
        return [slot] * count
    if not isinstance(entry, list | tuple):
        raise BatchTypeError(
            f"{where} is {entry!r} ({type(entry).__name__}); expected an adapter's name, None or a list"
        )
    if not sizes:
        raise BatchGranularityError(_too_deep(where, request_dims))
    if len(entry) != sizes[0]:
        dim = request_dims[-len(sizes)]
        raise BatchSizeError(f"{where} has {len(entry)} entries; dim {dim} of the inputs has {sizes[0]}")
    nested = (_flat(item, slots, sizes[1:], request_dims, f"{where}[{i}]") for i, item in enumerate(entry))
    return [slot for part in nested for slot in part]


def _too_deep(where: str, request_dims: tuple[int, ...]) -> str:
    if len(request_dims) == 1:
        return (
            f"{where} is a list, but this module takes one adapter per request; "
            f"apply with batch_dims=(0, 1) to choose one per token"
        )
    return f"{where} is a list, but this module takes one adapter per entry of dims {request_dims}"


def _checked(given: torch.Tensor, slots: Mapping[str, int], sizes: tuple[int, ...]) -> torch.Tensor:
    if given.dtype not in _SLOT_DTYPES:
        raise BatchTypeError(f"adapters is a tensor of {given.dtype}; expected slots as integers")
    if tuple(given.shape) != sizes:
        raise BatchSizeError(f"adapters is a tensor of shape {tuple(given.shape)}; the inputs ask for {sizes}")
    used = torch.tensor([NO_ADAPTER, *slots.values()], device=given.device)
    strange = given[~torch.isin(given.long(), used)]
    if strange.numel():
        raise UnknownAdapterError(
            f"adapters names slots {strange.unique().tolist()}, which hold no adapter; in use: {dict(slots)}"
        )
    return given
