"""A graph run on shapes alone: what every node gives at sizes that no caller ever passed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from fxlora.passes.graph import fake_value, op_name


@dataclass(frozen=True)
class GraphInput:
    """One tensor or number the caller passes (weights are no inputs).

    Attributes:
        node: Its placeholder.
        name: The path in the caller's arguments: ``input_ids``, ``past_key_values.0``.
        sizes: Per dim the traced size, hints for symbolic ones; empty for numbers.
        symbols: Per dim the symbol (after unification), None where the size is fixed.
        dtype: None for numbers.
        value: What the caller passed at tracing where it was no tensor; for tensors the example, if there is one.
    """

    node: fx.Node
    name: str
    sizes: tuple[int, ...]
    symbols: tuple[Any, ...]
    dtype: torch.dtype | None
    value: Any = None


@dataclass(frozen=True)
class TensorFacts:
    """Shape, dtype and device of a tensor in one world."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps what every node gave."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        number = _float_input(n)
        result = super().run_node(n) if number is None else number
        self.values[n] = _fixed(result)
        return result


def _float_input(node: fx.Node) -> float | None:
    """The value that tracing saw of a float that is an input (dynamo hands one in as a tensor, for dynamic graphs)."""
    value = fake_value(node) if op_name(node) == "item" else None
    if not isinstance(value, torch.SymFloat):
        return None
    hint = value.node.hint  # None where data decides
    return None if hint is None else float(hint)


def _fixed(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return TensorFacts(tuple(int(s) for s in value.shape), value.dtype, value.device)
    if isinstance(value, list | tuple):
        return tuple(_fixed(item) for item in value)
    return value


def run_fake(
    gm: fx.GraphModule,
    inputs: Sequence[GraphInput],
    shapes: Mapping[fx.Node, tuple[int, ...]],
    bound: Mapping[fx.Node, torch.Tensor],
) -> dict[fx.Node, Any]:
    """What every node gives when the inputs have these shapes."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    by_node = {inp.node: inp for inp in inputs}
    arguments: list[Any] = []
    with mode, torch.no_grad():
        for node in gm.graph.nodes:
            if node.op != "placeholder":
                continue
            inp = by_node.get(node)
            if inp is None:
                tensor = bound.get(node)
                arguments.append(mode.from_tensor(tensor) if tensor is not None else None)
            elif inp.dtype is None:
                arguments.append(inp.value)
            else:
                traced = inp.value if isinstance(inp.value, torch.Tensor) else fake_value(node)
                device = getattr(traced, "device", "cpu")
                arguments.append(torch.empty(shapes[node], dtype=inp.dtype, device=device))
        recorder = _Recorder(gm)
        with _quiet():
            recorder.run(*arguments, enable_io_processing=False)
    return recorder.values


@contextmanager
def _quiet() -> Iterator[None]:
    """Sizes that a graph rejects are an answer here, not an error to log."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
