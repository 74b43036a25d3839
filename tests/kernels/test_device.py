"""What only a GPU can show: captured CUDA graphs, streams, absence of host syncs, addresses past 32 bits."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from fxlora.kernels import ops
from fxlora.kernels.registry import SitePool
from tests.kernels.cases import TOLERANCE, Case, assert_near, draw_slots, equal_bits, make_case, registered, row_errors

pytestmark = pytest.mark.gpu
KINDS = ("linear", "logits", "embedding")


def capture(case: Case, handle: int) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]:
    def forward() -> list[torch.Tensor]:
        return case.call(ops.segment_rows(case.row_slots, case.max_adapters), handle)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        forward()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = forward()
    return graph, outputs


def change_adapters(case: Case) -> None:
    """Every slot gets another adapter of another rank, one slot none."""
    empty = random.randrange(case.max_adapters)
    for pool in case.pools:
        assert pool is not None
        for slot in range(case.max_adapters):
            pool.clear(slot)
            if slot != empty:
                rank = random.choice((1, 4, 8, 16))
                a_RK = torch.randn(rank, pool.a_PK.shape[1], device="cuda") / 8
                b_RN = torch.randn(rank, pool.b.shape[1], device="cuda")
                pool.write(slot, start=16 * slot, a_RK=a_RK, b_RN=b_RN, scaling=random.uniform(0.5, 2))


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("rows", [1, 16, 200])
@pytest.mark.parametrize("kind", KINDS)
def test_a_captured_graph_serves_whatever_is_loaded_at_replay(kind: str, rows: int, width: int) -> None:
    outs = (200, 72) if kind == "linear" else (200,)
    case = make_case(kind, rows=rows, features=136, outs=outs, ranks=(16,) * 5, width=width, device="cuda")
    with registered(case.pools) as handle:
        graph, outputs = capture(case, handle)
        for _ in range(4):
            change_adapters(case)
            case.row_slots.copy_(draw_slots(rows, width, 5, "shuffled"))
            if kind == "embedding":
                case.x.copy_(torch.randint(0, 136, case.x.shape))
            else:
                case.x.normal_()
            graph.replay()
            assert_near(outputs, case.expected(), torch.float32)
            assert equal_bits(outputs, case.run(), slice(None))


@pytest.mark.parametrize("kind", KINDS)
def test_one_op_on_two_streams_at_once(kind: str) -> None:
    cases = [make_case(kind, rows=64, features=520, outs=(512,), device="cuda", order="shuffled") for _ in range(2)]
    truths = [case.run() for case in cases]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for _ in range(20):
        found: list[list[torch.Tensor]] = [[], []]
        for index, (case, stream) in enumerate(zip(cases, streams, strict=True)):
            with torch.cuda.stream(stream), registered(case.pools) as handle:
                for _ in range(4):
                    found[index] += case.call(ops.segment_rows(case.row_slots, case.max_adapters), handle)
        torch.cuda.synchronize()
        for outputs, truth in zip(found, truths, strict=True):
            assert all(torch.equal(y, truth[0]) for y in outputs)


@pytest.mark.parametrize("kind", KINDS)
def test_no_call_waits_for_the_device(kind: str) -> None:
    case = make_case(kind, rows=40, device="cuda")
    case.run()
    with registered(case.pools) as handle:
        torch.cuda.set_sync_debug_mode("error")
        try:
            case.call(ops.segment_rows(case.row_slots, case.max_adapters), handle)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_offsets_past_32_bits() -> None:
    """Rows of x, weight and output whose element offsets pass 2**31, and a pool whose rows do."""
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of GPU memory")
    features, out = 1 << 16, 64
    rows = (1 << 15) + 33
    x = torch.empty(rows, features, dtype=torch.bfloat16, device="cuda")
    x[: rows - 48].zero_()
    x[rows - 48 :].normal_()
    pool = SitePool.allocate(
        kind="linear", pool_rows=rows, in_features=features, out_features=out, max_adapters=2, dtype=torch.bfloat16,
        device="cuda", max_rank=16,
    )  # fmt: skip
    a_RK = torch.randn(16, features, device="cuda") / 256
    pool.write(1, start=rows - 17, a_RK=a_RK, b_RN=torch.randn(16, out, device="cuda"), scaling=1.0)
    weight = torch.randn(out, features, device="cuda").bfloat16() / 256
    slots = torch.full((rows, 1), -1, dtype=torch.int32, device="cuda")
    slots[-40:] = 1
    case = Case("linear", x, [weight], [None], slots, None, (pool,), 2)
    found = case.run()[0][-48:]
    expected = Case("linear", x[-48:], [weight], [None], slots[-48:], None, (pool,), 2).expected()[0]
    assert row_errors(found, expected).max() < TOLERANCE[torch.bfloat16]


def test_compiled_with_cuda_graphs_sees_adapters_change() -> None:
    case = make_case(rows=16, outs=(40,), ranks=(16,) * 3, device="cuda")
    with registered(case.pools) as handle, torch.no_grad():

        def forward(x: torch.Tensor, row_slots: torch.Tensor) -> torch.Tensor:
            segments = torch.ops.fxlora.segment_rows(row_slots, 3)
            for _ in range(2):
                x = torch.ops.fxlora.lora_linear(x, case.weights, [None], row_slots, None, segments, handle)[0] + 1
            return x

        compiled: Callable[..., torch.Tensor] = torch.compile(forward, mode="reduce-overhead", fullgraph=True)
        for _ in range(6):
            change_adapters(case)
            torch.testing.assert_close(
                compiled(case.x, case.row_slots), forward(case.x, case.row_slots), rtol=1e-4, atol=1e-4
            )
