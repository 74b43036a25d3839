"""Tile choices: what a Triton dot accepts, and that they follow from shapes alone."""

from __future__ import annotations

import pytest
import torch

from fxlora.kernels.tiles import Tile, embedding_tile, gemm_tile, logits_tile, shrink_tile


def choices(rows: int) -> list[Tile]:
    halves = [pick(rows, dtype) for pick in (gemm_tile, logits_tile) for dtype in (torch.float32, torch.bfloat16)]
    return [shrink_tile(rows), embedding_tile(rows), *halves]


@pytest.mark.parametrize("rows", [1, 16, 17, 64, 65, 8192])
def test_sides_are_powers_of_two_that_a_dot_accepts(rows: int) -> None:
    for tile in choices(rows):
        for side in (tile.BM, tile.BN, tile.BK, tile.BR):
            assert side >= 16
            assert side & (side - 1) == 0


def test_table_is_total_and_the_same_at_each_call() -> None:
    assert [choices(rows) for rows in range(1, 300)] == [choices(rows) for rows in range(1, 300)]
