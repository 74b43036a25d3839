"""The slots of the running batch, for graphs that cannot take them as an input.

Stage: run time, first op of a graph under torch.compile. A request's adapter reaches such a graph through memory at a
fixed address, which `fxlora.Runtime.batch` writes before the graph runs, so that a CUDA-graph replay reads what was
written last.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

from fxlora.kernels.errors import OpInputError
from fxlora.kernels.registry import slots_behind


def batch_slots(like: torch.Tensor, dims: Sequence[int], group: int) -> torch.Tensor:
    """int32 of the sizes of `like` along `dims`: a copy, as a compiler may reuse the memory of any op's result."""
    sizes = [like.shape[d] for d in dims]
    buffers = slots_behind(group)
    buffer = buffers.get(like.device)
    if buffer is None:
        raise OpInputError(f"a call on {like.device}; the slots of a batch are kept on {[str(d) for d in buffers]}")
    if prod(sizes) > len(buffer):
        raise OpInputError(f"a call of {prod(sizes)} rows to choose adapters for; max_tokens is {len(buffer)}")
    return buffer[: prod(sizes)].clone().view(sizes)
