"""Bits: at a fixed batch shape a row's result depends neither on what the other rows use nor on when it is computed."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from fxlora.kernels.ops import INTERPRET
from tests.kernels.cases import DEVICES, Case, draw_slots, equal_bits, make_case

KINDS = ("linear", "logits", "embedding")
ROWS = (1, 6, 24) if INTERPRET else (1, 2, 8, 15, 16, 17, 20, 33, 64, 100, 300)
WIDTHS = (17, 40) if INTERPRET else (1, 3, 7, 16, 17, 40, 100, 192, 576, 577, 1536)


def random_case(kind: str, rows: int, dtype: torch.dtype, device: str) -> Case:
    return make_case(
        kind,
        rows=rows,
        features=random.choice(WIDTHS),
        outs=[random.choice(WIDTHS) for _ in range(2 if kind == "linear" else 1)],
        ranks=[0, *random.choices((1, 2, 3, 4, 8, 12, 16, 24, 32, 64) if not INTERPRET else (1, 3, 8, 20), k=4)],
        dtype=dtype,
        device=device,
        bias=kind != "embedding" and random.random() < 0.5,
        width=random.choice((1, 1, 2)),
    )


@pytest.mark.interpreted
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", ROWS)
def test_neighbours_do_not_change_a_row(rows: int, kind: str, dtype: torch.dtype, device: str) -> None:
    for _ in range(1 if INTERPRET else 8):
        case = random_case(kind, rows, dtype, device)
        kept = torch.tensor(random.sample(range(rows), max(1, rows // 8)), device=device)
        first = case.run()
        for order in ("runs", "shuffled", "one", "shuffled"):
            slots = draw_slots(rows, case.row_slots.shape[1], case.max_adapters, order).to(device)
            slots[kept] = case.row_slots[kept]
            found = case.with_slots(slots).run()
            assert equal_bits(found, first, kept), (order, case.row_slots[kept].tolist())


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.skipif(INTERPRET, reason="threads of the CPU bodies")
@pytest.mark.parametrize("threads", [1, 3, 4, 16], indirect=True)
@pytest.mark.parametrize("features", [577, 1536])
@pytest.mark.parametrize("rows", [24, 48, 100])
def test_nor_do_they_with_other_numbers_of_threads(rows: int, features: int, threads: int) -> None:
    for ranks in ((1, 2, 0, 8), (24, 17, 100, 0), (256, 16, 12, 4)):
        case = make_case(rows=rows, features=features, outs=(192,), ranks=ranks, order="shuffled")
        kept, first = torch.arange(0, rows, 7), case.run()
        for order in ("runs", "shuffled", "one"):
            slots = draw_slots(rows, 1, 4, order)
            slots[kept] = case.row_slots[kept]
            assert equal_bits(case.with_slots(slots).run(), first, kept), f"{threads} threads, ranks {ranks}, {order}"


@pytest.mark.interpreted
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", ROWS)
def test_rows_without_an_adapter_have_the_bits_of_nothing_loaded(rows: int, kind: str, device: str) -> None:
    for order in ("runs", "shuffled"):
        case = random_case(kind, rows, torch.float32, device)
        case = case.with_slots(draw_slots(rows, case.row_slots.shape[1], case.max_adapters, order).to(device))
        found = case.run()
        none = (case.row_slots < 0).all(1)
        rank_zero = case.with_slots(torch.zeros_like(case.row_slots)).run()
        for slot in range(case.max_adapters):
            for pool in case.pools:
                assert pool is not None
                pool.clear(slot)
        assert equal_bits(found, case.run(), none)
        assert equal_bits(rank_zero, case.run(), slice(None))


@pytest.mark.skipif(INTERPRET, reason="torch's own kernels are the base of the CPU bodies alone")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_rows_without_an_adapter_have_the_bits_of_plain_torch_on_cpu(rows: int, dtype: torch.dtype) -> None:
    case = random_case("linear", rows, dtype, "cpu")
    none = (case.row_slots < 0).all(1)
    plain = [F.linear(case.x, weight, bias) for weight, bias in zip(case.weights, case.biases, strict=True)]
    assert equal_bits(case.run(), plain, none)


@pytest.mark.skipif(INTERPRET, reason="slow")
@pytest.mark.parametrize("device", DEVICES)
def test_position_in_the_batch_does_not_change_what_the_adapter_adds(device: str) -> None:
    for rows in (16, 33, 100):
        case = make_case(rows=rows, features=577, outs=(64,), ranks=(8, 16), device=device, order="shuffled")
        case.x[:] = case.x[0].clone()
        case.weights[0].zero_()
        found = case.run()[0]
        for slot in (0, 1):
            same = found[case.row_slots[:, 0] == slot]
            assert (same == same[:1]).all()


@pytest.mark.interpreted
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_two_runs_are_equal(kind: str, device: str) -> None:
    for rows in (5, 40):
        case = random_case(kind, rows, torch.float32, device)
        assert equal_bits(case.run(), case.run(), slice(None))
