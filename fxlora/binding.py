"""Binding an adapter to the sites of a graph; total: every tensor lands exactly once, or an error lists the rest.

Stage: second of an adapter's way, Adapter x sites -> BoundAdapter -> pool. A site is found through the tensor behind a
name, so any alias of a weight will do, and through the role its key asks for: lora_embedding_A/B the embedding,
lora_A/B the linear or the logits. Key rules: `fxlora/adapter_keys.py`.

Letters: K in-features (V, the vocabulary, for an embedding), N out-features, R rank.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch

from fxlora.adapter import Adapter
from fxlora.adapter_config import AdapterConfig
from fxlora.adapter_keys import LoraKey, clean_path, group_keys
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
from fxlora.expert_binding import Part, Piece, compose, find_part, make_piece, parts_of, split_experts
from fxlora.passes.sites import Role, Site, Skipped
from fxlora.passes.weights import tensor_key

_log = logging.getLogger(__name__)

_NEAREST_LOOKUPS_MAX = 32
_COMPARED_ROWS = 4096
_NUMBERED = re.compile(r"(.*)\.(\d+)\.(\w+)\.weight")


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
    adapter: Adapter, sites: Sequence[Site], skipped: Sequence[Skipped], weights: Mapping[str, torch.Tensor]
) -> BoundAdapter:
    """Finds the site of every adapter tensor and checks shape, rank and values. Reads each tensor once.

    weights: every parameter path of the model, all aliases, in registration order, -> the base tensor itself.
    Raises UnboundTensorError (all tensors without a site), IncompletePairError, AdapterShapeError, RankError,
    UnsupportedAdapterError (convolutions), ConflictingEntriesError, BaseWeightMismatchError, AdapterDtypeError,
    NonFiniteError or AdapterFormatError. The rank limit is checked by the pool.
    """
    index = _Index(sites, skipped, weights)
    lora, plain = group_keys(adapter.tensors)
    places = [_place(index, key, adapter) for key in lora]
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


@dataclass(eq=False)
class _Target:
    """One base tensor: the sites that read it, and why other reads of it have none."""

    weight: torch.Tensor | None
    sites: list[Site] = field(default_factory=list)
    skips: list[str] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class _Place:
    """Where a pair of keys goes, and the path by which PEFT's patterns see it.

    wrapped: `target_parameters` names the weight. expert, part: whose matrix of an expert weight is meant, None for all.
    """

    site: Site
    pattern_path: str
    wrapped: bool = False
    expert: int | None = None
    part: Part | None = None


@dataclass(frozen=True, eq=False)
class _Spread:
    """Where a pair for all experts goes that this model keeps as linears: for each expert its linears, in order of N."""

    linears: tuple[tuple[Site, ...], ...]
    pattern_path: str


class _Index:
    """Parameter paths of a model, and what is known of the tensor behind each; aliases share one target."""

    def __init__(self, sites: Sequence[Site], skipped: Sequence[Skipped], weights: Mapping[str, torch.Tensor]) -> None:
        by_key: dict[Any, _Target] = {}
        self._by_path: dict[str, _Target] = {}
        self._children: dict[str, list[str]] = {}
        self._numbered: dict[str, dict[int, dict[str, str]]] = {}
        for name, weight in weights.items():
            path = clean_path(name)
            self._by_path[path] = by_key.setdefault(tensor_key(weight), _Target(weight))
            self._children.setdefault(path.rpartition(".")[0], []).append(path)
            if numbered := _NUMBERED.fullmatch(path):
                owner, number, leaf = numbered.groups()
                self._numbered.setdefault(owner, {}).setdefault(int(number), {})[leaf] = path
        for site in sites:
            target = by_key.setdefault(tensor_key(site.weight), _Target(site.weight))
            target.sites.append(site)
            for name in (site.parameter, *site.aliases):
                self._by_path.setdefault(clean_path(name), target)
        for skip in skipped:
            for target in self._targets_of(skip):
                target.skips.append(skip.reason)
        self._modules = sorted({path.removesuffix(".weight") for path, target in self._by_path.items() if target.sites})
        self._lookups_left = _NEAREST_LOOKUPS_MAX

    def first(self, paths: Sequence[str]) -> _Target | None:
        """The target of the first of these parameter paths that exists."""
        return next((self._by_path[path] for path in paths if path in self._by_path), None)

    def parameter_of(self, key: LoraKey, wrapped: Sequence[str]) -> tuple[str, str, bool] | None:
        """(parameter path, pattern path, whether `target_parameters` wrapped it) of a key's module, if it exists.

        PEFT wraps a module's targeted parameters in order of registration, each around the last: the outermost has
        nesting 0. It sees a wrapped parameter by its own path, a targeted module by the module's.
        """
        for module in key.modules:
            children = self._children.get(module, [])
            targeted = [path for path in children if any(_is_suffix(name, path) for name in wrapped)]
            if targeted and not key.embedding and key.nesting < len(targeted):
                path = targeted[len(targeted) - 1 - key.nesting]
                return path, path, True
            path = f"{module}.weight"
            if path in self._by_path and not key.nesting:
                return path, module, False
            if module in self._by_path and not key.nesting:
                return module, module, False  # a weight that no module holds under `weight` goes by its own path
        return None

    def matrix_of(self, key: LoraKey) -> tuple[str, int | None, Part | None, str] | None:
        """(path of an expert weight, expert, part, pattern path) for a key of one expert's or one part's matrix."""
        for module in () if key.nesting or key.embedding else key.modules:
            parent, _, leaf = module.rpartition(".")
            owner, _, number = parent.rpartition(".")
            holders: list[tuple[str, int | None]] = [(owner, int(number))] if number.isdigit() else []
            for holder, expert in [*holders, (parent, None)]:
                weights = {
                    path.rpartition(".")[2]: path for path in self._children.get(holder, []) if self._is_3d(path)
                }
                if found := find_part(leaf, weights):
                    return weights[found[0]], expert, found[1], module
        return None

    def linears_of(self, key: LoraKey, wrapped: Sequence[str]) -> list[tuple[str, list[list[str]]]]:
        """For a key of a parameter that this model keeps as one module per expert: each parameter that may be meant,
        with the weights that together are it, expert by expert.
        """
        found = []
        for module in () if key.embedding else key.modules:
            experts = self._numbered.get(module, {})
            leaves = [name.rpartition(".")[2] for name in wrapped]
            for leaf in leaves if sorted(experts) == list(range(len(experts))) and experts else ():
                if not any(_is_suffix(name, f"{module}.{leaf}") for name in wrapped):
                    continue
                paths = [parts_of(leaf, experts[e]) for e in range(len(experts))]
                if all(paths):
                    found.append((f"{module}.{leaf}", paths))
        return found

    def _is_3d(self, path: str) -> bool:
        weight = self._by_path[path].weight
        return weight is not None and weight.dim() == 3

    def skips_at(self, modules: Sequence[str]) -> list[str]:
        """Reasons given for the weights of these modules, or for a module that they are or lie in."""
        paths = [path for module in modules for path in self._children.get(module, [])]
        for module in modules:
            paths += accumulate(module.split("."), "{}.{}".format)
        targets = [self._by_path[path] for path in paths if path in self._by_path]
        return list(dict.fromkeys(reason for target in targets for reason in target.skips))

    def nearest(self, module: str) -> str | None:
        """The closest module path that has a site; for the first few asked only, as the search is slow."""
        if self._lookups_left <= 0:
            return None
        self._lookups_left -= 1
        return next(iter(difflib.get_close_matches(module, self._modules, n=1)), None)

    def _targets_of(self, skip: Skipped) -> list[_Target]:
        paths = [clean_path(name) for name in (skip.name, *skip.aliases)]
        known = {id(target): target for path in paths if (target := self._by_path.get(path))}
        if not known:
            target = _Target(None)
            for path in paths:
                self._by_path[path] = target
                self._children.setdefault(path.rpartition(".")[0], []).append(path)
            return [target]
        return list(known.values())


def _is_suffix(name: str, path: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _place(index: _Index, key: LoraKey, adapter: Adapter) -> _Place | _Spread | str:
    """Where a key goes, or the reason why nowhere."""
    config = adapter.config
    found = index.parameter_of(key, config.target_parameters)
    if found is None:
        inside = index.matrix_of(key)
        if inside is not None:
            return _place_matrix(index, *inside)
        spread = _place_spread(index, key, adapter)
        if spread is not None:
            return spread
        skips = index.skips_at(key.modules)
        return "; ".join(skips) if skips else "no weight of this name"
    path, pattern_path, was_wrapped = found
    target = index.first((path,))
    assert target is not None
    roles = (Role.EMBEDDING,) if key.embedding else (Role.LINEAR, Role.LOGITS, Role.EXPERTS)
    fitting = [site for site in target.sites if site.role in roles]
    if was_wrapped and fitting and (len(target.sites) > 1 or target.skips):
        return f"target_parameters names {path}, which is read in more than one role, so the role meant is unknown"
    if len(fitting) == 1:
        return _Place(fitting[0], pattern_path, was_wrapped)
    if fitting:
        return f"{path} is read as {' and as '.join(site.role.value for site in fitting)}: the role meant is unknown"
    asked = " or ".join(role.value for role in roles)
    others = [f"{path} is read as {site.role.value}, the key asks for {asked}" for site in target.sites]
    return "; ".join(target.skips + others) or f"{path} is not read by the graph"


def _place_matrix(index: _Index, path: str, expert: int | None, part: Part | None, pattern_path: str) -> _Place | str:
    """The place of one expert's, or one part's, matrix within an expert weight."""
    target = index.first((path,))
    assert target is not None
    site = next((site for site in target.sites if site.role is Role.EXPERTS), None)
    if site is None:
        return "; ".join(target.skips) or f"{path} is not read by the graph"
    if expert is not None and expert >= site.num_experts:
        return f"{path} has {site.num_experts} experts, numbered from 0"
    if part is not None and (site.packing is None or site.packing.count != part.count):
        return f"{path} is not seen to be taken apart into {part.count} matrices, so which columns are meant is unknown"
    return _Place(site, pattern_path, expert=expert, part=part)


def _place_spread(index: _Index, key: LoraKey, adapter: Adapter) -> _Spread | str | None:
    """The linears of all experts for a parameter that other versions of the model keep in one."""
    candidates = index.linears_of(key, adapter.config.target_parameters)
    if not candidates or not (key.a and key.b):
        return None
    shapes, fitting, skips = (adapter.tensors[key.a].shape, adapter.tensors[key.b].shape), [], []
    for pattern_path, paths in candidates:
        targets = [[index.first((path,)) for path in expert] for expert in paths]
        sites = [[s for t in expert if t for s in t.sites if s.role is Role.LINEAR] for expert in targets]
        if any(len(expert) != len(names) for expert, names in zip(sites, paths, strict=True)):
            skips += [reason for expert in targets for target in expert if target for reason in target.skips]
            continue
        rank = adapter.config.rank_of(pattern_path)
        width, inner = sum(site.out_features for site in sites[0]), {site.in_features for site in sites[0]}
        if inner == {shapes[0][-1]} and shapes[1][0] == width and shapes[0][0] in (rank, rank * len(sites)):
            fitting.append(_Spread(tuple(map(tuple, sites)), pattern_path))
    if len(fitting) == 1:
        return fitting[0]
    names = [path for path, _ in candidates]
    if fitting:
        return f"shapes do not tell which of {names} is meant"
    return "; ".join(dict.fromkeys(skips)) or f"the experts' linears do not have the shapes of any of {names}"


def _unplaced(index: _Index, key: LoraKey, place: _Place | _Spread | str) -> list[Unbound]:
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


def _make_entries(adapter: Adapter, placed: Sequence[tuple[LoraKey, _Place | _Spread | str]]) -> dict[Site, Entry]:
    """One entry for each site; what goes to several places of an expert weight is put together."""
    entries: dict[Site, Entry] = {}
    pieces: dict[Site, list[Piece]] = {}
    for key, place in placed:
        if isinstance(place, _Spread):
            for site, entry in _spread(adapter, key, place):
                _add_entry(entries, site, entry)
            continue
        assert isinstance(place, _Place)
        if not place.site.num_experts:
            _add_entry(entries, place.site, _make_entry(adapter, key, place))
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
    return entries | {site: compose(site, found) for site, found in pieces.items()}


def _spread(adapter: Adapter, key: LoraKey, place: _Spread) -> Iterator[tuple[Site, Entry]]:
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


def _make_entry(adapter: Adapter, key: LoraKey, place: _Place) -> Entry:
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
    return Entry(a_RK, b_NR.t(), adapter.config.scaling_of(place.pattern_path), rank, key.names)


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


def _check_base_copy(key: str, copy: torch.Tensor, target: _Target) -> None:
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
