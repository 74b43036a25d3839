"""ExpertPool: what is written where, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxlora.kernels.errors import OpInputError, PoolWriteError
from fxlora.kernels.expert_call import ExpertSite
from fxlora.kernels.registry import ExpertPool, SitePool, expert_pool_of, register_runtime, unregister_runtime
from tests.kernels.cases import DEVICES

SIZES: dict[str, Any] = {
    "num_experts": 3, "pool_rows_a": 20, "pool_rows_b": 22, "in_features": 6, "out_features": 5, "max_adapters": 4,
    "dtype": torch.bfloat16,
}  # fmt: skip


def allocate(device: str = "cpu", max_rank: int | None = None) -> ExpertPool:
    return ExpertPool.allocate(**SIZES, device=device, max_rank=max_rank)


def tensors_of(pool: ExpertPool) -> list[torch.Tensor]:
    return [pool.a, pool.b, pool.a_start, pool.a_step, pool.b_start, pool.b_step, pool.rank, pool.scaling]


def write(pool: ExpertPool, slot: int = 1, **changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """An ordinary adapter of rank 2, unless changed."""
    given: dict[str, Any] = {"a_start": 3, "a_step": 2, "b_start": 5, "b_step": 2, "rank": 2, "scaling": 0.3, **changes}
    a_rows = given.pop("a_rows", torch.randn(6, 6))
    b_rows = given.pop("b_rows", torch.randn(6, 5))
    pool.write(slot, a_rows=a_rows, b_rows=b_rows, **given)
    return a_rows, b_rows


def test_bytes_needed_are_the_bytes_taken() -> None:
    assert ExpertPool.bytes_needed(**SIZES, device="cpu") == allocate().bytes == 2 * (20 * 6 + 22 * 5) + 24 * 4


@pytest.mark.parametrize("device", DEVICES)
def test_write_publishes_one_slot_in_place(device: str) -> None:
    pool = allocate(device)
    addresses = [tensor.data_ptr() for tensor in tensors_of(pool)]
    a_rows, b_rows = write(pool)
    assert torch.equal(pool.a[3:9].cpu(), a_rows.bfloat16())
    assert torch.equal(pool.b[5:11].cpu(), b_rows.bfloat16())
    assert [t.tolist() for t in (pool.a_start, pool.a_step, pool.b_start, pool.b_step, pool.rank)] == [
        [0, 3, 0, 0], [0, 2, 0, 0], [0, 5, 0, 0], [0, 2, 0, 0], [0, 2, 0, 0],
    ]  # fmt: skip
    assert pool.scaling.tolist() == [0, pytest.approx(0.3), 0, 0]
    for expert in range(3):
        extent = pool.extent(1, expert)
        assert extent is not None
        assert torch.equal(extent.a.cpu(), a_rows[2 * expert : 2 * expert + 2].bfloat16())
        assert torch.equal(extent.b.cpu(), b_rows[2 * expert : 2 * expert + 2].bfloat16())
    pool.clear(1)
    assert pool.rank.tolist() == [0] * 4
    assert pool.extent(1, 0) is None
    assert addresses == [tensor.data_ptr() for tensor in tensors_of(pool)]


def test_a_shared_side_is_held_once() -> None:
    pool = allocate()
    a_rows, _ = write(pool, a_step=0, a_rows=torch.randn(2, 6))
    for expert in range(3):
        extent = pool.extent(1, expert)
        assert extent is not None
        assert torch.equal(extent.a, a_rows.bfloat16())
    assert not pool.a[5:].any()
    _, b_rows = write(pool, b_step=0, b_rows=torch.randn(2, 5), b_start=0)
    extents = [pool.extent(1, expert) for expert in range(3)]
    assert all(extent is not None and torch.equal(extent.b, b_rows.bfloat16()) for extent in extents)


def test_rank_one_has_a_neighbour_in_its_window() -> None:
    pool = allocate()
    a_rows, _ = write(pool, rank=1, a_step=1, b_step=1, a_rows=torch.randn(3, 6), b_rows=torch.randn(3, 5))
    for expert in range(3):
        extent = pool.extent(1, expert)
        assert extent is not None
        assert extent.window.shape == (2, 6)
        assert torch.equal(extent.window[extent.ranks], a_rows[expert : expert + 1].bfloat16())


def test_rank_zero_is_an_empty_slot() -> None:
    pool = allocate()
    write(pool, rank=0, a_step=0, b_step=0, a_rows=torch.empty(0, 6), b_rows=torch.empty(0, 5))
    assert pool.rank.tolist() == [0] * 4
    assert pool.extent(1, 2) is None


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"slot": 4}, "slot 4"),
        ({"slot": -1}, "slot -1"),
        ({"rank": 9, "a_step": 9, "b_step": 9}, "rank 9"),
        ({"a_step": 3}, "step of A is 3"),
        ({"b_step": 1}, "step of B is 1"),
        ({"a_step": 0}, r"A is \(6, 6\).*\[2, 6\]"),
        ({"a_rows": torch.randn(6, 7)}, r"A is \(6, 7\)"),
        ({"b_rows": torch.randn(5, 5)}, r"B is \(5, 5\)"),
        ({"a_start": 15}, "rows 15 to 21 of A are outside the 20"),
        ({"b_start": 17}, "rows 17 to 23 of B are outside the 22"),
        ({"a_start": -1}, "rows -1"),
        ({"b_rows": torch.full((6, 5), torch.nan)}, "not finite"),
        ({"b_rows": torch.full((6, 5), 3.4e38).double() * 10}, "not finite"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_changes(changes: dict[str, Any], match: str) -> None:
    pool = allocate(max_rank=8)
    write(pool, 1)
    before, extents = [tensor.clone() for tensor in tensors_of(pool)], list(pool.extents)
    with pytest.raises(PoolWriteError, match=match):
        write(pool, **{"slot": 1, **changes})
    assert all(torch.equal(tensor, old) for tensor, old in zip(tensors_of(pool), before, strict=True))
    assert pool.extents == extents
    with pytest.raises(PoolWriteError, match="slot 7"):
        pool.clear(7)


def test_the_highest_rank_is_that_of_the_smaller_pool_unless_told() -> None:
    assert allocate().rank_bound == 20
    assert allocate(max_rank=8).rank_bound == 8


def test_the_highest_rank_loaded_is_known() -> None:
    """Calls of a site with high ranks are remembered apart from those with low ones."""
    pool = ExpertPool.allocate(**{**SIZES, "pool_rows_a": 200, "pool_rows_b": 200}, device="cpu")
    site = ExpertSite(pool)
    low, found = site.replays, []
    high = {"rank": 33, "a_step": 33, "b_step": 33, "a_rows": torch.randn(99, 6), "b_rows": torch.randn(99, 5)}
    for change in (lambda: write(pool), lambda: write(pool, 2, **high), lambda: pool.clear(1), lambda: write(pool, 2)):
        change()
        found.append((pool.highest_rank, site.replays is low))
    assert found == [(2, True), (33, False), (33, False), (2, True)]


def test_a_handle_finds_its_pool() -> None:
    pool = allocate()
    linear = SitePool.allocate(
        kind="linear", pool_rows=4, in_features=2, out_features=2, max_adapters=1, dtype=torch.float32, device="cpu"
    )
    handles = register_runtime(0xE0E0, [(pool,), (None,), (linear,), (linear, None)])
    assert expert_pool_of(handles[0]) is pool
    assert expert_pool_of(handles[1]) is None
    for handle in handles[2:]:
        with pytest.raises(OpInputError, match="not of an expert weight"):
            expert_pool_of(handle)
    unregister_runtime(handles)
