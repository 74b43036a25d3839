"""Triton bodies of `lora_linear` and `lora_logits`: which body serves a call.

Stage: run time. The choice follows from shapes, strides and dtypes alone, so a batch's bits never depend on what it
holds:
    one row, or a few over few columns     gemv.py      shrink, matrix-vector products
    other fp32                             single.py    shrink, the library's product, expand
    up to DECODE_ROWS rows                 decode.py    base product with the shrink beside it, expand
        many of them, or many columns      fused.py     shrink, base product that takes the expand along
        tiles of one wave, on Hopper       fused_hopper.py  the same
    more rows, where TMA can read it all   prefill.py   shrink, one persistent launch of base product and expand (large
                                                        calls on a Hopper GPU: prefill_hopper.py)
        other bf16                         fused.py
    everything else                        general.py

Letters: T rows, J slots per row, K in-features, N out-features, V vocabulary.
"""

# ruff: noqa: C419 (a list costs less host time than a generator)

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import gcd
from typing import Any

import torch

from fxlora.kernels.call import MOST_MEMBERS, LinearCall, Members
from fxlora.kernels.checks import check_linears, check_members
from fxlora.kernels.decode import decode
from fxlora.kernels.fused import fused
from fxlora.kernels.gemv import gemv
from fxlora.kernels.general import general
from fxlora.kernels.prefill import has_gluon, lie_transposed, prefill
from fxlora.kernels.prefill_tiles import (
    hopper_tile,
    many_fused_tiles,
    prefers_many_tiles,
    prefers_prefill,
    prefill_tile,
)
from fxlora.kernels.registry import Group, derived_of, pools_of
from fxlora.kernels.single import single
from fxlora.kernels.tiles import (
    decode_tiles,
    fused_tiles,
    gemv_tile,
    general_tiles,
    single_tiles,
)
from fxlora.kernels.triton_helpers import device_of
from fxlora.kernels.wave_tiles import FusedHopperTiles, fused_hopper_tiles

DECODE_ROWS = 256
"""Most rows of decode.py and fused.py."""

FEW_ROWS = 64
"""Most rows of a batch that no body for many rows serves."""

GEMV_ROWS, GEMV_COLUMNS = 16, 512
"""Most rows and columns of a batch that matrix-vector products serve; one row is served whatever its columns."""

WAVE_SLOTS = 512
"""Most slots of a pool whose table a warp of fused_hopper.py holds."""

Body = Callable[[LinearCall, Any], list[torch.Tensor]]
"""(call, its tiles) -> the members' outputs."""


def lora_linear(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    row_slots: torch.Tensor,
    row_coeffs: torch.Tensor | None,
    segments: torch.Tensor,
    group: int,
) -> list[torch.Tensor]:
    """See `ops.lora_linear`."""
    runs = derived_of(group, _runs_of)
    if len(runs) == 1:
        found = runs[0].replays.run(x, row_slots, row_coeffs, segments, weights, biases)
        if found is not None:
            return found
    check_members(weights, pools_of(group))
    outputs: list[torch.Tensor] = []
    with device_of(x):  # another GPU than the current one is what a replay was refused for, if nothing else
        for members in runs:
            part = slice(len(outputs), len(outputs) + len(members.pools))
            inputs = (x, row_slots, row_coeffs, segments, weights[part], biases[part])
            outputs += members.replays.run(*inputs) or _run(inputs, members)
    return outputs


def _run(inputs: tuple[Any, ...], members: Members) -> list[torch.Tensor]:
    """The outputs of members that share launches. inputs: as of `Replays.run`."""
    x, row_slots, row_coeffs, segments, weights, biases = inputs
    call = LinearCall(x, weights, biases, row_slots, row_coeffs, segments, members)
    if not call.rows:
        return call.new_outputs()
    body, tiles = body_of(call)
    outputs = body(call, tiles)
    members.replays.learn(inputs, call, outputs)
    return outputs


def _runs_of(pools: Group) -> list[Members]:
    """A group's members, as many as share a launch at a time."""
    check_linears(pools)
    return [Members(pools[first : first + MOST_MEMBERS]) for first in range(0, len(pools), MOST_MEMBERS)]


def body_of(call: LinearCall) -> tuple[Body, object]:
    """The body that serves a call, and its tiles."""
    rows, features, columns, dtype = call.rows, call.features, sum(call.widths), call.x.dtype
    few = rows == 1 or (rows <= GEMV_ROWS and columns <= GEMV_COLUMNS)
    if few and all([weight.stride(1) == 1 for weight in call.weights]):
        return gemv, gemv_tile(features)
    if dtype == torch.float32:
        return single, single_tiles(rows, features)
    ranks, many = call.members.h_width, rows > DECODE_ROWS
    wave = None if many else fused_hopper_tiles(rows, features, call.widths, ranks)
    if wave and _serves_a_wave(call):
        return _one_wave, wave
    if (many or (rows > FEW_ROWS and prefers_prefill(rows, features, call.widths, dtype))) and _all_by_tma(call):
        tile_of = hopper_tile if has_gluon(call.x.device) else prefill_tile
        return prefill, tile_of(rows, features, call.widths, ranks)
    units = _units_of(call)
    if dtype == torch.bfloat16 and (many or (rows > FEW_ROWS and prefers_many_tiles(rows, call.widths, units))):
        return fused, many_fused_tiles(rows, call.widths, ranks, units)
    if many:
        return general, general_tiles(rows, call.entries)
    # fused keeps h in the dtype of x, whose range fp16 does not have
    aligned = not any([n % 8 for n in call.widths])
    tiles = fused_tiles(rows, features, call.widths, ranks, aligned) if dtype == torch.bfloat16 else None
    return (fused, tiles) if tiles else (decode, decode_tiles(rows, features, columns, ranks, units[0] == 1))


def _serves_a_wave(call: LinearCall) -> bool:
    """fused_hopper.py can take the call."""
    is_one = call.width == 1 and call.x.dtype == torch.bfloat16
    return is_one and call.members.max_adapters <= WAVE_SLOTS and _all_by_tma(call) and has_gluon(call.x.device)


def _one_wave(call: LinearCall, tiles: FusedHopperTiles) -> list[torch.Tensor]:
    from fxlora.kernels.fused_hopper import fused_hopper  # another Triton may not have what it imports

    return fused_hopper(call, tiles)


def _all_by_tma(call: LinearCall) -> bool:
    """TMA reads x and the weights, and writes the outputs."""
    weights = [weight.t() for weight in call.weights] if lie_transposed(call) else call.weights
    return call.rows_by_tma(call.x, *weights) and not any([n % 8 for n in call.widths])


def _units_of(call: LinearCall) -> tuple[int, int]:
    """As of `many_fused_tiles`."""
    in_rows = all([weight.stride(1) == 1 for weight in call.weights])
    strides = [max(weight.stride()) for weight in call.weights]
    return gcd(16, call.features, call.x.stride(0), *strides), gcd(16 if in_rows else 2, *call.widths)
