"""Which values may share memory, and which call writes it: whatever is not known to be apart counts as shared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from fxlora.passes.graph import op_name
from fxlora.passes.memory import Memory, written_by
from fxlora.passes.reads import Reader
from fxlora.passes.rows.seeds import choose_seeds
from fxlora.passes.rows.worlds import size_worlds
from fxlora.passes.weights import Weights
from tests.passes.build import call, holder, job_of, weight

Body = Callable[..., Any]


@fx.wrap
def unknown(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def memory_of(target: nn.Module, *examples: torch.Tensor) -> tuple[fx.Graph, Memory]:
    job = job_of(target, *examples)
    seeds, _ = choose_seeds(job.inputs, None)
    world = size_worlds(job.gm, job.inputs, seeds, {}).worlds[0]
    return job.gm.graph, Memory(job.gm.graph, Reader(Weights(job.gm), world))


def written(body: Body, *examples: torch.Tensor, **members: torch.Tensor | nn.Module) -> str:
    """The op that may write what the last call but the output reads first, after that was made; "" for none."""
    examples = examples or (torch.randn(3, 4),)
    graph, memory = memory_of(holder(body, **members), *examples)
    value = list(graph.nodes)[-2].all_input_nodes[0]
    found = memory.write_between([value], memory.order[value], len(memory.order) - 2)
    return "" if found is None else op_name(found)


def with_write(make: Callable[[Any], Any], write: Callable[[Any], Any]) -> Body:
    """h is made, then something made from it is written, then h is read."""

    def body(self: nn.Module, x: torch.Tensor) -> Any:
        h = x.relu()
        write(make(h))
        return h + 1

    return body


@pytest.mark.parametrize(
    "make",
    [
        lambda h: h,
        lambda h: h.view(-1),
        lambda h: h.t().unsqueeze(0)[0],
        lambda h: h.chunk(2)[1],
        lambda h: h.float(),
        lambda h: torch.einsum("ab->ba", h),
        lambda h: h.add_(1),
        lambda h: unknown(h),
    ],
)
def test_what_may_be_the_same_memory(make: Callable[[Any], Any]) -> None:
    assert written(with_write(make, lambda value: value.zero_())) != ""


@pytest.mark.parametrize(
    "make", [lambda h: h.clone(), lambda h: h * 2, lambda h: torch.cat([h, h]), lambda h: h @ h.t(), lambda h: h.sum(0)]
)
def test_what_is_made_anew_is_apart(make: Callable[[Any], Any]) -> None:
    assert written(with_write(make, lambda value: value.zero_())) == ""


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (lambda h: h.mul_(2), "mul_"),
        (lambda h: torch.ops.aten.copy_.default(h, h * 2), "copy_"),
        (lambda h: torch.add(h, 1, out=h), "add"),
        (lambda h: torch._foreach_add_([h], 1), "_foreach_add_"),
        (lambda h: unknown(h.sum()), "?tests.passes.test_memory.unknown"),
        (lambda h: nn.functional.relu(h, inplace=True), "relu"),
        (lambda h: h.add(1), ""),
    ],
)
def test_what_counts_as_a_write(write: Callable[[Any], Any], name: str) -> None:
    assert written(with_write(lambda h: h, write)) == name


def test_weights_over_one_storage_are_one_memory() -> None:
    whole = weight(6, 4)
    body = lambda self, x: (x + self.b, self.a.zero_(), self.b + 1)[2]  # noqa: E731
    assert written(body, torch.randn(6, 4), a=whole[:3], b=whole) == "zero_"
    assert written(body, torch.randn(6, 4), a=weight(3, 4), b=whole) == ""


def test_inputs_of_the_caller_may_be_one_tensor() -> None:
    body = lambda self, x, y: (x * 2, y.zero_(), x + 1)[2]  # noqa: E731
    assert written(body, torch.randn(3, 4), torch.randn(3, 4)) == "zero_"


def test_running_statistics_are_written() -> None:
    norm = call(nn.functional.batch_norm, "%x", "%mean", "%var", training=True)
    assert {n.name for n in written_by(norm) or ()} == {"x", "mean", "var"}


def test_places_are_strict() -> None:
    """A write at either end is not between."""
    graph, memory = memory_of(holder(with_write(lambda h: h, lambda h: h.mul_(2))), torch.randn(3, 4))
    (write,) = [n for n in graph.nodes if op_name(n) == "mul_"]
    (value,) = write.all_input_nodes
    at = memory.order[write]
    assert memory.write_between([value], at, at + 2) is None
    assert memory.write_between([value], at - 2, at) is None
    assert memory.write_between([value], at - 1, at + 1) is write
