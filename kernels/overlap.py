"""How kernels of one op run at the same time: programmatic dependent launch (CUDA 12, Hopper).

Stage: run time, below the Triton bodies. Nothing here exists in the interpreter, where programs run one after another.

Rules that make overlap safe. Whatever a kernel of ours lets start early is one of ours and waits before it reads x.
Weights, pools, row maps and segments are written by kernels that let nothing start early, so they are complete when
any kernel of ours starts; x may come from an op of ours, so it is read only after `wait_for_earlier`. The first kernel
of an op waits before it lets the next one start, hence the later kernels of an op may read x at once; every kernel
waits before it ends, so that whatever follows an op on the stream finds all of its kernels complete.

A kernel may also wait for a part of what the one before it makes, by a word that one resets before it lets others start
and sets behind that part. Programs of the later kernel start when all of the earlier one have started, so none that is
waited for is kept from its multiprocessor by one that waits. Programs of one launch wait for each other only where it
is cooperative (launch.py), so that all of them run.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

LOOKS = tl.constexpr(4_000_000)
"""How often a program looks whether what it waits for is ready, a microsecond or more each."""


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


@triton.jit
def wait_until_ready(ready_ptr) -> None:  # noqa: ANN001 (a pointer of a kernel has no static type)
    """Returns when 1 stands there, and what was stored before it is visible.

    After LOOKS, some seconds, it ends the launch with an error instead of a GPU that hangs.
    """
    ready = tl.atomic_add(ready_ptr, 0, sem="acquire", scope="gpu")
    looks = 0
    while ready == 0:
        looks += 1
        tl.inline_asm_elementwise(
            "{ .reg .pred never; setp.ge.s32 never, $1, $2; @never trap; nanosleep.u32 64; mov.u32 $0, $1; }",
            "=r,r,r", [looks, LOOKS], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        ready = tl.atomic_add(ready_ptr, 0, sem="acquire", scope="gpu")
