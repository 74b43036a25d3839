"""Binding an adapter to the sites of a graph; total: every tensor lands exactly once, or an error lists the rest.

Stage: second of an adapter's way, Adapter x sites -> BoundAdapter -> pool. A site is found through the tensor behind a
name, so any alias of a weight will do, and through the role its key asks for: lora_embedding_A/B the embedding,
lora_A/B the linear or the logits. Key rules: `fxlora/adapter_keys.py`.

Letters: K in-features (V, the vocabulary, for an embedding), N out-features, R rank.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from fxlora.adapter import Adapter
from fxlora.adapter_config import AdapterConfig
from fxlora.adapter_keys import LoraKey, group_keys
from fxlora.entries import Entry
from fxlora.errors import (
    AdapterFormatError,
    AdapterShapeError,
    BaseWeightMismatchError,
    ConflictingEntriesError,
    IncompletePairError,
    RankError,
    Unbound,
    UnboundTensorError,
    UnsupportedAdapterError,
)
from fxlora.expert_binding import Piece, compose, make_piece, split_experts
from fxlora.passes.sites import Site, Skipped
from fxlora.places import Index, Place, Spread, Target, find_place
from fxlora.renames import Rename

_log = logging.getLogger(__name__)

_COMPARED_ROWS = 4096


@dataclass(frozen=True, eq=False)
class BoundAdapter:
    """An adapter whose every tensor has its place: entries by site, and the base-weight copies found equal.

    The tensors may map the adapter's file: drop this once the pool has them.
    """

    origin: str
    config: AdapterConfig
    entries: Mapping[Site, Entry]
    base_copies: tuple[str, ...] = ()


def bind_adapter(
    adapter: Adapter,
    sites: Sequence[Site],
    skipped: Sequence[Skipped],
    weights: Mapping[str, torch.Tensor],
    rename: Rename | None = None,
) -> BoundAdapter:
    """Finds the site of every adapter tensor and checks shape, rank and values. Reads each tensor once.

    weights: every parameter path of the model, all aliases, in registration order, -> the base tensor itself.
    rename: today's name of a module under its name in an earlier version of the model.
    Raises UnboundTensorError (all tensors without a site), IncompletePairError, AdapterShapeError, RankError,
    UnsupportedAdapterError (convolutions), ConflictingEntriesError, BaseWeightMismatchError, AdapterDtypeError,
    NonFiniteError or AdapterFormatError. The rank limit is checked by the pool.
    """
    index = Index(sites, skipped, weights)
    lora, plain = group_keys(adapter.tensors)
    if rename is not None:
        lora = [replace(key, modules=tuple(dict.fromkeys((*key.modules, *map(rename, key.modules))))) for key in lora]
    places = [find_place(index, key, adapter) for key in lora]
    copies = [(key, index.first(key.paths)) for key in plain]
    unbound = [item for key, place in zip(lora, places, strict=True) for item in _unplaced(index, key, place)]
    unbound += [Unbound(key.key, key.reason) for key, target in copies if target is None]
    if unbound:
        raise UnboundTensorError(tuple(unbound), bound=len(adapter.tensors) - len(unbound))
    _require_pairs(lora)
    if not lora:
        raise AdapterFormatError(
            f"adapter {adapter.origin} holds no LoRA tensors; it holds {list(adapter.tensors)[:5]}"
        )
    entries = _make_entries(adapter, [(key, place) for key, place in zip(lora, places, strict=True)])
    for copy, target in copies:
        assert target is not None
        _check_base_copy(copy.key, adapter.tensors[copy.key], target)
    _log.debug("bound adapter %s: %d sites, %d copies of base weights", adapter.origin, len(entries), len(copies))
    return BoundAdapter(adapter.origin, adapter.config, entries, tuple(copy.key for copy, _ in copies))


def _unplaced(index: Index, key: LoraKey, place: Place | Spread | str) -> list[Unbound]:
    if not isinstance(place, str):
        return []
    nearest = index.nearest(key.modules[0])
    nearest = None if nearest in key.modules else nearest
    return [Unbound(name, place, nearest) for name in key.names]


def _require_pairs(keys: Sequence[LoraKey]) -> None:
    single = [
        f"{key.names[0]} has no {'lora_embedding_' if key.embedding else 'lora_'}{'B' if key.a else 'A'} beside it"
        for key in keys
        if not (key.a and key.b)
    ]
    if single:
        raise IncompletePairError(f"{len(single)} LoRA pairs are incomplete: " + "; ".join(single))


def _make_entries(adapter: Adapter, placed: Sequence[tuple[LoraKey, Place | Spread | str]]) -> dict[Site, Entry]:
    """One entry for each site; what goes to several places of an expert weight is put together."""
    entries: dict[Site, Entry] = {}
    idle: list[tuple[Site, Entry]] = []  # zero, of modules that are never called
    pieces: dict[Site, list[Piece]] = {}
    for key, place in placed:
        if isinstance(place, Spread):
            for site, entry in _spread(adapter, key, place):
                _add_entry(entries, site, entry)
            continue
        assert isinstance(place, Place)
        if not place.site.num_experts:
            entry = _make_entry(adapter, key, place)
            if place.past:
                idle.append((place.site, entry))
            else:
                _add_entry(entries, place.site, entry)
            continue
        piece = make_piece(
            place.site,
            (adapter.tensors[key.a], adapter.tensors[key.b]),
            keys=key.names,
            rank=adapter.config.rank_of(place.pattern_path),
            scaling=adapter.config.scaling_of(place.pattern_path),
            expert=place.expert,
            part=place.part,
            wrapped=place.wrapped,
        )
        pieces.setdefault(place.site, []).append(piece)
    for site, entry in idle:
        other = entries.get(site)
        entries[site] = entry if other is None else replace(other, keys=other.keys + entry.keys)
    return entries | {site: compose(site, found) for site, found in pieces.items()}


def _spread(adapter: Adapter, key: LoraKey, place: Spread) -> Iterator[tuple[Site, Entry]]:
    """The entries of a pair for all experts at each expert's own linears."""
    config, path = adapter.config, place.pattern_path
    rank, scaling = config.rank_of(path), config.scaling_of(path)
    pair = (adapter.tensors[key.a], adapter.tensors[key.b])
    for expert, (a_RK, b_RN) in enumerate(split_experts(pair, len(place.linears), rank, key.names)):
        start = 0
        for site in place.linears[expert]:
            end = start + site.out_features
            yield site, Entry(a_RK, b_RN[:, start:end], scaling, rank, key.names)
            start = end


