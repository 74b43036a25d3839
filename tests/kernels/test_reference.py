"""The reference itself, against the textbook: a base weight with the adapter merged in."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fxlora.kernels import reference
from tests.kernels.cases import make_case


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_each_row_is_the_merged_model_of_its_adapter(kind: str) -> None:
    case = make_case(kind, rows=12, ranks=(4, 2, 0), order="shuffled")
    pool, weight = case.pools[0], case.weights[0]
    assert pool is not None
    found = case.expected()[0]
    for row, slot in enumerate(case.row_slots[:, 0].tolist()):
        merged = weight
        if slot >= 0 and pool.rank[slot]:
            rows = slice(int(pool.start[slot]), int(pool.start[slot] + pool.rank[slot]))
            delta_NK = pool.scaling[slot] * (pool.b[rows].t() @ pool.a_PK[rows])
            merged = weight + (delta_NK if kind == "linear" else delta_NK.t())
        expected = F.linear(case.x[row], merged) if kind == "linear" else merged[case.x[row]]
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-5)


def test_several_adapters_per_row_sum_with_their_coefficients() -> None:
    case = make_case(rows=6, width=2)
    assert case.row_coeffs is not None
    base = case.with_slots(torch.full_like(case.row_slots, -1)).expected()[0]
    parts = []
    for j in range(2):
        column, coeffs = case.row_slots[:, j : j + 1], case.row_coeffs[:, j : j + 1]
        parts.append(reference.lora_linear(case.x, case.weights, [None], column, coeffs, case.pools)[0] - base)
    torch.testing.assert_close(case.expected()[0], base + parts[0] + parts[1], rtol=1e-4, atol=1e-5)


def test_result_is_fp32_for_any_input() -> None:
    assert make_case(dtype=torch.bfloat16).expected()[0].dtype == torch.float32
