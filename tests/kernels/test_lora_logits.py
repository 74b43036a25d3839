"""lora_logits against the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fxlora.kernels.ops import INTERPRET
from tests.kernels.cases import DEVICES, DTYPES, assert_right, make_case

pytestmark = pytest.mark.interpreted


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 9, 40])
def test_vocabulary_that_fits_no_tile(rows: int, dtype: torch.dtype, device: str) -> None:
    assert_right(
        make_case("logits", rows=rows, outs=(61 if INTERPRET else 301,), dtype=dtype, device=device, bias=rows == 9)
    )


@pytest.mark.parametrize("device", DEVICES)
def test_three_dims_and_several_adapters_per_row(device: str) -> None:
    case = make_case("logits", rows=12, outs=(34,), width=2, device=device)
    assert assert_right(replace(case, x=case.x.view(3, 4, 40)))[0].shape == (3, 4, 34)


@pytest.mark.parametrize("device", DEVICES)
def test_same_answer_as_the_linear(device: str) -> None:
    case = make_case("logits", rows=12, outs=(34,), device=device)
    torch.testing.assert_close(case.run(), replace(case, kind="linear").run(), rtol=1e-5, atol=1e-5)
