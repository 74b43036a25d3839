"""Registers, stack and shared memory of the launches of large calls, compiled for a GPU that need not be there.

`python -m tests.kernels.compiled [REGEX]` compiles, for sm_90, what those of `CALLS` whose names match would launch,
and prints a JSON object a launch. Triton brings the compiler and the disassembler; nothing runs.
"""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from fxlora.kernels import call as calls
from fxlora.kernels import expert_call, lora_linear, prefill
from fxlora.kernels import lora_experts as lora_experts_module
from fxlora.kernels.call import LinearCall, Members
from fxlora.kernels.expert_pool import ExpertPool
from fxlora.kernels.expert_segments import expert_segments_size
from fxlora.kernels.lora_experts import lora_experts
from fxlora.kernels.lora_linear import body_of
from fxlora.kernels.registry import SitePool, register_runtime, unregister_runtime
from fxlora.kernels.segments import segments_size

SLOTS, BF16 = 64, torch.bfloat16
ODD = ((3420, 1280), (1280, 3420), (1030, 1030), (768, 50257))
FIELDS = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)")


class Absent:
    """Stands where Triton looks for the driver of a GPU."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def is_active(self) -> bool:
        return True


def use(gpu: Absent) -> None:
    """Triton takes this for its driver, and the bodies for a Hopper GPU."""
    driver.set_active(gpu)
    calls.can_overlap = expert_call.can_overlap = lambda device: True
    prefill.multiprocessors = lambda device: 132


def linear(rows: int, features: int, *outs: int, rank: int = 16, transposed: bool = False, own: bool = False) -> None:
    """Compile what a bf16 call of `lora_linear` launches. own: with the kernels that Hopper GPUs have of their own."""
    lora_linear.has_gluon = lambda device: own
    pools = [
        SitePool.allocate(
            kind="linear", pool_rows=SLOTS * rank, in_features=features, out_features=out, max_adapters=SLOTS,
            dtype=BF16, device="cpu", max_rank=rank,
        )
        for out in outs
    ]  # fmt: skip
    x, weights = torch.zeros(rows, features, dtype=BF16), [torch.zeros(out, features, dtype=BF16) for out in outs]
    weights = [weight.t().contiguous().t() for weight in weights] if transposed else weights
    slots = torch.zeros(rows, 1, dtype=torch.int32)
    segments = torch.zeros(segments_size(rows, SLOTS), dtype=torch.int32)
    call = LinearCall(x, weights, [None] * len(outs), slots, None, segments, Members(tuple(pools)))
    body, tiles = body_of(call)
    body(call, tiles)


def experts(
    tokens: int, top_k: int, count: int, features: int, out: int, rank: int = 16, own: bool = False, slots: int = 16
) -> None:
    """Compile what a bf16 call of `lora_experts` launches. own: as of `linear`."""
    lora_experts_module.has_gluon = lambda device: own
    rows = tokens * top_k
    pool = ExpertPool.allocate(
        num_experts=count, pool_rows_a=slots * count * rank, pool_rows_b=slots * count * rank, in_features=features,
        out_features=out, max_adapters=slots, dtype=BF16, device="cpu", max_rank=rank,
    )  # fmt: skip
    row_slots = torch.zeros(rows, 1, dtype=torch.int32)
    segments = torch.zeros(expert_segments_size(rows, count, slots, True), dtype=torch.int32)
    (handle,) = register_runtime(0xF01A, [(pool,)])
    x, weight = torch.zeros(rows, features, dtype=BF16), torch.zeros(count, out, features, dtype=BF16)
    lora_experts(x, weight, None, row_slots, None, segments, handle)
    unregister_runtime([handle])


CALLS: dict[str, Callable[[], object]] = {
    "one row": lambda: linear(1, 4096, 4096),
    "one row, tall": lambda: linear(1, 14336, 4096),
    "one row, many widths": lambda: [linear(1, k, 4096) for k in (2048, 5120, 8192, 11008, 12288, 18944, 28672)],
    "few rows": lambda: linear(16, 4096, 4096),
    "few rows, tall": lambda: linear(16, 14336, 4096),
    "few rows, wide": lambda: linear(16, 4096, 14336, 14336),
    "some rows": lambda: linear(64, 4096, 4096),
    "some rows, three members": lambda: linear(64, 4096, 4096, 1024, 1024),
    "some rows, wide": lambda: linear(64, 4096, 28672),
    "some rows, odd vocabulary": lambda: linear(64, 768, 50257),
    "in-features of 8 or 4 apart": lambda: [linear(m, k, 1284, rank=64) for k in (3000, 3420) for m in (1, 64, 256)],
    "more rows": lambda: linear(256, 4096, 4096),
    "more rows, tall": lambda: linear(256, 14336, 4096),
    "more rows, tiles of one wave": lambda: [
        linear(12, 5120, 5120, own=True),
        linear(12, 4096, 4096, rank=64, own=True),
        linear(12, 4096, 11008, own=True),
        linear(24, 4096, 4096, own=True),
        linear(24, 4096, 4096, rank=64, own=True),
        linear(24, 1536, 8960, own=True),
        linear(64, 4096, 4096, own=True),
        linear(64, 4096, 4096, rank=64, own=True),
    ],
    "more rows, tiles of one wave in parts": lambda: [
        *[
            linear(m, k, n, rank=rank, own=True)
            for m, k, n in ((16, 8192, 1024), (24, 8192, 1024))
            for rank in (16, 64)
        ],
        linear(12, 7168, 1536, 576, own=True),
        *[linear(m, 8192, 1024, own=True) for m in (64, 128)],
        linear(128, 8192, 1024, rank=64, own=True),
    ],
    "more rows, tiles of one wave beside their shrink": lambda: [
        *[linear(m, 4096, 4096, 1024, 1024, rank=rank, own=True) for m in (12, 24) for rank in (16, 64)],
        *[linear(m, 4096, 14336, rank=rank, own=True) for m in (12, 24, 64) for rank in (16, 64)],
        linear(64, 4096, 4096, 1024, 1024, rank=64, own=True),
        linear(128, 4096, 4096, own=True),
        linear(128, 4096, 4096, 1024, 1024, own=True),
        linear(256, 4096, 4096, transposed=True, own=True),
        linear(128, 4096, 4096, rank=64, own=True),
        linear(256, 4096, 4096, rank=64, own=True),
    ],
    "many rows": lambda: linear(2048, 4096, 4096),
    "many rows, rank 64": lambda: linear(2048, 4096, 4096, rank=64),
    "many rows, three members": lambda: linear(2048, 4096, 4096, 1024, 1024),
    "many rows, warps in turn": lambda: [linear(1024, 5120, *n, own=True) for n in ((5120,), (2560, 1280, 1280))],
    "many rows, a tile shared by warps": lambda: linear(2048, 4096, 4096, 1024, own=True),
    "many rows, a tile shared by warps, transposed": lambda: linear(2048, 4096, 4096, transposed=True, own=True),
    "many rows, two programs at a time": lambda: linear(2048, 2048, 2048, 512, 512),
    "many rows over few columns": lambda: [linear(2048, 2048, n) for n in (64, 128, 256)],
    "many rows, transposed": lambda: [linear(m, 4096, 4096, transposed=True) for m in (300, 2048)],
    "many rows, a shrink aside": lambda: [linear(2048, 14336, 4096), linear(2048, 4096, 3584)],
    "many rows, in-features of 4 and 2 apart": lambda: [linear(m, k, n) for m in (300, 2048) for k, n in ODD],
    "experts, few rows": lambda: experts(16, 8, 128, 2048, 1536),
    "experts, few rows, tall": lambda: experts(16, 2, 8, 14336, 4096),
    "experts, many rows": lambda: experts(2048, 8, 128, 2048, 1536),
    "experts, many rows, a shrink beside": lambda: experts(1024, 8, 128, 4096, 1536, own=True),
    "experts, many rows, in one launch": lambda: [
        experts(2048, 8, 128, 2048, 1536, own=True),
        experts(2048, 8, 64, 2048, 2048, own=True, slots=64),
    ],
    "experts, many rows, a tail": lambda: experts(2048, 8, 128, 4096, 1536),
    "experts, a long way": lambda: [experts(m, 2, 8, 14336, 4096) for m in (256, 512, 2048)],
    "experts, rather many rows": lambda: experts(2048, 8, 64, 2048, 2048),
    "experts, many rows, wide": lambda: experts(512, 8, 64, 2048, 4096),
}


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of stack (where spilled registers go) of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = FIELDS.search(text)
    if found is None:
        raise RuntimeError(f"cuobjdump said nothing of resources: {text}")
    return {"registers": int(found[1]), "stack_bytes": int(found[2])}


def launches(names: list[str]) -> Iterator[dict[str, Any]]:
    """What each launch of these calls needs."""
    found: list[dict[str, Any]] = []
    run = triton.runtime.jit.JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> object:
        compiled = run(kernel, *args, grid=grid, warmup=True, **options)
        (threads,) = re.findall(r"\.reqntid (\d+)", compiled.asm["ptx"])
        needs = {"kernel": kernel.fn.__name__, "shared_bytes": compiled.metadata.shared, "threads": int(threads)}
        found.append({**needs, **resources(compiled.asm["cubin"])})
        return object()

    logging.getLogger("fxlora").setLevel(logging.ERROR)  # no launcher knows what is never launched
    use(Absent())
    triton.runtime.jit.JITFunction.run = compile_only
    for name in names:
        CALLS[name]()
        yield from ({"call": name, **launch} for launch in found)
        found.clear()


if __name__ == "__main__":
    pattern = sys.argv[1] if len(sys.argv) > 1 else ""
    for launch in launches([name for name in CALLS if re.search(pattern, name)]):
        print(json.dumps(launch), flush=True)
