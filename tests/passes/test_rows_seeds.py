"""Which input dims tell requests apart: defaults by shared dims, names, packed dims, and the errors."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from torch import fx

from fxlora.passes.errors import AmbiguousRequestsError, BatchDimsError
from fxlora.passes.rows.seeds import BatchDims, choose_seeds
from fxlora.passes.rows.worlds import GraphInput

BATCH, LENGTH, OTHER = sympy.symbols("s0 s1 s2")
FLOAT, INT = torch.float32, torch.int64


def made(name: str, sizes: tuple[int, ...], dtype: torch.dtype | None = FLOAT, symbols: Any = None) -> GraphInput:
    node = fx.Graph().placeholder(name.replace(".", "_"))
    return GraphInput(node, name, sizes, symbols or (None,) * len(sizes), dtype)


def seeds(inputs: list[GraphInput], batch_dims: BatchDims = None) -> tuple[dict[str, tuple[int, ...]], str]:
    """Request dims by input name, and the primary's name."""
    chosen, primary = choose_seeds(inputs, batch_dims)
    names = {inp.node: inp.name for inp in inputs}
    return {names[node]: dims for node, dims in chosen.items()}, names[primary]


def test_the_first_tensor_leads_and_numbers_have_no_requests() -> None:
    inputs = [made("scale", (), None), made("x", (4, 5)), made("y", (4, 7))]
    assert seeds(inputs) == ({"x": (0,), "y": (0,)}, "x")


@pytest.mark.parametrize("batch_dims", [None, 0, (0,), {}])
def test_ways_to_say_the_default(batch_dims: BatchDims) -> None:
    assert seeds([made("x", (4, 5))], batch_dims) == ({"x": (0,)}, "x")


def test_inputs_follow_by_symbol_and_not_by_size() -> None:
    inputs = [
        made("x", (4, 5), symbols=(BATCH, LENGTH)),
        made("same", (4, 9), symbols=(BATCH, None)),
        made("fixed", (4, 5)),
    ]
    assert seeds(inputs)[0] == {"x": (0,), "same": (0,)}


def test_two_symbols_of_one_size_that_tracing_never_compared() -> None:
    """A batch of rows follows, a bare list does not, nor another size."""
    inputs = [
        made("x", (4, 5), symbols=(BATCH, LENGTH)),
        made("rows", (4, 3), symbols=(OTHER, None)),
        made("list", (4,), symbols=(OTHER,)),
        made("short", (3, 5), symbols=(OTHER, LENGTH)),
    ]
    assert seeds(inputs)[0] == {"x": (0,), "rows": (0,)}


def test_fixed_sizes_follow_by_size_but_positions_never() -> None:
    inputs = [made("x", (4, 5)), made("scores", (4,)), made("positions", (4,), INT), made("y", (5, 4))]
    assert seeds(inputs)[0] == {"x": (0,), "scores": (0,)}


def test_another_dim_may_be_the_request_dim() -> None:
    inputs = [made("x", (5, 4, 3)), made("y", (9, 4)), made("z", (4, 9))]
    assert seeds(inputs, 1) == ({"x": (1,), "y": (1,)}, "x")


def test_a_mapping_names_the_primary_and_others_follow_by_symbol_alone() -> None:
    """Who names inputs means those; that another has their size by chance tells nothing."""
    inputs = [
        made("positions", (5, 3)),
        made("x", (4, 5), symbols=(BATCH, LENGTH)),
        made("y", (4, 2), symbols=(BATCH, None)),
        made("rows", (4, 3), symbols=(OTHER, None)),
        made("fixed", (4, 2)),
    ]
    assert seeds(inputs, {"x": 0}) == ({"x": (0,), "y": (0,)}, "x")
    assert seeds([made("x", (4, 5)), made("y", (4, 2))], {"x": 0}) == ({"x": (0,)}, "x")


def test_a_named_dim_holds_whatever_the_sizes() -> None:
    inputs = [made("x", (4, 5)), made("cache", (2, 4, 7))]
    assert seeds(inputs, {"x": 0, "cache": 1})[0] == {"x": (0,), "cache": (1,)}


def test_the_head_of_a_path_names_all_its_tensors() -> None:
    inputs = [made("cache.0.k", (4, 5)), made("cache.0.v", (4, 6)), made("x", (4, 2))]
    assert seeds(inputs, {"cache": 0}) == ({"cache.0.k": (0,), "cache.0.v": (0,)}, "cache.0.k")


def test_make_fx_numbers_its_inputs() -> None:
    assert seeds([made("ids_1", (4, 5), INT)], {"ids": 0}) == ({"ids_1": (0,)}, "ids_1")


def test_packed_dims_go_to_floats_that_share_both_and_never_to_positions() -> None:
    inputs = [
        made("x", (1, 6, 3)),
        made("positions", (1, 6), INT),
        made("gate", (1, 6)),
        made("other", (1, 7)),
        made("vector", (1,)),
    ]
    assert seeds(inputs, (0, 1))[0] == {"x": (0, 1), "gate": (0, 1)}
    assert seeds(inputs, {"x": (0, 1)})[0] == {"x": (0, 1)}
    assert seeds(inputs, {"x": (0, 1), "gate": (0, 1)})[0] == {"x": (0, 1), "gate": (0, 1)}


def test_packed_dims_follow_a_mapping_by_the_symbols_of_both() -> None:
    inputs = [
        made("x", (2, 6, 3), symbols=(BATCH, LENGTH, None)),
        made("positions", (2, 6), INT, symbols=(BATCH, LENGTH)),
        made("gate", (2, 6), symbols=(BATCH, LENGTH)),
        made("half", (2, 6), symbols=(BATCH, OTHER)),
    ]
    assert seeds(inputs, {"x": (0, 1)})[0] == {"x": (0, 1), "gate": (0, 1)}


@pytest.mark.parametrize(
    ("batch_dims", "message"),
    [
        ({"y": 0}, r"names the input 'y'.*\['x'\]"),
        (2, r"batch_dims 2 for input 'x' of 2 dims"),
        (-1, "batch_dims -1"),
        ((0, 1, 2), "expected one dim, or two"),
        ((1, 0), "ascending"),
        ((0, 0), "ascending"),
        ((), "expected one dim"),
        ({"x": 5}, "batch_dims 5"),
        ({"x": ("0",)}, "for input 'x'"),
    ],
)
def test_dims_that_do_not_fit(batch_dims: BatchDims, message: str) -> None:
    with pytest.raises(BatchDimsError, match=message):
        seeds([made("x", (4, 5)), made("n", (), None)], batch_dims)


def test_one_and_two_request_dims_do_not_mix() -> None:
    with pytest.raises(BatchDimsError, match="mixes inputs"):
        seeds([made("x", (1, 5)), made("y", (1, 5))], {"x": (0, 1), "y": 0})


@pytest.mark.parametrize("inputs", [[], [made("n", (), None)], [made("scalar", ())]])
def test_without_a_tensor_there_are_no_requests(inputs: list[GraphInput]) -> None:
    with pytest.raises(AmbiguousRequestsError, match="no tensor input"):
        seeds(inputs)


def test_an_exact_name_wins_over_a_numbered_one() -> None:
    inputs = [made("x", (4, 5)), made("x_1", (9, 5))]
    assert seeds(inputs, {"x": 0})[0] == {"x": (0,)}
