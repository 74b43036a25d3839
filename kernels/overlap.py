"""How kernels of one op run at the same time: programmatic dependent launch (CUDA 12, Hopper), and reading a flag.

Stage: run time, below the Triton bodies. Nothing here exists in the interpreter, where programs run one after another.

Rules that make overlap safe. Whatever a kernel of ours lets start early is one of ours and waits before it reads x.
Weights, pools, row maps and segments are written by kernels that let nothing start early, so they are complete when
any kernel of ours starts; x may come from an op of ours, so it is read only after `wait_for_earlier`. The first kernel
of an op waits before it lets the next one start, hence the later kernels of an op may read x at once; every kernel
waits before it ends, so that whatever follows an op on the stream finds all of its kernels complete.
"""

# ruff: noqa: ANN001, RET505 (blocks have no static type; Triton compiles one branch of a constexpr, so both stay)

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from fxlora.kernels.triton_helpers import INTERPRET


WORDS = tl.constexpr(16)

MOST_LOOKS = tl.constexpr(4096)
"""Looks at flags before a program does the work of others itself; some milliseconds."""


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
def enter(sync_ptr) -> tl.tensor:
    """What `launch_number` needs, read at the start of a program; nothing waits for it before that."""
    return tl.load(sync_ptr + tl.program_id(0) % WORDS, volatile=True)


@triton.jit
def launch_number(entered) -> tl.tensor:
    """Number of this launch among those that share `sync` (int64: WORDS counts of programs that left).

    All of them have the same grid and run one after another, so a program that has not left yet divides the count of
    its word by the programs of that word and gets the same number as all others. Nothing is ever cleared.
    """
    programs = (tl.num_programs(0) - tl.program_id(0) % WORDS + WORDS - 1) // WORDS
    return (entered // programs).to(tl.int32) + 1


@triton.jit
def leave(sync_ptr) -> None:
    """Once at the end of every program that shares `sync`."""
    tl.atomic_add(sync_ptr + tl.program_id(0) % WORDS, 1, sem="relaxed")


@triton.jit
def tag(values, number) -> tl.tensor:
    """fp32 values and the number of their launch in one int64 word each, which is stored and loaded as a whole.

    Whoever finds the number in a word has the value too: no fence, no flag, one trip (NCCL's LL protocol).
    """
    return (number.to(tl.int64) << 32) | (values.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def untag(words) -> tl.tensor:
    """The values, and the numbers they were tagged with."""
    return (words & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True), (words >> 32).to(tl.int32)


@triton.jit
def look(words_at) -> tl.tensor:
    """What int64 words that other programs of this launch write hold now."""
    if INTERPRET:
        return tl.load(words_at)
    else:
        return tl.inline_asm_elementwise(
            "ld.relaxed.gpu.global.b64 $0, [$1];", "=l,l", [words_at.to(tl.int64)], dtype=tl.int64, is_pure=False, pack=1
        )


@triton.jit
def await_tagged(words_at, mask, number) -> tl.tensor:
    """The tagged values under the mask, and whether they came before this program lost patience."""
    values, numbers = untag(look(words_at))
    missing = tl.max((mask & (numbers != number)).to(tl.int32), axis=None)
    looks = 0
    while (missing > 0) & (looks < MOST_LOOKS):
        values, numbers = untag(look(words_at))
        missing = tl.max((mask & (numbers != number)).to(tl.int32), axis=None)
        looks += 1
    return tl.where(mask, values, 0.0), missing == 0
