"""Moves of rows: how dims of a view hold the same elements, and the map after each op that moves elements.

Shape letters: B requests (29 in the first world), T and H other dims.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fxlora.passes.rows.labels import Label
from fxlora.passes.rows.moves import factor
from fxlora.passes.rows.worlds import UnknownShapeError
from tests.passes.build import mapping_of, proved, reason_of, returned, rows_of

Body = Callable[..., Any]
B = 29


@pytest.mark.parametrize(
    ("source", "target", "groups"),
    [
        ((6, 4), (6, 4), [((0,), (0,)), ((1,), (1,))]),
        ((6, 4), (2, 3, 4), [((0,), (0, 1)), ((1,), (2,))]),
        ((2, 3, 4), (6, 4), [((0, 1), (0,)), ((2,), (1,))]),
        ((6, 4), (24,), [((0, 1), (0,))]),
        ((6, 4), (8, 3), [((0, 1), (0, 1))]),
        ((6, 4), (6, 1, 4), [((0,), (0,)), ((), (1,)), ((1,), (2,))]),
        ((6, 1, 4), (6, 4), [((0,), (0,)), ((1,), ()), ((2,), (1,))]),
        ((1, 6), (6, 1), [((0,), ()), ((1,), (0,)), ((), (1,))]),
        ((), (1, 1), [((), (0,)), ((), (1,))]),
        ((1,), (), [((0,), ())]),
        ((4, 6, 5), (2, 2, 30), [((0,), (0, 1)), ((1, 2), (2,))]),
        ((5, 5), (5, 5), [((0,), (0,)), ((1,), (1,))]),
    ],
)
def test_factor(source: tuple[int, ...], target: tuple[int, ...], groups: list[Any]) -> None:
    assert factor(source, target) == groups
    flipped = [(gi, go) for go, gi in factor(target, source)]
    assert flipped == groups or 1 in (*source, *target), "the same groups both ways"


def test_factor_groups_are_minimal_and_hold_the_same_elements() -> None:
    """On random pairs: each dim is in one group, in order, and the products agree."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        primes = [2, 3, 5, 2, 3][: int(torch.randint(1, 6, (), generator=generator))]

        def split(primes: list[int] = primes) -> list[int]:
            dims = [1]
            for prime in primes:
                if torch.rand((), generator=generator) < 0.5:
                    dims.append(1)
                dims[-1] *= prime
            return dims

        source, target = split(), split()
        groups = factor(source, target)
        for side, dims in enumerate((source, target)):
            assert [d for g in groups for d in g[side]] == list(range(len(dims)))
        for gi, go in groups:
            left, right = [source[d] for d in gi], [target[d] for d in go]
            assert torch.Size(left).numel() == torch.Size(right).numel()
            inner = {torch.Size(left[:i]).numel() for i in range(1, len(left))}
            assert not (inner - {1}) & {torch.Size(right[:i]).numel() for i in range(1, len(right))}, "could be split"


@pytest.mark.parametrize(("source", "target"), [((0, 4), (4, 0)), ((4,), (0,))])
def test_a_view_of_nothing_tells_nothing(source: tuple[int, ...], target: tuple[int, ...]) -> None:
    with pytest.raises(UnknownShapeError):
        factor(source, target)


def repeated(times: int) -> list[int]:
    return [i for i in range(B) for _ in range(times)]


