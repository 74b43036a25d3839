"""Where each pair of an adapter's keys goes: the sites of a model by every name of their weights.

Stage: part of binding. A site is found through the tensor behind a name, so any alias of a weight will do, and through
the role its key asks for. Key rules: `fxlora/adapter_keys.py`; layouts of expert weights: `fxlora/expert_binding.py`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch

from fxlora.adapter import Adapter
from fxlora.adapter_keys import LoraKey, clean_path
from fxlora.expert_binding import Part, features_of, find_part, parts_of
from fxlora.passes.sites import Role, Site, Skipped
from fxlora.passes.weights import tensor_key

_NEAREST_LOOKUPS_MAX = 32
# What PEFT adapts of a module that it is told to: the weight, or q, k and v of packed attention.
_MODULE_WEIGHTS = ("weight", "in_proj_weight")
_NUMBERED = re.compile(r"(.*)\.(\d+)\.(\w+)\.weight")


@dataclass(eq=False)
class Target:
    """One base tensor: the sites that read it, and why other reads of it have none."""

    weight: torch.Tensor | None
    sites: list[Site] = field(default_factory=list)
    skips: list[str] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Place:
    """Where a pair of keys goes, and the path by which PEFT's patterns see it.

    wrapped: `target_parameters` names the weight. expert, part: whose matrix of an expert weight is meant; None: all.
    times: how often PEFT adds the pair. past: where the weight is read without the module that the key names.
    """

    site: Site
    pattern_path: str
    wrapped: bool = False
    expert: int | None = None
    part: Part | None = None
    times: int = 1
    past: str = ""


@dataclass(frozen=True, eq=False)
class Spread:
    """Where a pair for all experts goes that this model keeps as linears: those of each expert, in order of N."""

    linears: tuple[tuple[Site, ...], ...]
    pattern_path: str


class Index:
    """Parameter paths of a model, and what is known of the tensor behind each; aliases share one target."""

    def __init__(self, sites: Sequence[Site], skipped: Sequence[Skipped], weights: Mapping[str, torch.Tensor]) -> None:
        by_key: dict[Any, Target] = {}
        self._by_path: dict[str, Target] = {}
        self._children: dict[str, list[str]] = {}
        self._numbered: dict[str, dict[int, dict[str, str]]] = {}
        for name, weight in weights.items():
            path = clean_path(name)
            self._by_path[path] = by_key.setdefault(tensor_key(weight), Target(weight))
            self._children.setdefault(path.rpartition(".")[0], []).append(path)
            if numbered := _NUMBERED.fullmatch(path):
                owner, number, leaf = numbered.groups()
                self._numbered.setdefault(owner, {}).setdefault(int(number), {})[leaf] = path
        for site in sites:
            target = by_key.setdefault(tensor_key(site.weight), Target(site.weight))
            target.sites.append(site)
            for name in (site.parameter, *site.aliases):
                self._by_path.setdefault(clean_path(name), target)
        for skip in skipped:
            for target in self._targets_of(skip):
                target.skips.append(skip.reason)
        self._modules = sorted({path.removesuffix(".weight") for path, target in self._by_path.items() if target.sites})
        self._lookups_left = _NEAREST_LOOKUPS_MAX

    def unknown(self) -> str:
        """What to say of a name that the model does not have."""
        words, own = "no weight of this name", next(iter(self._by_path), "")
        if not own or any("." in path for path in self._by_path):
            return words
        return f"{words}, for this graph made up its own, as {own}: give `apply` the module it was traced from, model="

    def first(self, paths: Sequence[str]) -> Target | None:
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
            for name in _MODULE_WEIGHTS:
                path = f"{module}.{name}"
                if path in self._by_path and not key.nesting:
                    return path, module, False
            if module in self._by_path and not key.nesting:
                return module, module, False  # a weight that no module holds under `weight` goes by its own path
        return None

    def attention_around(self, key: LoraKey) -> str | None:
        """The module of packed attention whose output a key belongs to, where PEFT wrapped the two together."""
        packed = f"{key.owner}.in_proj_weight" in self._by_path
        return key.owner if packed and key.modules[0] == f"{key.owner}.out_proj" else None

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
                    return weights[found[0]], expert, found[1], key.modules[0]
        return None

    def linears_of(self, key: LoraKey, wrapped: Sequence[str]) -> list[tuple[str, list[list[str]]]]:
        """For a key of a parameter that this model keeps as one module per expert: each parameter that may be meant,
        with the weights that together are it, expert by expert.
        """
        found = []
        for module in () if key.embedding else key.modules:
            named = [name.rpartition(".")[2] for name in wrapped]
            meant = [(module, leaf) for leaf in named if any(_is_suffix(n, f"{module}.{leaf}") for n in wrapped)]
            owner, _, last = module.rpartition(".")
            for holder, leaf in [*meant, *([] if key.nesting else [(owner, last)])]:
                experts = self._numbered.get(holder, {})
                paths = [parts_of(leaf, experts.get(e, {})) for e in range(len(experts))]
                if paths and all(paths):
                    found.append((f"{holder}.{leaf}", paths))
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

    def _targets_of(self, skip: Skipped) -> list[Target]:
        paths = [clean_path(name) for name in (skip.name, *skip.aliases)]
        known = {id(target): target for path in paths if (target := self._by_path.get(path))}
        if not known:
            target = Target(None)
            for path in paths:
                self._by_path[path] = target
                self._children.setdefault(path.rpartition(".")[0], []).append(path)
            return [target]
        return list(known.values())


def _is_suffix(name: str, path: str) -> bool:
    return path == name or path.endswith(f".{name}")


def find_place(index: Index, key: LoraKey, adapter: Adapter) -> Place | Spread | str:
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
        return "; ".join(skips) if skips else index.unknown()
    path, pattern_path, was_wrapped = found
    target = index.first((path,))
    assert target is not None
    roles = (Role.EMBEDDING,) if key.embedding else (Role.LINEAR, Role.LOGITS, Role.EXPERTS)
    fitting = [site for site in target.sites if site.role in roles]
    if was_wrapped and fitting and (len(target.sites) > 1 or target.skips):
        return f"target_parameters names {path}, which is read in more than one role, so the role meant is unknown"
    if len(fitting) == 1 and (attention := index.attention_around(key)):
        # PEFT merges this pair by `lora.MultiheadAttention.merge` and by its own layer's: what was trained is the sum.
        return Place(fitting[0], attention, times=2)
    if len(fitting) == 1 and fitting[0].not_the_module and not was_wrapped:
        return fitting[0].not_the_module
    if len(fitting) == 1:
        past = {clean_path(name): reason for name, reason in fitting[0].past_the_module.items()}
        return Place(fitting[0], pattern_path, was_wrapped, past="" if was_wrapped else past.get(path, ""))
    if fitting:
        return f"{path} is read as {' and as '.join(site.role.value for site in fitting)}: the role meant is unknown"
    asked = " or ".join(role.value for role in roles)
    others = [f"{path} is read as {site.role.value}, the key asks for {asked}" for site in target.sites]
    return "; ".join(target.skips + others) or f"{path} is not read by the graph"


def _place_matrix(index: Index, path: str, expert: int | None, part: Part | None, pattern_path: str) -> Place | str:
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
    return Place(site, pattern_path, expert=expert, part=part)


def _place_spread(index: Index, key: LoraKey, adapter: Adapter) -> Spread | str | None:
    """The linears of all experts for a parameter that other versions of the model keep in one."""
    candidates = index.linears_of(key, adapter.config.target_parameters)
    if not candidates or not (key.a and key.b):
        return None
    pair, fitting, skips = (adapter.tensors[key.a], adapter.tensors[key.b]), [], []
    for pattern_path, paths in candidates:
        targets = [[index.first((path,)) for path in expert] for expert in paths]
        sites = [[s for t in expert if t for s in t.sites if s.role is Role.LINEAR] for expert in targets]
        if any(len(expert) != len(names) for expert, names in zip(sites, paths, strict=True)):
            skips += [reason for expert in targets for target in expert if target for reason in target.skips]
            continue
        rank = adapter.config.rank_of(pattern_path)
        width, inner = sum(site.out_features for site in sites[0]), {site.in_features for site in sites[0]}
        found = features_of(pair, len(sites), rank)
        if found is not None and inner == {found[0]} and found[1] == width:
            fitting.append(Spread(tuple(map(tuple, sites)), pattern_path))
    if len(fitting) == 1:
        return fitting[0]
    names = [path for path, _ in candidates]
    if fitting:
        return f"shapes do not tell which of {names} is meant"
    return "; ".join(dict.fromkeys(skips)) or f"the experts' linears do not have the shapes of any of {names}"
