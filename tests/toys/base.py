"""Toys for the row prover: a module around one target linear `proj`, its inputs, and what is true of its rows.

The verdict of a toy is never an opinion: `is_independent` decides it by numerics. A toy is a function of (self, x) that
the decorator turns into an nn.Module; `self` offers `proj` (the target, H -> N), the untargeted layers beside it, and
constant index buffers over the batch. Shape letters: B requests, T tokens, H features, N features after `proj`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import nn

Inputs = dict[str, torch.Tensor]
Adapter = tuple[dict[str, Any], dict[str, torch.Tensor]]
DRAWS = 3


@dataclass(frozen=True)
class Sizes:
    """The dims of one toy run; N is always H + 3."""

    batch: int
    tokens: int
    features: int


DISTINCT, SQUARE, SINGLE = Sizes(4, 5, 6), Sizes(5, 5, 5), Sizes(1, 5, 6)


class Verdict(str, Enum):
    """What must happen when an adapter targets `proj`."""

    ROWS = "rows"  # accepted, and every request gets its own adapter
    MIXED = "mixed"  # refused: rows at the site depend on several requests
    SHARED = "shared"  # refused: rows at the site belong to no request
    REPORTED = "reported"  # rows at the site are clean, an output mixes requests: refused or reported


class ToyModule(nn.Module):
    """What every toy may use. Only `proj` is ever targeted."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        h, n = sizes.features, sizes.features + 3
        self.proj = nn.Linear(h, n)
        self.back = nn.Linear(n, h)
        self.query = nn.Linear(h, h)
        self.key = nn.Linear(h, h)
        self.router = nn.Linear(h, 4)
        self.norm = nn.LayerNorm(h)
        self.batch_norm = nn.BatchNorm1d(h)
        self.conv = nn.Conv1d(h, h, 3, padding=1)
        self.table = nn.Embedding(13, h)
        self.position = nn.Parameter(torch.randn(sizes.tokens, h))
        self.experts = nn.Parameter(torch.randn(4, n, n) / math.sqrt(n))
        order = torch.arange(sizes.batch).roll(1)
        self.register_buffer("perm", order)
        self.register_buffer("inverse", order.argsort())
        self.register_buffer("mix", torch.randn(sizes.batch, sizes.batch))


Forward = Callable[..., Any]


@dataclass(frozen=True)
class Toy:
    """A toy with its verdict. batch_dims names the request dim of each input that carries requests.

    output_dim is the request dim of every output tensor; alone is False where a batch of one cannot run (constant
    permutations of the batch); traceable is False where torch.fx.symbolic_trace cannot follow the Python; since is the
    torch whose dynamo can.
    """

    name: str
    forward: Forward
    verdict: Verdict
    inputs_of: Callable[[Sizes, torch.Generator], Inputs]
    batch_dims: Mapping[str, int] = field(default_factory=lambda: {"x": 0})
    output_dim: int = 0
    alone: bool = True
    traceable: bool = True
    since: str = "2.11"
    train: bool = False
    sizes: Sequence[Sizes] = (DISTINCT, SQUARE)

    def module(self, sizes: Sizes = DISTINCT) -> nn.Module:
        """A fresh module, the same weights at every call."""
        with torch.random.fork_rng():
            torch.manual_seed(3)
            made: nn.Module = type(self.name, (ToyModule,), {"forward": self.forward})(sizes)
        return made.train(self.train).requires_grad_(False)

    def inputs(self, sizes: Sizes = DISTINCT, seed: int = 0) -> Inputs:
        """Seeded inputs by name of the forward's parameter, in its order."""
        return self.inputs_of(sizes, torch.Generator().manual_seed(seed))

    def of_request(self, inputs: Inputs, index: int) -> Inputs:
        """The inputs of one request alone: a batch of one; inputs without a request dim stay whole."""
        return {
            name: value.narrow(self.batch_dims[name], index, 1) if name in self.batch_dims else value
            for name, value in inputs.items()
        }

    def rows_of(self, output: Any, index: int) -> list[torch.Tensor]:
        """The part of each output tensor that belongs to one request."""
        return [value.narrow(self.output_dim, index, 1) for value in flat(output) if value.dim() > self.output_dim]


def plain(sizes: Sizes, generator: torch.Generator) -> Inputs:
    """One input x, fp32 [B, T, H]."""
    return {"x": torch.randn(sizes.batch, sizes.tokens, sizes.features, generator=generator)}


def flat(output: Any) -> list[torch.Tensor]:
    """Every tensor of an output, in order."""
    if isinstance(output, torch.Tensor):
        return [output]
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return [tensor for value in values for tensor in flat(value)]


def register(toys: list[Toy], verdict: Verdict, **facts: Any) -> Callable[[Forward], Forward]:
    """Decorator: add a toy with this forward to the list. facts are fields of Toy."""

    def add(forward: Forward) -> Forward:
        toys.append(Toy(forward.__name__, forward, verdict, **{"inputs_of": plain, **facts}))
        return forward

    return add


