"""Expert weights, what only a GPU can show: captured CUDA graphs, streams, absence of host syncs, order, addresses."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fxlora.kernels import ops, reference
from fxlora.kernels.expert_tiles import ExpertBesideTile, ExpertPrefillTile
from tests.kernels.cases import TOLERANCE, assert_near, registered, row_errors
from tests.kernels.expert_cases import ExpertCase, assert_experts_right, draw_experts, make_expert_case
from tests.kernels.test_device import capture, nothing
from tests.kernels.test_prefill_hopper import IS_HOPPER

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16
# rows, experts: tiles of 16, 16, 32, 128 (one for each expert), 64 and 128 rows.
DENSITY = {"one": (1, 8), "few": (60, 32), "some": (300, 32), "many": (700, 16), "more": (2400, 16), "most": (3200, 16)}


def case_of(density: str, in_place: bool = True, **options: object) -> ExpertCase:
    rows, experts = DENSITY[density]
    sizes = {"features": 512, "out": 384, "ranks": (8, 16, 0, 40, 64), "dtype": BF16, "device": "cuda", **options}
    return make_expert_case(rows=rows, experts=experts, in_place=in_place, **sizes)  # type: ignore[arg-type]


def change_adapters(case: ExpertCase) -> None:
    """Every slot gets another adapter of another rank, one slot none."""
    pool = case.pool
    assert pool is not None
    experts, empty = pool.num_experts, random.randrange(case.max_adapters)
    a_start = b_start = 0
    for slot in range(case.max_adapters):
        pool.clear(slot)
    for slot in range(case.max_adapters):
        if slot == empty:
            continue
        rank, shared = random.choice((1, 4, 8, 16)), random.choice(("", "", "A", "B"))
        a_step, b_step = (0 if name in shared else rank for name in "AB")
        a_rows = torch.randn(rank if not a_step else experts * rank, pool.a.shape[1], device="cuda") / 16
        b_rows = torch.randn(rank if not b_step else experts * rank, pool.b.shape[1], device="cuda") / 2
        pool.write(
            slot, a_start=a_start, a_step=a_step, b_start=b_start, b_step=b_step, rank=rank, a_rows=a_rows,
            b_rows=b_rows, scaling=random.uniform(0.5, 2),
        )  # fmt: skip
        a_start, b_start = a_start + len(a_rows), b_start + len(b_rows)


def change_rows(case: ExpertCase) -> None:
    """Other tokens, slots and experts, in the same memory."""
    case.x.copy_(torch.randn(case.x.shape))
    case.row_slots.copy_(torch.randint(-1, case.max_adapters, case.row_slots.shape))
    experts = case.weight.shape[0]
    ids = draw_experts(len(case.x), experts)
    if case.expert_ids is not None:
        case.expert_ids.copy_(ids)
    else:
        assert case.offsets is not None
        known = ids[(ids >= 0) & (ids < experts)]
        case.offsets.copy_(torch.bincount(known, minlength=experts).cumsum(0))


@pytest.fixture(params=["as chosen", "beside the last of the shrink", "beside all of it"])
def products_start(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the programs of a product over many rows start: as the tile says, or all of them early."""
    from fxlora.kernels import lora_experts

    choose = lora_experts.expert_prefill_tile

    def early(rows: int, experts: int, simple: bool, *sizes: Any) -> ExpertPrefillTile:
        tile = replace(choose(rows, experts, simple, *sizes), early=True)
        beside = request.param == "beside all of it" and simple and not tile.TAIL and IS_HOPPER
        return replace(tile, shrink=ExpertBesideTile(2, 1000)) if beside else tile

    if request.param != "as chosen":
        monkeypatch.setattr(lora_experts, "expert_prefill_tile", early)
        monkeypatch.setattr(lora_experts, "has_gluon", lambda device: False)


