"""Every Triton body of lora_linear, called directly on the same calls: against the reference and against each other.

Interpreted on the CPU with tiny tiles, so that few rows already make several tiles, splits and shares; compiled on a
GPU with the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from fxlora.kernels import ops
from fxlora.kernels.ops import INTERPRET
from fxlora.kernels.prefill_tiles import PrefillTile
from fxlora.kernels.segments import segments_size
from fxlora.kernels.tiles import (
    DecodeTiles,
    ExpandTile,
    FusedTiles,
    GemmTile,
    GemvTile,
    ShrinkTile,
    SingleTiles,
    VectorTile,
    general_tiles,
)
from tests.kernels.cases import (
    HAS_CUDA,
    TOLERANCE,
    Case,
    assert_right,
    equal_bits,
    linear_call,
    make_case,
    registered,
    row_errors,
)

pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.filterwarnings("ignore:invalid value encountered in matmul"),
    pytest.mark.skipif(not (HAS_CUDA or INTERPRET) or find_spec("triton") is None, reason="needs a GPU or interpreter"),
]
DEVICE = "cuda" if HAS_CUDA else "cpu"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# The interpreter cuts bf16 off instead of rounding it.
LIMIT = {**TOLERANCE, BF16: 1.2e-2} if INTERPRET else TOLERANCE

# Fewer programs than there is work, so that each loops.
SHRINK, VECTORS = ShrinkTile(16, 16, 32, 2, 3, 4, 2, 2), VectorTile(8, 64, 2, 5, 4)
EXPAND = ExpandTile(16, 16, 6, 4)
DECODE = {
    "plain": DecodeTiles(SHRINK, EXPAND, GemmTile(16, 16, 16, 1, False, 4, 2)),
    "swap": DecodeTiles(VECTORS, ExpandTile(32, 32, 1, 4), GemmTile(16, 32, 32, 1, True, 4, 2)),
    "split": DecodeTiles(VECTORS, EXPAND, GemmTile(32, 16, 16, 2, False, 4, 2)),
    "shared ranks": DecodeTiles(replace(SHRINK, shares=2), EXPAND, GemmTile(16, 16, 16, 1, False, 4, 2)),
    "split and swap": DecodeTiles(SHRINK, EXPAND, GemmTile(16, 16, 16, 2, True, 4, 2)),
}
ALONE = ShrinkTile(16, 16, 64, 1, 3, 4, 2, 4)
FUSED = {
    "plain": FusedTiles(ALONE, GemmTile(16, 16, 16, 1, False, 4, 2), 32, 2),
    "one tile of rows": FusedTiles(ALONE, GemmTile(256, 16, 32, 1, False, 4, 2), 16, 3),
    "swap": FusedTiles(replace(ALONE, BR=32), GemmTile(16, 64, 32, 1, True, 4, 2), 64, 3),
    "W by TMA": FusedTiles(ALONE, GemmTile(16, 32, 32, 1, False, 4, 3), 32, 2, w_tma=True),
    "W by TMA, swap": FusedTiles(ALONE, GemmTile(16, 64, 16, 1, True, 4, 2), 64, 3, w_tma=True),
    "shared ranks": FusedTiles(replace(ALONE, shares=3), GemmTile(16, 16, 16, 1, False, 4, 2), 32, 2),
    "tall shrink": FusedTiles(replace(ALONE, BM=32, slices=1), GemmTile(32, 16, 16, 1, False, 4, 2), 32, 2),
}
GEMV = {
    "one block": GemvTile(16, 64, 4, 28, VectorTile(8, 64, 2, 5, 4)),
    "several blocks": GemvTile(8, 32, 1, 2, VectorTile(4, 64, 3, 7, 4)),
}
SIDE = 32 if INTERPRET else 64
PREFILL = PrefillTile(SIDE, SIDE, SIDE, 16, 4, 3, 1, (32, 2), ALONE)

SINGLE = {"tiles": SingleTiles(SHRINK, EXPAND), "vectors": SingleTiles(VECTORS, ExpandTile(32, 32, 1, 4))}

BODIES = ("gemv", "single", "decode", "fused", "prefill", "general")
ANY_STRIDE = ("single", "decode", "fused", "general")
ANY_WIDTH = ("gemv", "single", "decode", "fused", "general")


def serves(body: str, dtype: torch.dtype) -> bool:
    return dtype == FP32 if body == "single" else body != "prefill" or dtype != FP32


def run(body: str, case: Case, tile: Any = None) -> list[torch.Tensor]:
    """The members' outputs."""
    from fxlora.kernels import decode, fused, gemv, general, prefill, single

    call = linear_call(case)
    if body == "gemv":
        return gemv.gemv(call, tile or GEMV["one block"])
    if body == "single":
        return single.single(call, tile or SINGLE["tiles"])
    if body == "decode":
        return decode.decode(call, tile or DECODE["split"])
    if body == "fused":
        return fused.fused(call, tile or FUSED["plain"])
    if body == "general":
        return general.general(call, tile or general_tiles(call.rows, call.entries))
    return prefill.prefill(call, tile or PREFILL)


