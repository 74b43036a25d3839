"""What the decode benchmark runs: one model without LoRA, with ours, and with what others do, each as a timed step.

A variant shares the Parameters of the one model, except `vllm` (its fused weights) and `merged` (its changed weights).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import nn

import fxlora
from tests.benchmarks.decode_models import Bank, adapter_source, leaf_names, linears_of, shared_copy, split
from tests.benchmarks.decode_timing import Timed, Turn, captured

LETTERS = {"a": "base", "b": "ours", "c": "vllm", "d": "peft", "e": "merged"}
# Projections that vLLM computes as one: they read one input.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass
class Work:
    """What all variants of one measurement share.

    adapters: of each request. step_of: makes the step of a model; inputs: its arguments; before: what a round needs
    first. rows: tokens of a step; graphed: whether it goes into a CUDA graph. compiler: of every compiled variant, a
    name or a callable.
    """

    model: Any
    bank: Bank
    adapters: Sequence[int]
    rows: int
    step_of: Callable[[Any], Any]
    inputs: tuple[torch.Tensor, ...]
    before: Callable[[], None]
    graphed: bool
    dynamic: bool
    compiler: Any
    turn: Turn
    calls: int = 8
    peers: Any = None
    keep: list[Any] = field(default_factory=list)

    def close(self) -> None:
        """Let go of the model's Parameters and of what is on the device."""
        for kept in self.keep:
            if isinstance(kept, fxlora.Runtime):
                kept.close()
        self.keep.clear()
        _layers.clear()
        _meta_by_rows.clear()

    @property
    def names(self) -> list[str | None]:
        return [f"a{index}" for index in self.adapters]


def compiled_step(work: Work, model: Any, backend: Any, **options: Any) -> Any:
    """The step under torch.compile, compiled (the GPU is free for others meanwhile) and kept alive."""
    step = torch.compile(work.step_of(model), backend=backend, fullgraph=True, dynamic=work.dynamic, **options)
    work.keep.append(step)
    work.before()
    with work.turn.compiling():
        step(*work.inputs)
    return step


def timed_step(work: Work, step: Any, around: Any = contextlib.nullcontext) -> Timed:
    """In a CUDA graph, where the work goes into one."""
    call = partial(step, *work.inputs)
    with around():
        if work.graphed:
            run, result = captured(call, work.before)
        else:
            work.before()
            run, result = call, call()
    return Timed(run, result, around, work.before, work.calls)


def own_compiler(work: Work) -> Any:
    if work.turn.shared or work.compiler != "inductor":
        from torch._dynamo.backends.registry import lookup_backend

        inner = lookup_backend(work.compiler) if isinstance(work.compiler, str) else work.compiler
        return work.turn.compiler(inner)
    return work.compiler


def build_base(work: Work) -> dict[str, Timed]:
    """The model under torch.compile, no LoRA."""
    return {"base": timed_step(work, compiled_step(work, shared_copy(work.model), own_compiler(work)))}


def build_ours(work: Work) -> dict[str, Timed]:
    """All adapters, and none, through one compiled step."""
    model = shared_copy(work.model)
    a_SRK = next(iter(work.bank.values()))[0]
    with work.turn.compiling():
        runtime = fxlora.attach(
            model, max_adapters=a_SRK.shape[0], max_rank=a_SRK.shape[1], targets=leaf_names(work.bank)
        )
    work.keep += [model, runtime]
    for index in sorted(set(work.adapters)):
        runtime.load_adapter(f"a{index}", adapter_source(work.bank, index))
    inner = own_compiler(work)
    options = {} if inner == "inductor" else {"options": {"backend": inner}}
    step = compiled_step(work, model, runtime.backend, **options)
    mixed = timed_step(work, step, partial(runtime.batch, work.names))
    mixed.facts = {"pool_bytes": runtime.pool.bytes, "sites": len(runtime.sites)}
    none = Timed(mixed.run, mixed.result, partial(runtime.batch, [None] * len(work.names)), work.before, work.calls)
    return {"ours": mixed, "ours_none": none}


def build_merged(work: Work) -> dict[str, Timed]:
    """One adapter, merged into a copy of the weights by PEFT, under torch.compile."""
    _no_experts(work)
    wrapped = _peft(copy.deepcopy(work.model), work.bank, [0])
    model = wrapped.merge_and_unload().eval().requires_grad_(False)
    return {"merged": timed_step(work, compiled_step(work, model, own_compiler(work)))}


def build_peft(work: Work) -> dict[str, Timed]:
    """PEFT's mixed batch, a loop over adapters in every linear: eager only."""
    _no_experts(work)
    wrapped = _peft(shared_copy(work.model), work.bank, sorted(set(work.adapters))).eval()
    step = work.step_of(partial(wrapped, adapter_names=work.names))
    work.before()
    timed = Timed(partial(step, *work.inputs), step(*work.inputs), before=work.before, calls=2)
    return {"peft": timed}


def _no_experts(work: Work) -> None:
    if split(work.bank)[1]:
        raise LookupError("built for models without expert weights: PEFT refuses mixed batches over them")