def forward_of(case: ExpertCase, handle: int) -> Callable[[], torch.Tensor]:
    return lambda: case.call(case.segments(), handle)


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("density", DENSITY)
def test_shapes_and_strides(density: str, in_place: bool, dtype: torch.dtype) -> None:
    calls: list[dict[str, object]] = [
        {"transposed": True, "bias": True},
        {"features": 333, "out": 77},
        {},
        {"width": 2},
        {"features": 72, "out": 40, "bias": True},
        {"shared": ("A", "B", "", "AB")},
        {"has_pool": False},
    ]
    for options in calls if dtype == BF16 else calls[:2]:
        assert_experts_right(case_of(density, in_place, dtype=dtype, **options))


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("density", DENSITY)
def test_a_captured_graph_serves_whatever_is_loaded_and_routed(density: str, in_place: bool, width: int) -> None:
    case = case_of(density, in_place, ranks=(64,) * 5, width=width)
    with registered([case.pool]) as handle:
        graph, y = capture(forward_of(case, handle))
        for _ in range(4):
            change_adapters(case)
            change_rows(case)
            graph.replay()
            assert_near([y], [case.expected()], BF16)
            assert torch.equal(y, case.run())


@pytest.mark.usefixtures("plain_memory", "products_start")
@pytest.mark.parametrize("density", DENSITY)
def test_gate_up_and_down_of_a_graph_keep_their_order(density: str) -> None:
    """One table for both, an activation of torch in between, and no wait anywhere."""
    up = case_of(density, ranks=(16,) * 5, out=1024)
    down = replace(case_of(density, ranks=(16,) * 5), row_slots=up.row_slots, offsets=up.offsets)
    with registered([up.pool]) as up_handle, registered([down.pool]) as down_handle:

        def layer(between: Callable[[], None] = nothing) -> torch.Tensor:
            segments = up.segments()
            between()
            gate, value = up.call(segments, up_handle).chunk(2, dim=1)
            between()
            hidden = F.silu(gate) * value
            between()
            y = replace(down, x=hidden).call(segments, down_handle)
            between()
            return y

        graph, y = capture(layer)
        for _ in range(30):
            change_adapters(up)
            change_adapters(down)
            change_rows(up)
            graph.replay()
            apart = layer(torch.cuda.synchronize)
            assert apart.isfinite().all()
            assert torch.equal(y, apart)
            assert torch.equal(layer(), apart)


@pytest.mark.usefixtures("plain_memory", "products_start")
@pytest.mark.parametrize("density", DENSITY)
def test_ops_directly_behind_each_other(density: str) -> None:
    """The output of one is x of the next, so its launches overlap those of the one before."""
    cases = [case_of(density, out=512, ranks=(16,) * 5) for _ in range(3)]
    cases = [replace(case, row_slots=cases[0].row_slots, offsets=cases[0].offsets) for case in cases]
    with registered([cases[0].pool]) as a, registered([cases[1].pool]) as b, registered([cases[2].pool]) as c:

        def chain(between: Callable[[], None] = nothing) -> torch.Tensor:
            y, segments = cases[0].x, cases[0].segments()
            for case, handle in zip(cases, (a, b, c), strict=True):
                y = replace(case, x=y).call(segments, handle)
                between()
            return y

        graph, y = capture(chain)
        for _ in range(30):
            for case in cases:
                change_adapters(case)
            change_rows(cases[0])
            graph.replay()
            apart = chain(torch.cuda.synchronize)
            assert torch.equal(y, apart)
            assert torch.equal(chain(), apart)


@pytest.mark.parametrize("density", DENSITY)
def test_one_op_on_two_streams_at_once(density: str) -> None:
    cases = [case_of(density) for _ in range(2)]
    truths = [case.run() for case in cases]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for _ in range(20):
        found: list[list[torch.Tensor]] = [[], []]
        for index, (case, stream) in enumerate(zip(cases, streams, strict=True)):
            with torch.cuda.stream(stream), registered([case.pool]) as handle:
                found[index] += [case.call(case.segments(), handle) for _ in range(4)]
        torch.cuda.synchronize()
        for outputs, truth in zip(found, truths, strict=True):
            assert all(torch.equal(y, truth) for y in outputs)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("density", DENSITY)