def assert_close(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], limit: float, name: str = "") -> None:
    for y, truth in zip(found, expected, strict=True):
        assert y.shape == truth.shape
        errors = row_errors(y, truth)
        worst = int(errors.nan_to_num(torch.inf).argmax())
        assert errors[worst] <= limit, f"{name} row {worst}: relative error {errors[worst]:.2e}"


def check(body: str, case: Case, tile: Any = None, bare: bool = True) -> list[torch.Tensor]:
    """Near the reference; rows without an adapter have the bits of a batch without any (`bare`)."""
    found, dtype = run(body, case, tile), case.x.dtype
    assert {y.dtype for y in found} == {dtype}
    assert all(y.is_contiguous() for y in found)
    assert_close(found, case.expected(), LIMIT[dtype])
    plain = (case.row_slots < 0).all(1)
    if bare and plain.any():
        without = run(body, case.with_slots(torch.full_like(case.row_slots, -1)), tile)
        assert equal_bits(found, without, plain)
    return found


def case_for(body: str, **options: Any) -> Case:
    return small_case(**{"dtype": FP32 if body == "single" else BF16, **options})


def small_case(**options: Any) -> Case:
    sizes = {"rows": 21, "features": 40, "outs": (24,), "ranks": (8, 16, 0, 3), "dtype": BF16, "device": DEVICE}
    return make_case(**{**sizes, **options})


CALLS: dict[str, dict[str, Any]] = {
    "runs": {"bias": True},
    "shuffled": {"order": "shuffled"},
    "last slot alone": {"order": "one"},
    "two adapters and coefficients": {"width": 2, "bias": True},
    "two adapters shuffled": {"width": 2, "order": "shuffled"},
    "ranks up to 100": {"ranks": (100, 0, 17, 64, 1), "order": "shuffled"},
    "37 groups of ranks": {"ranks": (256, 0, 240, 64, 17), "order": "shuffled"},
    "one row": {"rows": 1, "ranks": (3, 20)},
    "three members, one without a pool": {"outs": (24, 16, 40), "none_members": (1,), "bias": True},
    "members without pools": {"outs": (24, 16), "none_members": (0, 1)},
    "no features to spare": {"features": 8, "outs": (8,)},
}


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_all_bodies_agree_with_the_reference_and_each_other(name: str, dtype: torch.dtype) -> None:
    case = small_case(dtype=dtype, **CALLS[name])
    found = {body: check(body, case) for body in BODIES if serves(body, dtype)}
    for body, outputs in found.items():
        assert_close(outputs, [y.float() for y in found["decode"]], 2 * LIMIT[dtype], body)


@pytest.mark.parametrize("body", BODIES)
def test_batches_without_any_adapter(body: str) -> None:
    case = case_for(body, rows=9, outs=(24, 16))
    base = run(body, replace(case, pools=(None, None)))
    for slots in (torch.full_like(case.row_slots, -1), torch.full_like(case.row_slots, 2)):  # no slot; a rank of 0
        found = check(body, case.with_slots(slots))
        assert equal_bits(found, base, slice(None))


