"""The ops that a rewritten graph calls: schema, shape function and choice of body. The only file `passes/` imports.

Stage: run time. Registered with `torch.library.Library` rather than `custom_op`, whose Python layers cost more than a
small linear (measured on CPU, us a call of an op with this schema: 6 here, 12 with custom_op, 34 with custom_op and
weights that require grad). No op has an autograd formula: outputs never carry grad, in grad mode and under every
compile backend.

A call finds its adapter memory by handle (registry.py) at the time it runs; Triton is imported by the first call on
CUDA. With TRITON_INTERPRET=1 set before this import, CPU tensors run the Triton bodies as well.

Letters: T rows (product of the leading dims of x), J slots per row, E experts, K in-features, N out-features, S slots,
V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import cast

import torch

from fxlora.kernels import cpu, cpu_experts
from fxlora.kernels.batch_slots import batch_slots as _batch_slots
from fxlora.kernels.expert_segments import expert_segments_size, segment_experts_torch
from fxlora.kernels.segments import segment_rows_torch, segments_size

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

_library = torch.library.Library("fxlora", "DEF")
_library.define("segment_rows(Tensor row_slots, int max_adapters) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(
    "lora_linear(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor row_slots, Tensor? row_coeffs, Tensor segments, "
    "int group) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "lora_logits(Tensor x, Tensor weight, Tensor? bias, Tensor row_slots, Tensor? row_coeffs, Tensor segments, "
    "int group) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "lora_embedding(Tensor ids, Tensor weight, Tensor row_slots, Tensor? row_coeffs, Tensor segments, int group) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "segment_experts(Tensor row_slots, Tensor? offsets, Tensor? expert_ids, int num_experts, int max_adapters) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "lora_experts(Tensor x, Tensor weight, Tensor? bias, Tensor row_slots, Tensor? row_coeffs, Tensor segments, "
    "int group) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define("batch_slots(Tensor like, int[] dims, int group) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))

segment_rows = torch.ops.fxlora.segment_rows.default
"""(row_slots int32 [T, J], max_adapters S) -> int32 of `segments_size`, the layout of segments.py.

On CPU raises OpInputError on a slot that is neither -1 nor in 0 .. S - 1; on CUDA such a slot means no adapter
(checking would stop the stream)."""

lora_linear = torch.ops.fxlora.lora_linear.default
"""(x [..., K], weights [N, K] each, biases [N] or None each, row_slots int32 [T, J], row_coeffs fp32 [T, J] or None,
segments, group handle) -> one [..., N] per weight: y = x W^T + bias + sum over j of coeff_j scaling_j (x A_j^T) B_j.

-1 and slots with rank 0 add nothing. x is fp32, bf16 or fp16, pools have its dtype; weights may have any stride. h is
accumulated in fp32, scaling is applied in fp32. Raises RuntimeGoneError, PlanMismatchError, OpInputError."""

lora_logits = torch.ops.fxlora.lora_logits.default
"""(x [..., K], weight [V, K], bias [V] or None, row_slots, row_coeffs, segments, group) -> [..., V].

As `lora_linear`."""

lora_embedding = torch.ops.fxlora.lora_embedding.default
"""(ids [...] of any int dtype, weight [V, N], row_slots, row_coeffs, segments, group) -> [..., N]: the rows of `weight`
plus the sum over j of coeff_j scaling_j A_j[id] B_j."""

segment_experts = torch.ops.fxlora.segment_experts.default
"""(row_slots int32 [T, J], offsets int [E] or None, expert_ids int [T] or None, num_experts E, max_adapters S) -> int32
of `expert_segments_size`, the layout of expert_segments.py.

A row is one (token, expert) pair. Exactly one of the two says which expert a row goes to: offsets, where each expert's
rows end, for rows that come sorted by expert (rows past the last end go to none); or expert_ids, in any order, where a
value outside 0 .. E - 1 means none. Raises OpInputError where they do not fit, on CPU on a bad slot too."""

lora_experts = torch.ops.fxlora.lora_experts.default
"""(x [T, K], weight [E, N, K], bias [E, N] or None, row_slots int32 [T, J], row_coeffs fp32 [T, J] or None, segments of
`segment_experts`, group handle) -> [T, N]: with e the expert of row t, y = x W_e^T + bias_e + sum over j of coeff_j
scaling_j (x A_je^T) B_je. Rows without an expert are zero.

