"""What a dump says of an adapter: where it landed, how large its deltas are, and what found no place.

Norms come from Gram matrices: ||B^T A||_F^2 = sum over r, s of <a_r, a_s> <b_r, b_s>, so no delta is ever made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from fxlora.adapter import Adapter, AdapterSource, read_adapter
from fxlora.binding import BoundAdapter
from fxlora.errors import AdapterError, Unbound, UnboundTensorError, UnknownAdapterError
from fxlora.passes.sites import Site
from fxlora.passes.weights import tensor_key
from fxlora.pool import AdapterPool

Bind = Callable[[Adapter], BoundAdapter]


@dataclass(frozen=True)
class Place:
    """One adapter at one site. start, rows: its extent in the pool_rows of the site; None where it is not loaded.

    delta_norm: ||scaling B A||_F. weight_norm: ||W||_F of the base weight; None where it holds no values.
    """

    rank: int
    scaling: float
    delta_norm: float | None = None
    weight_norm: float | None = None
    start: int | None = None
    rows: int | None = None
    pool_rows: int | None = None

    @property
    def ratio(self) -> float | None:
        """||dW|| / ||W||."""
        return self.delta_norm / self.weight_norm if self.delta_norm is not None and self.weight_norm else None


@dataclass(frozen=True, eq=False)
class AdapterView:
    """One adapter, loaded (it has a slot) or only tried: then `unbound` has what found no site, `error` any other."""

    name: str
    slot: int | None = None
    origin: str = ""
    places: Mapping[Site, Place] = field(default_factory=dict)
    unbound: Sequence[Unbound] = ()
    error: str = ""

    @property
    def binds(self) -> bool:
        return not self.unbound and not self.error


def loaded_views(pool: AdapterPool | None, norm: Norms, names: Sequence[str] | None = None) -> list[AdapterView]:
    """The loaded adapters, or those named. Raises UnknownAdapterError."""
    if pool is None:
        return []
    views = []
    for name in pool.names if names is None else names:
        places = {
            site: Place(
                rank=p.rank,
                scaling=p.scaling,
                delta_norm=delta_norm(site, p.a_rows, p.b_rows, p.rank, p.scaling),
                weight_norm=norm(site.weight),
                start=p.start,
                rows=p.rows,
                pool_rows=p.pool_rows,
            )
            for site, p in pool.placements(name).items()
        }
        views.append(AdapterView(name, pool.slot_of(name), "", places))
    return views


def tried_view(source: AdapterSource, bind: Bind, norm: Norms) -> AdapterView:
    """An adapter that is bound for its view alone: nothing is loaded, and what does not bind is part of the view."""
    origin = Path(source).name if isinstance(source, str | Path) else "(config, tensors)"
    try:
        with read_adapter(source) as adapter:
            places = {
                site: Place(e.rank, e.scaling, delta_norm(site, e.a_RK, e.b_RN, e.rank, e.scaling), norm(site.weight))
                for site, e in bind(adapter).entries.items()
            }
    except UnboundTensorError as error:
        return AdapterView(origin, None, origin, unbound=error.unbound)
    except AdapterError as error:
        return AdapterView(origin, None, origin, error=f"{type(error).__name__}: {error}")
    return AdapterView(origin, None, origin, places)


def choose_views(chosen: Any, pool: AdapterPool | None, bind: Bind) -> list[AdapterView]:
    """The views that `adapter=` asks for: None every loaded one, a loaded name that one, else a source to try.

    bind: finds the sites of an adapter. Raises UnknownAdapterError for a string that is neither a loaded name nor a
    folder.
    """
    norm = Norms()
    if chosen is None:
        return loaded_views(pool, norm)
    views = []
    for item in chosen if isinstance(chosen, list) else [chosen]:
        if pool is not None and isinstance(item, str) and item in pool.names:
            views += loaded_views(pool, norm, [item])
        elif isinstance(item, str) and not Path(item).exists():
            known = list(pool.names) if pool is not None else []
            raise UnknownAdapterError(f"adapter={item!r} is neither loaded nor a folder; loaded: {known}")
        else:
            views.append(tried_view(item, bind, norm))
    return views


def delta_norm(site: Site, a_rows: torch.Tensor, b_rows: torch.Tensor, rank: int, scaling: float) -> float:
    """||scaling B A||_F in fp64 from Gram matrices, over all parts of a weight.

    a_rows: [parts * R, K], b_rows: [parts * R, N]; a weight of three dims has its first dim's size of parts, and R rows
    alone are those of every part.
    """
    parts = site.weight.shape[0] if site.weight.dim() == 3 else 1
    a, b = (rows.detach().double().unflatten(0, (-1, rank)) for rows in (a_rows, b_rows))
    squared = (a @ a.mT) * (b @ b.mT)
    total = float(squared.sum()) * parts / len(squared)
    return abs(scaling) * math.sqrt(max(total, 0.0))


class Norms:
    """||W||_F of base weights, each computed once; None where a weight holds no values (meta, fake)."""

    def __init__(self) -> None:
        self._known: dict[Any, float | None] = {}

    def __call__(self, weight: torch.Tensor) -> float | None:
        key = tensor_key(weight)
        if key not in self._known:
            empty = weight.device.type == "meta" or not weight.numel() or isinstance(weight, FakeTensor)
            self._known[key] = None if empty else _norm(weight.detach())
        return self._known[key]


def _norm(weight: torch.Tensor) -> float:
    """||W||_F; fp64 would be slow on the many values of half-precision models, and say no more of them."""
    dtype = torch.float64 if weight.dtype in (torch.float32, torch.float64) else torch.float32
    return float(torch.linalg.vector_norm(weight, dtype=dtype))