@pytest.mark.parametrize("body", BODIES)
def test_one_slot_twice_and_coefficients_at_one_adapter(body: str) -> None:
    case = case_for(body, rows=9, width=2)
    check(body, case.with_slots(torch.ones_like(case.row_slots)))
    check(body, replace(case_for(body, rows=9, order="shuffled"), row_coeffs=torch.randn(9, 1, device=DEVICE)))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize(("features", "out"), [(1, 1), (37, 19), (19, 33)])
@pytest.mark.parametrize("body", ANY_WIDTH)
def test_odd_widths(body: str, features: int, out: int, dtype: torch.dtype) -> None:
    if not serves(body, dtype):
        pytest.skip("half precision has other bodies")
    for rows in (1, 18):
        check(body, small_case(rows=rows, features=features, outs=(out, 5), ranks=(5, 17), dtype=dtype, bias=True))


def wider(tensor: torch.Tensor, extra: int, skip: int = 0) -> torch.Tensor:
    """The same values as columns of a wider matrix."""
    rows, columns = tensor.shape
    wide = torch.full((rows, columns + extra), torch.nan, dtype=tensor.dtype, device=tensor.device)
    wide[:, skip : skip + columns] = tensor
    return wide[:, skip : skip + columns]


@pytest.mark.parametrize("body", BODIES)
def test_strides_do_not_change_a_bit(body: str) -> None:
    case = case_for(body, rows=5, width=2, order="shuffled", bias=True)
    x, weight, slots, coeffs = case.x, case.weights[0], case.row_slots, case.row_coeffs
    assert coeffs is not None
    variants = {
        "x every second column": replace(case, x=torch.stack([x, -x], 2).flatten(1)[:, ::2]),
        "x in wider rows": replace(case, x=wider(x, 8)),
        "weight in wider rows": replace(case, weights=[wider(weight, 16, 8)]),
        "row map transposed": replace(case, row_slots=slots.t().contiguous().t()),
        "coefficients transposed": replace(case, row_coeffs=coeffs.t().contiguous().t()),
    }
    if body != "prefill":
        variants["x in odd rows"] = replace(case, x=wider(x, 3, 1))
        variants["weight in odd rows"] = replace(case, weights=[wider(weight, 5, 3)])
        variants["bias strided"] = replace(case, biases=[case.biases[0].repeat_interleave(2)[::2]])
    if body in (*ANY_STRIDE, "prefill"):
        variants["weight transposed"] = replace(case, weights=[weight.t().contiguous().t()])
    if body in ANY_STRIDE:
        variants["weight every second column"] = replace(case, weights=[weight.repeat_interleave(2, 1)[:, ::2]])
    expected = check(body, case)
    for name, variant in variants.items():
        assert_close(run(body, variant), [y.float() for y in expected], LIMIT[BF16] if INTERPRET else 1e-6, name)


@pytest.mark.parametrize("tiles", DECODE)
@pytest.mark.parametrize("rows", [1, 17, 65, 200])
def test_decode_tiles(rows: int, tiles: str) -> None:
    tile = DECODE[tiles]
    if rows > 64:  # fewer programs to interpret
        tile = replace(tile, gemm=replace(tile.gemm, BM=64))
    case = small_case(rows=rows, features=72, outs=(24, 40), ranks=(3, 0, 20), none_members=(0,), order="shuffled")
    check("decode", case, tile, bare=rows < 64)


@pytest.mark.parametrize("slots", [1, 64, 256])
@pytest.mark.parametrize("body", BODIES)
def test_few_and_many_slots_with_ranks_up_to_256(body: str, slots: int) -> None:
    """Rows use few of the slots; the others hold adapters of all ranks beside them."""
    ranks = [(256, 1, 16, 0, 100, 8, 64)[slot % 7] for slot in range(slots)]
    case = case_for(body, rows=18, ranks=ranks)
    for seed in range(1 if INTERPRET else 4):
        used = torch.randint(-1, slots, (3,), generator=torch.Generator().manual_seed(seed)).tolist()
        drawn = torch.tensor([[used[row % 3] if row else 0] for row in range(18)])
        check(body, case.with_slots(drawn.to(case.row_slots)))