def _make_entry(adapter: Adapter, key: LoraKey, place: Place) -> Entry:
    a_RK, b_NR = adapter.tensors[key.a], adapter.tensors[key.b]
    site, rank = place.site, adapter.config.rank_of(place.pattern_path)
    if place.wrapped and site.stored_KN and a_RK.dim() == b_NR.dim() == 2:
        a_RK, b_NR = b_NR.t(), a_RK.t()  # PEFT takes any 2-D parameter for [out, in]
    shapes = f"{key.a} is {list(a_RK.shape)} and {key.b} is {list(b_NR.shape)}"
    if a_RK.dim() > 2 or b_NR.dim() > 2:
        raise UnsupportedAdapterError(f"{shapes}: LoRA of convolutions is not served; expected two dims each")
    if a_RK.dim() < 2 or b_NR.dim() < 2 or 0 in a_RK.shape + b_NR.shape:
        raise AdapterShapeError(f"{shapes}: incomplete, as when sharded parameters were not gathered before saving")
    if a_RK.shape[1] != site.in_features or b_NR.shape != (site.out_features, a_RK.shape[0]):
        expected = f"A [R, {site.in_features}] and B [{site.out_features}, R]"
        raise AdapterShapeError(f"{shapes}; {site.role.value} site {site.name} takes {expected}")
    if a_RK.shape[0] != rank:
        raise RankError(f"{shapes}, so rank {a_RK.shape[0]}, but the config gives {place.pattern_path} rank {rank}")
    if place.past and bool(b_NR.any()):
        raise UnsupportedAdapterError(
            f"{place.past}, so PEFT's layer there changes nothing, whatever it holds; {key.b} is not zero, "
            "so it was trained otherwise"
        )
    scaling = place.times * adapter.config.scaling_of(place.pattern_path)
    return Entry(a_RK, b_NR.t(), scaling, rank, key.names)


def _add_entry(entries: dict[Site, Entry], site: Site, entry: Entry) -> None:
    other = entries.get(site)
    if other is None:
        entries[site] = entry
        return
    equal = (
        entry.scaling == other.scaling and _same_values(entry.a_RK, other.a_RK) and _same_values(entry.b_RN, other.b_RN)
    )
    if not equal:
        raise ConflictingEntriesError(
            f"{other.keys} and {entry.keys} name one weight ({site.parameter}, also {list(site.aliases)}) and differ "
            f"in values or scaling ({other.scaling} and {entry.scaling}); keep one of the two"
        )
    entries[site] = Entry(other.a_RK, other.b_RN, other.scaling, other.rank, other.keys + entry.keys)


def _same_values(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and bool((one == other.to(one.device)).all())


def _check_base_copy(key: str, copy: torch.Tensor, target: Target) -> None:
    """The copy must be the base weight in the coarser of the two dtypes; compared by blocks of rows on its device."""
    base = target.weight
    if base is None:
        raise BaseWeightMismatchError(f"{key} copies a base weight that is not at hand to compare: {target.skips}")
    if copy.shape != base.shape:
        raise BaseWeightMismatchError(f"{key} is {list(copy.shape)}, the base weight of this model {list(base.shape)}")
    dtype = base.dtype if base.dtype.itemsize <= copy.dtype.itemsize else copy.dtype
    differences = []
    for copy_rows, base_rows in zip(copy.split(_COMPARED_ROWS), base.detach().split(_COMPARED_ROWS), strict=True):
        ours, theirs = base_rows.to(dtype), copy_rows.to(base.device, dtype)
        if not torch.equal(ours, theirs):
            differences.append(float((ours.double() - theirs.double()).abs().max()))
    if differences:
        raise BaseWeightMismatchError(
            f"{key} is a full copy of a base weight and differs from this model's by up to {max(differences):.3g}: "
            f"the adapter was trained on another base, or the weight itself was trained, which is not served"
        )
