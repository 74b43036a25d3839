"""A linear over few rows, host side: the base product with the shrink beside it, then the expand.

Stage: run time, between `lora_linear.py`, which picks the tiles, and the kernels. Up to some rows the shrink's programs
are in the launch of the product, past that in one of their own, which runs beside it. A group's members share all
launches. No program waits for another of its launch, so nothing can hang.

Letters: T rows, J slots per row, E = T * J entries, K in-features, N out-features.
"""

# ruff: noqa: C419 (a list costs less host time than a generator)

from __future__ import annotations

import torch

from fxlora.kernels.call import LinearCall, Plan
from fxlora.kernels.decode_gemm import gemm_kernel
from fxlora.kernels.decode_shrink import shrink_tiles
from fxlora.kernels.expand import expand, has_sums, scratch_sizes
from fxlora.kernels.launch import Launcher
from fxlora.kernels.tiles import DecodeTiles, ShrinkTile
from fxlora.kernels.triton_helpers import cdiv

_launcher = Launcher(gemm_kernel)


def decode(call: LinearCall, tiles: DecodeTiles) -> list[torch.Tensor]:
    """The members' outputs for `call`."""
    plan = call.plan(_launcher, tiles, lambda: _plan(call, tiles))
    *numbers, stride, h_size, sums_size = plan.numbers
    h, sums = torch.split_with_sizes(call.new_scratch(h_size + sums_size, dtype=torch.float32), (h_size, sums_size))
    outputs = tuple(call.new_outputs())
    if isinstance(tiles.shrink, ShrinkTile) and h_size:
        shrink_tiles(call, h, stride, tiles.shrink)
    call.launch(
        plan,
        (call.x, *call.x.stride()),
        call.strided_weights,
        call.strided_biases,
        outputs,
        sums,
        h,
        stride,
        call.slots,
        call.coeffs,
        call.members.a_pools,
        call.widths,
        *numbers,
    )
    if sums_size:
        expand(call, outputs, sums, h, stride, tiles)
    return list(outputs)


def _plan(call: LinearCall, tiles: DecodeTiles) -> Plan:
    """Of the product's launch; its numbers end with the stride of h and the sizes of the scratch."""
    members, tile, shrink = call.members, tiles.gemm, tiles.shrink
    count = sum([cdiv(n, tile.BN) for n in call.widths]) * cdiv(call.rows, tile.BM) * tile.SPLIT
    stride, h_size, sums_sizes = scratch_sizes(call, tiles)
    programs, parts, constants = 0, 1, ()
    if members.has_pools and not isinstance(shrink, ShrinkTile):
        parts = min(cdiv(members.h_width, shrink.BR), shrink.parts)
        programs = min(call.entries * parts, shrink.programs)
        constants = (cdiv(call.features, shrink.BK) * shrink.BK, shrink.BR, shrink.BK)
    return call.planned(
        _launcher,
        (programs * len(call.widths) + count,),
        (call.rows, call.features, members.max_adapters, programs, parts, stride, h_size, sum(sums_sizes)),
        tile.num_warps,
        J=call.width,
        BM=tile.BM,
        BN=tile.BN,
        BK=tile.BK,
        SPLIT=tile.SPLIT,
        SWAP=tile.SWAP,
        EVEN=call.features % tile.BK == 0 and not any([n % tile.BN for n in call.widths]),
        HAS_BIAS=call.has_bias,
        HAS_POOL=members.has_pool if constants else (False,) * len(call.widths),
        HAS_SUMS=has_sums(call, tiles.split),
        HAS_COEFFS=call.has_coeffs,
        SHRINK=constants,
        STAGES=tile.num_stages,
        UNITS=call.units,
        PDL=call.overlap,
        FIRST=not (isinstance(shrink, ShrinkTile) and members.has_pools),
    )