KEPT: dict[str, tuple[Body, tuple[int, ...]]] = {
    "transpose": (lambda x: x.transpose(0, 1), (1,)),
    "transpose of other dims": (lambda x: x.transpose(1, 2), (0,)),
    "negative dims": (lambda x: x.transpose(-3, -1), (2,)),
    "permute": (lambda x: x.permute(2, 0, 1), (1,)),
    "permute by tuple": (lambda x: torch.permute(x, (1, 2, 0)), (2,)),
    "swapaxes": (lambda x: x.swapaxes(0, 2), (2,)),
    "movedim": (lambda x: x.movedim(0, -1), (2,)),
    "movedim of two": (lambda x: x.movedim((0, 1), (1, 2)), (1,)),
    "movedim across": (lambda x: x.movedim((1, 0), (0, 2)), (2,)),
    "moveaxis back": (lambda x: torch.moveaxis(torch.moveaxis(x, 0, 1), 1, 0), (0,)),
    "mT": (lambda x: x.mT, (0,)),
    "T": (lambda x: x[:, :, 0].T, (1,)),
    "t": (lambda x: x[:, :, 0].t(), (1,)),
    "unsqueeze in front": (lambda x: x.unsqueeze(0), (1,)),
    "unsqueeze at the end": (lambda x: x.unsqueeze(-1), (0,)),
    "squeeze": (lambda x: x.unsqueeze(0).squeeze(0), (0,)),
    "None index": (lambda x: x[None], (1,)),
    "expand": (lambda x: x.unsqueeze(0).expand(5, -1, -1, -1), (1,)),
    "broadcast_to": (lambda x: torch.broadcast_to(x, (3, x.shape[0], x.shape[1], x.shape[2])), (1,)),
    "flatten of other dims": (lambda x: x.flatten(1), (0,)),
    "view by sizes": (lambda x: x.view(x.size(0), -1), (0,)),
    "unflatten": (lambda x: x.flatten(1).unflatten(1, (-1, x.shape[2])), (0,)),
    "split heads": (lambda x: x.view(x.shape[0], x.shape[1], 2, 3).transpose(1, 2), (0,)),
    "there and back": (lambda x: x.reshape(-1, x.shape[2]).reshape(x.shape), (0,)),
    "repeat elsewhere": (lambda x: x.repeat(1, 2, 1), (0,)),
    "repeat with more dims": (lambda x: x.repeat(2, 1, 1, 1), (1,)),
    "cat elsewhere": (lambda x: torch.cat([x, x * 2], 1), (0,)),
    "cat with what has no rows": (lambda x: torch.cat([x, torch.zeros_like(x)], -1), (0,)),
    "stack": (lambda x: torch.stack([x, x], 0), (1,)),
    "chunk elsewhere": (lambda x: x.chunk(2, -1)[1], (0,)),
    "split elsewhere": (lambda x: torch.split(x, [2, 4], 2)[0], (0,)),
    "unbind elsewhere": (lambda x: x.unbind(2)[3], (0,)),
    "repeat_interleave elsewhere": (lambda x: x.repeat_interleave(2, 1), (0,)),
}


@pytest.mark.parametrize("op", KEPT)
def test_moves_that_keep_the_seed(op: str) -> None:
    """The map is the seed itself, at the dim where the requests went: no node is made for it."""
    body, dims = KEPT[op]
    prover = proved(body, torch.randn(4, 5, 6))
    rows = prover.rows(returned(prover.graph))
    assert isinstance(rows, Label), rows
    assert (rows.map, rows.dims) == (prover.seed, dims)


MADE: dict[str, tuple[Body, tuple[int, ...], Callable[[int], list[int]]]] = {
    "tokens flattened": (lambda x: x.reshape(-1, x.shape[2]), (0,), lambda t: repeated(t)),
    "all flattened": (lambda x: x[..., :2].flatten(), (0,), lambda t: repeated(t * 2)),
    "tokens first": (lambda x: x.transpose(0, 1).reshape(-1, x.shape[2]), (0,), lambda t: list(range(B)) * t),
    "repeat": (lambda x: x.repeat(3, 1, 1), (0,), lambda t: list(range(B)) * 3),
    "tile": (lambda x: torch.tile(x, (2, 1, 1)), (0,), lambda t: list(range(B)) * 2),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, 0), (0,), lambda t: repeated(2)),
    "negative dim": (lambda x: torch.repeat_interleave(x, 2, dim=-3), (0,), lambda t: repeated(2)),
    "cat": (lambda x: torch.cat([x, x]), (0,), lambda t: list(range(B)) * 2),
    "cat of halves": (lambda x: torch.cat([x[1:], x[:1]]), (0,), lambda t: [*range(1, B), 0]),
    "vstack": (lambda x: torch.vstack([x, x]), (0,), lambda t: list(range(B)) * 2),
    "stack of requests": (lambda x: torch.stack([x[3], x[0]]), (0,), lambda t: [3, 0]),
    "stack of parts": (lambda x: torch.stack([x[1:], x[:-1]]), (0, 1), lambda t: [*range(1, B), *range(B - 1)]),
    "cat of requests": (lambda x: torch.cat([x[3], x[0]]), (0,), lambda t: [3] * t + [0] * t),
    "beams": (lambda x: x.unsqueeze(1).expand(-1, 2, -1, -1).reshape(-1, 5, 6), (0,), lambda t: repeated(2)),
}