@pytest.mark.parametrize("tiles", FUSED)
@pytest.mark.parametrize("rows", [1, 17, 65, 200])
def test_fused_tiles(rows: int, tiles: str) -> None:
    tile = FUSED[tiles]
    if rows > 64 and tiles == "plain":  # fewer programs to interpret
        tile = replace(tile, gemm=replace(tile.gemm, BM=64))
    case = small_case(rows=rows, features=72, outs=(24, 40), ranks=(3, 0, 70), none_members=(0,), order="shuffled")
    check("fused", case, tile, bare=rows < 64)


@pytest.mark.parametrize("parts", [2, 3])
def test_parts_of_a_shrink_add_up(parts: int) -> None:
    """group_shrink.py: several programs share the in-features of a tile, of which the last may get none."""
    from fxlora.kernels.group_shrink import scratch_of, shrink_groups

    case = small_case(rows=40, features=200, outs=(24, 40), ranks=(3, 0, 70, 16), none_members=(0,), order="shuffled")
    call = linear_call(case)
    whole, shared = scratch_of(call, 64, sorts=False), scratch_of(call, 64, sorts=False, parts=parts)
    shrink_groups(call, whole, ALONE)
    shrink_groups(call, shared, replace(ALONE, parts=parts))
    assert torch.equal(whole.groups[1, 0, -1], shared.groups[1, 0, -1])
    found, expected = shared.h.view(2, parts, 40, -1)[1].sum(0), whole.h[1].float()
    for row, slot in enumerate(case.row_slots[:, 0].tolist()):
        rank = (3, 0, 70, 16)[slot] if slot >= 0 else 0
        torch.testing.assert_close(found[row, :rank], expected[row, :rank], rtol=1e-2, atol=1e-2)


def test_weights_that_tma_does_not_read() -> None:
    """In-features of which rows are not 16 bytes apart, weights with strides, fp32: through pointers."""
    tile = FUSED["W by TMA"]
    check("fused", small_case(rows=18, features=37), tile)
    check("fused", small_case(rows=18, dtype=FP32), tile)
    case = small_case(rows=18)
    check("fused", replace(case, weights=[case.weights[0].t().contiguous().t()]), tile)
    check("fused", replace(case, weights=[wider(case.weights[0], 5, 3)]), tile)


@pytest.mark.parametrize("order", ["runs", "shuffled"])
def test_bodies_that_share_a_shrink_keep_their_own_order_of_rows(order: str) -> None:
    """fused takes rows in the order of their slots, prefill as they come: the lists of groups differ."""
    from fxlora.kernels import fused, prefill

    case = small_case(rows=3 * SIDE, order=order)
    call = linear_call(case)  # one call, so that plans of the first are there for the second
    both = FusedTiles(ALONE, GemmTile(SIDE, 16, 16, 1, False, 4, 2), 32, 2)
    for outputs in (fused.fused(call, both), prefill.prefill(call, PREFILL), fused.fused(call, both)):
        assert_close(outputs, case.expected(), LIMIT[BF16])
        call.scratch.clear()


@pytest.mark.parametrize("tiles", GEMV)
@pytest.mark.parametrize("rows", [1, 16])
def test_gemv_tiles(rows: int, tiles: str) -> None:
    case = small_case(rows=rows, features=72, outs=(8, 18), ranks=(3, 0, 80), width=2, none_members=(0,), bias=True)
    check("gemv", case, GEMV[tiles], bare=False)


