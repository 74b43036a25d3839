"""segment_experts: layout, against rows sorted by Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fxlora.kernels import expert_segments as layout
from fxlora.kernels import ops, reference
from fxlora.kernels.errors import OpInputError
from fxlora.kernels.ops import INTERPRET
from tests.kernels.cases import DEVICES
from tests.kernels.expert_cases import make_expert_case

pytestmark = pytest.mark.interpreted


def check_table(
    slots: torch.Tensor, offsets: torch.Tensor | None, ids: torch.Tensor | None, experts: int, max_adapters: int
) -> None:
    """Every part of the table, from the rows one by one."""
    rows = len(slots)
    table = ops.segment_experts(slots, offsets, ids, experts, max_adapters)
    assert table.dtype == torch.int32
    assert table.numel() == layout.expert_segments_size(rows, experts, max_adapters, ids is None)
    assert layout.is_in_place(table.numel()) == (ids is None)
    found = table.tolist()
    of_row = [experts if expert is None else expert for expert in reference.experts_of(rows, offsets, ids, experts)]
    order = sorted(range(rows), key=of_row.__getitem__)
    assert found[:rows] == order
    assert found[layout.row_experts_at(rows) :][:rows] == of_row
    starts = [sum(other < expert for other in of_row) for expert in range(experts + 2)]
    assert found[layout.expert_starts_at(rows) :][: experts + 2] == starts
    of_position = [sorted({slot for slot in slots[row].tolist() if slot >= 0}) for row in order]
    height, bound = layout.tile_height(rows, experts), layout.tile_bound(rows, experts, 16)
    tiles = check_tiles(found[layout.tile_count_at(rows, experts) :], bound, height, starts)
    if height >= layout.SLOTS_FROM:
        listed = found[layout.tile_slots_at(rows, experts) :]
        check_slots(listed, tiles, height, starts, of_position, max_adapters)
    if layout.has_high_tiles(rows, experts):
        bound = layout.tile_bound(rows, experts, layout.HIGH)
        tiles = check_tiles(found[layout.high_count_at(rows, experts) :], bound, layout.HIGH, starts)
        listed = found[layout.high_slots_at(rows, experts, max_adapters) :]
        check_slots(listed, tiles, layout.HIGH, starts, of_position, max_adapters)


def check_tiles(found: list[int], bound: int, height: int, starts: list[int]) -> list[tuple[int, int]]:
    """A list from its count on. -> (expert, first position) of each tile."""
    experts, rows = len(starts) - 2, starts[-1]
    tiles = [(e, first) for e in range(experts + 1) for first in range(starts[e], starts[e + 1], height)]
    assert len(tiles) <= min(rows, layout.tile_bound(rows, experts, height))
    assert found[0] == len(tiles)
    unused = [-1] * (bound - len(tiles))
    assert found[1:][:bound] == [expert for expert, _ in tiles] + unused
    assert found[1 + bound :][:bound] == [first for _, first in tiles] + unused
    return tiles


def check_slots(
    found: list[int], tiles: list[tuple[int, int]], height: int, starts: list[int], of_position: list[list[int]],
    max_adapters: int,
) -> None:  # fmt: skip
    """The slots of each tile."""
    for tile, (expert, first) in enumerate(tiles):
        mine = of_position[first : min(first + height, starts[expert + 1])] if expert < len(starts) - 2 else []
        used = sorted({slot for slots in mine for slot in slots})
        assert found[tile * max_adapters :][:max_adapters] == used + [-1] * (max_adapters - len(used))


@settings(max_examples=20 if INTERPRET else 80, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.integers(0, 90),
    experts=st.integers(1, 7),
    width=st.integers(1, 3),
    max_adapters=st.integers(1, 6),
    in_place=st.booleans(),
    device=st.sampled_from(DEVICES),
)
def test_layout(rows: int, experts: int, width: int, max_adapters: int, in_place: bool, device: str) -> None:
    case = make_expert_case(
        rows=rows, experts=experts, width=width, ranks=(1,) * max_adapters, in_place=in_place, features=2, out=2,
        device=device,
    )  # fmt: skip
    check_table(case.row_slots, case.offsets, case.expert_ids, experts, max_adapters)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize(
    ("rows", "experts"), [(2100, 2), (3000, 40), (300, 1), (260, 2), (113, 1), (5000, 300), (5000, 40)]
)
def test_more_rows_than_one_block(rows: int, experts: int, in_place: bool, device: str) -> None:
    if INTERPRET and experts > 2:
        pytest.skip("slow")
    case = make_expert_case(
        rows=rows, experts=experts, ranks=(1, 1, 1), in_place=in_place, features=2, out=2, has_pool=False, device=device
    )
    check_table(case.row_slots, case.offsets, case.expert_ids, experts, 3)


def test_heights_follow_from_the_rows_of_an_expert() -> None:
    assert [layout.tile_height(rows, 8) for rows in (1, 32, 33, 128, 129, 896, 897, 1536, 1537, 10**6)] == [
        16, 16, 32, 32, 128, 128, 64, 64, 128, 128,
    ]  # fmt: skip
    assert [rows for rows in range(2000) if layout.has_high_tiles(rows, 8)] == list(range(897, 1153))


def test_offsets_that_no_row_follows_and_that_pass_the_last_row(device: str) -> None:
    slots = torch.zeros(10, 1, dtype=torch.int32, device=device)
    for ends in ([0, 0, 0], [3, 3, 7], [0, 10, 10], [4, 12, 15]):
        offsets = torch.tensor(ends, device=device)
        check_table(slots, offsets.clamp(max=10), None, 3, 2)
        beyond = ops.segment_experts(slots, offsets, None, 3, 2)[: layout.tile_slots_at(10, 3)]
        assert torch.equal(beyond, ops.segment_experts(slots, offsets.clamp(max=10), None, 3, 2)[: len(beyond)])


class Table(torch.nn.Module):
    def forward(self, slots: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return ops.segment_experts(slots, None, ids, 4, 3)


def test_one_graph_serves_any_number_of_rows() -> None:
    def inputs(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(rows, 1, dtype=torch.int32), torch.arange(rows) % 5

    rows = torch.export.Dim("rows")
    exported = torch.export.export(Table(), inputs(12), dynamic_shapes=({0: rows}, {0: rows})).module()
    for count in (12, 13, 500):
        assert exported(*inputs(count)).numel() == layout.expert_segments_size(count, 4, 3, in_place=False)


@pytest.mark.skipif(INTERPRET, reason="device bodies take such a slot for no adapter")
def test_slots_out_of_range_are_refused_on_cpu() -> None:
    with pytest.raises(OpInputError, match="-2"):
        ops.segment_experts(torch.full((3, 1), -2, dtype=torch.int32), None, torch.zeros(3, dtype=torch.int64), 2, 4)
