"""Bits of expert weights: with the same shape and the same routing, a row does not depend on what the others use.

On a GPU the routing of the others does not matter either.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from fxlora.kernels.ops import INTERPRET
from tests.kernels.cases import DEVICES, HAS_CUDA
from tests.kernels.expert_cases import ExpertCase, draw_experts, make_expert_case

SHAPES = ((9, 3), (40, 2)) if INTERPRET else ((1, 3), (5, 2), (16, 4), (17, 4), (40, 4), (60, 2), (150, 2), (400, 2))


def random_case(rows: int, experts: int, dtype: torch.dtype, device: str) -> ExpertCase:
    return make_expert_case(
        rows=rows,
        experts=experts,
        features=random.choice((17, 40) if INTERPRET else (7, 40, 192, 577)),
        out=random.choice((17, 40) if INTERPRET else (3, 40, 192, 576)),
        ranks=(0, 1, 8, 20, 3),
        dtype=dtype,
        device=device,
        in_place=random.random() < 0.5,
        width=random.choice((1, 1, 2)),
        bias=random.random() < 0.5,
        shared=random.choice(((), ("A", ""), ("", "B"))),
    )


@pytest.mark.interpreted
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "experts"), SHAPES)
def test_neighbours_do_not_change_a_row(rows: int, experts: int, dtype: torch.dtype, device: str) -> None:
    for _ in range(1 if INTERPRET else 6):
        case = random_case(rows, experts, dtype, device)
        kept = torch.tensor(random.sample(range(rows), max(1, rows // 8)), device=device)
        first = case.run()
        for runs in (1, rows):
            slots = torch.randint(-1, 5, case.row_slots.shape, dtype=torch.int32).to(device)
            slots = slots[:1].expand_as(slots).clone() if runs > 1 else slots
            slots[kept] = case.row_slots[kept]
            found = case.with_slots(slots).run()
            assert torch.equal(found[kept], first[kept])


@pytest.mark.interpreted
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "experts"), SHAPES)
def test_rows_without_an_adapter_have_the_bits_of_nothing_loaded(rows: int, experts: int, device: str) -> None:
    case = random_case(rows, experts, torch.float32, device)
    none = (case.row_slots < 0).all(1)
    found = case.run()
    rank_zero = case.with_slots(torch.zeros_like(case.row_slots)).run()
    assert case.pool is not None
    for slot in range(case.max_adapters):
        case.pool.clear(slot)
    assert torch.equal(found[none], case.run()[none])
    assert torch.equal(rank_zero, case.run())


@pytest.mark.skipif(INTERPRET, reason="torch's own kernels are the base of the CPU body alone")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_without_an_adapter_have_the_bits_of_torch_on_cpu(dtype: torch.dtype) -> None:
    for rows, experts in SHAPES:
        case = make_expert_case(rows=rows, experts=experts, dtype=dtype, missing=False)
        assert case.offsets is not None
        ends = case.offsets.tolist()
        found = case.base()
        for expert, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            assert torch.equal(found[start:end], torch.mm(case.x[start:end], case.weight[expert].t()))


@pytest.mark.skipif(not HAS_CUDA, reason="the CPU body multiplies all rows of an expert at once")
def test_nor_does_the_routing_of_the_others_on_a_gpu() -> None:
    for rows, experts in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            case = make_expert_case(
                rows=rows, experts=experts, in_place=False, dtype=dtype, device="cuda", features=192
            )
            assert case.expert_ids is not None
            kept = torch.arange(0, rows, 3, device="cuda")
            ids = draw_experts(rows, experts).to("cuda")
            ids[kept] = case.expert_ids[kept]
            assert torch.equal(replace(case, expert_ids=ids).run()[kept], case.run()[kept])
