"""Models with little or no attention: delta rules that solve systems of equations, state spaces that are scanned."""

from __future__ import annotations

import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import fx, nn

import fxlora
from tests.models import GROUPED, VOCAB, causal
from tests.oracle import Oracle, make_adapter

SIZES = {
    **GROUPED,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 0,
    "mlp_only_layers": [0, 1],
}
LINEAR = ("in_proj_qkvz", "in_proj_ba", "out_proj")


@pytest.mark.skipif(not hasattr(transformers, "Qwen3NextForCausalLM"), reason="this transformers has no Qwen3-Next")
def test_a_mixed_batch_equals_peft(tmp_path: Path) -> None:
    entry = causal("qwen3next", "Qwen3Next", SIZES)
    targets = [*LINEAR, *entry.attention, *entry.mlp, *entry.head]
    adapters = {
        name: make_adapter(
            entry.build, peft.LoraConfig(r=rank, lora_alpha=3, target_modules=targets), tmp_path / name, seed=rank
        )
        for name, rank in (("a", 2), ("b", 5))
    }
    lora = fxlora.apply(fxlora.capture(entry.build(), **entry.inputs()), max_adapters=2, max_rank=8)
    for name, folder in adapters.items():
        lora.load_adapter(name, folder)
    names, inputs = ["a", None, "b", "a"], entry.inputs(batch=4, seed=3)
    with torch.no_grad():
        Oracle(entry.build, adapters).check(lora(**inputs, adapters=names), inputs, names)


def test_state_spaces_scanned_under_compile(tmp_path: Path) -> None:
    """Mamba's associative scan is a vmap of an elementwise function in the graph of torch.compile on a CPU."""
    torch._dynamo.reset()
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 4}
    entry = causal("mamba", "Mamba", {**sizes, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2})
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["in_proj", "x_proj"])
    adapters = {name: make_adapter(entry.build, config, tmp_path / name, seed=i) for i, name in enumerate("ab")}
    served: Any = fxlora.compile(entry.build(), max_adapters=2, max_rank=4, backend="eager")
    for name, folder in adapters.items():
        served.load_adapter(name, folder)
    names, inputs = ["a", None, "b", "a"], entry.inputs(batch=4, seed=3)
    with torch.no_grad():
        Oracle(entry.build, adapters).check(served(**inputs, adapters=names), inputs, names)


class Mapped(nn.Module):
    """A linear over x [B, T, H], and what `body` makes of x before it."""

    def __init__(self, body: Callable[[nn.Linear, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.proj = nn.Linear(6, 6)
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self.proj, x)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda proj, x: proj(torch.vmap(lambda row: row.exp() * row, in_dims=1, out_dims=1)(x)), ""),
        (lambda proj, x: proj(torch.vmap(lambda row: row.exp() * row)(x)), ""),
        (lambda proj, x: proj(torch.vmap(lambda row: row.softmax(0))(x)), "vmap along the request dim"),
        (lambda proj, x: proj(torch.vmap(lambda row: row.softmax(0), in_dims=1, out_dims=1)(x)), "softmax inside vmap"),
        (lambda proj, x: torch.vmap(proj, in_dims=1, out_dims=1)(x), "computed inside torch.vmap"),
    ],
    ids=["elementwise", "over requests", "other ops over requests", "over the batch inside", "the linear inside"],
)
def test_what_vmap_may_do(body: Any, reason: str) -> None:
    torch._dynamo.reset()
    served: Any = fxlora.compile(Mapped(body), max_adapters=2, max_rank=4, backend="eager")
    a, b = torch.randn(2, 6), torch.randn(6, 2)
    keys = ("base_model.model.proj.lora_A.weight", "base_model.model.proj.lora_B.weight")
    served.load_adapter(
        "a",
        (
            {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["proj"]},
            dict(zip(keys, (a, b), strict=True)),
        ),
    )
    x = torch.randn(3, 5, 6)
    if reason:
        with pytest.raises(fxlora.FxloraError, match=reason):
            served(x, adapters=["a", None, "a"])
        return
    mine = served.proj(x.exp() * x)
    want = mine + torch.tensor([1.0, 0.0, 1.0])[:, None, None] * ((x.exp() * x) @ a.T @ b.T)
    assert torch.allclose(served(x, adapters=["a", None, "a"]), want, atol=1e-4)


@pytest.mark.parametrize(("dim", "combine", "reason"), [
    (1, operator.add, ""), (0, operator.add, "along the request dim"), (1, torch.matmul, "other than elementwise"),
])  # fmt: skip
def test_a_scan_that_is_one_node(dim: int, combine: Any, reason: str) -> None:
    """As the graph of torch.compile has it on a GPU."""
    from torch._higher_order_ops.associative_scan import associative_scan_op

    body = fx.Graph()
    body.output((body.call_function(combine, (body.placeholder("left"), body.placeholder("right"))),))
    root = nn.Module()
    root.proj, root.body = nn.Linear(6, 6), fx.GraphModule(nn.Module(), body)
    graph = fx.Graph(root)
    x = graph.placeholder("x")
    leaf = graph.call_method("transpose", (x, 0, dim))
    scanned = graph.call_function(associative_scan_op, (graph.get_attr("body"), [leaf], ()))
    back = graph.call_method("transpose", (graph.call_function(operator.getitem, (scanned, 0)), 0, dim))
    weight, bias = graph.get_attr("proj.weight"), graph.get_attr("proj.bias")
    graph.output(graph.call_function(nn.functional.linear, (back, weight, bias)))
    lora = fxlora.apply(fx.GraphModule(root, graph), max_adapters=2, max_rank=4, example_inputs=(torch.randn(3, 5, 6),))
    if reason:
        assert [reason in skip.reason for skip in lora.skipped] == [True]
    else:
        assert [site.name for site in lora.sites] == ["proj"]
