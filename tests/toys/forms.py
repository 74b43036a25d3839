"""One model with every spelling of a linear, and every way torch turns it into a graph.

Shape letters: B requests, T tokens, K and N features, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import fxlora
from tests.toys.base import Inputs, clone

V, K, N, E = 23, 12, 10, 5
BATCH, LENGTH = 4, 7


class Weight(nn.Module):
    """A bare weight whose owner spells the product; in_by_out keeps it as [in, out]."""

    def __init__(self, columns: int, rows: int, in_by_out: bool = False) -> None:
        super().__init__()
        self.in_by_out = in_by_out
        shape = (columns, rows) if in_by_out else (rows, columns)
        self.weight = nn.Parameter(torch.randn(shape) / math.sqrt(columns))
        self.bias = nn.Parameter(torch.randn(rows) / 10)


class Runner(nn.Module):
    """Holds the gate under a second path."""

    def __init__(self, gate: nn.Linear) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gate(x).softmax(-1)


class EverySpelling(nn.Module):
    """Embedding, tied head, a gate on two paths, a linear in each spelling; ids int64 [B, T] -> logits [B, T, V]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, K)
        self.module = nn.Linear(K, N)
        self.functional = Weight(N, K)
        self.transposed = Weight(K, N)
        self.product = Weight(N, K)
        self.conv = Weight(K, N, in_by_out=True)
        self.right = Weight(N, K, in_by_out=True)
        self.summed = Weight(K, K)
        self.gate = nn.Linear(K, E, bias=False)
        self.runner = Runner(self.gate)
        self.head = nn.Linear(K, V, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = x + F.linear(self.module(x).tanh(), self.functional.weight, self.functional.bias)
        x = x + torch.matmul((x @ self.transposed.weight.T).tanh(), self.product.weight.t())
        flat = torch.addmm(self.conv.bias, x.reshape(-1, K), self.conv.weight).tanh()
        x = x + (flat @ self.right.weight).view(ids.shape[0], ids.shape[1], K)
        x = x + torch.einsum("bti,oi->bto", x, self.summed.weight).tanh()
        x = x * self.gate(x).sigmoid().mean(-1, keepdim=True) * (1 + self.runner(x)[..., :1])
        return self.head(x)


PATHS = ("embed", "module", "functional", "transposed", "product", "conv", "right", "summed", "gate", "head")


def every_spelling() -> EverySpelling:
    """The model, the same weights at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(17)
        return EverySpelling().eval().requires_grad_(False)


def ids(batch: int = BATCH, length: int = LENGTH, seed: int = 0) -> Inputs:
    return {"ids": torch.randint(0, V, (batch, length), generator=torch.Generator().manual_seed(seed))}


def exported(model: nn.Module, inputs: Inputs) -> torch.export.ExportedProgram:
    """torch.export with the request dim dynamic."""
    dims = {name: {0: torch.export.Dim("requests", min=2)} for name in inputs}
    return torch.export.export(model, (), clone(inputs), dynamic_shapes=dims)


def dynamo(model: nn.Module, inputs: Inputs) -> fx.GraphModule:
    """dynamo's whole-graph capture for export."""
    from torch._dynamo.functional_export import dynamo_graph_capture_for_export

    return dynamo_graph_capture_for_export(model)(**clone(inputs))


def proxied(model: nn.Module, inputs: Inputs, pre_dispatch: bool) -> fx.GraphModule:
    """make_fx over the model as a function of its ids; parameters become get_attr constants."""

    def run(ids: torch.Tensor) -> torch.Tensor:
        return model(ids=ids)

    return make_fx(run, pre_dispatch=pre_dispatch, _allow_non_fake_inputs=True)(*clone(inputs).values())


Form = Callable[[nn.Module, Inputs], fx.GraphModule]
FORMS: Mapping[str, Form] = {
    "symbolic_trace": lambda model, inputs: fx.symbolic_trace(model),
    "export": lambda model, inputs: exported(model, inputs).module(),
    "export_decomposed": lambda model, inputs: exported(model, inputs).run_decompositions().module(),
    "dynamo": dynamo,
    "make_fx": lambda model, inputs: proxied(model, inputs, pre_dispatch=False),
    "make_fx_pre_dispatch": lambda model, inputs: proxied(model, inputs, pre_dispatch=True),
    "capture": lambda model, inputs: fxlora.capture(model, **clone(inputs)),
}
