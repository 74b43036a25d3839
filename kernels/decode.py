"""A linear over few rows, host side: shrink, expand and the base product, three launches that run at the same time.

Stage: run time, between `lora_linear.py`, which picks the tiles, and the kernels. A group's members share the launches.

Letters: T rows, J slots per row, E = T * J entries, K in-features, N out-features.
"""

# ruff: noqa: C419 (a list costs less host time than a generator)

from __future__ import annotations

import torch

from fxlora.kernels.call import LinearCall
from fxlora.kernels.decode_gemm import gemm_kernel
from fxlora.kernels.expand import expand
from fxlora.kernels.launch import Launcher
from fxlora.kernels.shrink import shrink
from fxlora.kernels.tiles import DecodeTiles, GemmTile
from fxlora.kernels.triton_helpers import cdiv, next_power_of_2
from fxlora.kernels.workspace import counters

_launcher = Launcher(gemm_kernel)


def decode(call: LinearCall, tiles: DecodeTiles) -> list[torch.Tensor]:
    """The members' outputs for `call`."""
    members = call.members
    columns = sum(call.widths)
    split = tiles.gemm.SPLIT
    stride = max(16, next_power_of_2(members.h_width))
    sizes = (
        cdiv(call.entries * columns, 4) * 4 if members.has_pools else 0,  # what follows starts at 16 bytes
        len(call.widths) * call.entries * stride if members.has_pools else 0,
        split * call.rows * columns if split > 1 else 0,
    )
    delta, h, parts = call.x.new_empty(sum(sizes), dtype=torch.float32).split(sizes)
    if members.has_pools:
        shrink(call, h, stride, tiles.shrink)
        expand(call, delta, h, stride, tiles.expand)
    outputs = call.new_outputs()
    _gemm(call, outputs, delta, parts, tiles.gemm)
    return outputs


def _gemm(
    call: LinearCall, outputs: list[torch.Tensor], delta: torch.Tensor, parts: torch.Tensor, tile: GemmTile
) -> None:
    members = call.members
    tiles = sum([cdiv(n, tile.BN) for n in call.widths]) * cdiv(call.rows, tile.BM)
    call.launch(
        _launcher,
        (tiles * tile.SPLIT,),
        (
            (call.x, *call.x.stride()),
            call.strided_weights,
            call.strided_biases,
            tuple(outputs),
            delta,
            parts,
            counters(tiles, call.x.device, call.stream) if tile.SPLIT > 1 else call.segments,
            call.slots,
            members.a_pools,
            call.widths,
            call.rows,
            call.features,
            members.max_adapters,
        ),
        tile.num_warps,
        J=call.width,
        BM=tile.BM,
        BN=tile.BN,
        BK=tile.BK,
        SPLIT=tile.SPLIT,
        SWAP=tile.SWAP,
        EVEN=call.features % tile.BK == 0 and not any([n % tile.BN for n in call.widths]),
        HAS_BIAS=call.has_bias,
        HAS_POOL=members.has_pool,
        STAGES=tile.num_stages,
        PDL=call.overlap and members.has_pools,
    )
