"""How kernels of one op run at the same time: programmatic dependent launch (CUDA 12, Hopper).

Stage: run time, below the Triton bodies. Nothing here exists in the interpreter, where programs run one after another.

Rules that make overlap safe. Whatever a kernel of ours lets start early is one of ours and waits before it reads x.
Weights, pools, row maps and segments are written by kernels that let nothing start early, so they are complete when
any kernel of ours starts; x may come from an op of ours, so it is read only after `wait_for_earlier`. The first kernel
of an op waits before it lets the next one start, hence the later kernels of an op may read x at once; every kernel
waits before it ends, so that whatever follows an op on the stream finds all of its kernels complete.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl


@cache
def can_overlap(device: torch.device) -> bool:
    """Whether this device has programmatic dependent launch."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


@triton.jit
def wait_for_earlier(PDL: tl.constexpr) -> None:
    """Returns when the kernels before this one have ended and their memory is visible."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_later_start(PDL: tl.constexpr) -> None:
    """The next kernel may start once every program of this one has come here or ended."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
