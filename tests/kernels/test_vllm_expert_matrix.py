"""vLLM's expert matrix (vllm/tests/lora/test_fused_moe_lora_kernel.py), re-posed through the fused op.

There: the adapters' part alone, every token with an adapter drawn below the last, one rank, slices side by side, 1e-2
absolute and relative. Here: base and adapters in one call, all slots and -1, mixed ranks up to the matrix's rank,
shared A and B among them, both forms of routing, every sampled row within the table of tolerances.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from fxlora.kernels import reference
from tests.kernels.cases import assert_near
from tests.kernels.expert_cases import LIMIT, ExpertCase, make_expert_case

HALF = (torch.float16, torch.bfloat16)


def check_sampled_rows(case: ExpertCase, samples: int = 12) -> None:
    """The whole call, compared on some rows: the reference goes row by row."""
    rows = sorted({*random.sample(range(len(case.x)), min(samples, len(case.x))), 0, len(case.x) - 1})
    experts = [case.row_experts[row] for row in rows]
    rest = (case.row_slots[rows], case.row_coeffs, experts, case.pool)
    truth = reference.lora_experts(case.x[rows], case.weight, case.bias, *rest)
    found = case.run()
    assert_near([found[rows]], [truth], case.x.dtype, LIMIT)
    assert not torch.equal(found, case.base())


def draw(
    tokens: int, top_k: int, experts: int, adapters: int, rank: int, sizes: tuple[int, int], dtype: torch.dtype,
    device: str,
) -> ExpertCase:  # fmt: skip
    """Every token through `top_k` different experts; ranks mixed, the highest in the last slot."""
    ranks = [random.choice([r for r in (0, 1, 8, 16, 32, rank) if r <= rank]) for _ in range(adapters - 1)] + [rank]
    case = make_expert_case(
        rows=tokens * top_k, experts=experts, features=sizes[0], out=sizes[1], ranks=ranks, dtype=dtype, device=device,
        shared=random.choices(("", "A", "B"), k=adapters), in_place=False,
    )  # fmt: skip
    ids = torch.rand(tokens, experts).topk(top_k).indices.flatten().to(device)
    slots = torch.randint(-1, adapters, (tokens, 1), dtype=torch.int32).repeat_interleave(top_k, 0).to(device)
    slots[-1] = adapters - 1
    case = replace(case, expert_ids=ids, row_slots=slots)
    if random.random() < 0.5:
        return case
    order = ids.argsort(stable=True)
    offsets = torch.bincount(ids, minlength=experts).cumsum(0)
    return replace(case, x=case.x[order], row_slots=slots[order], expert_ids=None, offsets=offsets)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("adapters", [4, 6, 16])
@pytest.mark.parametrize("top_k", [6, 12])
def test_a_tenth_of_the_widths(top_k: int, adapters: int, dtype: torch.dtype, device: str) -> None:
    for rank in (16, 32, 64):
        check_sampled_rows(draw(100, top_k, 64, adapters, rank, (204, 140), dtype, device))


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_few_of_the_matrix(dtype: torch.dtype, device: str) -> None:
    for tokens, top_k, experts, adapters, rank in ((2, 2, 64, 4, 16), (12, 2, 4, 4, 32)):
        check_sampled_rows(draw(tokens, top_k, experts, adapters, rank, (48, 40), dtype, device))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("adapters", [4, 6, 16])
@pytest.mark.parametrize("top_k", [6, 12])
def test_many_tokens(top_k: int, adapters: int, dtype: torch.dtype) -> None:
    for rank in (16, 32, 64):
        for slices in (1, 2):
            check_sampled_rows(draw(100, top_k, 64, adapters, rank, (2048, 1408 * slices), dtype, "cuda"))
            check_sampled_rows(draw(2048, top_k, 64, adapters, rank, (2048, 1408 * slices), dtype, "cuda"))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("experts", [64, 128])
@pytest.mark.parametrize("top_k", [1, 2])
def test_few_tokens(top_k: int, experts: int, dtype: torch.dtype, device: str) -> None:
    sizes = (2048, 1408) if device == "cuda" else (104, 72)
    for tokens in (1, 2, 4, 8):
        for adapters in (4, 8):
            for rank in (16, 32):
                check_sampled_rows(draw(tokens, top_k, experts, adapters, rank, sizes, dtype, device))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("rank", [128, 256])
def test_high_ranks(rank: int, dtype: torch.dtype, device: str) -> None:
    check_sampled_rows(draw(8, 2, 4, 3, rank, (256, 256), dtype, device))
    check_sampled_rows(draw(200, 2, 4, 3, rank, (256, 256), dtype, device))
