"""How programs of one launch wait for others of it: two int32 counters, zero before and after every launch.

Stage: run time, below the Triton bodies. Programs with the lowest ids produce something in steps and raise the first
counter after each; every program waits for it once (or never), then leaves; the last one to leave zeroes both counters.
Nothing here waits in the interpreter, where programs run one after another: the first one has to produce everything.
"""

# ruff: noqa: ANN001 (blocks of a Triton kernel have no static type)

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from fxlora.kernels.triton_helpers import INTERPRET

COUNTERS = 2
"""Steps produced, programs that wait no more."""


@triton.jit
def raise_counter(counter_ptr) -> None:
    """One step more; what this program wrote before is visible to those who waited for it."""
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release")


@triton.jit
def wait_for(counter_ptr, target) -> None:
    """Until the counter reaches `target`; what was written before it was raised may be read then.

    Cannot hang: the programs that raise it have the lowest ids, so they run before or beside this one, and they wait
    for nothing until they raised it. Some seconds of polling end in a trap, which fails the launch.
    """
    tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        .reg .b32 seen, polls;
        mov.u32 polls, 0;
        POLL:
        ld.acquire.gpu.global.b32 seen, [$1];
        setp.ge.s32 p, seen, $2;
        @p bra DONE;
        add.u32 polls, polls, 1;
        setp.gt.u32 p, polls, 4194304;
        @p trap;
        bra POLL;
        DONE:
        mov.u32 $0, seen;
        }""",
        "=r,l,r", [counter_ptr.to(tl.int64), target], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def leave(counter_ptr) -> tl.tensor:
    """Counts this program out; its place, known to its first thread only, arrives while other work goes on."""
    return tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        .reg .b32 thread;
        mov.u32 thread, %tid.x;
        setp.eq.u32 p, thread, 0;
        mov.b32 $0, -1;
        @p atom.relaxed.gpu.global.add.s32 $0, [$1], 1;
        }""",
        "=&r,l", [counter_ptr.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def clear_after_last(counters_ptr, place, programs, has_left) -> None:
    """Zeroes both counters in the program that left last: no other one reads them any more."""
    if INTERPRET:
        if tl.program_id(0) == programs - 1:
            tl.store(counters_ptr + tl.arange(0, 2), tl.zeros([2], tl.int32))
    else:
        if not has_left:
            place = leave(counters_ptr + 1)
        tl.inline_asm_elementwise(
            """{
            .reg .pred p;
            setp.eq.s32 p, $2, $3;
            @p st.global.b32 [$1], 0;
            @p st.global.b32 [$1+4], 0;
            mov.u32 $0, 0;
            }""",
            "=r,l,r,r", [counters_ptr.to(tl.int64), place, programs - 1], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@cache
def resident_programs(device: torch.device) -> int:
    """Programs that run at the same time: one for each multiprocessor."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
