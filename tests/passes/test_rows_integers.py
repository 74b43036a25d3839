"""Values of index tensors: run where the graph fixes them, drawn where only data does: distinct, covering, in range."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from fxlora.passes.rows.integers import Integers
from fxlora.passes.rows.propagate import constant_integers
from fxlora.passes.rows.worlds import UnknownShapeError
from tests.passes.build import mapping_of, proved, returned, traced

Body = Callable[..., Any]
B = 29


def node(graph: fx.Graph, name: str) -> fx.Node:
    return next(n for n in graph.nodes if n.name == name)


def integers_of(target: nn.Module | Body, *examples: torch.Tensor, **options: Any) -> tuple[fx.Graph, Integers]:
    prover = proved(target, *examples, **options)
    return prover.graph, prover.integers


def value(target: nn.Module | Body, name: str, *examples: torch.Tensor) -> Any:
    """What the first world holds for a node, None where it is not known."""
    graph, integers = integers_of(target, *examples)
    return integers.values[0].get(node(graph, name))


def drawn(length: int, size: int) -> list[torch.Tensor]:
    """An index of `length` entries into `size` positions that only the caller knows, in every world."""
    gm = traced(lambda x, i: x[i])
    integers = Integers(gm, proved(gm, torch.randn(4, 5), torch.zeros(length, dtype=torch.int32)).worlds, {})
    found = []
    for w, world in enumerate(integers.worlds):
        index = node(gm.graph, "i")
        facts = world.values[index]
        world.values[index] = type(facts)((length,), facts.dtype, facts.device)
        found.append(integers.index_values(index, size, w))
    return found


@pytest.mark.parametrize(("length", "size"), [(5, 29), (12, 13), (13, 13), (27, 29), (1, 2), (1, 29)])
def test_short_indices_are_distinct(length: int, size: int) -> None:
    for values in drawn(length, size):
        assert values.shape == (length,)
        assert len(set(values.tolist())) == length
        assert 0 <= int(values.min()) <= int(values.max()) < size


@pytest.mark.parametrize(("length", "size"), [(13, 13), (30, 13), (100, 7), (2, 1)])
def test_long_indices_cover_every_position_evenly(length: int, size: int) -> None:
    for values in drawn(length, size):
        counts = torch.bincount(values, minlength=size)
        assert len(counts) == size
        assert int(counts.min()) >= length // size
        assert int(counts.max()) <= -(-length // size)


def test_short_indices_leave_the_ends_alone() -> None:
    """A choice of a few requests is never the first or the last by luck."""
    for values in drawn(5, 29):
        assert 0 not in values
        assert 28 not in values


def test_no_entries_are_no_entries() -> None:
    assert [v.numel() for v in drawn(0, 13)] == [0, 0, 0]


def test_worlds_draw_for_themselves_and_keep_what_they_drew() -> None:
    graph, integers = integers_of(lambda x, i: x[i] + x[i], torch.randn(4, 5), torch.zeros(4, dtype=torch.long))
    index = node(graph, "i")
    first = [integers.index_values(index, B, w) for w in range(3)]
    assert [v.tolist() for v in first] == [integers.index_values(index, B, w).tolist() for w in range(3)]
    assert len({tuple(v[:20].tolist()) for v in first}) == 3


def test_proofs_are_the_same_from_run_to_run() -> None:
    runs = [[v.tolist() for v in drawn(20, 29)] for _ in range(2)]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("index", [torch.zeros(4, dtype=torch.bool), torch.zeros(4)])
def test_masks_and_floats_are_no_positions(index: torch.Tensor) -> None:
    graph, integers = integers_of(lambda x, i: x + i.sum(), torch.randn(4, 5), index)
    with pytest.raises(UnknownShapeError, match="selects rows by data"):
        integers.index_values(node(graph, "i"), B, 0)


COMPUTED: dict[str, tuple[Body, str, Callable[[], torch.Tensor]]] = {
    "arange": (lambda x: x[torch.arange(x.shape[0], device=x.device)], "arange", lambda: torch.arange(B)),
    "reversed": (
        lambda x: x[torch.arange(x.shape[0] - 1, -1, -1, device=x.device)],
        "arange",
        lambda: torch.arange(B).flip(0),
    ),
    "arithmetic": (
        lambda x: x[(torch.arange(x.shape[0], device=x.device) * 3 + 1) % 5],
        "mod",
        lambda: (torch.arange(B) * 3 + 1) % 5,
    ),
    "methods": (
        lambda x: x[torch.arange(x.shape[0], device=x.device).view(-1, 1).repeat(1, 2).flatten()],
        "flatten",
        lambda: torch.arange(B).repeat_interleave(2),
    ),
    "sorted constants": (
        lambda x: x[torch.arange(x.shape[0], device=x.device).flip(0).argsort()],
        "argsort",
        lambda: torch.arange(B).flip(0),
    ),
    "cumsum": (
        lambda x: x[torch.ones(x.shape[0], dtype=torch.long, device=x.device).cumsum(0) - 1],
        "sub",
        lambda: torch.arange(B),
    ),
}


@pytest.mark.parametrize("op", COMPUTED)
def test_what_the_graph_fixes_is_run_for_real(op: str) -> None:
    body, name, expected = COMPUTED[op]
    assert torch.equal(value(body, name, torch.randn(4, 5)), expected())


def test_index_tables_of_the_model_are_known_unless_they_are_written() -> None:
    root = nn.Module()
    root.register_buffer("order", torch.tensor([3, 1, 0, 2]))
    root.register_buffer("counts", torch.zeros(2, dtype=torch.long))
    root.register_buffer("scale", torch.ones(2))
    graph = fx.Graph()
    nodes = [graph.get_attr(name) for name in ("order", "counts", "scale")]
    graph.call_method("add_", (nodes[1], 1))
    graph.output(tuple(nodes))
    gm = fx.GraphModule(root, graph)
    assert {str(n.target): v.tolist() for n, v in constant_integers(gm, {}).items()} == {"order": [3, 1, 0, 2]}


def test_values_of_known_nodes_are_copies() -> None:
    gm = traced(lambda x, i: x[i])
    table = torch.tensor([0, 1])
    integers = Integers(gm, proved(gm, torch.randn(4, 5), table).worlds, {node(gm.graph, "i"): table})
    integers.values[0][node(gm.graph, "i")].add_(5)
    assert table.tolist() == [0, 1]
    assert integers.values[1][node(gm.graph, "i")].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("body", "name", "shape"),
    [
        (lambda x: x.gather(1, x.argsort(1)), "argsort", (B, 7)),
        (lambda x: x[:, x.argmax(1)], "argmax", (B,)),
        (lambda x: x.gather(1, x.argmax(1, keepdim=True)), "argmax", (B, 1)),
    ],
)
def test_rankings_of_data_are_drawn_along_their_dim(body: Body, name: str, shape: tuple[int, ...]) -> None:
    found = value(body, name, torch.randn(4, 5))
    assert found.shape == shape
    assert found.dtype == torch.int64
    assert 0 <= int(found.min()) <= int(found.max()) < 7
    if name == "argsort":
        assert all(sorted(row) == list(range(7)) for row in found.tolist())
    else:
        assert len(set(found.flatten().tolist())) > 1


def test_topk_draws_distinct_experts_for_each_row() -> None:
    found = value(lambda x: x.gather(1, x.topk(2, 1)[1]), "topk", torch.randn(4, 5))
    values, indices = found
    assert values is None
    assert indices.shape == (B, 2)
    assert all(a != b for a, b in indices.tolist())
    assert len({tuple(row) for row in indices.tolist()}) > 5


def test_what_indexes_nothing_is_never_computed() -> None:
    """Masks and positions cost nothing."""
    graph, integers = integers_of(lambda x: x * torch.arange(x.shape[1], device=x.device), torch.randn(4, 5))
    assert node(graph, "arange") not in integers.needed
    assert integers.values[0] == {}


def test_unknown_functions_are_not_run() -> None:
    ran.clear()
    graph, integers = integers_of(lambda x: x[shuffled(torch.arange(x.shape[0], device=x.device))], torch.randn(4, 5))
    before = len(ran)
    assert node(graph, "shuffled") not in integers.values[0] or len(ran) == before


ran: list[int] = []


@fx.wrap
def shuffled(index: torch.Tensor) -> torch.Tensor:
    ran.append(len(index))
    return index.flip(0)


def test_writes_into_an_index_are_seen() -> None:
    """order = zeros; order[2:] = 1; x[order]: the index that is used, not the one that was made."""

    def body(x: torch.Tensor) -> torch.Tensor:
        order = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
        order[2:].fill_(1)
        return x[order]

    prover = proved(body, torch.randn(4, 5))
    assert mapping_of(prover.rows(returned(prover.graph))) == ((0,), [0, 0] + [1] * (B - 2))
