"""The ops alone, beside the plain torch linear on the same inputs, in the same run.

`python -m tests.benchmarks.ops [--device cpu|cuda] [--layers 6]`. On CPU: linears of SmolLM2-135M, eight requests
over four adapters (ranks 8 and 16) and rows without one. On CUDA: bf16 linears of common sizes, rank 16, from CUDA
graphs. Answers are compared with the reference first; where they are wrong nothing is timed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from fxlora.kernels import ops
from fxlora.kernels.registry import register_runtime
from tests.kernels.cases import Case, assert_right, make_case, make_pool

HIDDEN, KV, MLP, VOCABULARY = 576, 192, 1536, 49152
REQUEST_SLOTS = (0, 1, -1, 2, 3, 0, -1, 1)
RANKS = (8, 16, 8, 16)
GPU_SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (2048, 128))
GPU_ROWS = ((1, 1), (16, 16), (64, 8), (2048, 8))
Site = tuple[torch.Tensor, list[torch.Tensor], torch.Tensor, torch.Tensor, int]


def smollm2_sites(tokens: int, layers: int) -> list[Site]:
    """(x, weights, row_slots, segments, handle) of each linear; the head reads one token per request."""
    slots = torch.tensor(REQUEST_SLOTS, dtype=torch.int32)[:, None]
    rows = slots.repeat_interleave(tokens, dim=0)
    segments, head_segments = ops.segment_rows(rows, len(RANKS)), ops.segment_rows(slots, len(RANKS))
    layer = [(HIDDEN, (HIDDEN, KV, KV)), (HIDDEN, (HIDDEN,)), (HIDDEN, (MLP, MLP)), (MLP, (HIDDEN,))]
    sites = []
    for features, outs in [*layer * layers, (HIDDEN, (VOCABULARY,))]:
        head = outs == (VOCABULARY,)
        weights = [torch.randn(out, features) for out in outs]
        (handle,) = register_runtime(1, [tuple(make_pool("linear", features, out, RANKS) for out in outs)])
        x = torch.randn(8, 1 if head else tokens, features)
        sites.append((x, weights, slots if head else rows, head_segments if head else segments, handle))
    return sites


def time_cpu(layers: int, rounds: int) -> None:
    for tokens in (1, 128):
        sites = smollm2_sites(tokens, layers)

        def plain(sites: list[Site] = sites) -> None:
            for x, weights, *_ in sites:
                for weight in weights:
                    F.linear(x, weight)

        def fused(sites: list[Site] = sites) -> None:
            for x, weights, slots, segments, handle in sites:
                ops.lora_linear(x, weights, [None] * len(weights), slots, None, segments, handle)

        seconds: dict[Callable[[], None], list[float]] = {plain: [], fused: []}
        for index in range(rounds + 2):
            for step in (plain, fused) if index % 2 else (fused, plain):
                begin = time.perf_counter()
                step()
                seconds[step].append(time.perf_counter() - begin)
        base, ours = seconds[plain][2:], seconds[fused][2:]
        ratio = statistics.median(b / a for a, b in zip(base, ours, strict=True))
        print(
            f"cpu {torch.get_num_threads()} threads, {8 * tokens:5} rows, {layers} layers and head: "
            f"F.linear {statistics.median(base) * 1e3:.2f} ms, op {statistics.median(ours) * 1e3:.2f} ms, {ratio:.3f}x"
        )


def graph_us(step: Callable[[], object], calls: int = 20, replays: int = 20) -> float:
    """Median microseconds of one call, from replays of a CUDA graph of `calls` of them."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            step()
    times = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / calls)
    return statistics.median(times)


def time_cuda() -> None:
    print(f"{torch.cuda.get_device_name()}, bf16, rank 16; weights stay in L2 where they fit")
    for rows, adapters in GPU_ROWS:
        for features, out in GPU_SHAPES:
            case = make_case(
                rows=rows, features=features, outs=(out,), ranks=(16,) * adapters, dtype=torch.bfloat16, device="cuda"
            )
            slots = (torch.arange(rows, dtype=torch.int32, device="cuda") * adapters // rows)[:, None]
            case = case.with_slots(slots)
            (handle,) = register_runtime(2, [case.pools])
            segments = ops.segment_rows(case.row_slots, case.max_adapters)

            def fused(case: Case = case, segments: torch.Tensor = segments, handle: int = handle) -> None:
                case.call(segments, handle)

            base = graph_us(partial(F.linear, case.x, case.weights[0]))
            print(f"rows {rows:5} adapters {adapters:3} K {features:6} N {out:6}: "
                  f"F.linear {base:8.1f} us, op {graph_us(fused):8.1f} us")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    for rows in (8, 40):
        assert_right(make_case(rows=rows, outs=(24, 40), device=arguments.device))
    with torch.no_grad():
        time_cuda() if arguments.device == "cuda" else time_cpu(arguments.layers, arguments.rounds)


if __name__ == "__main__":
    main()