@pytest.mark.parametrize("op", MADE)
def test_moves_that_make_a_map(op: str) -> None:
    body, dims, expected = MADE[op]
    example = torch.randn(4, 5, 6) if op == "beams" else torch.randn(4, 3, 6)
    prover = proved(body, example)
    tokens = prover.shape(next(iter(prover.graph.nodes)), 0)[1]
    assert mapping_of(prover.rows(returned(prover.graph))) == (dims, expected(tokens))


def test_parts_of_the_batch_are_parts_of_the_map() -> None:
    prover = proved(lambda x: torch.cat([x.tensor_split(2)[1], x.tensor_split(2)[0]]), torch.randn(4, 6))
    dims, ids = mapping_of(prover.rows(returned(prover.graph)))
    assert (dims, sorted(ids), ids[0]) == ((0,), list(range(B)), 15)


def test_a_request_alone_has_a_map_of_no_dims() -> None:
    assert mapping_of(rows_of(lambda x: x[2].relu(), torch.randn(4, 6))) == ((), [2])


def test_a_split_that_undoes_an_expansion_gives_the_seed_back() -> None:
    """[B, T, H] -> [B * T, H] -> [B, T, H]: constant along T again."""
    prover = proved(lambda x: x.reshape(-1, x.shape[2]).view(x.shape[0], x.shape[1], -1), torch.randn(4, 5, 6))
    rows = prover.rows(returned(prover.graph))
    assert rows == Label(prover.seed, (0,))


def test_equal_maps_by_different_ways_are_one_map() -> None:
    prover = proved(
        lambda x: (x.reshape(-1, x.shape[2]), x.flatten(0, 1), x[:, :, 0].reshape(-1)), torch.randn(4, 5, 6)
    )
    output = next(n for n in prover.graph.nodes if n.op == "output").args[0]
    assert len({id(prover.rows(n).map) for n in output}) == 1


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda x: torch.cat([x, torch.zeros_like(x)]), "with and without a request"),
        (lambda x: x.repeat_interleave(2), "flattened rows"),
        (lambda x: torch.stack([x, x.flip(0)]), "flip along the request dim"),
        (lambda x: torch.stack([x[1:], torch.ones_like(x[1:])]) + x[1:] * x[:-1], "different requests"),
        (lambda x: torch.stack([x[1:], x[:-1]]).sum(0), "over the request dim"),
        (lambda x: torch.cat([x[1:], x[:-1]], 1).sum(1), "over the request dim"),
        (lambda x: torch.vstack([x[0, 0], x[1, 0]]), "too few dims"),
        (lambda x: x.view(torch.int32), "another dtype"),
    ],
)
def test_moves_that_mix(body: Body, reason: str) -> None:
    assert reason in reason_of(rows_of(body, torch.randn(4, 6)))


def test_a_reason_names_the_op_and_its_place() -> None:
    assert "at flip (node flip" in reason_of(rows_of(lambda x: x.flip(0).relu(), torch.randn(4, 6)))


def test_what_has_no_request_stays_without() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(6, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.w.t().reshape(-1).repeat(x.shape[0], 1)

    assert rows_of(Positions(), torch.randn(4, 6)) is None
