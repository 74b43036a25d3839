"""The ops alone, beside the plain torch linear on the same inputs, in the same run.

`python -m tests.benchmarks.ops [--layers 6]`, on the CPU: linears of SmolLM2-135M, eight requests over four adapters
(ranks 8 and 16) and rows without one. Answers are compared with the reference first; where they are wrong nothing is
timed. `tests.benchmarks.linear` is the one for a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from fxlora.kernels import ops
from fxlora.kernels.registry import register_runtime
from tests.kernels.cases import assert_right, make_case, make_pool

HIDDEN, KV, MLP, VOCABULARY = 576, 192, 1536, 49152
REQUEST_SLOTS = (0, 1, -1, 2, 3, 0, -1, 1)
RANKS = (8, 16, 8, 16)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    for rows in (8, 40):
        assert_right(make_case(rows=rows, outs=(24, 40)))
    with torch.no_grad():
        time_cpu(arguments.layers, arguments.rounds)


if __name__ == "__main__":
    main()