def test_no_call_waits_for_the_device(density: str, in_place: bool) -> None:
    case = case_of(density, in_place)
    case.run()
    with registered([case.pool]) as handle:
        torch.cuda.set_sync_debug_mode("error")
        try:
            case.call(case.segments(), handle)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("density", DENSITY)
def test_a_row_keeps_its_bits_whatever_the_others_use(density: str, width: int) -> None:
    case = case_of(density, in_place=False, width=width, bias=True)
    assert case.expert_ids is not None
    kept, first = torch.arange(0, len(case.x), 5, device="cuda"), case.run()
    assert torch.equal(first, case.run()), "two runs differ"
    for favours_one in (False, False, True, True):
        slots, ids = case.row_slots.clone(), case.expert_ids.clone()
        change_rows(replace(case, x=case.x.clone(), row_slots=slots, expert_ids=ids))
        if favours_one:  # which then has tiles of other heights than before
            ids[len(ids) // 8 :] = case.expert_ids[random.choice(kept.tolist())]
        slots[kept], ids[kept] = case.row_slots[kept], case.expert_ids[kept]
        assert torch.equal(case.with_slots(slots).run()[kept], first[kept])
        assert torch.equal(replace(case, row_slots=slots, expert_ids=ids).run()[kept], first[kept])


@pytest.mark.usefixtures("plain_memory")
@pytest.mark.parametrize("density", DENSITY)
def test_torch_kernels_around_an_op_keep_their_order(density: str) -> None:
    """x is written right before the op and spoilt right after it, y is read right after it."""
    case = case_of(density)
    inputs = [torch.randn_like(case.x) for _ in range(8)]
    with registered([case.pool]) as handle:
        segments = case.segments()

        def step(values: torch.Tensor, between: Callable[[], None]) -> torch.Tensor:
            case.x.copy_(values)
            between()
            y = case.call(segments, handle)
            between()
            doubled = y + y
            between()
            case.x.fill_(torch.nan)
            return doubled

        truths = [step(values, torch.cuda.synchronize) for values in inputs]
        found = [step(inputs[index % 8], nothing) for index in range(100)]
    assert all(truth.isfinite().all() for truth in truths)
    assert all(torch.equal(y, truths[index % 8]) for index, y in enumerate(found))


@pytest.mark.parametrize("rows", [8, 2000])
def test_offsets_past_32_bits(rows: int) -> None:
    """A weight and pools with more than 2**31 elements."""
    if torch.cuda.mem_get_info()[0] < 30 << 30:
        pytest.skip("needs 30 GiB of GPU memory")
    experts, features, out = 33, 8192, 8192
    weight = torch.zeros(experts, out, features, dtype=BF16, device="cuda")
    weight[-1].normal_(std=features**-0.5)
    case = make_expert_case(rows=rows, experts=experts, features=features, out=out, ranks=(1,), dtype=BF16,
                            device="cuda", in_place=False, has_pool=False)  # fmt: skip
    assert case.expert_ids is not None
    case.expert_ids.fill_(experts - 1)
    found = replace(case, weight=weight).run()[:8]
    truth = reference.lora_experts(case.x[:8], weight, None, case.row_slots[:8], None, [experts - 1] * 8, None)
    assert row_errors(found, truth).max() < TOLERANCE[BF16]


@pytest.mark.gpu
def test_compiled_with_cuda_graphs_sees_adapters_and_routing_change() -> None:
    case = case_of("few", in_place=False, ranks=(16,) * 5, dtype=torch.float32)
    assert case.expert_ids is not None
    with registered([case.pool]) as handle, torch.no_grad():

        def forward(x: torch.Tensor, row_slots: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            segments = ops.segment_experts(row_slots, None, ids, case.weight.shape[0], 5)
            return ops.lora_experts(x, case.weight, None, row_slots, None, segments, handle) + 1

        compiled: Callable[..., torch.Tensor] = torch.compile(forward, mode="reduce-overhead", fullgraph=True)
        for _ in range(6):
            change_adapters(case)
            change_rows(case)
            args = (case.x, case.row_slots, case.expert_ids)
            torch.testing.assert_close(compiled(*args), forward(*args), rtol=1e-4, atol=1e-4)
