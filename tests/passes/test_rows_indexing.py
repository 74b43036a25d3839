"""Indexing: items spelled out, where dims go, and the map after each index along the request dim."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fxlora.passes.errors import RowsNotProvenError
from fxlora.passes.rows.indexing import expand_items, index_items, is_index, is_mask, is_whole, layout
from fxlora.passes.rows.labels import Label
from fxlora.passes.rows.propagate import Prover
from tests.passes.build import holder, mapping_of, proved, reason_of, returned, rows_of, weight

Body = Callable[..., Any]
B = 29
ALL = slice(None)


@pytest.mark.parametrize(
    ("items", "ndim", "expected"),
    [
        ([], 2, [ALL, ALL]),
        ([0], 3, [0, ALL, ALL]),
        ([Ellipsis, 0], 3, [ALL, ALL, 0]),
        ([0, Ellipsis], 3, [0, ALL, ALL]),
        ([0, Ellipsis, 1], 4, [0, ALL, ALL, 1]),
        ([Ellipsis], 2, [ALL, ALL]),
        ([None, 0], 2, [None, 0, ALL]),
        ([Ellipsis, None], 2, [ALL, ALL, None]),
        ([None, Ellipsis, 0, None], 3, [None, ALL, ALL, 0, None]),
        ([0, Ellipsis, 1], 2, [0, 1]),
    ],
)
def test_items_are_spelled_out(items: list[Any], ndim: int, expected: list[Any]) -> None:
    assert expand_items(items, ndim) == expected


@pytest.mark.parametrize("item", [slice(None), slice(0, None), slice(None, None, 1), slice(0, 2**63 - 1, 1)])
def test_whole_slices(item: slice) -> None:
    assert is_whole(item)


@pytest.mark.parametrize("item", [slice(1, None), slice(None, 4), slice(None, -1), slice(None, None, 2), 0, None])
def test_parts(item: Any) -> None:
    assert not is_whole(item)


def setting(*indices: torch.Tensor) -> tuple[Prover, list[Any]]:
    """A prover over index tensors, and their nodes."""
    model = holder(lambda self, x: [getattr(self, f"i{k}") for k in range(len(indices))] + [x.shape[0]])
    for k, tensor in enumerate(indices):
        model.register_buffer(f"i{k}", tensor)
    prover = proved(model, torch.randn(4, 5))
    return prover, list(next(n for n in prover.graph.nodes if n.op == "output").args[0])


@pytest.mark.parametrize(
    "pattern",
    ["i:", ":i", ":i:", "i0:", "0i:", ":ii", "i:i", "ii:", "i0i:", ":i0i", "n:i", "i:n", "0:0", ":[:", "nini:", "i:0i"],
)
@pytest.mark.parametrize("width", [1, 2])
def test_layout_is_that_of_torch(pattern: str, width: int) -> None:
    """Every pattern is run on a tensor whose dims all differ: where each source dim went is read off the result."""
    index = torch.zeros((9, 8)[:width], dtype=torch.long)
    prover, nodes = setting(index, index, index)
    tensors = iter(nodes)
    items = [{":": ALL, "0": 0, "n": None, "[": [0, 0, 0]}[c] if c != "i" else next(tensors) for c in pattern]
    concrete = [index if c == "i" else item for c, item in zip(pattern, items, strict=True)]
    sizes = [2, 3, 4, 5, 6, 7][: sum(c != "n" for c in pattern)]
    out = torch.zeros(sizes)[tuple(concrete)].shape
    where, start, found = layout(prover, items)
    assert {d: out[o] for d, o in where.items()} == {d: sizes[d] for d in where}
    assert len(where) == pattern.count(":")
    if "i" in pattern:
        assert found == width
        assert out[start : start + width] == index.shape


def test_what_is_an_index_and_what_a_mask() -> None:
    prover, (numbers, mask, size) = setting(torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.bool))
    assert is_index(prover, numbers)
    assert is_index(prover, [0, 1])
    assert not is_index(prover, [True, False])
    assert not is_index(prover, size)
    assert is_mask(prover, mask)
    assert is_mask(prover, True)
    assert is_mask(prover, [True, False])
    assert not is_mask(prover, numbers)
    assert not is_mask(prover, 1)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (lambda x: x[1:3], [slice(1, 3), ALL]),
        (lambda x: x[..., 0], [ALL, 0]),
        (lambda x: x[None, 0], [None, 0, ALL]),
        (lambda x: x.select(1, 2), [ALL, 2]),
        (lambda x: x.narrow(-1, 1, 2), [ALL, slice(1, 3)]),
        (lambda x: torch.ops.aten.slice.Tensor(x, 1, 1, 3, 2), [ALL, slice(1, 3, 2)]),
        (lambda x: torch.ops.aten.slice.Tensor(x), [slice(None, None, 1), ALL]),
        (lambda x: torch.ops.aten.select.int(x, -1, 2), [ALL, 2]),
    ],
)
def test_items_of_every_spelling(body: Body, expected: list[Any]) -> None:
    prover = proved(body, torch.randn(4, 5))
    assert index_items(prover, returned(prover.graph)) == expected


SAME: dict[str, tuple[Body, tuple[int, ...]]] = {
    "a token": (lambda x: x[:, -1], (0,)),
    "the last tokens": (lambda x: x[:, -2:, :], (0,)),
    "a feature": (lambda x: x[..., 0], (0,)),
    "tokens by list": (lambda x: x[:, [0, 2]], (0,)),
    "new dims": (lambda x: x[None, :, None], (1,)),
    "index_select elsewhere": (lambda x: torch.index_select(x, 1, torch.tensor([0, 1])), (0,)),
    "steps elsewhere": (lambda x: x[:, ::2], (0,)),
    "whole": (lambda x: x[:], (0,)),
}


@pytest.mark.parametrize("op", SAME)
def test_indices_of_other_dims_keep_the_seed(op: str) -> None:
    body, dims = SAME[op]
    prover = proved(body, torch.randn(4, 5, 6))
    rows = prover.rows(returned(prover.graph))
    assert isinstance(rows, Label), rows
    assert (rows.map, rows.dims) == (prover.seed, dims)


PICKED: dict[str, tuple[Body, list[int]]] = {
    "slice": (lambda x: x[1:3], [1, 2]),
    "last": (lambda x: x[-2:], [B - 2, B - 1]),
    "step": (lambda x: x[::7], [0, 7, 14, 21, 28]),
    "list in a tuple": (lambda x: x[[2, 0, 2], :], [2, 0, 2]),
    "one": (lambda x: x[3], [3]),
    "one of each": (lambda x: x[3, 0], [3]),
    "narrow": (lambda x: x.narrow(0, 1, 2), [1, 2]),
    "select": (lambda x: x.select(0, -1), [B - 1]),
    "index_select": (lambda x: torch.index_select(x, 0, torch.arange(2)), [0, 1]),
    "index tensor": (lambda x: x[torch.arange(3, device=x.device)], [0, 1, 2]),
    "aten.index": (lambda x: torch.ops.aten.index.Tensor(x, [torch.arange(2, device=x.device)]), [0, 1]),
    "paired indices": (lambda x: x[torch.arange(3, device=x.device), torch.zeros(3, dtype=torch.long)], [0, 1, 2]),
    "slice by a size": (lambda x: x[: x.shape[0] // 2], list(range(B // 2))),
}


@pytest.mark.parametrize("op", PICKED)
def test_indices_of_requests_pick_from_the_map(op: str) -> None:
    body, expected = PICKED[op]
    _, ids = mapping_of(rows_of(body, torch.randn(4, 5, 6)))
    assert ids == expected


@pytest.mark.parametrize("spelling", ["getitem", "index_select", "gather", "embedding"])
def test_indices_from_the_caller_pick_unknown_requests(spelling: str) -> None:
    """Positions that only the call knows: distinct requests, which no other map equals by luck."""
    bodies: dict[str, Body] = {
        "getitem": lambda x, i: x[i],
        "index_select": lambda x, i: x.index_select(0, i),
        "gather": lambda x, i: x[:, 0].gather(0, i),
        "embedding": lambda x, i: x[i, :],
    }
    rows = rows_of(bodies[spelling], torch.randn(4, 5), torch.tensor([0, 2, 1, 3, 0, 1]), batch_dims={"x": 0})
    assert isinstance(rows, Label)
    for ids in rows.map.ids:
        assert len(set(ids.tolist())) == len(ids)
        assert ids.tolist() != sorted(ids.tolist())


def test_a_table_read_by_ids_has_the_rows_of_the_ids() -> None:
    model = holder(lambda self, ids: self.w[ids], w=weight(7, 3))
    assert mapping_of(rows_of(model, torch.randint(0, 7, (4, 5)))) == ((0,), list(range(B)))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda x: x.gather(0, torch.zeros_like(x, dtype=torch.long)), "along the request dim"),
        (lambda x: x[:, x.argmax(0)], "argmax over the request dim"),
        (lambda x: x + x[torch.arange(x.shape[0]).flip(0)], "different requests"),
    ],
)
def test_indices_that_mix(body: Body, reason: str) -> None:
    assert reason in reason_of(rows_of(body, torch.randn(4, 5)))


def test_a_choice_per_request_is_the_requests_own() -> None:
    """x[b, argmax(x[b])]: the index carries the same rows as what it indexes."""
    body = lambda x: x[torch.arange(x.shape[0], device=x.device), x.argmax(1)]  # noqa: E731
    assert mapping_of(rows_of(body, torch.randn(4, 5))) == ((0,), list(range(B)))


@pytest.mark.parametrize("body", [lambda x: x[x > 0], lambda x: x[x.sum(1) > 0], lambda x: x.masked_select(x > 0)])
def test_masks_have_no_size_to_prove_anything_at(body: Body) -> None:
    with pytest.raises(RowsNotProvenError):
        rows_of(body, torch.randn(4, 5))


def test_a_bare_list_is_one_index() -> None:
    assert mapping_of(rows_of(lambda x: x[[2, 0, 2]], torch.randn(4, 5, 6))) == ((0,), [2, 0, 2])
