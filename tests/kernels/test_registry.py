"""Pools, slot tables and handles."""

from __future__ import annotations

import pytest
import torch

from fxlora.kernels.errors import FxloraError, PlanMismatchError, PoolWriteError, RuntimeGoneError
from fxlora.kernels.registry import (
    Group,
    PoolKind,
    SitePool,
    derived_of,
    pools_of,
    register_runtime,
    unregister_runtime,
)
from tests.kernels.cases import DEVICES


def allocate(kind: PoolKind = "linear", device: str = "cpu", max_rank: int | None = None) -> SitePool:
    return SitePool.allocate(
        kind=kind, pool_rows=40, in_features=6, out_features=5, max_adapters=3, dtype=torch.bfloat16, device=device,
        max_rank=max_rank,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_bytes_needed_are_the_bytes_taken(kind: PoolKind) -> None:
    needed = SitePool.bytes_needed(
        kind=kind, pool_rows=40, in_features=6, out_features=5, max_adapters=3, dtype=torch.bfloat16, device="cpu"
    )
    assert needed == allocate(kind).bytes == 40 * 11 * 2 + 3 * 12


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_write_publishes_one_slot_in_place(kind: PoolKind, device: str) -> None:
    pool = allocate(kind, device)
    assert pool.a.shape == ((40, 6) if kind == "linear" else (6, 40))
    addresses = [t.data_ptr() for t in (pool.a, pool.b, pool.start, pool.rank, pool.scaling)]
    a_RK, b_RN = torch.randn(4, 6), torch.randn(4, 5)
    pool.write(2, start=16, a_RK=a_RK, b_RN=b_RN, scaling=0.3)
    assert torch.equal(pool.a_PK[16:20].cpu(), a_RK.bfloat16())
    assert torch.equal(pool.b[16:20].cpu(), b_RN.bfloat16())
    assert pool.rank.tolist() == [0, 0, 4]
    assert pool.start.tolist() == [0, 0, 16]
    assert pool.scaling.tolist() == [0, 0, pytest.approx(0.3)]
    extent = pool.extents[2]
    assert extent is not None
    assert torch.equal(extent.a if kind == "linear" else extent.a.t(), pool.a_PK[16:20])
    pool.clear(2)
    assert pool.rank.tolist() == [0, 0, 0]
    assert pool.extents == [None] * 3
    assert addresses == [t.data_ptr() for t in (pool.a, pool.b, pool.start, pool.rank, pool.scaling)]


@pytest.mark.parametrize(("start", "rank", "width"), [(0, 1, 2), (39, 1, 2), (37, 3, 3)])
def test_window_holds_a_and_stays_inside_the_pool(start: int, rank: int, width: int) -> None:
    pool = allocate()
    a_RK = torch.randn(rank, 6)
    pool.write(0, start=start, a_RK=a_RK, b_RN=torch.randn(rank, 5), scaling=1.0)
    extent = pool.extents[0]
    assert extent is not None
    assert extent.window.shape == (width, 6)
    assert torch.equal(extent.window[extent.ranks], a_RK.bfloat16())


def test_rank_zero_is_an_empty_slot() -> None:
    pool = allocate()
    pool.write(1, start=0, a_RK=torch.empty(0, 6), b_RN=torch.empty(0, 5), scaling=1.0)
    assert pool.rank.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("slot", "start", "a_shape", "b_shape", "match"),
    [
        (3, 0, (4, 6), (4, 5), "slot 3"),
        (-1, 0, (4, 6), (4, 5), "slot -1"),
        (0, 37, (4, 6), (4, 5), "rows 37 to 41"),
        (0, -1, (4, 6), (4, 5), "rows -1"),
        (0, 0, (4, 7), (4, 5), r"\(4, 7\)"),
        (0, 0, (4, 6), (3, 5), r"\(3, 5\)"),
        (0, 0, (9, 6), (9, 5), "rank 9"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_changes(
    slot: int, start: int, a_shape: tuple[int, int], b_shape: tuple[int, int], match: str
) -> None:
    pool = allocate(max_rank=8)
    pool.write(0, start=0, a_RK=torch.ones(2, 6), b_RN=torch.ones(2, 5), scaling=1.0)
    before = pool.a.clone()
    with pytest.raises(PoolWriteError, match=match):
        pool.write(slot, start=start, a_RK=torch.randn(a_shape), b_RN=torch.randn(b_shape), scaling=1.0)
    assert torch.equal(pool.a, before)
    assert pool.rank.tolist() == [2, 0, 0]
    with pytest.raises(PoolWriteError, match="slot 7"):
        pool.clear(7)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [torch.nan, -torch.inf, torch.finfo(torch.float32).max])
def test_b_that_is_not_finite_in_the_dtype_of_the_pool_is_refused_and_nothing_changes(
    value: float, device: str
) -> None:
    pool = allocate(device=device)
    pool.write(0, start=16, a_RK=torch.ones(2, 6), b_RN=torch.ones(2, 5), scaling=1.0)
    tensors = (pool.a, pool.b, pool.start, pool.rank, pool.scaling)
    before, extents = [tensor.clone() for tensor in tensors], list(pool.extents)
    b_RN = torch.ones(4, 5)
    b_RN[1, 2] = b_RN[3, 0] = value
    for slot in (0, 1):
        with pytest.raises(PoolWriteError, match=r"2 of 20 values of B are not finite in torch\.bfloat16"):
            pool.write(slot, start=0, a_RK=torch.zeros(4, 6), b_RN=b_RN, scaling=2.0)
        assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, before, strict=True))
        assert pool.extents == extents