def _peft(model: nn.Module, bank: Bank, indices: Sequence[int]) -> Any:
    import peft

    a_SRK = next(iter(bank.values()))[0]
    config = peft.LoraConfig(r=a_SRK.shape[1], lora_alpha=a_SRK.shape[1], target_modules=leaf_names(bank))
    wrapped: Any = None
    for index in indices:
        if wrapped is None:
            wrapped = peft.get_peft_model(model, config, f"a{index}", autocast_adapter_dtype=False)
        else:
            wrapped.add_adapter(f"a{index}", copy.copy(config), autocast_adapter_dtype=False)
    for path, (a_SRK, b_SNR) in bank.items():
        layer = wrapped.base_model.model.get_submodule(path)
        for index in indices:
            layer.lora_A[f"a{index}"].weight.data = a_SRK[index].contiguous()
            layer.lora_B[f"a{index}"].weight.data = b_SNR[index].contiguous()
    return wrapped


# The fused layers of the variant that was built last: an op finds its tensors by number.
_layers: list[tuple[torch.Tensor, torch.Tensor | None, list[torch.Tensor], list[torch.Tensor]]] = []
_meta_by_rows: dict[int, Any] = {}


@torch.library.custom_op("fxlora_bench::vllm_linear", mutates_args=())
def vllm_linear(x: torch.Tensor, layer: int, width: int) -> torch.Tensor:
    """mm, lora_shrink into an fp32 buffer, lora_expand into the result: what vLLM launches for a fused linear."""
    ops = import_module("vllm.lora.ops.triton_ops")
    weight, bias, a, b = _layers[layer]
    flat = x.reshape(-1, x.shape[-1])
    y = torch.nn.functional.linear(flat, weight, bias)
    meta = _meta_by_rows[flat.shape[0]]
    h = torch.empty(len(a), flat.shape[0], a[0].shape[1], dtype=torch.float32, device=x.device)
    ops.lora_shrink(flat, a, h, *meta, 1.0)
    ops.lora_expand(h, b, y, *meta, offset_start=0, add_inputs=True)
    return y.view(*x.shape[:-1], width)


@vllm_linear.register_fake
def _(x: torch.Tensor, layer: int, width: int) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], width)


class _Leader(nn.Module):
    """Computes a fused projection where the first of its parts stands; the others take their slices of it."""

    def __init__(self, layer: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.layer, self.widths = layer, list(widths)
        self.parts: tuple[torch.Tensor, ...] = ()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.ops.fxlora_bench.vllm_linear(x, self.layer, sum(self.widths))
        self.parts = y.split(self.widths, dim=-1)
        return self.parts[0]


class _Follower(nn.Module):
    def __init__(self, leader: _Leader, part: int) -> None:
        super().__init__()
        self.leaders = (leader,)  # in a tuple, so that it is no submodule here as well
        self.part = part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.leaders[0].parts[self.part]


def _fused_paths(model: nn.Module) -> Iterator[list[str]]:
    """Paths of the linears that vLLM computes together, in the order of their parts."""
    linears = linears_of(model)
    taken: set[str] = set()
    for path in linears:
        owner, _, leaf = path.rpartition(".")
        for parts in FUSED:
            if leaf == parts[0] and all(f"{owner}.{part}" in linears for part in parts):
                taken |= {f"{owner}.{part}" for part in parts}
                yield [f"{owner}.{part}" for part in parts]
        if path not in taken:
            taken.add(path)
            yield [path]


def build_vllm(work: Work) -> dict[str, Timed]:
    """The model under torch.compile with vLLM's fused linears and its LoRA ops in them."""
    if work.peers is None:
        raise LookupError("no --peers folder")
    _no_experts(work)
    model = shared_copy(work.model)
    linears = linears_of(model)
    _layers.clear()
    _meta_by_rows.clear()
    device = work.inputs[0].device
    slots = torch.tensor(list(work.adapters), dtype=torch.int32, device=device)
    count = next(iter(work.bank.values()))[0].shape[0]
    for rows in {work.rows, len(work.adapters)}:
        ids = slots.repeat_interleave(rows // len(work.adapters))
        meta = work.peers.vllm_meta(ids, count)
        meta.prepare_tensors(ids)
        _meta_by_rows[rows] = meta.meta_args(rows, True)
        work.keep.append(meta)
    for paths in _fused_paths(work.model):
        parts = [linears[path] for path in paths]
        weight = parts[0].weight if len(parts) == 1 else torch.cat([part.weight for part in parts])
        bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
        a, b = ([work.bank[path][side] for path in paths] for side in (0, 1))
        leader = _Leader(len(_layers), [part.out_features for part in parts])
        _layers.append((weight, bias, a, b))
        for i, path in enumerate(paths):
            owner, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(owner), leaf, leader if not i else _Follower(leader, i))
    work.keep.append(list(_layers))
    return {"vllm": timed_step(work, compiled_step(work, model, own_compiler(work)))}


BUILDERS: dict[str, Callable[[Work], dict[str, Timed]]] = {
    "base": build_base,
    "ours": build_ours,
    "vllm": build_vllm,
    "peft": build_peft,
    "merged": build_merged,
}
