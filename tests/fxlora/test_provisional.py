"""Sites that one adapter's keys ask for, before a graph has shown the real ones."""

from __future__ import annotations

import torch
from torch import nn

from fxlora.adapter import read_adapter
from fxlora.passes.sites import Role
from fxlora.provisional import provisional_sites


class Tied(nn.Module):
    """A tied table, a weight stored [K, N], and one that no adapter names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.conv = nn.Module()
        self.conv.weight = nn.Parameter(torch.randn(6, 9))
        self.other = nn.Linear(6, 8)


def test_roles_and_orientation_follow_the_keys() -> None:
    model = Tied()
    names = dict(model.named_parameters(remove_duplicate=False))
    tensors = {
        "base_model.model.embed.lora_embedding_A": torch.randn(2, 11),
        "base_model.model.embed.lora_embedding_B": torch.randn(6, 2),
        "base_model.model.head.lora_A.weight": torch.randn(2, 6),
        "base_model.model.head.lora_B.weight": torch.randn(11, 2),
        "base_model.model.conv.lora_A.weight": torch.randn(2, 6),
        "base_model.model.conv.lora_B.weight": torch.randn(9, 2),
    }
    config = {"r": 2, "lora_alpha": 4, "peft_type": "LORA", "target_modules": ["embed", "head", "conv"]}
    with read_adapter((config, tensors)) as adapter:
        sites = provisional_sites(adapter, names)
    found = {(site.parameter, site.role): (site.in_features, site.out_features) for site in sites}
    assert found == {
        ("embed.weight", Role.EMBEDDING): (11, 6),
        ("embed.weight", Role.LINEAR): (6, 11),
        ("conv.weight", Role.LINEAR): (6, 9),
        ("other.weight", Role.LINEAR): (6, 8),
    }
    assert all(site.aliases == ("head.weight",) for site in sites if site.parameter == "embed.weight")
    assert all(site.weight is names[site.parameter] for site in sites)
