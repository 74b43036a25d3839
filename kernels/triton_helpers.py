"""What differs between the Triton compiler and its interpreter, and the pieces shared by all Triton bodies.

Stage: run time, below the Triton bodies. The only kernel code that asks whether it is interpreted.
"""

# ruff: noqa: ANN001, RET505 (blocks have no static type; Triton compiles one branch of a constexpr, so both stay)

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
import triton
import triton.language as tl

from fxlora.kernels.errors import OpInputError
from fxlora.kernels.registry import SitePool
from fxlora.kernels.segments import segments_size, slots_of

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr) -> tl.tensor:
    """acc + a @ b in fp32.

    The interpreter's bf16 dot is wrong without a word. In fp64 its bits do not depend on a row's place in the tile, as
    they do in fp32 with the numpy of some CPUs.
    """
    if INTERPRET:
        return acc + tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64).to(tl.float32)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def whole(number, UNIT: tl.constexpr) -> tl.tensor:
    """The number, which is a multiple of UNIT: now the compiler knows, and copies as much at once.

    Triton itself tells it of multiples of 16 alone. Without either, every element is loaded by itself.
    """
    if UNIT == 1:
        return number
    else:
        return number // UNIT * UNIT


@triton.jit
def whole_rows(matrix, UNIT: tl.constexpr) -> tl.tensor:
    """A matrix (pointer, row stride and maybe column stride) whose rows begin at multiples of UNIT elements."""
    if len(matrix) == 2:
        return matrix[0], whole(matrix[1], UNIT)
    else:
        return matrix[0], whole(matrix[1], UNIT), matrix[2]


@triton.jit
def next_slot(slots, previous, max_adapters) -> tl.tensor:
    """Smallest slot above `previous` among a tile's slots, or `max_adapters` if there is none."""
    return tl.min(tl.where((slots > previous) & (slots < max_adapters), slots, max_adapters), axis=0)


@triton.jit
def add_adapters(
    acc,  # [BM, BN] fp32, the base result
    rows,  # [BM] int64
    cols,  # [BN] int64
    h_ptr,
    h_offsets,  # [BM] int64, where the row's h of j = 0 begins
    h_j_stride,
    slots,  # int32 [T, J]: pointer, strides
    coeffs,  # fp32 [T, J]: pointer, strides
    pool,  # B [P, N], start, rank, scaling
    num_rows,
    num_cols,
    max_adapters,
    J: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    HAS_COEFFS: tl.constexpr,
    H_IN_POOL: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """acc plus, for each j in order, coeff * scaling * (h @ B) of the row's slot; other rows keep their bits.

    H_IN_POOL: h_ptr is the pool of A and a row's ranks begin at `start`; else a workspace whose columns begin at 0. The
    tile is walked slot by slot and each result selected by row, so that a slot's infinities never reach other rows.
    """
    slots_ptr, slots_row_stride, slots_j_stride = slots
    coeffs_ptr, coeffs_row_stride, coeffs_j_stride = coeffs
    b_ptr, start_ptr, rank_ptr, scaling_ptr = pool
    row_mask = rows < num_rows
    col_mask = cols < num_cols
    for j in tl.static_range(J):
        row_slots = tl.load(slots_ptr + rows * slots_row_stride + j * slots_j_stride, mask=row_mask, other=-1)
        slot = next_slot(row_slots, -1, max_adapters)
        while slot < max_adapters:
            here = row_slots == slot
            rank = tl.load(rank_ptr + slot)
            start = tl.load(start_ptr + slot).to(tl.int64)
            delta = tl.zeros([BM, BN], tl.float32)
            for first in range(0, rank, BR):
                ranks = (first + tl.arange(0, BR)).to(tl.int64)
                rank_mask = ranks < rank
                h_cols = start + ranks if H_IN_POOL else ranks
                h_at = h_ptr + (h_offsets + j * h_j_stride)[:, None] + h_cols[None, :]
                h = tl.load(h_at, mask=here[:, None] & rank_mask[None, :], other=0.0)  # [BM, BR]
                b_at = b_ptr + (start + ranks)[:, None] * num_cols + cols[None, :]
                b = tl.load(b_at, mask=rank_mask[:, None] & col_mask[None, :], other=0.0)  # [BR, BN]
                if H_IN_POOL:  # both of the pool's dtype
                    delta = dot(h, b, delta, PRECISION)
                else:
                    delta = dot(h.to(tl.float32), b.to(tl.float32), delta, PRECISION)
            delta *= tl.load(scaling_ptr + slot)
            if HAS_COEFFS:
                at = coeffs_ptr + rows * coeffs_row_stride + j * coeffs_j_stride
                delta *= tl.load(at, mask=row_mask, other=0.0)[:, None]
            acc = tl.where(here[:, None] & (rank > 0), acc + delta, acc)
            slot = next_slot(row_slots, slot, max_adapters)
    return acc


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. `triton.cdiv`, made to be called from kernels too, takes 1.3 us of host time; this 0.05."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is at least n, 1 for n < 2. As for `cdiv`."""
    return 1 << max(n - 1, 0).bit_length()


def unit_of(*numbers: int) -> int:
    """What `whole` is to be told of these numbers: the largest power of two that divides them all; 1 if all are
    multiples of 16, which Triton sees by itself."""
    return math.gcd(16, *numbers) % 16 or 1


def strided(tensor: torch.Tensor) -> tuple[torch.Tensor | int, ...]:
    """A kernel argument: the tensor and its strides."""
    return (tensor, *tensor.stride())


def pool_arguments(pool: SitePool | None, stand_in: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A kernel argument: B and the slot table; a stand-in that is never read where a member owns no pool."""
    return (stand_in,) * 4 if pool is None else (pool.b, pool.start, pool.rank, pool.scaling)


_HERE = nullcontext()

# torch.cuda.current_device looks first whether CUDA is initialised; CPU builds of torch do not have the other.
current_gpu: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


def device_of(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Launches inside go to this tensor's GPU. Nothing to do on CPU (interpreted kernels) or on the current GPU."""
    if not tensor.is_cuda or tensor.get_device() == current_gpu():
        return _HERE
    return torch.cuda.device(tensor.device)


def expand_precision(dtype: torch.dtype) -> str:
    """How h @ B multiplies: tf32 holds bf16 and fp16 values exactly and h with fp32's range; fp32 sites stay fp32."""
    return "ieee" if dtype == torch.float32 else "tf32"


def check_pool(pool: SitePool, segments: torch.Tensor, entries: int) -> int:
    """Slots of the pool. Raises OpInputError when the segments were sorted for another number of slots."""
    max_adapters = pool.start.numel()
    if segments.numel() != segments_size(entries, max_adapters):
        raise OpInputError(
            f"segments were sorted for {slots_of(segments.numel(), entries)} slots, the pool has {max_adapters}"
        )
    return max_adapters


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of the GPU; a few where kernels are interpreted, so that programs get several tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