def make_adapter(module: nn.Module, paths: Sequence[str], rank: int, seed: int, rslora: bool = False) -> Adapter:
    """A PEFT adapter in memory (config, tensors) over the named linears and embeddings; A and B are random.

    A module with a true attribute `in_by_out` keeps its weight as [in, out], as GPT-2's Conv1D does.
    """
    generator, alpha = torch.Generator().manual_seed(seed), rank + 1
    tensors: dict[str, torch.Tensor] = {}
    for path in paths:
        weight = module.get_parameter(f"{path}.weight")
        key = f"base_model.model.{path}"
        rows, columns = weight.shape
        if isinstance(module.get_submodule(path), nn.Embedding):
            tensors[f"{key}.lora_embedding_A"] = torch.randn(rank, rows, generator=generator)
            tensors[f"{key}.lora_embedding_B"] = torch.randn(columns, rank, generator=generator) / 2
            continue
        if getattr(module.get_submodule(path), "in_by_out", False):
            rows, columns = columns, rows
        tensors[f"{key}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) / math.sqrt(columns)
        tensors[f"{key}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) / 2
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": rslora,
        "target_modules": list(paths),
        "bias": "none",
        "fan_in_fan_out": False,
    }
    return config, tensors


def scaling_of(config: Mapping[str, Any]) -> float:
    """PEFT's scaling: alpha / r, or alpha / sqrt(r) with rsLoRA."""
    rank = config["r"]
    return config["lora_alpha"] / (math.sqrt(rank) if config["use_rslora"] else rank)


@torch.no_grad()
def merged(module: nn.Module, adapter: Adapter | None) -> nn.Module:
    """A copy of the module with the adapter added into its weights: the answer when all rows use this adapter."""
    made = copy.deepcopy(module)
    config, tensors = adapter if adapter is not None else ({}, {})
    for key, first in tensors.items():
        if key.endswith("lora_A.weight"):
            path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            delta = tensors[key.replace("lora_A", "lora_B")] @ first
            delta = delta.T if getattr(made.get_submodule(path), "in_by_out", False) else delta
        elif key.endswith("lora_embedding_A"):
            path = key.removeprefix("base_model.model.").removesuffix(".lora_embedding_A")
            delta = (tensors[key.replace("embedding_A", "embedding_B")] @ first).T
        else:
            continue
        made.get_parameter(f"{path}.weight").add_(scaling_of(config) * delta)
    return made


def adapters_for(module: nn.Module, paths: Sequence[str] = ("proj",)) -> dict[str, Adapter]:
    """Two adapters of different rank over the same paths; the second uses rsLoRA."""
    return {"a": make_adapter(module, paths, 2, 11), "b": make_adapter(module, paths, 5, 12, rslora=True)}


def worst(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> float:
    """Largest max |got - want| / max(1, max |want|) over paired tensors; infinite where shapes differ."""
    errors = [0.0]
    for left, right in zip(got, want, strict=True):
        if left.shape != right.shape or not torch.equal(left.isfinite(), right.isfinite()):
            return math.inf
        left, right = (value.double().nan_to_num(0.0, 0.0, 0.0) for value in (left, right))
        if left.numel():
            errors.append(float((left - right).abs().max() / right.abs().max().clamp_min(1.0)))
    return max(errors)


@torch.no_grad()
def is_independent(toy: Toy, sizes: Sizes = DISTINCT, tolerance: float = 1e-5) -> bool:
    """Whether every request's output is a function of that request alone, by numerics, with and without adapters.

    Request j's inputs are redrawn and all other rows of the output must stay; where the toy can run on a batch of one,
    each request alone must also give its own rows.
    """
    base = toy.module(sizes)
    inputs = toy.inputs(sizes)
    for adapter in (None, *adapters_for(base).values()):
        module = merged(base, adapter)
        whole = copy.deepcopy(module)(**clone(inputs))
        for other in range(sizes.batch):
            for draw in range(1, DRAWS + 1):
                moved = copy.deepcopy(module)(**redrawn(toy, sizes, inputs, other, draw))
                for index in range(sizes.batch):
                    if index != other and worst(toy.rows_of(moved, index), toy.rows_of(whole, index)) > tolerance:
                        return False
            if toy.alone:
                alone = copy.deepcopy(module)(**clone(toy.of_request(inputs, other)))
                if worst(toy.rows_of(alone, 0), toy.rows_of(whole, other)) > tolerance:
                    return False
        scalars = [value for value in flat(whole) if value.dim() <= toy.output_dim]
        if scalars:
            return False
    return True


def clone(inputs: Inputs) -> Inputs:
    """A copy of every input, for toys that write in place."""
    return {name: value.clone() for name, value in inputs.items()}


def redrawn(toy: Toy, sizes: Sizes, inputs: Inputs, index: int, draw: int) -> Inputs:
    """The inputs with one request replaced by another random one."""
    fresh, changed = toy.inputs(sizes, seed=100 * draw + index), clone(inputs)
    for name, dim in toy.batch_dims.items():
        changed[name].narrow(dim, index, 1).copy_(fresh[name].narrow(dim, index, 1))
    return changed
