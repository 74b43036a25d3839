"""CPU bodies: the host plan, and that it is never stale."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch

from fxlora.kernels import cpu, ops
from fxlora.kernels.ops import INTERPRET
from tests.kernels.cases import assert_near, draw_slots, make_case, registered

pytestmark = pytest.mark.skipif(INTERPRET, reason="CPU bodies do not run under the interpreter")


def plan_of(slots: list[int], max_adapters: int = 4) -> cpu.HostPlan:
    row_slots = torch.tensor(slots, dtype=torch.int32)[:, None]
    return cpu.host_plan(ops.segment_rows(row_slots, max_adapters), row_slots)


def test_small_batches_go_row_by_row() -> None:
    assert plan_of([2, -1, 0, 2]) == cpu.HostPlan(4, ((0, 0, 2), (2, 0, 0), (3, 0, 2)), ())
    assert plan_of([-1] * cpu.SINGLE_ROWS) == cpu.HostPlan(4, (), ())


def test_adjacent_rows_are_sliced_in_blocks_and_the_rest_is_gathered_and_padded() -> None:
    plan = plan_of([1] * 36 + [3] * 5 + [-1] * 6 + [1] * 16)
    assert plan.single == ()
    found = [(b.slot, b.start, b.stop, b.rows.tolist(), b.padded.tolist()) for b in plan.blocks]
    assert found == [
        (1, 0, 16, [], []),
        (1, 16, 32, [], []),
        (1, 47, 63, [], []),
        (1, 0, -1, [32, 33, 34, 35], [32, 33, 34, 35] + [32] * 12),
        (3, 0, -1, list(range(36, 41)), [*range(36, 41), *[36] * 11]),
    ]


@pytest.mark.parametrize("rows", [17, 64, 65, 300, 600])
def test_every_gemm_of_a_batch_shape_has_the_same_rows(rows: int) -> None:
    for order in ("runs", "shuffled", "one"):
        row_slots = draw_slots(rows, 1, 3, order)
        plan = cpu.host_plan(ops.segment_rows(row_slots, 3), row_slots)
        sizes = {b.stop - b.start if b.stop >= 0 else b.padded.numel() for b in plan.blocks}
        assert sizes == {cpu.block_rows(rows)}


@pytest.mark.parametrize("rows", [8, 40])
@pytest.mark.parametrize("width", [1, 2])
def test_every_entry_is_planned_once(rows: int, width: int) -> None:
    row_slots = draw_slots(rows, width, 5, "shuffled")
    plan = cpu.host_plan(ops.segment_rows(row_slots, 5), row_slots)
    found = list(plan.single)
    for block in plan.blocks:
        of_block = range(block.start, block.stop) if block.stop >= 0 else block.rows.tolist()
        found += [(row, block.j, block.slot) for row in of_block]
    expected = [(t, j, s) for t, slots in enumerate(row_slots.tolist()) for j, s in enumerate(slots) if s >= 0]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("rows", [8, 40])
@pytest.mark.parametrize("inference", [False, True])
def test_segments_refilled_in_place_are_read_again(rows: int, inference: bool) -> None:
    case = make_case(rows=rows, ranks=(8, 8), order="shuffled")
    other = case.with_slots(torch.where(case.row_slots < 0, case.row_slots, 1 - case.row_slots))
    with torch.inference_mode(inference), registered(case.pools) as handle:
        segments = ops.segment_rows(case.row_slots, 2)
        assert_near(case.call(segments, handle), case.expected(), torch.float32)
        segments.data.copy_(ops.segment_rows(other.row_slots, 2))
        assert_near(other.call(segments, handle), other.expected(), torch.float32)


def test_threads_do_not_cross() -> None:
    cases = [make_case(rows=rows, order="shuffled") for rows in (8, 12, 30, 40)]
    truths = [case.run() for case in cases]
    wrong: list[int] = []

    def serve(index: int) -> None:
        for _ in range(50):
            if not torch.equal(cases[index].run()[0], truths[index][0]):
                wrong.append(index)

    threads = [threading.Thread(target=serve, args=(index % 4,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_slot_table_is_read_at_each_call() -> None:
    case = make_case(ranks=(4, 4), order="one")
    before = case.run()
    pool = case.pools[0]
    assert pool is not None
    pool.write(1, start=int(pool.start[1]), a_RK=torch.randn(2, 40), b_RN=torch.randn(2, 24), scaling=1.0)
    assert_near(case.run(), case.expected(), torch.float32)
    assert not torch.equal(case.run()[0], before[0])


def test_base_keeps_the_strides_promised_by_the_fake() -> None:
    case = make_case(rows=24)
    x = case.x.view(2, 12, 40).transpose(0, 1)
    assert replace(case, x=x).run()[0].is_contiguous()
