"""Rows under in-place ops: what counts as a write, what it does to its target, to the base and to other views."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import fx
from torch.nn import functional as F

from fxlora.passes.rows.labels import Label, Mixed, RowMap
from fxlora.passes.rows.writes import is_write, match
from tests.passes.build import call, mapping_of, proved, reason_of, rows_of

Body = Callable[..., Any]
B = 29
aten = torch.ops.aten


@pytest.mark.parametrize(
    "node",
    [
        call("add_", "%x", 1, method=True),
        call("copy_", "%x", "%y", method=True),
        call(operator.setitem, "%x", 0, "%y"),
        call(operator.iadd, "%x", 1),
        call(torch.add, "%x", "%y", out="%z"),
        call(aten.add_.Tensor, "%x", "%y"),
        call(aten.index_put_.default, "%x", ["%i"], "%y"),
        call(torch.relu_, "%x"),
        call("masked_fill_", "%x", "%m", 0.0, method=True),
    ],
    ids=lambda node: node.name,
)
def test_writes(node: fx.Node) -> None:
    assert is_write(node)


@pytest.mark.parametrize(
    "node",
    [
        call("add", "%x", 1, method=True),
        call(operator.getitem, "%x", 0),
        call(aten.add.Tensor, "%x", "%y"),
        call(aten.index_put.default, "%x", ["%i"], "%y"),
        call("requires_grad_", "%x", method=True),
        call("__and__", "%x", "%y", method=True),
        fx.Graph().placeholder("x_"),
    ],
    ids=lambda node: node.name,
)
def test_what_is_no_write(node: fx.Node) -> None:
    assert not is_write(node)


class Worlds:
    """Stands for a prover of some worlds."""

    def __init__(self, count: int) -> None:
        self.count = count


def label(*values: Sequence[int], dims: tuple[int, ...] = (0,)) -> Label:
    return Label(RowMap(None, (), None, tuple(torch.tensor(v) for v in values)), dims)


def tensors(*values: Any) -> list[torch.Tensor]:
    return [torch.tensor(v) for v in values]


def test_match_takes_the_first_candidate_that_fits_where_a_request_wrote() -> None:
    """-1 is memory that no request has written: any map fits there."""
    seed, other = label([0, 1, 2]), label([2, 1, 0])
    assert match(Worlds(1), tensors([0, 1, 2]), [other, seed]) == seed
    assert match(Worlds(1), tensors([2, -1, -1]), [seed, other]) == other
    assert match(Worlds(1), tensors([-1, 1, -1]), [other, seed]) == other


def test_match_finds_the_dims_a_map_lies_over() -> None:
    found = match(Worlds(1), tensors([[0, 1, 2], [0, 1, 2]]), [label([0, 1, 2])])
    assert isinstance(found, Label)
    assert found.dims == (1,)


@pytest.mark.parametrize(
    "ids",
    [tensors([0, 1, 1]), tensors([0, 1]), tensors([0, 1, 2, 0]), tensors([[0, 1, 2], [0, 1, 0]])],
    ids=["value", "short", "long", "one place"],
)
def test_match_fits_everywhere_or_not_at_all(ids: list[torch.Tensor]) -> None:
    assert isinstance(match(Worlds(1), ids, [label([0, 1, 2])]), Mixed)


def test_match_must_hold_in_every_world() -> None:
    candidate = label([0, 1], [0, 1, 2])
    assert match(Worlds(2), tensors([0, 1], [0, 1, 2]), [candidate]) == candidate
    assert isinstance(match(Worlds(2), tensors([0, 1], [0, 2, 1]), [candidate]), Mixed)


def test_match_without_candidates_is_mixed() -> None:
    assert isinstance(match(Worlds(1), tensors([0]), []), Mixed)


Program = Callable[[fx.Graph, fx.Node], fx.Node]


def rows_after(program: Program, *shape: int) -> Any:
    """Rows of what a hand-made program over x returns; torch.fx cannot trace item assignment."""
    graph = fx.Graph()
    graph.output(program(graph, graph.placeholder("x")))
    return rows_of(fx.GraphModule({}, graph), torch.randn(shape or (4, 5, 6)))


def assign(graph: fx.Graph, target: fx.Node, key: Any, value: Any) -> fx.Node:
    graph.call_function(operator.setitem, (target, key, value))
    return target


def zeros(graph: fx.Graph, x: fx.Node) -> fx.Node:
    return graph.call_function(torch.zeros_like, (x,))


def test_memory_without_rows_takes_those_of_what_fills_it() -> None:
    assert mapping_of(rows_after(lambda g, x: assign(g, zeros(g, x), slice(None), x))) == ((0,), list(range(B)))
    part = rows_after(
        lambda g, x: assign(g, zeros(g, x), (slice(None), 0), g.call_function(operator.getitem, (x, (slice(None), 0))))
    )
    assert mapping_of(part) == ((0,), list(range(B)))


def test_a_number_changes_no_rows() -> None:
    assert mapping_of(rows_after(lambda g, x: assign(g, x, (slice(None), 0), 0.0))) == ((0,), list(range(B)))


def test_one_requests_row_over_another_is_a_new_map_or_mixed() -> None:
    """x[0] = x[1]: row 0 now belongs to request 1."""
    rows = rows_after(
        lambda g, x: assign(g, g.call_method("clone", (x,)), 0, g.call_function(operator.getitem, (x, 1)))
    )
    assert isinstance(rows, Mixed) or rows.map.ids[0].tolist()[:2] == [1, 1]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda x: x.clone().copy_(x.flip(0)), "flip along the request dim"),
        (lambda x: x.clone().add_(x.mean(0)), "mean over the request dim"),
        (lambda x: x.clone().masked_scatter_(x > 0, x), "masked_scatter of other than whole vectors"),
        (lambda x: torch.add(x, 1, out=torch.empty_like(x)), "an out= argument"),
    ],
)
def test_writes_that_mix(body: Body, reason: str) -> None:
    assert reason in reason_of(rows_of(body, torch.randn(4, 5)))


def test_a_mask_decides_by_data_what_is_written() -> None:
    def program(g: fx.Graph, x: fx.Node) -> fx.Node:
        mask = g.call_function(operator.gt, (x, 0))
        other = g.call_function(operator.getitem, (x, 0))
        return assign(g, g.call_method("clone", (x,)), mask, g.call_function(torch.sum, (other,)))

    reason_of(rows_after(program, 4, 5))


KEPT: dict[str, Body] = {
    "relu_": lambda x: x.clone().relu_(),
    "F.relu in place": lambda x: F.relu(x + 1, inplace=True),
    "mul_ by own": lambda x: x.clone().mul_(x[:, :1]),
    "copy_ own": lambda x: torch.empty_like(x).copy_(x),
    "masked_fill_": lambda x: x.clone().masked_fill_(x > 0, 0.0),
    "zero_": lambda x: x.clone().zero_(),
    "index_fill_ elsewhere": lambda x: x.clone().index_fill_(1, torch.tensor([0]), 0.0),
    "scatter_ elsewhere": lambda x: torch.zeros_like(x).scatter_(1, x.argsort(1), x),
    "functional index_add elsewhere": lambda x: torch.zeros_like(x).index_add(1, torch.tensor([0]), x[:, :1]),
}


@pytest.mark.parametrize("op", KEPT)
def test_writes_that_keep_requests_apart(op: str) -> None:
    assert mapping_of(rows_of(KEPT[op], torch.randn(4, 5))) == ((0,), list(range(B)))


@pytest.mark.parametrize("wrote", ["whole", "part"])
def test_a_write_through_a_view_reaches_the_base(wrote: str) -> None:
    """The base is read after a view of it took the rows of all requests in another order."""

    def program(g: fx.Graph, x: fx.Node) -> fx.Node:
        base = g.call_method("clone", (x,))
        view = g.call_method("view", (base, -1)) if wrote == "whole" else g.call_function(operator.getitem, (base, 0))
        source = g.call_method("flip", (x, 0))
        value = g.call_method("reshape", (source, -1)) if wrote == "whole" else g.call_function(torch.sum, (source, 0))
        g.call_method("copy_", (view, value))
        return g.call_function(torch.relu, (base,))

    reason_of(rows_after(program, 4, 5))


def test_other_views_of_written_memory_are_not_trusted() -> None:
    def program(g: fx.Graph, x: fx.Node) -> fx.Node:
        base = g.call_method("clone", (x,))
        first = g.call_method("view", (base, -1))
        second = g.call_method("transpose", (base, 0, 1))
        g.call_method("copy_", (first, g.call_method("reshape", (g.call_method("flip", (x, 0)), -1))))
        return g.call_function(torch.relu, (second,))

    reason_of(rows_after(program, 4, 5))


def test_a_write_of_the_same_rows_through_a_view_changes_nothing() -> None:
    def program(g: fx.Graph, x: fx.Node) -> fx.Node:
        base = g.call_method("clone", (x,))
        view = g.call_function(operator.getitem, (base, (slice(None), 0)))
        g.call_method("mul_", (view, 2))
        return g.call_function(torch.relu, (base,))

    assert mapping_of(rows_after(program, 4, 5)) == ((0,), list(range(B)))


def test_what_was_read_before_a_write_keeps_its_rows() -> None:
    prover = proved(lambda x: (x.clone(), x.flip(0)), torch.randn(4, 5))
    first = next(n for n in prover.graph.nodes if n.name == "clone")
    assert mapping_of(prover.rows(first)) == ((0,), list(range(B)))


@pytest.mark.parametrize(("places", "requests"), [([0, 1], [3, 2]), ([1, 0], [2, 3]), ([-1, 0], [2, 3])])
def test_a_bare_list_is_one_index(places: list[int], requests: list[int]) -> None:
    """y[places] = x[[3, 2]] over memory of two rows and no request; read as y[0, 1] it would be one row."""

    def program(g: fx.Graph, x: fx.Node) -> fx.Node:
        g.call_function(operator.getitem, (x, ([2, 3], slice(None))))
        value = g.call_function(operator.getitem, (x, ([3, 2], slice(None))))
        return assign(g, g.call_function(torch.zeros, (2, 5, 6)), places, value)

    assert mapping_of(rows_after(program, 4, 5, 6)) == ((0,), requests)


def test_a_list_that_leaves_rows_unwritten_is_not_guessed() -> None:
    """No map has the length of the memory; rows 0 and 1 must not pass for requests 0 and 1."""

    def program(g: fx.Graph, x: fx.Node) -> fx.Node:
        value = g.call_function(operator.getitem, (x, ([1, 0], slice(None))))
        made = assign(g, zeros(g, x), [0, 1], value)
        return g.call_function(operator.getitem, (made, slice(None, 2)))

    rows = rows_after(program)
    assert isinstance(rows, Mixed) or mapping_of(rows) == ((0,), [1, 0])
