"""lora_linear against the reference, on every device; the interpreted Triton bodies through test_interpreter.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fxlora.kernels.ops import INTERPRET
from tests.kernels.cases import DEVICES, DTYPES, HAS_CUDA, Case, assert_right, equal_bits, make_case

pytestmark = pytest.mark.interpreted
EXAMPLES = 8 if INTERPRET else 12 if HAS_CUDA else 60  # each shape compiles anew on a GPU


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 5, 16, 17, 70])
def test_mixed_ranks_members_and_bias(rows: int, dtype: torch.dtype, device: str) -> None:
    assert_right(make_case(rows=rows, features=45, outs=(40, 19), dtype=dtype, device=device, bias=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("order", ["runs", "shuffled", "one"])
@pytest.mark.parametrize("width", [1, 2, 3])
def test_orders_and_several_adapters_per_row(width: int, order: str, device: str) -> None:
    assert_right(make_case(rows=40, width=width, order=order, device=device))


@pytest.mark.parametrize("device", DEVICES)
def test_coefficients_at_one_adapter_per_row(device: str) -> None:
    case = make_case(device=device)
    assert_right(replace(case, row_coeffs=torch.randn(24, 1, device=device)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [8, 40])
def test_one_slot_twice_in_a_row_adds_twice(rows: int, device: str) -> None:
    case = make_case(rows=rows, width=2, device=device)
    assert_right(case.with_slots(torch.ones_like(case.row_slots)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ranks", [(1, 256), (1, 2, 3, 5, 7, 11, 13), (64, 0, 24, 100)], ids=str)
def test_ranks(ranks: tuple[int, ...], device: str) -> None:
    assert_right(make_case(rows=35, ranks=ranks, device=device, order="shuffled"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("features", "out"), [(1, 1), (3, 130), (130, 3), (64, 64), (65, 15)])
def test_widths_that_fit_no_tile(features: int, out: int, device: str) -> None:
    for rows in (3, 33):
        assert_right(make_case(rows=rows, features=features, outs=(out,), ranks=(4, 2), device=device))


@pytest.mark.parametrize("device", DEVICES)
def test_members_without_a_pool_are_base_only(device: str) -> None:
    case = make_case(outs=(24, 16, 8), none_members=(1,), device=device, bias=True)
    found = assert_right(case)
    assert torch.equal(found[1], case.base()[1])


@pytest.mark.parametrize("device", DEVICES)
def test_group_without_any_pool(device: str) -> None:
    assert_right(make_case(outs=(24, 16), none_members=(0, 1), device=device))


def strided_variants(case: Case) -> dict[str, Case]:
    x, weight = case.x, case.weights[0]
    return {
        "x transposed": replace(case, x=x.t().contiguous().t()),
        "x every second column": replace(case, x=torch.stack([x, -x], 2).flatten(1)[:, ::2]),
        "x expanded": replace(case, x=x[:1].expand_as(x)),
        "weight [K, N] viewed as [N, K]": replace(case, weights=[weight.t().contiguous().t()]),
        "weight every second row": replace(case, weights=[weight.repeat_interleave(2, 0)[::2]]),
        "bias strided": replace(case, biases=[case.weights[0].new_ones(48)[::2]]),
        "row_slots strided": replace(case, row_slots=case.row_slots.repeat(1, 3)[:, ::3]),
        "row_slots expanded": replace(case, row_slots=case.row_slots[:1].expand_as(case.row_slots)),
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [7, 24])
def test_strides(rows: int, device: str) -> None:
    for variant in strided_variants(make_case(rows=rows, device=device, order="shuffled", ranks=(8, 4))).values():
        assert_right(variant)


@pytest.mark.parametrize("device", DEVICES)
def test_leading_dims_and_empty_batches(device: str) -> None:
    case = make_case(rows=24, outs=(24, 16), device=device)
    folded = replace(case, x=case.x.view(2, 3, 4, 40))
    assert [tuple(y.shape) for y in assert_right(folded)] == [(2, 3, 4, 24), (2, 3, 4, 16)]
    assert_right(replace(case.with_slots(case.row_slots[:1]), x=case.x[0]))
    empty = replace(case.with_slots(case.row_slots[:0]), x=case.x[:0].view(0, 5, 40))
    assert [tuple(y.shape) for y in empty.run()] == [(0, 5, 24), (0, 5, 16)]


@pytest.mark.parametrize("device", DEVICES)
def test_swapping_two_slots_changes_the_answer(device: str) -> None:
    case = make_case(rows=20, device=device, ranks=(8, 8), order="shuffled")
    swapped = case.with_slots(torch.where(case.row_slots < 0, case.row_slots, 1 - case.row_slots))
    found, other = assert_right(case)[0], assert_right(swapped)[0]
    used = case.row_slots[:, 0] >= 0
    assert not (found == other)[used].all(1).any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_are_new_memory_and_inputs_stay(dtype: torch.dtype, device: str) -> None:
    case = make_case(outs=(24, 24), dtype=dtype, device=device)
    before = (case.x.clone(), case.weights[0].clone(), case.row_slots.clone())
    first, second = case.run()
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
    assert first.is_contiguous()
    for tensor, copy in zip((case.x, case.weights[0], case.row_slots), before, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize("device", DEVICES)
def test_infinite_adapter_stays_in_its_rows(device: str) -> None:
    for rows in (8, 40):
        case = make_case(rows=rows, ranks=(8, 8), order="shuffled", device=device)
        pool = case.pools[0]
        assert pool is not None
        start = int(pool.start[0])
        pool.b[start : start + 8] = float("inf")
        others = case.row_slots[:, 0] != 0
        assert case.run()[0][others].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_half_precision_h_does_not_overflow(device: str) -> None:
    case = make_case(dtype=torch.float16, ranks=(8,), order="one", device=device)
    pool = case.pools[0]
    assert pool is not None
    pool.a.mul_(2000)
    pool.b.mul_(1 / 2000)
    pool.scaling.mul_(1000)
    pool.b.mul_(1 / 1000)
    extent = pool.extents[0]
    assert extent is not None
    pool.extents[0] = extent._replace(scaling=float(pool.scaling[0]))
    assert case.run()[0].isfinite().all()


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.integers(0, 40),
    features=st.integers(1, 70),
    outs=st.lists(st.integers(1, 50), min_size=1, max_size=3),
    ranks=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    width=st.integers(1, 2),
    bias=st.booleans(),
    order=st.sampled_from(["runs", "shuffled", "one"]),
    device=st.sampled_from(DEVICES),
)
def test_any_shape(
    rows: int, features: int, outs: list[int], ranks: list[int], width: int, bias: bool, order: str, device: str
) -> None:
    case = make_case(
        rows=rows, features=features, outs=outs, ranks=ranks, width=width, bias=bias, order=order, device=device
    )
    found = assert_right(case)
    assert equal_bits(found, case.run(), slice(None)), "two runs differ"
