"""Triton body of `lora_experts`: which launches serve a call.

Stage: run time. The choice follows from shapes, strides, dtypes, what the pool was allocated for and the highest rank
in it, never from what the batch holds or how it is routed: low row tiles (few rows per expert) go through
expert_decode.py, high ones through expert_prefill.py, or on a Hopper GPU through expert_hopper.py, which has its bits.

At a fixed batch shape a row's bits follow from its own x, expert and adapters alone, on either path, whatever its
neighbours use or wherever they are routed. A row without an adapter has the bits of the same call with nothing loaded.
"""

from __future__ import annotations

import torch

from fxlora.kernels.expert_call import ExpertCall, ExpertSite
from fxlora.kernels.expert_decode import decode
from fxlora.kernels.expert_prefill import prefill, runs_in_one, shrinks_beside
from fxlora.kernels.expert_segments import SLOTS_FROM
from fxlora.kernels.expert_tiles import (
    expert_beside_tile,
    expert_decode_tiles,
    expert_hopper_tile,
    expert_prefill_tile,
)
from fxlora.kernels.prefill import has_gluon
from fxlora.kernels.registry import derived_of, expert_pool_of
from fxlora.kernels.triton_helpers import device_of


def lora_experts(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    row_slots: torch.Tensor,
    row_coeffs: torch.Tensor | None,
    segments: torch.Tensor,
    group: int,
) -> torch.Tensor:
    """See `ops.lora_experts`."""
    site = derived_of(group, lambda _: ExpertSite(expert_pool_of(group)))
    inputs = (x, row_slots, row_coeffs, segments, (weight,), (bias,))
    found = site.replays.run(*inputs)
    if found is not None:
        return found[0]
    with device_of(x):
        found = site.replays.run(*inputs)  # which was refused if another GPU was the current one
        if found is not None:
            return found[0]
        call = ExpertCall(x, weight, bias, row_slots, row_coeffs, segments, site)
        if not call.rows or not call.columns:
            return x.new_zeros(call.rows, call.columns)
        y = _run(call)
        site.replays.learn(inputs, call, [y])
        return y


def _run(call: ExpertCall) -> torch.Tensor:
    if call.height < SLOTS_FROM:
        return decode(call, expert_decode_tiles(call.entries, call.features, call.columns, call.x.dtype))
    gluon = has_gluon(call.x.device)
    if gluon and runs_in_one(call):
        sizes = (call.rows, call.num_experts, call.features, call.columns)
        whole = expert_hopper_tile(*sizes, call.site.highest_rank, call.site.max_adapters)
        if whole is not None:
            from fxlora.kernels import expert_hopper  # another Triton may not have what it imports

            return expert_hopper.prefill(call, whole)
    simple = call.in_place and call.width == 1
    sizes = (call.features, call.columns, call.x.dtype, call.site.h_width)
    tile_of = expert_beside_tile if gluon and shrinks_beside(call) else expert_prefill_tile
    return prefill(call, tile_of(call.rows, call.num_experts, simple, *sizes))