def test_a_may_be_anything_and_rows_past_the_rank_stay() -> None:
    pool = allocate()
    pool.b.fill_(7)
    pool.write(0, start=16, a_RK=torch.full((3, 6), torch.inf), b_RN=torch.ones(3, 5), scaling=1.0)
    assert (pool.b[19:] == 7).all()
    assert (pool.b[:16] == 7).all()


def test_what_was_derived_from_a_group_is_made_once_and_forgotten_with_its_handle() -> None:
    pool, made = allocate(), list[Group]()

    def make(group: Group) -> int:
        made.append(group)
        return len(made)

    (handle,) = register_runtime(0xABC, [(pool, None)])
    assert [derived_of(handle, make) for _ in range(3)] == [1, 1, 1]
    assert made == [(pool, None)]
    unregister_runtime([handle])
    with pytest.raises(RuntimeGoneError):
        derived_of(handle, make)
    (again,) = register_runtime(0xABC, [(None,)])
    assert derived_of(again, make) == 2
    assert made[1] == (None,)
    unregister_runtime([again])


def test_handles_name_plan_runtime_and_group() -> None:
    first, second = allocate(), allocate()
    digest = 0xDEADBEEF
    handles = register_runtime(digest, [(first, None), (second,)])
    again = register_runtime(digest, [(second,)])
    assert [handle >> 31 for handle in (*handles, *again)] == [digest] * 3
    assert [(handle >> 15) & 0xFFFF for handle in (*handles, *again)] == [0, 0, 1]
    assert [handle & 0x7FFF for handle in (*handles, *again)] == [0, 1, 0]
    assert all(0 <= handle < 1 << 63 for handle in handles)
    assert pools_of(handles[0]) == (first, None)
    assert pools_of(again[0]) == (second,)
    unregister_runtime(handles)
    unregister_runtime(handles)
    for handle in handles:
        with pytest.raises(RuntimeGoneError, match="0xdeadbeef"):
            pools_of(handle)
    later = register_runtime(digest, [(first,)])
    assert not {*later} & {*handles, *again}
    unregister_runtime([*again, *later])


def test_handles_of_others_are_refused() -> None:
    handles = register_runtime(77, [(allocate(),)])
    for wrong, match in ((handles[0] + 1, "no group 1"), (handles[0] + (1 << 15), "has 1 runtimes"), (5, "no runtime")):
        with pytest.raises(PlanMismatchError, match=match):
            pools_of(wrong)
    unregister_runtime(handles)


@pytest.mark.parametrize("digest", [-1, 1 << 32])
def test_digest_has_32_bits(digest: int) -> None:
    with pytest.raises(ValueError, match="32 bits"):
        register_runtime(digest, [])


def test_errors_are_one_family() -> None:
    for error in (RuntimeGoneError, PlanMismatchError, PoolWriteError):
        assert issubclass(error, FxloraError)
