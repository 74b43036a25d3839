"""vLLM's op matrix (vllm/tests/lora/test_punica_ops.py), re-posed through the fused ops.

There: shrink and expand apart, hidden 2049 and a sweep of widths, adapters drawn below the last, equal lengths, one
rank. Here: base and adapter in one call (K = width as the shrink, N = width as the expand), all slots and -1, mixed
ranks up to the matrix's rank, ragged runs, every sampled row within the table of tolerances.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from tests.kernels.cases import Case, assert_near, make_case

RANKS = (1, 4, 8, 16, 32, 64, 128, 256)
ADAPTERS = (1, 8, 32, 128)
BATCHES = (1, 4, 16, 32)
# fmt: off
HIDDEN = (
    128, 256, 512, 896, 1024, 1152, 1216, 1280, 1536, 1664, 2048, 2240, 2304, 2368, 2432, 2560, 2752, 3072, 3328, 3456,
    3584, 3712, 4096, 4480, 4608, 4736, 4864, 5120, 5504, 5632, 5888, 6144, 6400, 6848, 6912, 7168, 7424, 8192, 8960,
    9216, 9472, 10240, 11008, 11264, 13824, 14336, 14784, 14848, 15360, 18944, 22016, 22528, 24576, 27392, 27648, 29568,
    29696, 32000, 32256, 32512, 32768, 33024, 36864, 43264, 49152, 49408, 60544, 60672, 64000, 64256, 102400, 102656,
    128000, 128256,
)
# fmt: on
WIDTHS = sorted({hidden // divisor for hidden in HIDDEN for divisor in (1, 2, 8, 16, 64)})
HALF = (torch.float16, torch.bfloat16)


def mixed_ranks(top: int, adapters: int) -> list[int]:
    """Ranks of the slots: the top rank in the last, others below it, one slot empty where there are several."""
    below = random.choices([rank for rank in RANKS if rank <= top], k=max(0, adapters - 2))
    return [*below, 0, top] if adapters > 1 else [top]


def check_sampled_rows(case: Case, samples: int = 24) -> None:
    """The whole call, compared on some rows: the reference goes row by row."""
    rows = torch.tensor(sorted({*random.sample(range(len(case.row_slots)), min(samples, len(case.row_slots))), 0}))
    rows = torch.cat([rows, torch.tensor([len(case.row_slots) - 1])]).to(case.x.device)
    sampled = replace(case.with_slots(case.row_slots[rows]), x=case.x[rows])
    assert_near([y[rows] for y in case.run()], sampled.expected(), case.x.dtype)


def draw(rows: int, features: int, out: int, ranks: list[int], slices: int, dtype: torch.dtype, device: str) -> Case:
    order = random.choice(("runs", "shuffled"))
    return make_case(
        rows=rows, features=features, outs=(out,) * slices, ranks=ranks, dtype=dtype, device=device, order=order
    )


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("slices", [1, 3])
def test_a_few_of_the_matrix(slices: int, dtype: torch.dtype, device: str) -> None:
    for rows, adapters, rank in ((1, 1, 1), (20, 8, 16), (12, 5, 64)):
        check_sampled_rows(draw(rows, 65, 33, mixed_ranks(rank, adapters), slices, dtype, device))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("slices", [1, 2, 3])
@pytest.mark.parametrize("adapters", ADAPTERS)
def test_general(adapters: int, slices: int, dtype: torch.dtype) -> None:
    for rank in RANKS:
        for batch in BATCHES:
            for features, out in ((2049, 96), (96, 2049)):
                rows = batch * random.choice((1, 128))
                ranks = mixed_ranks(rank, adapters)
                check_sampled_rows(draw(rows, features, out, ranks, slices, dtype, "cuda"), samples=6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("slices", [1, 2, 3])
def test_widths(slices: int, dtype: torch.dtype) -> None:
    for width in WIDTHS:
        for features, out in ((width, 80), (80, width)):
            rows = random.choice((4, 4 * 128))
            check_sampled_rows(draw(rows, features, out, mixed_ranks(32, 4), slices, dtype, "cuda"), samples=3)


@pytest.mark.interpreted
def test_rows_without_an_adapter_in_between(device: str) -> None:
    """vLLM's CPU case: lora_indices [0, -1, -1, 0, -1, 0], one slot, rank 4, hidden 8."""
    case = make_case(rows=6, features=8, outs=(8,), ranks=(4,), device=device)
    case = case.with_slots(torch.tensor([0, -1, -1, 0, -1, 0], dtype=torch.int32, device=device)[:, None])
    found, base = case.run()[0], case.base()[0]
    assert torch.equal(found[[1, 2, 4]], base[[1, 2, 4]])
    assert not (found[[0, 3, 5]] == base[[0, 3, 5]]).all(1).any()
    assert_near([found], case.expected(), torch.float32)
