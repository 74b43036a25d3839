"""lora_experts: both bodies (torch on CPU, Triton interpreted or on a GPU) against the reference, case by case."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fxlora.kernels import ops
from fxlora.kernels.errors import OpInputError
from fxlora.kernels.registry import pools_of
from tests.kernels import expert_cases as expert_case_module
from tests.kernels.cases import DTYPES, make_pool, registered
from tests.kernels.expert_cases import assert_experts_right, make_expert_case

pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.filterwarnings("ignore:invalid value encountered"),
]

# rows, experts: tiles of 16, 32, 64 and 128 rows; on a GPU "most" are of 128 with one for each expert.
DENSITY = {"few": (19, 6), "some": (40, 4), "many": (50, 2) if ops.INTERPRET else (300, 2), "most": (170, 2)}

CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "transposed weight": {"transposed": True, "bias": True},
    "two adapters and coefficients": {"width": 2, "bias": True},
    "two adapters without coefficients": {"width": 2, "coeffs": False},
    "three slots": {"width": 3},
    "coefficients at one adapter": {"coeffs": True},
    "ranks 1 to 64": {"ranks": (64, 1, 0, 17, 33, 16)},
    "37 groups of ranks": {"ranks": (256, 0, 240, 64, 17)},
    "shared A": {"shared": ("A", "")},
    "shared B": {"shared": ("", "B")},
    "shared A and B": {"shared": ("AB", "", "A")},
    "empty experts": {"empty": (0,)},
    "every row has an expert": {"missing": False},
    "no adapters loaded": {"ranks": (0, 0)},
    "no pool": {"has_pool": False},
    "odd widths": {"features": 37, "out": 19, "ranks": (5, 3)},
    "widths of one": {"features": 1, "out": 1, "ranks": (1, 2)},
    "runs of slots": {"slot_runs": 8},
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the interpreter: fewer programs than there is work, several column tiles, shares of some ranks, and tiles
    of 128 rows for few rows already."""
    if not ops.INTERPRET:
        return
    from fxlora.kernels import expert_segments, lora_experts
    from fxlora.kernels import expert_tiles as tiles
    from fxlora.kernels.tiles import VectorTile

    monkeypatch.setattr(expert_segments, "_HEIGHTS", ((4, 16), (16, 32), (30, 64)))

    def decode(entries: int, features: int, columns: int, dtype: torch.dtype) -> tiles.ExpertDecodeTiles:
        shrink = VectorTile(8, 32, 2, 5, 4) if entries % 2 else None
        delta = tiles.DeltaTile(8, 32, 16, 5, 4)
        return tiles.ExpertDecodeTiles(shrink, delta, tiles.ExpertGemmTile(16, 16, entries % 2 == 1, 3, 2, 4, 2))

    def prefill(rows: int, num_experts: int, *_: object) -> tiles.ExpertPrefillTile:
        height = expert_segments.tile_height(rows, num_experts)
        shrink = tiles.ExpertShrinkTile(32, 16, 32, 1, 4, 2, height > 64, 2)
        return tiles.ExpertPrefillTile(height, 0, 16, 16, 16, 1, 4, 3, 2, True, True, shrink)

    monkeypatch.setattr(lora_experts, "expert_decode_tiles", decode)
    monkeypatch.setattr(lora_experts, "expert_prefill_tile", prefill)


