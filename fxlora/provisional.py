"""Sites as one adapter sees them, before any graph has shown the real ones: each 2-D weight in the roles its keys ask
for.

Stage: beside binding, only until a model's first compiled graph. Names, shapes and ranks can be checked against them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fxlora.adapter import Adapter
from fxlora.adapter_keys import group_keys
from fxlora.passes.sites import Role, Site, module_name
from fxlora.passes.weights import tensor_key


def provisional_sites(adapter: Adapter, weights: Mapping[str, torch.Tensor]) -> list[Site]:
    """A site for each weight of two dims (two, where the adapter has keys of both kinds for it).

    weights: every path of every Parameter. Which dim of a linear's weight is K is read off the adapter's A.
    """
    embedding: set[str] = set()
    in_features: dict[str, int] = {}
    for key in group_keys(adapter.tensors)[0]:
        paths = [f"{module}.weight" for module in key.modules]
        if key.embedding:
            embedding.update(paths)
        elif key.a and (a_RK := adapter.tensors[key.a]).dim() == 2:
            in_features |= dict.fromkeys(paths, a_RK.shape[1])
    named: dict[Any, list[str]] = {}
    for path, weight in weights.items():
        named.setdefault(tensor_key(weight), []).append(path)
    sites = []
    for paths in named.values():
        weight = weights[paths[0]]
        if weight.dim() != 2:
            continue
        as_embedding = bool(embedding & set(paths))
        asked = [in_features[path] for path in paths if path in in_features]
        if as_embedding:
            sites.append(_site(paths, weight, Role.EMBEDDING, tuple(weight.shape)))
        if asked or not as_embedding:
            stored_KN = bool(asked) and asked[0] == weight.shape[0] != weight.shape[1]
            sites.append(_site(paths, weight, Role.LINEAR, tuple(weight.shape if stored_KN else weight.shape[::-1])))
    return sites


def _site(paths: list[str], weight: torch.Tensor, role: Role, sizes: tuple[int, ...]) -> Site:
    return Site(
        name=module_name(paths[0]),
        parameter=paths[0],
        aliases=tuple(paths[1:]),
        role=role,
        weight=weight,
        in_features=sizes[0],
        out_features=sizes[1],
        dtype=weight.dtype,
        device=weight.device,
    )