@pytest.mark.parametrize("body", ["gemv", "decode"])
def test_more_in_features_than_are_loaded_at_once(body: str) -> None:
    """Loops of several loads, and the loads left over behind them: 24 and 47 blocks of 1500 in-features."""
    case = small_case(rows=3, features=1500, outs=(24,), ranks=(8, 70), bias=True)
    tall = VectorTile(64, 64, 2, 5, 4)
    tile = GemvTile(8, 32, 1, 4, tall) if body == "gemv" else replace(DECODE["swap"], shrink=tall)
    check(body, case, tile)


@pytest.mark.parametrize("body", BODIES)
def test_a_row_keeps_its_bits_whatever_the_others_use(body: str) -> None:
    rows = 12 if INTERPRET and body == "gemv" else 35
    case = case_for(body, rows=rows, order="shuffled", ranks=(8, 16, 0, 3, 40))
    mine = torch.arange(rows, device=DEVICE) % 3 == 1
    before = run(body, case)
    for seed in range(1 if INTERPRET else 3):
        others = torch.randint(-1, 5, case.row_slots.shape, generator=torch.Generator().manual_seed(100 + seed))
        found = run(body, case.with_slots(torch.where(mine[:, None], case.row_slots, others.to(case.row_slots))))
        assert equal_bits(before, found, mine)
        assert not equal_bits(before, found, slice(None))


@pytest.mark.parametrize("body", BODIES)
def test_adapters_of_neighbours_may_hold_anything_in_a(body: str) -> None:
    case = case_for(body, order="shuffled", ranks=(8, 8))
    pool, clean = case.pools[0], run(body, case)
    assert pool is not None
    pool.a[int(pool.start[1])] = torch.nan
    others = case.row_slots[:, 0] != 1
    found = run(body, case)
    assert equal_bits(clean, found, others)
    assert found[0][~others].isnan().all()


def test_two_runs_are_equal() -> None:
    for body in BODIES:
        case = case_for(body, rows=18, order="shuffled", ranks=(8, 3, 30))
        assert equal_bits(run(body, case), run(body, case), slice(None)), body


@pytest.mark.parametrize("rows", [1, 20])
def test_more_members_than_share_a_launch(rows: int) -> None:
    from fxlora.kernels.lora_linear import MOST_MEMBERS, _runs_of

    outs = (24, 8, 16, 9, 40, 3)
    case = small_case(rows=rows, outs=outs, none_members=(2, 4), ranks=(4, 17), dtype=FP32, bias=True)
    assert [len(members.pools) for members in _runs_of(case.pools)] == [MOST_MEMBERS, 2]
    assert [y.shape[1] for y in assert_right(case)] == list(outs)


@pytest.mark.parametrize("rows", [1, 20])
def test_one_pool_twice_in_a_group(rows: int) -> None:
    case = small_case(rows=rows, outs=(24, 24), ranks=(4, 17), dtype=FP32, order="one")
    case = replace(case, pools=(case.pools[1], case.pools[1]), weights=[case.weights[0], case.weights[0]])
    first, second = assert_right(case)
    assert torch.equal(first, second)


def test_memory_that_no_kernel_wrote_is_poisoned() -> None:
    """So whatever a kernel misses shows in every test here."""
    assert all(y.isnan().all() for y in linear_call(small_case(outs=(24, 16))).new_outputs())


def choice(case: Case) -> Callable[..., object]:
    """The body that would serve a call; nothing is computed."""
    from fxlora.kernels.call import LinearCall, Members
    from fxlora.kernels.lora_linear import body_of

    segments = torch.zeros(segments_size(case.row_slots.numel(), case.max_adapters), dtype=torch.int32, device=DEVICE)
    rest = (case.row_slots, case.row_coeffs, segments, Members(case.pools))
    return body_of(LinearCall(case.x, case.weights, case.biases, *rest))[0]


