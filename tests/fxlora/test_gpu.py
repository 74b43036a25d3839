"""The whole flow on a GPU: the CPU's answers in fp32 and bf16, a shared gate on two streams, bits of untouched rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

import fxlora
from tests.fxlora.test_equality import ZOO
from tests.oracle import make_adapters, relative_error, tensors_of

pytestmark = pytest.mark.gpu
FAMILIES = ("llama", "qwen3moe", "gemma2", "gpt2", "deepseekv3", "bert", "vit")
# The adapters are as large as the weights, so that bf16 rounding of two layers shows: BERT moves by 5.6e-2.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 8e-2}
MIX = ["sql", None, "docs", "code"]


def on_cuda(inputs: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {k: v.to("cuda", dtype if v.is_floating_point() else v.dtype) for k, v in inputs.items()}


def served(model: nn.Module, inputs: Mapping[str, torch.Tensor], adapters: Mapping[str, Path]) -> fxlora.LoraModule:
    lora = fxlora.apply(fxlora.capture(model, **inputs), max_adapters=4, max_rank=16)
    for name, folder in adapters.items():
        lora.load_adapter(name, str(folder))
    return lora


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_mixed_batch_equals_the_cpu(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    entry = ZOO[name]
    adapters = make_adapters(entry, tmp_path)
    inputs = entry.inputs(batch=4, length=9, seed=3)
    want = tensors_of(served(entry.build(), inputs, adapters)(**inputs, adapters=MIX))
    base = tensors_of(served(entry.build(), inputs, adapters)(**inputs))
    there = on_cuda(inputs, dtype)
    lora = served(entry.build().to("cuda", dtype), there, adapters)
    got = tensors_of(lora(**there, adapters=MIX))
    nothing = tensors_of(lora(**there))
    again = tensors_of(lora(**there, adapters=MIX))
    for key, value in want.items():
        if value.is_floating_point():
            assert relative_error(value, base[key]) > 1e-3
            if not (entry.routed and dtype is torch.bfloat16):  # near-ties in a router may fall the other way in bf16
                assert relative_error(got[key].cpu().float(), value) <= TOLERANCE[dtype]
            assert torch.equal(got[key], again[key])
            if not entry.routed:
                assert torch.equal(got[key][1], nothing[key][1])


class Gate(nn.Module):
    """A router gate reachable by two paths, called on two streams."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(64, 8, bias=False)
        self.runner = nn.Module()
        self.runner.gate = self.gate

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.gate(x), self.runner.gate(x + 1)


def test_a_shared_gate_on_two_streams() -> None:
    torch.manual_seed(0)
    model = Gate().cuda()
    x = torch.randn(6, 5, 64, device="cuda")
    lora = fxlora.apply(fxlora.capture(model, x), max_adapters=4, max_rank=8)
    a, b = torch.randn(4, 64), torch.randn(8, 4)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["gate"]}
    keys = "base_model.model.runner.gate"
    lora.load_adapter("r", (config, {f"{keys}.lora_A.weight": a, f"{keys}.lora_B.weight": b}))
    assert [site.parameter for site in lora.sites] == ["gate.weight"]
    names = ["r", None, "r", None, None, "r"]
    want = lora(x, adapters=names)
    rows = torch.tensor([n is not None for n in names], device="cuda")[:, None, None]
    delta = 2 * (x @ a.cuda().T) @ b.cuda().T * rows
    assert relative_error(want[0], model.gate(x) + delta) <= 1e-4
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for _ in range(50):
        got = []
        for stream in streams:
            with torch.cuda.stream(stream):
                got.append(lora(x, adapters=names))
        torch.cuda.synchronize()
        for pair in got:
            assert all(map(torch.equal, pair, want))
