"""segment_rows: layout, and the tile formula that device bodies build on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fxlora.kernels import ops, reference
from fxlora.kernels.errors import OpInputError
from fxlora.kernels.ops import INTERPRET
from fxlora.kernels.segments import (
    TILE,
    segments_size,
    slot_starts_at,
    slots_of,
    tile_bound,
    tile_count_at,
    tile_firsts_at,
    tile_slots_at,
)
from tests.kernels.cases import DEVICES, draw_slots

pytestmark = pytest.mark.interpreted
ORDERS = st.sampled_from(["runs", "shuffled", "one"])


@settings(max_examples=15 if INTERPRET else 80, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.integers(0, 70),
    width=st.integers(1, 3),
    max_adapters=st.integers(1, 9),
    order=ORDERS,
    device=st.sampled_from(DEVICES),
)
def test_layout_is_that_of_the_reference(rows: int, width: int, max_adapters: int, order: str, device: str) -> None:
    slots = draw_slots(rows, width, max_adapters, order).to(device)
    segments = ops.segment_rows(slots, max_adapters)
    assert segments.dtype == torch.int32
    assert segments.numel() == segments_size(rows * width, max_adapters)
    assert torch.equal(segments, reference.segment_rows(slots, max_adapters))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 16, 17, 2048, 2049, 5000])
@pytest.mark.parametrize("order", ["shuffled", "one"])
def test_more_entries_than_one_block(rows: int, order: str, device: str) -> None:
    slots = draw_slots(rows, 1, 3, order).to(device)
    assert torch.equal(ops.segment_rows(slots, 3), reference.segment_rows(slots, 3))


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "max_adapters"), [(256, 512), (8192, 64), (65536, 512)])
@pytest.mark.parametrize("order", ["shuffled", "runs", "one"])
def test_many_entries_and_slots(rows: int, max_adapters: int, order: str) -> None:
    slots = draw_slots(rows, 1, max_adapters, order)
    found = ops.segment_rows(slots.cuda(), max_adapters)
    assert torch.equal(found.cpu(), ops.segment_rows(slots, max_adapters))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "max_adapters"), [(0, 1), (1, 1), (40, 3), (300, 30), (70, 600)])
def test_tiles_cover_each_entry_with_an_adapter_once(rows: int, max_adapters: int, device: str) -> None:
    slots = draw_slots(rows, 2, max_adapters, "shuffled").to(device)
    entries, flat = 2 * rows, slots.flatten().tolist()
    segments = ops.segment_rows(slots, max_adapters).tolist()
    starts = segments[slot_starts_at(entries) :][: max_adapters + 2]
    count = segments[tile_count_at(entries, max_adapters)]
    tile_slots = segments[tile_slots_at(entries, max_adapters) : tile_firsts_at(entries, max_adapters)]
    tile_firsts = segments[tile_firsts_at(entries, max_adapters) :]
    assert len(tile_slots) == len(tile_firsts) == tile_bound(entries, max_adapters, TILE)
    assert set(tile_slots[count:] + tile_firsts[count:]) <= {-1}
    covered = []
    for slot, first in zip(tile_slots[:count], tile_firsts[:count], strict=True):
        tile = segments[first : min(first + TILE, starts[slot + 1])]
        assert tile
        assert {flat[entry] for entry in tile} == {slot}
        covered += tile
    assert covered == segments[: starts[max_adapters]]
    assert sorted(covered) == [entry for entry, slot in enumerate(flat) if slot >= 0]


@given(entries=st.integers(0, 5000), max_adapters=st.integers(0, 600))
def test_the_size_tells_the_number_of_slots(entries: int, max_adapters: int) -> None:
    size = segments_size(entries, max_adapters)
    assert slots_of(size, entries) == max_adapters
    assert slots_of(size + 1, entries) == -1


@pytest.mark.parametrize("device", DEVICES)
def test_strides(device: str) -> None:
    slots = draw_slots(20, 4, 5, "shuffled").to(device)
    for view in (slots[:, ::2], slots[::3], slots.t(), slots[:1].expand(7, 4)):
        assert torch.equal(ops.segment_rows(view, 5), reference.segment_rows(view, 5))


@pytest.mark.skipif(INTERPRET, reason="device bodies take such a slot for no adapter")
@pytest.mark.parametrize("slot", [-2, 4])
def test_slots_out_of_range_are_refused_on_cpu(slot: int) -> None:
    with pytest.raises(OpInputError, match=f"{slot}"):
        ops.segment_rows(torch.tensor([[0], [slot], [3]], dtype=torch.int32), 4)


@pytest.mark.gpu
def test_slots_out_of_range_mean_no_adapter_on_a_device() -> None:
    slots = torch.tensor([[0], [-7], [4], [3]], dtype=torch.int32, device="cuda")
    assert torch.equal(ops.segment_rows(slots, 4), reference.segment_rows(slots, 4))


@given(counts=st.lists(st.integers(0, 50), min_size=1, max_size=8), none=st.integers(0, 20), height=st.integers(1, 40))
def test_tiles_of_slots_never_overlap_and_the_bound_holds(counts: list[int], none: int, height: int) -> None:
    taken: list[int] = []
    start = 0
    for slot, count in enumerate(counts):
        first = start // height + slot
        taken += range(first, first + -(-count // height))
        start += count
    assert len(set(taken)) == len(taken)
    bound = tile_bound(start + none, len(counts), height)
    assert all(tile < bound for tile in taken)
