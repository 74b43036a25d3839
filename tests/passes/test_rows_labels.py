"""The lattice of rows: equal maps are one map, joins agree or mix, labels move with their dims."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import fx

from fxlora.passes.rows.labels import Label, MapTable, Mixed, RowMap, broadcast_ids, join, remap, shift


class Setting:
    """A graph of three nodes and a table over it; maps in two worlds, `times` copies of a range in the second."""

    def __init__(self) -> None:
        graph = fx.Graph()
        self.nodes = [graph.placeholder(name) for name in "abc"]
        self.table = MapTable({None: -1, **{n: i for i, n in enumerate(self.nodes)}})

    def map(self, *values: Sequence[int], at: int | None = None, text: str = "map") -> RowMap:
        origin = None if at is None else self.nodes[at]
        return self.table.intern([torch.tensor(v) for v in values], (), origin, None, text)


@pytest.fixture
def setting() -> Setting:
    return Setting()


def label(*values: Sequence[int] | torch.Tensor, dims: tuple[int, ...] = (0,)) -> Label:
    return Label(RowMap(None, (), None, tuple(torch.as_tensor(v) for v in values)), dims)


def test_maps_equal_in_every_world_are_one(setting: Setting) -> None:
    assert setting.map([0, 1], [0, 1, 2]) is setting.map([0, 1], [0, 1, 2])


@pytest.mark.parametrize("other", [([0, 1], [0, 1, 1]), ([1, 0], [0, 1, 2]), ([[0, 1]], [0, 1, 2]), ([0, 1],)])
def test_maps_that_differ_in_one_world_or_in_shape_are_two(setting: Setting, other: tuple[list[int], ...]) -> None:
    assert setting.map([0, 1], [0, 1, 2]) is not setting.map(*other)


def test_the_map_that_can_be_computed_first_stands_for_all(setting: Setting) -> None:
    late = setting.map([0, 1], at=2)
    early = setting.map([0, 1], at=0)
    assert setting.map([0, 1], at=1) is early
    assert setting.table.canonical(late) is early is not late


def test_only_maps_of_earlier_nodes_are_found(setting: Setting) -> None:
    made = setting.map([0, 1], at=1)
    ids = [torch.tensor([0, 1])]
    assert setting.table.find(ids, setting.nodes[2]) is made
    assert setting.table.find(ids, setting.nodes[1]) is None
    assert setting.table.find([torch.tensor([1, 0])], setting.nodes[2]) is None
    seed = setting.map([0, 1, 2])
    assert setting.table.before(setting.nodes[0]) == [seed]
    assert setting.table.before(setting.nodes[2]) == [made, seed]


def test_a_chain_reads_seed_first() -> None:
    seed = RowMap(None, (), None, (), "seed")
    assert RowMap(None, (RowMap(None, (seed,), None, (), "view"),), None, (), "pick").chain() == [
        "seed",
        "view",
        "pick",
    ]


def test_broadcast_ids_stand_at_their_dims() -> None:
    assert broadcast_ids(label([3, 4], dims=(1,)), 3, 0).shape == (1, 2, 1)
    two = label(torch.arange(6).reshape(2, 3), dims=(0, 2))
    assert broadcast_ids(two, 3, 0).tolist() == [[[0, 1, 2]], [[3, 4, 5]]]


def test_shift_and_remap_leave_what_is_no_label() -> None:
    mixed = Mixed("why")
    assert shift(mixed, 1) is mixed
    assert shift(None, 1) is None
    assert shift(label([0], dims=(0,)), 2).dims == (2,)
    assert remap(mixed, lambda d: d + 1) is mixed
    assert remap(label([0], dims=(1,)), lambda d: d - 1).dims == (0,)


def test_join_of_nothing_and_of_one() -> None:
    one = label([0, 1])
    assert join([], 1, 1, "op") is None
    assert join([None, None], 1, 1, "op") is None
    assert join([None, one, None], 1, 1, "op") is one
    assert join([one, one], 1, 1, "op") is one


def test_the_first_mixed_wins() -> None:
    first = Mixed("first")
    assert join([label([0, 1]), first, Mixed("second")], 1, 1, "op") is first


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (label([0, 1]), label([1, 0])),
        (label([0, 1], dims=(0,)), label([0, 1], dims=(1,))),
        (label([0, 0]), label([0, 1])),
        (label([0, 1], [0, 1, 2]), label([0, 1], [0, 1, 1])),
        (label([0, 1]), label([0, 1, 2])),
        (label([[0, 1], [0, 1]], dims=(0, 1)), label([0, 1], dims=(0,))),
    ],
    ids=["values", "dims", "a part", "second world", "sizes", "crosswise"],
)
def test_rows_of_different_requests_mix(left: Label, right: Label) -> None:
    worlds = len(left.map.ids)
    for pair in ([left, right], [right, left]):
        rows = join(pair, 2, worlds, "add")
        assert isinstance(rows, Mixed)
        assert rows.reason == "add combines rows of different requests"


def test_equal_rows_join_to_the_smallest_map_that_covers_the_result() -> None:
    """[B] beside [B, T] of the same requests: the map of [B] says it all."""
    small, large = label([0, 1], dims=(0,)), label([[0, 0, 0], [1, 1, 1]], dims=(0, 1))
    assert join([small, large], 2, 1, "add") is small
    assert join([large, small], 2, 1, "add") is small


def test_a_map_of_size_one_does_not_stand_for_a_larger_one() -> None:
    single, full = label([0], dims=(0,)), label([0, 0, 0], dims=(0,))
    assert join([single, full], 1, 1, "add") is full
    assert isinstance(join([single, label([0, 1], dims=(0,))], 1, 1, "add"), Mixed)
