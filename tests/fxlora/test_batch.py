"""`adapters=` of a call: the slot of each request or token, and every wrong list, name, type or tensor refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fxlora.batch import slots_of
from fxlora.errors import (
    BatchError,
    BatchGranularityError,
    BatchSizeError,
    BatchTypeError,
    FxloraError,
    UnknownAdapterError,
)
from fxlora.pool import AdapterPool
from tests.fxlora.peft_sites import make_site
from tests.fxlora.test_pool import make_bound


@pytest.fixture(scope="module")
def pool() -> Iterator[AdapterPool]:
    """Four slots; sql in 0, docs in 2, slots 1 and 3 empty."""
    site = make_site("fc", torch.randn(5, 6))
    pool = AdapterPool((site,), digest=0xBA7C4, max_adapters=4, max_rank=8)
    for name in ("sql", "gone", "docs"):
        pool.load(name, make_bound({site: 4}))
    pool.unload("gone")
    yield pool
    pool.close()


def per_request(adapters: Any, pool: AdapterPool, batch: int = 3) -> torch.Tensor:
    return slots_of(adapters, pool, request_dims=(0,), sizes=(batch,))


def per_token(adapters: Any, pool: AdapterPool, batch: int = 2, tokens: int = 3) -> torch.Tensor:
    return slots_of(adapters, pool, request_dims=(0, 1), sizes=(batch, tokens))


@pytest.mark.parametrize(
    ("adapters", "slots"),
    [
        (None, [-1, -1, -1]),
        ("docs", [2, 2, 2]),
        (["sql", None, "docs"], [0, -1, 2]),
        (("docs", "docs", None), [2, 2, -1]),
        (torch.tensor([2, -1, 0]), [2, -1, 0]),
        (torch.tensor([2, -1, 0], dtype=torch.int8), [2, -1, 0]),
    ],
)
def test_per_request(pool: AdapterPool, adapters: Any, slots: list[int]) -> None:
    got = per_request(adapters, pool)
    assert got.dtype == torch.int32
    assert got.tolist() == slots


@pytest.mark.parametrize(
    ("adapters", "slots"),
    [
        (None, [[-1] * 3] * 2),
        ("docs", [[2] * 3] * 2),
        (["sql", None], [[0] * 3, [-1] * 3]),
        ([["sql", None, "docs"], ["docs", "docs", "sql"]], [[0, -1, 2], [2, 2, 0]]),
        (["docs", ("sql", None, None)], [[2, 2, 2], [0, -1, -1]]),
        (torch.tensor([[0, 2, -1], [-1, -1, 2]]), [[0, 2, -1], [-1, -1, 2]]),
    ],
)
def test_per_token(pool: AdapterPool, adapters: Any, slots: list[list[int]]) -> None:
    got = per_token(adapters, pool)
    assert got.dtype == torch.int32
    assert got.shape == (2, 3)
    assert got.tolist() == slots


def test_empty_batches(pool: AdapterPool) -> None:
    assert per_request([], pool, batch=0).shape == (0,)
    assert per_request("sql", pool, batch=0).shape == (0,)
    assert per_token([[], []], pool, tokens=0).shape == (2, 0)


@pytest.mark.parametrize("adapters", [[["sql"] * 3] * 3, ["sql", ["docs"], None], [[], [], []]])
def test_nesting_on_a_module_built_per_request_names_the_way_out(pool: AdapterPool, adapters: Any) -> None:
    with pytest.raises(BatchGranularityError, match=r"adapters\[[01]\] is a list.*batch_dims=\(0, 1\)"):
        per_request(adapters, pool)


def test_nesting_deeper_than_two_dims(pool: AdapterPool) -> None:
    with pytest.raises(BatchGranularityError, match=r"adapters\[0\]\[0\] is a list.*dims \(0, 1\)"):
        per_token([[["sql"], None, None], None], pool)


@pytest.mark.parametrize("adapters", [["sql"], ["sql"] * 4, []])
def test_wrong_number_of_requests(pool: AdapterPool, adapters: Any) -> None:
    with pytest.raises(BatchSizeError, match=rf"adapters has {len(adapters)} entries; dim 0 of the inputs has 3"):
        per_request(adapters, pool)


def test_wrong_number_of_tokens(pool: AdapterPool) -> None:
    with pytest.raises(BatchSizeError, match=r"adapters\[1\] has 2 entries; dim 1 of the inputs has 3"):
        per_token([None, ["sql", "docs"]], pool)


@pytest.mark.parametrize("adapters", ["typo", ["sql", "typo", None], ["sql", "gone", None]])
def test_names_not_loaded_list_what_is(pool: AdapterPool, adapters: Any) -> None:
    with pytest.raises(UnknownAdapterError, match=r"which is not loaded; loaded: \['sql', 'docs'\]"):
        per_request(adapters, pool)


@pytest.mark.parametrize("adapters", [3, [0, 1, 2], ["sql", True, None], {"a": 1}, [b"sql", None, None], iter("abc")])
def test_wrong_types(pool: AdapterPool, adapters: Any) -> None:
    with pytest.raises(BatchTypeError, match="expected an adapter's name, None or a list"):
        per_request(adapters, pool)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_tensors_that_are_no_slots(pool: AdapterPool, dtype: torch.dtype) -> None:
    with pytest.raises(BatchTypeError, match=str(dtype)):
        per_request(torch.zeros(3, dtype=dtype), pool)


def test_tensors_of_the_wrong_shape(pool: AdapterPool) -> None:
    with pytest.raises(BatchSizeError, match=r"shape \(3, 1\); the inputs ask for \(3,\)"):
        per_request(torch.zeros(3, 1, dtype=torch.int32), pool)
    with pytest.raises(BatchSizeError, match=r"shape \(2,\); the inputs ask for \(2, 3\)"):
        per_token(torch.zeros(2, dtype=torch.int32), pool)


@pytest.mark.parametrize("slot", [1, 3, 4, -2, 2**32])
def test_tensors_with_slots_not_in_use(pool: AdapterPool, slot: int) -> None:
    with pytest.raises(UnknownAdapterError, match=rf"slots \[{slot}\], which hold no adapter; in use: .*'docs': 2"):
        per_request(torch.tensor([0, slot, -1]), pool)


def test_dims_and_sizes_must_agree(pool: AdapterPool) -> None:
    with pytest.raises(BatchSizeError, match=r"request dims \(0, 1\) have 1 sizes"):
        slots_of(None, pool, request_dims=(0, 1), sizes=(3,))


def test_a_given_tensor_is_not_changed_or_shared(pool: AdapterPool) -> None:
    given = torch.tensor([0, 2, -1])
    got = per_request(given, pool)
    got[0] = 2
    assert given.tolist() == [0, 2, -1]


def test_the_device_of_the_answer(pool: AdapterPool) -> None:
    assert slots_of("sql", pool, request_dims=(0,), sizes=(3,)).device.type == "cpu"
    meta = torch.device("meta")
    assert slots_of("sql", pool, request_dims=(0,), sizes=(3,), device=meta).device == meta


def test_every_batch_error_is_one_family() -> None:
    for error in (BatchSizeError, BatchTypeError, BatchGranularityError, UnknownAdapterError):
        assert issubclass(error, BatchError)
        assert issubclass(error, FxloraError)