def combinations() -> list[Any]:
    """(name, density, in place); under the interpreter one decode and one prefill of each name, in turns."""
    found = []
    for i, name in enumerate(CALLS):
        for k, density in enumerate(DENSITY):
            forms = ([(i // 2 + k) % 2 == 0] if k % 2 == i % 2 else []) if ops.INTERPRET else [True, False]
            found += [pytest.param(name, density, form, id=f"{name}, {density}, {form}") for form in forms]
    return found


@pytest.mark.parametrize(("name", "density", "in_place"), combinations())
def test_calls(name: str, density: str, in_place: bool, device: str) -> None:
    rows, experts = DENSITY[density]
    assert_experts_right(make_expert_case(rows=rows, experts=experts, in_place=in_place, device=device, **CALLS[name]))


TAILS: dict[str, dict[str, Any]] = {
    "plain": {"slot_runs": 8},
    "bias": {"bias": True, "transposed": True},
    "37 groups of ranks": {"ranks": (256, 0, 240, 64, 17)},
    "x as it comes": {"in_place": False, "width": 2, "bias": True},
    "odd widths": {"features": 37, "out": 19, "ranks": (5, 3)},
    "no pool": {"has_pool": False},
}


@pytest.mark.parametrize("name", TAILS)
def test_tiles_with_a_tail(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts of up to 64, 128, 160 rows, and of more."""
    if device == "cpu" and not ops.INTERPRET:
        pytest.skip("a body for GPUs")
    from fxlora.kernels import expert_segments, lora_experts
    from fxlora.kernels.expert_tiles import ExpertShrinkTile, expert_prefill_tile

    monkeypatch.setattr(expert_segments, "_HEIGHTS", ((4, 16), (112, 128), (192, 64)))
    tile = expert_prefill_tile(500, 4, True, 4096, 4096, torch.bfloat16, 16)
    assert tile.TAIL
    assert isinstance(tile.shrink, ExpertShrinkTile)
    if ops.INTERPRET:
        tile = replace(tile, BN=32, BK=32, programs=1, shrink=replace(tile.shrink, BM=64, BR=16, BK=32, programs=1))
    monkeypatch.setattr(lora_experts, "expert_prefill_tile", lambda *_: tile)
    monkeypatch.setattr(lora_experts, "has_gluon", lambda device: False)
    monkeypatch.setattr(expert_case_module, "draw_experts", lambda *_: draws())
    assert_experts_right(make_expert_case(rows=500, experts=4, dtype=torch.bfloat16, device=device, **TAILS[name]))


def draws() -> torch.Tensor:
    """Experts of 500 rows, shuffled: 130, 160, 20 and 190."""
    return torch.repeat_interleave(torch.tensor([130, 160, 20, 190]))[torch.randperm(500)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", DENSITY)
def test_dtypes(density: str, dtype: torch.dtype, device: str) -> None:
    rows, experts = DENSITY[density]
    for in_place in (True,) if ops.INTERPRET else (True, False):
        case = make_expert_case(rows=rows, experts=experts, in_place=in_place, dtype=dtype, device=device, bias=True)
        assert_experts_right(case)


@pytest.mark.parametrize("experts", [1, 128])
@pytest.mark.parametrize("rows", [1, 17])
def test_numbers_of_experts(rows: int, experts: int, device: str) -> None:
    for in_place in (True, False):
        assert_experts_right(
            make_expert_case(rows=rows, experts=experts, in_place=in_place, features=16, out=16, device=device)
        )


@pytest.mark.parametrize(("rows", "experts"), [(150, 40), (600, 14), (600, 4), (1100, 2)])
def test_one_expert_with_many_row_tiles(rows: int, experts: int, device: str) -> None:
    """On a GPU tiles of 16, 128 (of which the last is half as high), 64 and 128 rows."""
    case = make_expert_case(rows=rows, experts=experts, empty=range(1, experts), device=device)
    assert_experts_right(case)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64, torch.int16, torch.uint8], ids=str)
def test_dtypes_of_the_routing(ids_dtype: torch.dtype, device: str) -> None:
    for in_place in (True, False):
        if in_place and ids_dtype not in (torch.int32, torch.int64):
            continue
        case = make_expert_case(rows=9, ids_dtype=ids_dtype, missing=in_place, in_place=in_place, device=device)
        assert_experts_right(case)


def test_strides_do_not_matter(device: str) -> None:
    for rows, experts in (DENSITY["few"], DENSITY["many"]):
        case = make_expert_case(rows=rows, experts=experts, bias=True, device=device, in_place=False)
        wide_x = torch.cat([case.x, case.x], 1)[:, : case.x.shape[1]]
        wide_w = torch.cat([case.weight, case.weight], 2)[..., : case.weight.shape[2]]
        ids = torch.stack([case.expert_ids, case.expert_ids], 1)[:, 0]
        slots = torch.stack([case.row_slots, case.row_slots], 1)[:, 0]
        assert case.bias is not None
        bias = case.bias.t().contiguous().t()
        found = replace(case, x=wide_x, weight=wide_w, expert_ids=ids, row_slots=slots, bias=bias).run()
        assert torch.equal(found, case.run())


def test_both_forms_of_routing_agree(device: str) -> None:
    for rows, experts in (DENSITY["few"], DENSITY["many"]):
        case = make_expert_case(rows=rows, experts=experts, device=device)
        ids = torch.tensor([experts if expert is None else expert for expert in case.row_experts], device=device)
        assert torch.equal(case.run(), replace(case, offsets=None, expert_ids=ids).run())


def test_no_rows_and_no_experts_in_use(device: str) -> None:
    for rows in (0, 5):
        case = make_expert_case(rows=rows, device=device)
        assert case.offsets is not None
        found = replace(case, offsets=torch.zeros_like(case.offsets)).run()
        assert found.shape == (rows, 24)
        assert not found.any()


def test_a_slot_that_is_emptied_adds_nothing(device: str) -> None:
    for rows, experts in DENSITY.values():
        case = make_expert_case(rows=rows, experts=experts, device=device)
        assert case.pool is not None
        for slot in range(case.max_adapters):
            case.pool.clear(slot)
        assert torch.equal(case.run(), case.base())


def test_an_infinite_adapter_stays_in_its_rows(device: str) -> None:
    for rows, experts in (DENSITY["few"], DENSITY["many"]):
        case = make_expert_case(rows=rows, experts=experts, ranks=(4, 8, 20), device=device, missing=False)
        before = case.run()
        assert case.pool is not None
        start = int(case.pool.a_start[1])
        case.pool.a[start : start + 8 * experts] = torch.inf
        found, own = case.run(), (case.row_slots == 1).any(1)
        assert not found[own].isfinite().any()
        assert torch.equal(found[~own], before[~own])


def test_what_does_not_fit_is_refused(device: str) -> None:
    case = make_expert_case(rows=8, device=device)
    wrong = [
        replace(case, x=case.x[:, :-1]),
        replace(case, x=case.x.double()),
        replace(case, weight=case.weight[:, :-1]),
        replace(case, weight=case.weight[0]),
        replace(case, bias=torch.zeros(5, 23, device=device)),
        replace(case, row_coeffs=torch.zeros(8, 2, device=device)),
        replace(case, offsets=None),
        replace(case, expert_ids=torch.zeros(8, dtype=torch.int64, device=device)),
        replace(case, offsets=torch.zeros(4, dtype=torch.int64, device=device)),
        replace(case, offsets=torch.zeros(5, device=device)),
        replace(case, row_slots=case.row_slots.long()),
        replace(case, max_adapters=7),
    ]
    for bad in wrong:
        with pytest.raises(OpInputError):
            bad.run()


def test_a_handle_of_linears_is_refused(device: str) -> None:
    case = make_expert_case(rows=8, device=device)
    with registered([make_pool("linear", 40, 24, (4,), device=device)]) as handle:
        with pytest.raises(OpInputError, match="not of an expert weight"):
            case.call(case.segments(), handle)
        assert pools_of(handle)


def test_fake_and_real_agree(device: str) -> None:
    for in_place in (True, False):
        case = make_expert_case(rows=9, device=device, in_place=in_place, width=2, bias=True)
        routing = (case.row_slots, case.offsets, case.expert_ids, 5, case.max_adapters)
        torch.library.opcheck(ops.segment_experts, routing, test_utils=("test_schema", "test_faketensor"))
    with registered([case.pool]) as handle:
        args = (case.x, case.weight, case.bias, case.row_slots, case.row_coeffs, case.segments(), handle)
        torch.library.opcheck(ops.lora_experts, args, test_utils=("test_schema", "test_faketensor"))
