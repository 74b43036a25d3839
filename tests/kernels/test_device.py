"""What only a GPU can show: captured CUDA graphs, streams, absence of host syncs, addresses past 32 bits."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TypeVar

import pytest
import torch

from fxlora.kernels import ops
from fxlora.kernels.registry import SitePool
from tests.kernels.cases import TOLERANCE, Case, assert_near, draw_slots, equal_bits, make_case, registered, row_errors

pytestmark = pytest.mark.gpu
KINDS = ("linear", "logits", "embedding")
BF16 = torch.bfloat16
Result = TypeVar("Result")


def capture(
    forward: Callable[[], Result], stream: torch.cuda.Stream | None = None
) -> tuple[torch.cuda.CUDAGraph, Result]:
    """A graph of `forward`, captured on `stream` or one of its own, and the outputs that its replays fill."""
    stream = stream or torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        forward()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        outputs = forward()
    return graph, outputs


def forward_of(case: Case, handle: int) -> Callable[[], list[torch.Tensor]]:
    return lambda: case.call(ops.segment_rows(case.row_slots, case.max_adapters), handle)


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
        graph, outputs = capture(forward_of(case, handle))
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


@pytest.mark.parametrize(
    ("rows", "features", "outs"),
    [(1, 136, (200, 72)), (16, 136, (200, 72)), (200, 136, (200, 72)), (200, 136, (4096,)), (16, 136, (20008,)),
     (64, 136, (20008,)), (70, 136, (20008,)), (300, 136, (200, 72)), (200, 8200, (4096,)),
     (2048, 136, (2304,)), (2048, 4104, (4096,))],
)  # fmt: skip
def test_a_captured_graph_of_every_half_precision_body(rows: int, features: int, outs: tuple[int, ...]) -> None:
    """Replayed with other adapters, slots and rows: near the reference, and the bits of a call outside of a graph."""
    case = make_case(rows=rows, features=features, outs=outs, ranks=(16,) * 5, dtype=BF16, device="cuda")
    with registered(case.pools) as handle:
        graph, outputs = capture(forward_of(case, handle))
        for _ in range(4):
            change_adapters(case)
            case.row_slots.copy_(draw_slots(rows, 1, 5, "shuffled"))
            case.x.normal_()
            graph.replay()
            assert_near(outputs, case.expected(), BF16)
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


def pool_of_many(features: int, out: int, room: int, slots: int, device: str) -> SitePool:
    """Adapters of ranks up to `room` / 2, `room` pool rows apart; the last one ends with the pool."""
    pool = SitePool.allocate(
        kind="linear", pool_rows=room * slots, in_features=features, out_features=out, max_adapters=slots, dtype=BF16,
        device=device, max_rank=room // 2,
    )  # fmt: skip
    half = room // 2
    for slot in range(slots):
        rank = (half, 1, 16, 8, half // 4, half // 2 - 3)[slot % 6] if slot < slots - 1 else half
        a_RK = torch.randn(rank, features, device=device) * features**-0.5
        b_RN = torch.randn(rank, out, device=device) * rank**-0.5
        pool.write(slot, start=room * slot + half, a_RK=a_RK, b_RN=b_RN, scaling=random.uniform(0.5, 2))
    return pool


def test_pools_of_8_gb_with_256_slots() -> None:
    """Every body, on adapters that lie all over a pool, the last of them past 2**31 elements of B."""
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of GPU memory")
    features, out = 4096, 28672
    pool = pool_of_many(features, out, room=512, slots=256, device="cuda")
    assert (pool.a.numel() + pool.b.numel()) * 2 > 8e9
    weight = torch.randn(out, features, device="cuda").bfloat16() * features**-0.5
    for rows in (1, 16, 64, 200, 300):
        x = torch.randn(rows, features, device="cuda").bfloat16()
        slots = torch.randint(-1, 256, (rows, 1), dtype=torch.int32, device="cuda")
        slots[-1] = 255
        case = Case("linear", x, [weight], [None], slots, None, (pool,), 256)
        assert row_errors(case.run()[0], case.expected()[0]).max() < TOLERANCE[BF16], rows


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


def nothing() -> None:
    """Where a test could wait for the GPU, and does not."""


def chain_of(rows: int, features: int) -> list[Case]:
    """Three linears that share one row map: each one's output is meant to be the next one's x."""
    first, *others = (
        make_case(rows=rows, features=features, outs=(features,), ranks=(16,) * 5, dtype=BF16, device="cuda")
        for _ in range(3)
    )
    return [first, *(other.with_slots(first.row_slots) for other in others)]


def run_chain(chain: Sequence[Case], handles: Sequence[int], between: Callable[[], None] = nothing) -> torch.Tensor:
    segments = ops.segment_rows(chain[0].row_slots, chain[0].max_adapters)
    y = chain[0].x
    for case, handle in zip(chain, handles, strict=True):
        (y,) = replace(case, x=y).call(segments, handle)
        between()
    return y


@contextmanager
def all_registered(cases: Sequence[Case]) -> Iterator[list[int]]:
    with ExitStack() as stack:
        yield [stack.enter_context(registered(case.pools)) for case in cases]


@pytest.mark.usefixtures("plain_memory")
@pytest.mark.parametrize(
    ("rows", "features"),
    [*((rows, features) for rows in (1, 16, 64, 300) for features in (1024, 4096)), (1024, 5120), (2048, 4096)],
)
def test_chained_ops_of_a_graph_serve_whatever_is_loaded_at_replay(rows: int, features: int) -> None:
    chain = chain_of(rows, features)
    with all_registered(chain) as handles:
        graph, y = capture(lambda: run_chain(chain, handles))
        for _ in range(50):
            for case in chain:
                change_adapters(case)
            chain[0].row_slots.copy_(draw_slots(rows, 1, 5, random.choice(("runs", "shuffled", "one"))))
            chain[0].x.normal_()
            graph.replay()
            apart = run_chain(chain, handles, torch.cuda.synchronize)
            assert apart.isfinite().all()
            assert torch.equal(y, apart)
            assert torch.equal(run_chain(chain, handles), apart)


@pytest.mark.usefixtures("plain_memory")
@pytest.mark.parametrize("rows", [16, 300])
def test_graphs_of_one_stream_replayed_side_by_side(rows: int) -> None:
    """Captured one after the other on one stream: they must not share the words through which programs meet."""
    cases = [
        make_case(rows=rows, features=4096, outs=(1024,), dtype=BF16, device="cuda", order="shuffled") for _ in range(2)
    ]
    truths = [case.run()[0] for case in cases]
    stream, others = torch.cuda.Stream(), [torch.cuda.Stream(), torch.cuda.Stream()]
    with all_registered(cases) as handles:
        graphs = [capture(forward_of(case, handle), stream) for case, handle in zip(cases, handles, strict=True)]
        torch.cuda.synchronize()
        for _ in range(20):
            for _, (y,) in graphs:
                y.fill_(torch.nan)
            torch.cuda.synchronize()
            for _ in range(5):
                for (graph, _), other in zip(graphs, others, strict=True):
                    with torch.cuda.stream(other):
                        graph.replay()
            torch.cuda.synchronize()
            assert all(torch.equal(y, truth) for (_, (y,)), truth in zip(graphs, truths, strict=True))


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("rows", [1, 16, 64, 200, 600])
def test_a_row_keeps_its_bits_whatever_the_others_use(rows: int, width: int) -> None:
    case = make_case(
        rows=rows, features=1024, outs=(768, 200), ranks=(8, 16, 0, 64, 40), dtype=BF16, device="cuda", bias=True,
        width=width, order="shuffled",
    )  # fmt: skip
    kept, first = torch.arange(0, rows, 5, device="cuda"), case.run()
    assert equal_bits(first, case.run(), slice(None)), "two runs differ"
    for order in ("runs", "shuffled", "one"):
        slots = draw_slots(rows, width, case.max_adapters, order).to("cuda")
        slots[kept] = case.row_slots[kept]
        assert equal_bits(case.with_slots(slots).run(), first, kept), order


@pytest.mark.usefixtures("plain_memory")
@pytest.mark.parametrize("rows", [1, 16, 64, 300])
def test_torch_kernels_around_an_op_keep_their_order(rows: int) -> None:
    """x is written right before the op and spoilt right after it, y is read right after it."""
    case = make_case(rows=rows, features=1024, outs=(4096,), dtype=BF16, device="cuda", order="shuffled")
    inputs = [torch.randn_like(case.x) for _ in range(8)]
    with registered(case.pools) as handle:
        segments = ops.segment_rows(case.row_slots, case.max_adapters)

        def step(values: torch.Tensor, between: Callable[[], None]) -> torch.Tensor:
            case.x.copy_(values)
            between()
            (y,) = case.call(segments, handle)
            between()
            doubled = y + y
            between()
            case.x.fill_(torch.nan)
            return doubled

        truths = [step(values, torch.cuda.synchronize) for values in inputs]
        found = [step(inputs[index % 8], nothing) for index in range(200)]
    assert all(truth.isfinite().all() for truth in truths)
    assert all(torch.equal(y, truths[index % 8]) for index, y in enumerate(found))
