"""`lora_linear` in fp32, host side: the shrink, torch.mm as the base product, then the expand.

Stage: run time, between `lora_linear.py`, which picks the tiles, and the kernels. In fp32 there is no matrix unit to
feed, and the library's product is several times as fast as one written in Triton. It follows the precision that is set
for PyTorch (`torch.set_float32_matmul_precision`), as the model does without adapters; what adapters add is IEEE fp32.

Letters: T rows, J slots per row, E = T * J entries, K in-features, N out-features.
"""

from __future__ import annotations

import torch

from fxlora.kernels.call import LinearCall
from fxlora.kernels.decode_shrink import shrink_tiles
from fxlora.kernels.expand import expand, scratch_sizes
from fxlora.kernels.shrink import shrink
from fxlora.kernels.tiles import ShrinkTile, SingleTiles


def single(call: LinearCall, tiles: SingleTiles) -> list[torch.Tensor]:
    """The members' outputs for `call`."""
    stride, h_size, sizes = scratch_sizes(call, tiles)
    h, sums = call.new_scratch(h_size + sum(sizes), dtype=torch.float32).split_with_sizes([h_size, sum(sizes)])
    outputs = tuple(call.new_outputs())
    if h_size:
        if isinstance(tiles.shrink, ShrinkTile):
            shrink_tiles(call, h, stride, tiles.shrink)
        else:
            shrink(call, h, stride, tiles.shrink)
    call.is_recorded = False
    with torch.no_grad():  # `out` is refused where a parameter asks for a gradient
        for weight, bias, y, part in zip(call.weights, call.biases, outputs, sums.split_with_sizes(sizes), strict=True):
            target = (part if part.numel() else y).view(call.rows, -1)
            if part.numel() or bias is None:
                torch.mm(call.x, weight.t(), out=target)
            else:
                torch.addmm(bias, call.x, weight.t(), out=target)
    if sums.numel():
        expand(call, outputs, sums, h, stride, tiles)
    return list(outputs)
