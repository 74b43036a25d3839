"""Linear attention beside full attention, in one model: the delta rule solves a system of equations per request."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers

import fxlora
from tests.models import GROUPED, causal
from tests.oracle import Oracle, make_adapter

SIZES = {
    **GROUPED,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 0,
    "mlp_only_layers": [0, 1],
}
LINEAR = ("in_proj_qkvz", "in_proj_ba", "out_proj")


@pytest.mark.skipif(not hasattr(transformers, "Qwen3NextForCausalLM"), reason="this transformers has no Qwen3-Next")
def test_a_mixed_batch_equals_peft(tmp_path: Path) -> None:
    entry = causal("qwen3next", "Qwen3Next", SIZES)
    targets = [*LINEAR, *entry.attention, *entry.mlp, *entry.head]
    adapters = {
        name: make_adapter(
            entry.build, peft.LoraConfig(r=rank, lora_alpha=3, target_modules=targets), tmp_path / name, seed=rank
        )
        for name, rank in (("a", 2), ("b", 5))
    }
    lora = fxlora.apply(fxlora.capture(entry.build(), **entry.inputs()), max_adapters=2, max_rank=8)
    for name, folder in adapters.items():
        lora.load_adapter(name, folder)
    names, inputs = ["a", None, "b", "a"], entry.inputs(batch=4, seed=3)
    with torch.no_grad():
        Oracle(entry.build, adapters).check(lora(**inputs, adapters=names), inputs, names)
