"""What dynamo's graphs say of their inputs: weights by identity, arguments by name however the call was written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fxlora.dynamo_inputs import DynamoInputs, read_inputs
from tests.fxlora.runtime_toys import Broken, Toy

X, Y, Z = torch.randn(4, 6), torch.randn(4, 5), torch.randn(4, 5)


class Model(Toy):
    """Arguments of every kind beside a buffer, a plain tensor attribute and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.randn(5))
        self.plain, self.number = torch.randn(5), 0.5

    def forward(  # pyrefly: ignore[bad-override]
        self, x: torch.Tensor, cache: Any, mask: torch.Tensor, **extra: torch.Tensor
    ) -> torch.Tensor:
        y = super().forward(x) + self.shift + self.plain * self.number
        return y * mask + cache["layers"][0] + extra["bias"]


def read(call: Callable[[Callable[..., Any]], object], model: Any) -> list[DynamoInputs]:
    """The inputs of each graph that dynamo makes."""
    torch._dynamo.reset()
    found: list[DynamoInputs] = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        found.append(read_inputs(gm, inputs))
        return gm.forward

    call(torch.compile(model, backend=backend, dynamic=True))
    return found


MASK = torch.randn(5)
NAMES = ("x", "cache", "mask")
CALLS: dict[str, Callable[[Any], object]] = {
    "by keyword": lambda f: f(x=X, cache={"layers": [Y]}, mask=MASK, bias=Z),
    "by position": lambda f: f(X, {"layers": [Y]}, MASK, bias=Z),
    "mixed": lambda f: f(X, mask=MASK, bias=Z, cache={"layers": [Y]}),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("of", ["module", "method", "function"])
def test_arguments_have_their_names_in_the_order_of_the_forward(call: Callable[[Any], object], of: str) -> None:
    model = Model()
    target = {"module": model, "method": model.forward, "function": lambda *args, **kwargs: model(*args, **kwargs)}[of]
    (inputs,) = read(call, target)
    arguments = [inp for inp in inputs.arguments(NAMES) if inp.sizes]
    assert [inp.name.removeprefix("extra.") for inp in arguments] == ["x", "cache.layers.0", "mask", "bias"]
    assert all((inp.symbols[0] is not None) == (len(inp.sizes) > 1) or inp.name == "mask" for inp in arguments)
    bound = {id(value) for value in inputs.bound.values()}
    assert bound >= {id(model.fc.weight), id(model.shift), id(model.plain)}
    assert not bound & {id(X), id(Y), id(Z), id(MASK)}
    assert sorted(inputs.parameters.values()) == ["fc.bias", "fc.weight", "out.bias", "out.weight"]
    assert not inputs.after_break


def test_tensors_of_an_argument_that_is_a_module_are_the_callers() -> None:
    class Cache(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("keys", torch.randn(4, 5))

    class Reader(Toy):
        def forward(self, x: torch.Tensor, cache: nn.Module) -> torch.Tensor:  # pyrefly: ignore[bad-override]
            return super().forward(x) + cache.keys

    cache = Cache()
    (inputs,) = read(lambda f: f(X, cache), Reader())
    assert not any(value is cache.keys for value in inputs.bound.values())
    assert any("cache" in inp.name and "keys" in inp.name for inp in inputs.arguments(("x", "cache")))


def test_lists_of_positions_come_behind_what_has_a_batch() -> None:
    model = Toy()
    (inputs,) = read(lambda f: f(torch.arange(6.0), X), lambda positions, x: model(x + positions))
    assert [inp.name for inp in inputs.arguments(()) if inp.sizes] == ["x", "positions"]


def test_graphs_behind_a_break_say_so() -> None:
    before, behind = read(lambda f: f(X), Broken())
    assert not before.after_break
    assert behind.after_break
