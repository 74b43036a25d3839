"""In-place views become views: every node has one shape, and what is known by another name stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

import fxlora
from fxlora.passes.graph import op_name
from fxlora.passes.inplace_views import functional_views
from tests.passes.build import traced
from tests.toys.base import make_adapter, merged

Body = Callable[[nn.Linear, torch.Tensor], torch.Tensor]


class Model(nn.Module):
    def __init__(self, body: Body) -> None:
        super().__init__()
        self.proj, self.body = nn.Linear(6, 6), body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self.proj, x)


def unsqueezed(proj: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    mask = (x[..., 0] > 0).float()
    mask.unsqueeze_(-1)
    return proj(x * mask)


def chosen(proj: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    mask = torch.where(x[..., 0] > 0, 1, 0)  # numbers, which only a fake mode takes beside fake tensors
    mask[:, 0] = False
    mask.unsqueeze_(2)
    return proj(x * mask)


def turned(proj: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y.transpose_(1, 2).unsqueeze_(0)
    y.squeeze_(0)
    return proj(y.mT)


def seen_before(proj: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    y = x + 1
    rows = y[:, 0]
    y.transpose_(1, 2)
    return proj(rows[:, None] + y.mT)


@pytest.mark.parametrize("body", [unsqueezed, chosen, turned, seen_before])
@torch.no_grad()
def test_a_mixed_batch_is_served(body: Body) -> None:
    torch.manual_seed(0)
    model, x = Model(body).requires_grad_(False), torch.randn(3, 5, 6)
    adapter = make_adapter(model, ["proj"], 2, 11)
    lora = fxlora.apply(fxlora.capture(model, x), max_adapters=1, max_rank=4)
    lora.load_adapter("a", adapter)
    got, plain = lora(x, adapters=["a", None, "a"]), model(x)
    assert torch.allclose(got[1], plain[1], atol=1e-5)
    assert torch.allclose(got[::2], merged(model, adapter)(x)[::2], atol=1e-5)
    assert not torch.allclose(got[0], plain[0], atol=1e-3)


@pytest.mark.parametrize(
    ("body", "left"),
    [
        (lambda x: (x + 1).unsqueeze_(1), []),
        (lambda x: torch.ops.aten.transpose_.default(x + 1, 0, 1), []),
        (lambda x: x.unsqueeze_(1), ["unsqueeze_"]),
        (lambda x: known_twice(x + 1), ["t_"]),
        (lambda x: x.float().unsqueeze_(1), ["unsqueeze_"]),
    ],
    ids=["a result", "aten", "an input", "by two names", "perhaps an input"],
)
def test_what_is_replaced(body: Any, left: list[str]) -> None:
    gm, x = traced(body), torch.randn(3, 3)
    expected = body(x.clone())
    functional_views(gm)
    gm.recompile()
    assert torch.equal(gm(x.clone()), expected)
    assert [op_name(node) for node in gm.graph.nodes if op_name(node).endswith("_")] == left


def known_twice(y: Any) -> Any:
    same = y.contiguous()
    y.t_()
    return same + y.exp()


def test_shapes_are_those_before_and_after() -> None:
    gm: fx.GraphModule = fxlora.capture(Model(unsqueezed), torch.randn(3, 5, 6))
    assert functional_views(gm) == 1
    made = next(node for node in gm.graph.nodes if op_name(node) == "unsqueeze")
    assert [made.all_input_nodes[0].meta["example_value"].dim(), made.meta["example_value"].dim()] == [2, 3]
