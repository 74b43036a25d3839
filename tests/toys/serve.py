"""How tests put a toy through fxlora: to a graph, to a served module, to a mixed answer, or to a typed refusal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

import fxlora
from tests.toys.base import Adapter, Inputs, Toy, clone, flat, merged, worst

FORMS = ("symbolic_trace", "capture")


def graph_of(form: str, module: nn.Module, inputs: Inputs) -> fx.GraphModule:
    """A module as a graph; "capture" is fxlora's own, the rest are torch's."""
    if form == "symbolic_trace":
        return fx.symbolic_trace(module)
    return fxlora.capture(module, **clone(inputs))


def serve(gm: fx.GraphModule, inputs: Inputs, batch_dims: Mapping[str, Any], adapters: Mapping[str, Adapter]) -> Any:
    """Apply and load; raises FxloraError where either refuses."""
    lora = fxlora.apply(gm, max_adapters=4, max_rank=8, batch_dims=dict(batch_dims), example_inputs=clone(inputs))
    for name, adapter in adapters.items():
        lora.load_adapter(name, adapter)
    return lora


def mixed_outputs(lora: Any) -> bool:
    """Whether the served module reports that one of its outputs mixes requests."""
    return bool(lora.mixed_outputs)


@torch.no_grad()
def expected(toy: Toy, module: nn.Module, inputs: Inputs, adapter: Adapter | None, index: int) -> list[torch.Tensor]:
    """What one request must get: its own rows of a run where every request uses its adapter."""
    output = merged(module, adapter)(**clone(inputs))
    return toy.rows_of(output, index)


@torch.no_grad()
def check_mixed(
    toy: Toy,
    module: nn.Module,
    lora: Any,
    inputs: Inputs,
    adapters: Mapping[str, Adapter],
    names: Sequence[str | None],
    tolerance: float = 1e-5,
) -> None:
    """Serve one mixed batch and compare every request with its own answer; an adapter must move its request."""
    got = lora(**clone(inputs), adapters=list(names))
    nothing = lora(**clone(inputs), adapters=None)
    for index, name in enumerate(names):
        adapter = None if name is None else adapters[name]
        want, base = (expected(toy, module, inputs, each, index) for each in (adapter, None))
        mine = toy.rows_of(got, index)
        error, change = worst(mine, want), worst(want, base)
        assert error <= tolerance, (
            f"request {index} under {name!r} is off by {error:.1e}; the adapter moves it {change:.1e}"
        )
        if name is None:
            assert all(map(torch.equal, mine, toy.rows_of(nothing, index))), f"base request {index} lost its bits"
        else:
            assert change > 1e-3, f"adapter {name!r} does not change request {index}: nothing is checked"
    assert len(flat(got)) == len(flat(nothing))
