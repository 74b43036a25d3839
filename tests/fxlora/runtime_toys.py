"""Small modules with runtimes, one adapter for them, and its answer by plain arithmetic."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fxlora import Runtime, attach

EAGER: Mapping[str, Any] = {"backend": "eager"}
TOLERANCE, CHANGED = 1e-5, 1e-2
Source = tuple[dict[str, Any], dict[str, torch.Tensor]]


class Toy(nn.Module):
    """Two linears, 6 -> 8 -> 5."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(F.relu(self.fc(x)))


class Broken(Toy):
    """A graph break between the two."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.relu(self.fc(x))
        torch._dynamo.graph_break()
        return self.out(hidden)


class Outer(nn.Module):
    """A broken module inside another."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = Broken(), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(x))


def adapter(path: str = "fc", k: int = 6, n: int = 8, rank: int = 2, seed: int = 0) -> Source:
    """A (config, tensors) adapter of scaling 2 for one linear."""
    generator = torch.Generator().manual_seed(seed)
    config = {"r": rank, "lora_alpha": 2 * rank, "peft_type": "LORA", "target_modules": [path]}
    key = f"base_model.model.{path}"
    return config, {
        f"{key}.lora_A.weight": torch.randn(rank, k, generator=generator),
        f"{key}.lora_B.weight": torch.randn(n, rank, generator=generator),
    }


@torch.no_grad()
def expected(
    model: nn.Module, x: torch.Tensor, names: Sequence[str | None], sources: Mapping[str, Source]
) -> torch.Tensor:
    """Every request alone, on a base whose weight has the adapter's product added."""
    rows = []
    for i, name in enumerate(names):
        merged = copy.deepcopy(model)
        if name is not None:
            a_RK, b_NR = sources[name][1].values()
            path = next(iter(sources[name][1])).removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            merged.get_submodule(path).weight += 2 * b_NR @ a_RK
        rows.append(merged(x[i : i + 1]))
    return torch.cat(rows)


def check(compiled: Any, runtime: Runtime, model: nn.Module, x: torch.Tensor, sources: Mapping[str, Source]) -> None:
    """A batch that names each adapter and none in turn is right request by request, and each adapter matters."""
    names = [[*sources, None][i % (len(sources) + 1)] for i in range(len(x))]
    with runtime.batch(names):
        got = compiled(x)
    want, base = expected(model, x, names, sources), model(x).detach()
    assert (got - want).abs().max() < TOLERANCE * want.abs().max()
    for i, name in enumerate(names):
        assert name is None or (want - base)[i].abs().max() > CHANGED
    assert torch.equal(compiled(x), base), "outside of a batch there is no adapter"


def attached(model: nn.Module, sources: Mapping[str, Source] | None = None, **options: Any) -> Runtime:
    """A runtime for a toy, with adapters."""
    runtime = attach(model, **{"max_adapters": 3, "max_rank": 4, **options})
    for name, source in (sources or {}).items():
        runtime.load_adapter(name, source)
    return runtime


def compiled_by(backend: Any, model: Any, **options: Any) -> Any:
    """torch.compile with the eager inner compiler."""
    return torch.compile(model, backend=backend, options=dict(EAGER), **options)
