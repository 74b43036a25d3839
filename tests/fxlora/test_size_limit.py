"""Sizes that grow into formulas too long to compare: a capture gives up leaving them open, in seconds."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import fxlora
from fxlora.size_limit import MOST_OPERATIONS, limited_sizes


class Windows(nn.Module):
    """Blocks that pad an image to whole windows, look at each and put it together again, as Swin does."""

    def __init__(self, blocks: int, window: int = 4, width: int = 8) -> None:
        super().__init__()
        self.window = window
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            batch, height, width, channels = x.shape
            right, below = -width % self.window, -height % self.window
            padded = F.pad(x, (0, 0, 0, right, 0, below))
            rows, cols = padded.shape[1] // self.window, padded.shape[2] // self.window
            windows = padded.view(batch, rows, self.window, cols, self.window, channels).transpose(2, 3)
            seen = layer(windows.reshape(-1, self.window * self.window, channels))
            whole = seen.view(batch, rows, cols, self.window, self.window, channels).transpose(2, 3)
            x = x + whole.reshape(batch, rows * self.window, cols * self.window, channels)[:, :height, :width]
            x = x[:, ::3, ::3] if x.shape[1] > 12 else x
        return x


@pytest.mark.parametrize(("blocks", "fixed"), [(1, False), (6, True)])
def test_sizes_are_left_open_as_long_as_they_can_be_compared(blocks: int, fixed: bool) -> None:
    model = Windows(blocks).eval()
    lora = fxlora.apply(fxlora.capture(model, torch.randn(2, 17, 22, 8)), max_adapters=2, max_rank=4)
    sizes = lora.fixed_sizes.get("x", {})
    assert (sizes.get(2) == 22) is fixed
    assert 0 not in sizes
    x = torch.randn(5, 17, 22, 8)
    with torch.no_grad():
        torch.testing.assert_close(lora(x), model(x))


def test_the_limit_ends_with_the_capture() -> None:
    evaluate = ShapeEnv.evaluate_expr
    with limited_sizes() as found:
        assert ShapeEnv.evaluate_expr is not evaluate
    assert ShapeEnv.evaluate_expr is evaluate
    assert found == []
    assert MOST_OPERATIONS > 170
