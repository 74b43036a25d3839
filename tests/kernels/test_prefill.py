"""prefill against the reference: interpreted on the CPU with small tiles, on a GPU with the real ones."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from fxlora.kernels.ops import INTERPRET
from fxlora.kernels.prefill_tiles import PrefillTile
from fxlora.kernels.tiles import ShrinkTile
from tests.kernels.cases import HAS_CUDA, Case, assert_near, equal_bits, linear_call, make_case

pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.filterwarnings("ignore:invalid value encountered in matmul"),
    pytest.mark.skipif(not (HAS_CUDA or INTERPRET) or find_spec("triton") is None, reason="needs a GPU or interpreter"),
]
DEVICE = "cuda" if HAS_CUDA else "cpu"
DTYPES = (torch.bfloat16, torch.float16)
RANKS = (1, 8, 0, 16, 40, 16)
SHRINK = ShrinkTile(16, 64, 256, 1, 264, 4, 4, 4)
TILE = PrefillTile(*((32, 32, 32, 16, 4) if INTERPRET else (128, 256, 64, 16, 8)), 3, 1, (32, 3), SHRINK)
# Frobenius, over a whole output. The interpreter cuts bf16 off instead of rounding it.
ERROR = {torch.bfloat16: 8e-3 if INTERPRET else 4e-3, torch.float16: 6e-4}


def small_case(**options: Any) -> Case:
    sizes = (
        {"rows": 75, "features": 72, "outs": (40,)} if INTERPRET else {"rows": 1100, "features": 1032, "outs": (776,)}
    )
    return make_case(**{**sizes, "ranks": RANKS, "dtype": torch.bfloat16, "device": DEVICE, **options})


def run(case: Case, tile: PrefillTile = TILE) -> list[torch.Tensor]:
    """The outputs."""
    from fxlora.kernels.prefill import prefill

    return prefill(linear_call(case), tile)


def assert_right(case: Case, tile: PrefillTile = TILE) -> list[torch.Tensor]:
    found, truth, dtype = run(case, tile), case.expected(), case.x.dtype
    for y, expected in zip(found, truth, strict=True):
        assert y.dtype == dtype
        assert y.shape == expected.shape
        assert (y.float() - expected).norm() <= ERROR[dtype] * expected.norm()
    without = run(case.with_slots(torch.full_like(case.row_slots, -1)), tile)
    plain = (case.row_slots < 0).all(dim=1)
    assert equal_bits(found, without, plain)
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ["runs", "shuffled", "one"])
@pytest.mark.parametrize("bias", [False, True])
def test_orders_mixed_ranks_and_bias(bias: bool, order: str, dtype: torch.dtype) -> None:
    assert_right(small_case(order=order, bias=bias, dtype=dtype))


@pytest.mark.parametrize("order", ["runs", "shuffled"])
@pytest.mark.parametrize("width", [2, 3])
def test_several_adapters_per_row_with_coefficients(width: int, order: str) -> None:
    assert_right(small_case(width=width, order=order))


def test_one_slot_twice_in_a_row_adds_twice() -> None:
    case = small_case(width=2)
    assert_right(case.with_slots(torch.full_like(case.row_slots, 4)))


@pytest.mark.parametrize("ranks_at_once", [16, 32, 64])
def test_chunks_of_ranks(ranks_at_once: int) -> None:
    assert_right(small_case(ranks=(1, 33, 64, 100, 16), order="shuffled"), replace(TILE, BR=ranks_at_once))


@pytest.mark.parametrize("height", [16, 32])
def test_a_shrink_keeps_to_few_programs_unless_the_batch_has_many_tiles(height: int) -> None:
    case = small_case(rows=75, order="shuffled")
    shrink = replace(SHRINK, BM=height, slices=4 if height == 16 else 1, programs=5)
    plain = assert_right(case, replace(TILE, shrink=shrink))
    for few in (1, 4, 9):  # too few for these adapters, enough of them, more than there are
        found = assert_right(case, replace(TILE, shrink=replace(shrink, few=few)))
        assert equal_bits(plain, found, slice(None))


@pytest.mark.parametrize("features", [8, 32, 200])
@pytest.mark.parametrize("rows", [1, 32, 33])
def test_sizes_that_fit_no_tile(rows: int, features: int) -> None:
    assert_right(small_case(rows=rows, features=features, outs=(8, 40)))


def test_members_without_a_pool_are_base_only() -> None:
    case = small_case(outs=(40, 24), none_members=(0,))
    found = assert_right(case)
    assert_near(found[:1], [case.x.float() @ case.weights[0].float().T], torch.bfloat16)


def test_no_slot_no_adapter() -> None:
    case = small_case()
    assert_right(case.with_slots(torch.full_like(case.row_slots, -1)))
    assert_right(case.with_slots(torch.full_like(case.row_slots, 2)))  # rank 0


def test_a_row_keeps_its_bits_whatever_the_others_use() -> None:
    case = small_case(order="shuffled")
    mine = torch.arange(case.row_slots.shape[0], device=DEVICE) % 3 == 1
    before = run(case)
    for seed in range(3):
        others = torch.randint(-1, len(RANKS), case.row_slots.shape, generator=torch.Generator().manual_seed(seed))
        slots = torch.where(mine[:, None], case.row_slots, others.to(case.row_slots))
        assert equal_bits(before, run(case.with_slots(slots)), mine)


def test_what_is_wrong_with_one_adapter_stays_in_its_rows() -> None:
    case = small_case(order="shuffled")
    clean = run(case)
    pool = case.pools[0]
    assert pool is not None
    broken = 3
    pool.a[int(pool.start[broken])] = float("nan")
    pool.a[int(pool.start[broken]) + 1] = float("inf")
    others = (case.row_slots != broken).all(dim=1)
    assert equal_bits(clean, run(case), others)


def test_strided_weights_and_row_maps() -> None:
    case = small_case(width=2)
    wide = torch.cat([case.weights[0], case.weights[0]], dim=1)
    strided = replace(
        case,
        weights=[wide[:, : case.x.shape[1]]],
        row_slots=case.row_slots.t().contiguous().t(),
        row_coeffs=None if case.row_coeffs is None else case.row_coeffs.t().contiguous().t(),
    )
    assert equal_bits(run(case), run(strided), slice(None))


@pytest.mark.parametrize("slices", [1, 4])
@pytest.mark.parametrize("height", [32, 64])
def test_shrink_of_taller_tiles(height: int, slices: int) -> None:
    shrink = replace(SHRINK, BM=height, BK=128, slices=slices)
    for order in ("runs", "shuffled"):
        assert_right(small_case(order=order), replace(TILE, shrink=shrink))
    assert_right(small_case(ranks=(0, 0)), replace(TILE, shrink=shrink))


@pytest.mark.parametrize("none_members", [(), (1,), (0, 3)])
def test_members_share_a_launch(none_members: tuple[int, ...]) -> None:
    case = small_case(outs=(40, 8, 104, 24), none_members=none_members, bias=True, order="shuffled")
    assert_right(case)
    assert_right(case, replace(TILE, BN=TILE.BN // 2, programs=2))
