"""What reaches the CUDA driver, by way of Triton's launcher, of a prepared call and of a replay.

`python -m tests.kernels.entered` compiles the kernels of `CALLS` for sm_90 and launches them by the installed Triton's
launcher, over a driver that does nothing (no_driver.c, which TRITON_LIBCUDA_PATH and LD_LIBRARY_PATH must lead to). It
prints a JSON object a call: its kernels, whether all ways hand over the same, and how many calls were prepared.
"""

from __future__ import annotations

import ctypes
import json
import struct
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from triton.backends.nvidia.driver import CudaLauncher, CudaUtils

from fxlora.kernels import entry, launch, lora_embedding, lora_experts, lora_linear, replay
from tests.kernels.cases import Case, make_case, registered
from tests.kernels.compiled import Absent, use
from tests.kernels.expert_cases import ExpertCase, make_expert_case
from tests.kernels.test_replay import moved, names_of, noting, run_embedding, run_experts, run_linear

BF16 = torch.bfloat16


def linears(rows: int, features: int, *outs: int, kind: str = "linear", **options: Any) -> Case:
    case = make_case(kind, rows=rows, features=features, outs=outs, dtype=BF16, **options)
    for pool in case.pools:
        if pool is not None:
            pool.max_rank = 16
    return case


def experts(rows: int, features: int, out: int) -> ExpertCase:
    case = make_expert_case(rows=rows, experts=32, features=features, out=out, dtype=BF16)
    assert case.pool is not None
    case.pool.max_rank = 16
    return case


CALLS: dict[str, Callable[[], Case | ExpertCase]] = {
    "one row, three members": lambda: linears(1, 64, 64, 32, 16, bias=True),
    "few rows, plain": lambda: linears(16, 64, 1024, 64, width=2),
    "tiles of one wave, a member without a pool": lambda: linears(
        16, 1024, 2048, 512, 512, none_members=(1,), bias=True
    ),
    "tiles of one wave in parts": lambda: linears(8, 5120, 1024),
    "many rows": lambda: linears(2048, 2048, 4096),
    "many rows, plain": lambda: linears(300, 64, 256, 64),
    "embedding": lambda: linears(9, 64, 200, kind="embedding"),
    "embedding, many rows": lambda: linears(200, 64, 200, kind="embedding", width=2),
    "experts": lambda: experts(4096, 1024, 2048),
    "experts, few rows": lambda: experts(20, 64, 32),
}
CONFIG = struct.Struct("7I4xQ8xI")  # CUlaunchConfig: grid, block, bytes of shared memory, stream, number of attributes
STREAM = 7
Told = list[tuple[str, Any]]


class OneGpu(Absent):
    """Of the driver that does nothing."""

    def __init__(self) -> None:
        self.utils, self.launcher_cls = CudaUtils(), CudaLauncher

    def get_current_stream(self, device: int) -> int:
        return STREAM


def forms_of(signature: Any) -> Iterator[str]:
    """The parameters of a compiled kernel: p for a pointer, m for a map, i, l and b for ints of 4, 8 and 1 bytes."""
    for kind in signature:
        if isinstance(kind, tuple):
            yield from forms_of(kind)
        elif kind.startswith("*"):
            yield "p"
        elif kind.startswith("tensordesc"):
            dims = kind[kind.index("[") : kind.index("]")].count(",") + 1
            yield from ("m", *"i" * dims, *"l" * dims)
        elif kind != "constexpr":
            yield {"i1": "b", "i32": "i", "i64": "l"}[kind]


class Ear:
    """Hears every launch of a kernel whose parameters are known."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.told: Told = []
        self._names: dict[int, tuple[str, list[str]]] = {}
        kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p))
        self._hear = kind(self.hear)  # alive as long as the driver may call it
        library.no_driver_tell(self._hear)

    def know(self, compiled: Any) -> None:
        signature = compiled.src.signature
        forms = list(forms_of(signature.values()))
        self._names[compiled.function] = (compiled.metadata.name, forms)

    def hear(self, config: int, function: int, arguments: Any) -> None:
        if function not in self._names:
            return
        name, forms = self._names[function]
        sizes = {"p": 8, "l": 8, "i": 4, "b": 1, "m": 128}
        parts = [(form, ctypes.string_at(arguments[i], sizes[form])) for i, form in enumerate(forms)]
        self.told.append((name, (CONFIG.unpack(ctypes.string_at(config, CONFIG.size)), parts)))

    def taken(self, names: dict[int, str]) -> Told:
        """Since the last time; addresses by name, unknown ones by the order in which they turned up."""
        unknown: dict[int, str] = {}

        def named(data: bytes) -> str:
            (address,) = struct.unpack_from("Q", data)
            return names.get(address) or ("none" if not address else unknown.setdefault(address, f"#{len(unknown)}"))

        told, self.told = self.told, []
        return [
            (name, (config, [(form, named(data) if form in "pm" else None, data[8 if form in "pm" else 0 :])
                             for form, data in parts]))
            for name, (config, parts) in told
        ]  # fmt: skip


def report(case: Any, ear: Ear, prepared: list[object]) -> dict[str, object]:
    """A plain launch, a prepared call, two replays, at other addresses each, and one at those of the last."""
    told, kept = [], []
    prepared.clear()
    run: Callable[..., Any] = run_experts
    if isinstance(case, Case):
        run = run_embedding if case.kind == "embedding" else run_linear
    with registered(case.pools if isinstance(case, Case) else (case.pool,)) as handle:

        def hear(case: Any) -> None:
            outputs, segments = run(case, handle)
            kept.append((case, outputs, segments))  # alive, so that no address comes again
            told.append(ear.taken(names_of(case, outputs, segments)))

        run(case, handle)  # compiles
        ear.taken({})
        always = {"return_value": True}
        with mock.patch.object(launch, "hooked", **always), mock.patch.object(replay, "hooked", **always):
            hear(moved(case))  # launched by Triton itself, and nothing is learnt
        for _ in range(3):
            case = moved(case)
            hear(case)
        hear(case)
    return {
        "kernels": [name for name, _ in told[0]],
        "maps": sum(form == "m" for _, (_, parts) in told[0] for form, *_ in parts),
        "same": [found == told[0] for found in told[1:]],
        "prepared": len(prepared),
    }


def main() -> None:
    library = ctypes.CDLL("libcuda.so.1")
    use(OneGpu())
    ear, prepared = Ear(library), []
    found = entry.entry

    def noted(compiled: Any, num_constants: int) -> entry.Entry | None:
        ear.know(compiled)
        return found(compiled, num_constants)

    launch.entry = noted
    launch.raw_stream = replay.raw_stream = lambda device: STREAM
    lora_linear.LinearCall = noting(lora_linear.LinearCall, prepared)
    lora_experts.ExpertCall = noting(lora_experts.ExpertCall, prepared)
    lora_embedding.EmbeddingCall = noting(lora_embedding.EmbeddingCall, prepared)
    for name, make in CALLS.items():
        lora_linear.has_gluon = lora_experts.has_gluon = lambda device, own="plain" not in name: own
        print(json.dumps({"call": name, **report(make(), ear, prepared)}), flush=True)


if __name__ == "__main__":
    main()
