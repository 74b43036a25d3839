"""lora_embedding against the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fxlora.kernels.ops import INTERPRET
from tests.kernels.cases import DEVICES, DTYPES, HAS_CUDA, assert_right, make_case

pytestmark = pytest.mark.interpreted


@pytest.fixture(autouse=True, params=["short batch", "long batch"] if INTERPRET or HAS_CUDA else ["short batch"])
def both_triton_bodies(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs row by row and in tiles, whatever the length of its batch."""
    if request.param == "long batch":
        monkeypatch.setattr("fxlora.kernels.lora_embedding.ROW_ROWS", 0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 9, 40])
def test_mixed_ranks(rows: int, dtype: torch.dtype, device: str) -> None:
    assert_right(make_case("embedding", rows=rows, features=31, outs=(137,), dtype=dtype, device=device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [1, 2])
def test_shuffled_rows(width: int, device: str) -> None:
    assert_right(make_case("embedding", rows=40, width=width, order="shuffled", device=device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_id_dtypes_shapes_and_strides(dtype: torch.dtype, device: str) -> None:
    case = make_case("embedding", rows=24, device=device)
    ids = case.x.to(dtype)
    assert assert_right(replace(case, x=ids.view(2, 12)))[0].shape == (2, 12, 24)
    assert_right(replace(case, x=ids.repeat_interleave(2)[::2]))
    assert_right(replace(case, x=ids.view(4, 6).t()))
    weight = case.weights[0]
    assert_right(replace(case, weights=[weight.t().contiguous().t()]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_an_adapter_are_the_table_to_the_bit(dtype: torch.dtype, device: str) -> None:
    for rows in (9, 40):
        case = make_case("embedding", rows=rows, dtype=dtype, device=device, order="shuffled")
        none = case.row_slots[:, 0] < 0
        assert torch.equal(case.run()[0][none], F.embedding(case.x, case.weights[0])[none])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("width", [1, 2])
def test_infinities_of_one_adapter_stay_in_its_rows(width: int, value: float, device: str) -> None:
    case = make_case("embedding", rows=40, width=width, ranks=(8, 16, 3), order="shuffled", device=device)
    before, (pool,) = case.run()[0], case.pools
    assert pool is not None
    start = int(pool.start[1])
    pool.write(1, start=start, a_RK=torch.ones(16, 40), b_RN=torch.ones(16, 24), scaling=1.0)
    pool.b[start : start + 16] = value  # `write` would refuse it
    after, touched = case.run()[0], (case.row_slots == 1).any(1)
    assert torch.equal(after[~touched], before[~touched])
    assert not after[touched].isfinite().any()


@pytest.mark.parametrize("device", DEVICES)
def test_empty_batch_and_no_pool(device: str) -> None:
    case = make_case("embedding", device=device)
    assert replace(case.with_slots(case.row_slots[:0]), x=case.x[:0]).run()[0].shape == (0, 24)
    assert_right(make_case("embedding", none_members=(0,), device=device))


@pytest.mark.parametrize("device", DEVICES)
def test_id_outside_the_vocabulary_is_not_served(device: str) -> None:
    case = make_case("embedding", device=device, order="one")
    case.x[3] = 40
    if device == "cpu" and not INTERPRET:
        with pytest.raises(IndexError):
            case.run()
    else:
        found = case.run()[0]
        assert found[3].isnan().all()
        assert found[4].isfinite().all()


@settings(max_examples=8 if INTERPRET or HAS_CUDA else 40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.integers(0, 40),
    vocabulary=st.integers(1, 70),
    out=st.integers(1, 150),
    ranks=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    width=st.integers(1, 2),
    device=st.sampled_from(DEVICES),
)
def test_any_shape(rows: int, vocabulary: int, out: int, ranks: list[int], width: int, device: str) -> None:
    assert_right(
        make_case(
            "embedding", rows=rows, features=vocabulary, outs=(out,), ranks=ranks, width=width, order="shuffled",
            device=device,
        )
    )  # fmt: skip
