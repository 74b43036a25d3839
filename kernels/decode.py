"""A linear over few rows, host side: shrink, expand and the base product, three launches that run at the same time.

Stage: run time, between `lora_linear.py`, which picks the tiles, and the kernels. A group's members share the launches.

Letters: T rows, J slots per row, E = T * J entries, K in-features, N out-features.
"""

# ruff: noqa: C419 (a list costs less host time than a generator)

from __future__ import annotations

import torch

from fxlora.kernels.call import LinearCall, Plan
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
    plan = call.plan(_launcher, tiles.gemm, lambda: _plan(call, tiles.gemm))
    *numbers, tile_count, stride, delta_size, h_size, parts_size = plan.numbers
    sizes = (delta_size, h_size, parts_size)
    delta, h, parts = torch.split_with_sizes(call.x.new_empty(sum(sizes), dtype=torch.float32), sizes)
    if members.has_pools:
        shrink(call, h, stride, tiles.shrink)
        expand(call, delta, h, stride, tiles.expand)
    outputs = call.new_outputs()
    plan.launch(
        (call.x, *call.x.stride()),
        call.strided_weights,
        call.strided_biases,
        tuple(outputs),
        delta,
        parts,
        counters(tile_count, call.x.device, call.stream) if parts_size else call.segments,
        call.slots,
        members.a_pools,
        call.widths,
        *numbers,
    )
    return outputs


def _plan(call: LinearCall, tile: GemmTile) -> Plan:
    """Of the base product; its numbers end with the count of tiles, the stride of h and the sizes of the scratch."""
    members = call.members
    columns = sum(call.widths)
    tiles = sum([cdiv(n, tile.BN) for n in call.widths]) * cdiv(call.rows, tile.BM)
    stride = max(16, next_power_of_2(members.h_width))
    sizes = (
        cdiv(call.entries * columns, 4) * 4 if members.has_pools else 0,  # what follows starts at 16 bytes
        len(call.widths) * call.entries * stride if members.has_pools else 0,
        tile.SPLIT * call.rows * columns if tile.SPLIT > 1 else 0,
    )
    return call.planned(
        _launcher,
        (tiles * tile.SPLIT,),
        (call.rows, call.features, members.max_adapters, tiles, stride, *sizes),
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
