"""What the tuner tries: tiles that differ from the table's in one number."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")


def test_neighbours_differ_in_one_number() -> None:
    from fxlora.kernels.tiles import FusedTiles, GemmTile, ShrinkTile
    from tests.benchmarks.tune import neighbours

    tiles = FusedTiles(ShrinkTile(16, 64, 256, 1, 264, 4, 4, 4), GemmTile(16, 128, 128, 1, True, 4, 3), 128, 2)
    found = dict(neighbours(tiles))
    assert found["gemm.BN 128 -> 64"].gemm == GemmTile(16, 64, 128, 1, True, 4, 3)
    assert found["gemm.SWAP True -> False"].gemm.SWAP is False
    assert found["gemm.num_stages 3 -> 4"].gemm.num_stages == 4
    assert found["stages 2 -> 1"].stages == 1
    assert "gemm.SPLIT 1 -> 0" not in found
    assert len(set(found.values()) - {tiles}) == len(found)