def test_which_body_serves_what() -> None:
    from fxlora.kernels.decode import decode
    from fxlora.kernels.fused import fused
    from fxlora.kernels.gemv import gemv
    from fxlora.kernels.general import general
    from fxlora.kernels.overlap import can_overlap
    from fxlora.kernels.prefill import prefill
    from fxlora.kernels.single import single

    many, many_fp16 = prefill, prefill
    if not (INTERPRET or can_overlap(torch.device(DEVICE))):
        many, many_fp16 = fused, general
    for rows, outs, dtype, body in (
        (1, (4096,), BF16, gemv), (1, (5,), FP32, gemv), (16, (512,), BF16, gemv), (16, (256, 256), FP32, gemv),
        (16, (256, 257), BF16, decode), (2, (513,), FP32, single), (17, (24,), BF16, decode),
        (256, (24,), FP32, single),
        (65, (512,), BF16, decode), (256, (2048,), BF16, fused), (256, (2048,), FP16, decode),
        (64, (6144,), BF16, fused), (16, (6144,), BF16, decode),
        (2, (8449,), BF16, fused), (2, (8449,), FP16, decode), (64, (6143,), BF16, decode),
        (65, (4159,), BF16, decode), (65, (20007,), BF16, fused), (65, (20007,), FP16, decode),
        (129, (9000,), BF16, fused), (129, (9001,), FP16, decode), (129, (4504, 4504), BF16, fused),
        (129, (9000,), FP16, decode),
        (257, (24,), FP32, single), (257, (24, 16), BF16, many), (257, (24,), FP16, many_fp16),
        (257, (24, 17), BF16, fused), (257, (24, 17), FP16, general),
    ):  # fmt: skip
        assert choice(small_case(rows=rows, outs=outs, dtype=dtype)) is body, (rows, outs, dtype)
    assert choice(small_case(rows=257, features=44)) is fused
    assert choice(small_case(rows=65, features=43, outs=(20007,))) is decode
    assert choice(small_case(rows=129, features=8200, outs=(4304,))) is (prefill if many is prefill else decode)
    assert choice(small_case(rows=129, features=8200, outs=(4096,))) is decode
    case, few = small_case(rows=257), small_case(rows=1)
    transposed = [case.weights[0].t().contiguous().t()]
    assert choice(replace(few, weights=transposed)) is decode
    assert choice(replace(case, weights=transposed)) is many
    both = small_case(rows=257, outs=(24, 16))
    assert choice(replace(both, weights=[both.weights[0], both.weights[1].t().contiguous().t()])) is fused
    assert choice(replace(case, weights=[wider(case.weights[0], 8)])) is many
    assert choice(replace(case, weights=[wider(case.weights[0], 4)])) is fused
    assert choice(replace(case, weights=[wider(case.weights[0], 8, 1)])) is fused
    assert choice(replace(case, x=wider(case.x, 3))) is fused
    assert choice(replace(case, x=case.x.t().contiguous().t())) is many  # made contiguous first


def test_the_choice_does_not_follow_what_the_batch_holds() -> None:
    for rows in (1, 16, 17, 256, 257):
        case = small_case(rows=rows)
        chosen = choice(case)
        for slot in range(-1, 4):
            assert choice(case.with_slots(torch.full_like(case.row_slots, slot))) is chosen


def test_what_a_call_finds_out_about_its_group_goes_with_the_handle() -> None:
    from fxlora.kernels import registry

    case = small_case(rows=1)
    with registered(case.pools) as handle:
        case.call(ops.segment_rows(case.row_slots, case.max_adapters), handle)
        assert handle in registry._derived
    assert handle not in registry._derived


@pytest.mark.parametrize("rows", [1, 5, 70])
def test_rows_that_begin_elsewhere_are_copied_otherwise(rows: int) -> None:
    case = small_case(rows=rows)  # 40 in-features: rows 8 elements apart, so that 8 are copied at once
    with registered(case.pools) as handle:
        segments = ops.segment_rows(case.row_slots, case.max_adapters)
        expected = [y.float() for y in case.call(segments, handle)]
        for extra in (3, 0, 4, 2):
            found = replace(case, x=wider(case.x, extra)).call(segments, handle)
            assert_close(found, expected, LIMIT[BF16] if INTERPRET else 1e-6, f"{extra} more columns")
