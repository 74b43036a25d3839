"""Opaque calls to the ops they are made of: the same answers at other sizes, or left as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from fxlora.passes.decompose import decompose_calls, opaque_calls
from fxlora.passes.normalize import inline_modules
from fxlora.passes.rows.seeds import choose_seeds
from fxlora.passes.rows.worlds import TensorFacts, World, size_worlds
from tests.passes.build import holder, inputs_of, traced


def opened(model: nn.Module, *examples: torch.Tensor, batch: int = 1) -> tuple[fx.GraphModule, int]:
    """The graph with its opaque calls opened, and how many were."""
    gm = traced(model)
    inline_modules(gm)
    inputs = inputs_of(gm, *examples)
    world = size_worlds(gm, inputs, choose_seeds(inputs, batch)[0], {}).worlds[0]
    count = decompose_calls(gm, world)
    gm.graph.lint()
    gm.recompile()
    return gm, count


def attention(pick: bool = True) -> nn.Module:
    """Packed multi-head attention over x [T, B, 6]."""

    def first(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.attn(x, x, x)[0] + 1

    def whole(self: Any, x: torch.Tensor) -> Any:
        return self.attn(x, x, x)

    return holder(first if pick else whole, attn=nn.MultiheadAttention(6, 2)).requires_grad_(False)


def test_packed_attention_is_opened_and_right_at_every_size() -> None:
    model = attention()
    gm, count = opened(model, torch.randn(5, 4, 6))
    assert count == 1
    assert opaque_calls(gm) == []
    assert {str(n.target) for n in gm.graph.nodes if n.op == "get_attr"} >= {"attn.in_proj_weight"}
    for tokens, batch in ((5, 4), (1, 2), (8, 3)):
        x = torch.randn(tokens, batch, 6)
        assert torch.allclose(gm(x), model(x), atol=1e-5)


class Deciding(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


class LeafTracer(fx.Tracer):
    """Keeps every module below the root as one call."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def test_what_data_decides_stays_opaque() -> None:
    model = holder(lambda self, x: self.inner(x), inner=Deciding())
    gm = fx.GraphModule(model, LeafTracer().trace(model))
    x = next(iter(gm.graph.nodes))
    world = World(values={x: TensorFacts((3, 4), torch.float32, torch.device("cpu"))})
    assert decompose_calls(gm, world) == 0
    assert [n.target for n in opaque_calls(gm)] == ["inner"]


def test_calls_that_nobody_reads_are_left_alone() -> None:
    def body(self: Any, x: torch.Tensor) -> torch.Tensor:
        self.inner(x)
        return x + 1

    model = holder(body, inner=Deciding())
    assert opaque_calls(fx.GraphModule(model, LeafTracer().trace(model))) == []


def test_a_result_passed_on_whole_is_kept_whole() -> None:
    model = attention(pick=False)
    gm, _ = opened(model, torch.randn(5, 4, 6))
    x = torch.randn(5, 4, 6)
    for got, want in zip(gm(x), model(x), strict=True):
        assert torch.allclose(got, want, atol=1e-5)


def test_batch_first_attention_is_opened() -> None:
    model = holder(lambda self, x: self.attn(x, x, x)[0], attn=nn.MultiheadAttention(6, 2, batch_first=True))
    assert opened(model, torch.randn(4, 5, 6), batch=0)[1] == 1