weight may have any stride (one stored [E, K, N] comes transposed). As for `lora_linear`: -1 and slots with rank 0 add
nothing, h is accumulated and scaled in fp32, the same errors are raised."""

batch_slots = torch.ops.fxlora.batch_slots.default
"""(like, dims, group handle) -> int32 of the sizes of `like` along `dims`: the slots of the running batch, -1 outside
of one. Reads memory that is no argument, at a fixed address. Raises OpInputError past its end."""


def _fake_segment_rows(row_slots: torch.Tensor, max_adapters: int) -> torch.Tensor:
    return row_slots.new_empty(segments_size(row_slots.numel(), max_adapters))


def _fake_lora_linear(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    row_slots: torch.Tensor,
    row_coeffs: torch.Tensor | None,
    segments: torch.Tensor,
    group: int,
) -> list[torch.Tensor]:
    return [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights]


def _fake_lora_logits(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    row_slots: torch.Tensor,
    row_coeffs: torch.Tensor | None,
    segments: torch.Tensor,
    group: int,
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _fake_lora_embedding(
    ids: torch.Tensor,
    weight: torch.Tensor,
    row_slots: torch.Tensor,
    row_coeffs: torch.Tensor | None,
    segments: torch.Tensor,
    group: int,
) -> torch.Tensor:
    return weight.new_empty(*ids.shape, weight.shape[1])


def _fake_segment_experts(
    row_slots: torch.Tensor,
    offsets: torch.Tensor | None,
    expert_ids: torch.Tensor | None,
    num_experts: int,
    max_adapters: int,
) -> torch.Tensor:
    size = expert_segments_size(row_slots.shape[0], num_experts, max_adapters, expert_ids is None)
    return row_slots.new_empty(size)


def _fake_lora_experts(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    row_slots: torch.Tensor,
    row_coeffs: torch.Tensor | None,
    segments: torch.Tensor,
    group: int,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


def _fake_batch_slots(like: torch.Tensor, dims: Sequence[int], group: int) -> torch.Tensor:
    return like.new_empty([like.shape[d] for d in dims], dtype=torch.int32)


def _without_grad(body: Callable[..., object] | str) -> Callable[..., object]:
    """The op skips autograd, so its body must not record the torch ops that it calls.

    As `torch.no_grad` does, less its Python layers: 0.25 us instead of 1.1, nothing where grad mode is off. body: or
    the name of a Triton body, which is in the file of that name and imported at the first call.
    """

    def run(*args: object) -> object:
        nonlocal body
        if isinstance(body, str):
            body = cast("Callable[..., object]", getattr(import_module(f"fxlora.kernels.{body}"), body))
        if not torch.is_grad_enabled():
            return body(*args)
        torch._C._set_grad_enabled(False)
        try:
            return body(*args)
        finally:
            torch._C._set_grad_enabled(True)

    return run


def _register() -> None:
    rows: dict[str, tuple[Callable[..., object], Callable[..., object]]] = {
        "segment_rows": (_fake_segment_rows, segment_rows_torch),
        "lora_linear": (_fake_lora_linear, cpu.lora_linear),
        "lora_logits": (_fake_lora_logits, cpu.lora_logits),
        "lora_embedding": (_fake_lora_embedding, cpu.lora_embedding),
        "segment_experts": (_fake_segment_experts, segment_experts_torch),
        "lora_experts": (_fake_lora_experts, cpu_experts.lora_experts),
        "batch_slots": (_fake_batch_slots, _batch_slots),
    }
    for name, (fake, cpu_body) in rows.items():
        torch.library.register_fake(f"fxlora::{name}", fake, lib=_library)
        _library.impl(name, _without_grad(name if INTERPRET else cpu_body), "CPU")
        _library.impl(name, _without_grad(name), "CUDA")
        _library.impl(name, torch.library.fallthrough_kernel, "Autograd")


_register()
