"""Sites of a plain transformers model, found by module type: what the graph passes would hand to binding and pool."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fxlora.passes.sites import Role, Site, Skipped


@dataclass(frozen=True)
class ModelSites:
    sites: tuple[Site, ...]
    skipped: tuple[Skipped, ...]
    weights: dict[str, torch.Tensor]

    def of(self, name: str, role: Role = Role.LINEAR) -> Site:
        """The site of a role behind any alias of its module path."""
        paths = {site: {site.parameter, *site.aliases} for site in self.sites if site.role is role}
        (found,) = [site for site, names in paths.items() if f"{name}.weight" in names]
        return found


def make_site(
    name: str,
    weight: torch.Tensor,
    role: Role = Role.LINEAR,
    *,
    aliases: Sequence[str] = (),
    transposed: bool = False,
    dtype: torch.dtype | None = None,
) -> Site:
    """A site over a weight [N, K] ([K, N] if transposed, [V, N] for an embedding), with what adapters need to know."""
    out_features, in_features = weight.shape
    if transposed or role is Role.EMBEDDING:
        in_features, out_features = weight.shape
    return Site(
        name=name,
        parameter=f"{name}.weight",
        aliases=tuple(f"{alias}.weight" for alias in aliases),
        role=role,
        weight=weight,
        in_features=in_features,
        out_features=out_features,
        dtype=dtype or weight.dtype,
        device=weight.device,
    )


def sites_of(model: nn.Module, dtype: torch.dtype | None = None) -> ModelSites:
    """Every linear, Conv1D, router, embedding and head of a model; stacked expert weights are skipped with a reason."""
    weights: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    find_head: Callable[[], nn.Module | None] = getattr(model, "get_output_embeddings", lambda: None)
    head = find_head()
    sites: dict[tuple[int, Role], Site] = {}
    skipped: list[Skipped] = []
    for name, module in model.named_modules():
        for child, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3:
                skipped.append(Skipped(f"{name}.{child}", "not targeted: expert weights", ()))
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.dim() != 2:
            continue
        role = Role.EMBEDDING if isinstance(module, nn.Embedding) else Role.LOGITS if module is head else Role.LINEAR
        names = [path.removesuffix(".weight") for path, tensor in weights.items() if tensor is weight]
        site = make_site(names[0], weight, role, aliases=names[1:], transposed=isinstance(module, Conv1D), dtype=dtype)
        sites.setdefault((id(weight), role), site)
    return ModelSites(tuple(sites.values()), tuple(skipped), weights)
