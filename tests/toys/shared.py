"""Modules that share weights: a router gate on two paths, a gate of two layers, one block used thrice, and look-alikes.

Shape letters: B requests, T tokens, H features, E experts.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.toys.base import Inputs

H, E = 10, 4


class Runner(nn.Module):
    """Runs the experts of its owner and holds the owner's gate under a second path."""

    def __init__(self, gate: nn.Linear) -> None:
        super().__init__()
        self.gate = gate


class Moe(nn.Module):
    """A mixture whose gate is `gate` and `runner.gate`; path says which of them the forward calls: either or both."""

    def __init__(self, path: str, gate: nn.Linear | None = None) -> None:
        super().__init__()
        self.path = path
        self.gate = gate if gate is not None else nn.Linear(H, E, bias=False)
        self.runner = Runner(self.gate)
        self.experts = nn.Parameter(torch.randn(E, H, H) / H**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.path == "gate":
            scores = self.gate(x)
        elif self.path == "runner":
            scores = self.runner.gate(x)
        else:
            scores = self.gate(x) + self.runner.gate(x.tanh())
        served = torch.einsum("bth,ehi->btei", x, self.experts)
        return x + (served * scores.softmax(-1).unsqueeze(-1)).sum(2)


class Model(nn.Module):
    """One mixture between two linears; x fp32 [B, T, H] -> [B, T, H + 3]."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.start, self.moe, self.end = nn.Linear(H, H), Moe(path), nn.Linear(H, H + 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.end(self.moe(self.start(x)))


class TwoLayers(nn.Module):
    """Two mixtures over one gate."""

    def __init__(self) -> None:
        super().__init__()
        first = Moe("gate")
        self.layers = nn.ModuleList([first, Moe("runner", first.gate)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class OneBlockThrice(nn.Module):
    """ALBERT's way: one block, called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(H, H + 5), nn.Linear(H + 5, H)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = x + self.down(self.up(x).tanh())
        return x


class BothWays(nn.Module):
    """One square weight read plainly and transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.square, self.end = nn.Linear(H, H, bias=False), nn.Linear(H, H + 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.end(F.linear(x, self.square.weight).tanh() @ self.square.weight)


class MissingLayer(nn.Identity):
    """Stands where another pipeline stage holds the layer."""


class Pipeline(nn.Module):
    """The first of two stages: layer 1 and the head are elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(H, H), MissingLayer(), nn.Linear(H, H)])
        self.head = MissingLayer()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return self.head(x)


class UnusedGate(nn.Module):
    """A block that keeps a gate it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.gate = nn.Linear(H, H + 3), nn.Linear(H, E)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


def built(make: type[nn.Module], *arguments: object) -> nn.Module:
    """The module, the same weights at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(29)
        return make(*arguments).eval().requires_grad_(False)


def rows(batch: int = 4, tokens: int = 5, seed: int = 0) -> Inputs:
    return {"x": torch.randn(batch, tokens, H, generator=torch.Generator().manual_seed(seed))}
