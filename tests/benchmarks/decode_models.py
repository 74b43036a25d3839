"""Models of the decode benchmark: shapes, random weights, the adapters of a batch, and what they must compute.

Letters: S adapters, R rank, K in-features, N out-features.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tests.benchmarks.decode_experts import expert_bank, expert_tensors, experts_of, plain_experts

Bank = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""By path of a linear: A [S, R, K] and B [S, N, R] of all adapters, whose scaling is 1. Behind them by path of an
expert weight, with E experts: A [S, E, R, K], B [S, E, N, R]."""


@dataclass(frozen=True)
class Preset:
    """kind, sizes: of the transformers config. dtype: of the weights. tolerance: least error that counts as wrong.
    share: of a batch's requests that have to be right, less than all where half precision decides near ties between
    experts at random."""

    kind: str
    sizes: dict[str, Any]
    layers: int
    dtype: torch.dtype = torch.bfloat16
    tolerance: float = 5e-2
    share: float = 1.0


PRESETS = {
    "qwen3-8b": Preset(
        "qwen3",
        {
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "tie_word_embeddings": False,
        },
        layers=36,
    ),
    "llama-3.1-8b": Preset(
        "llama",
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": False,
        },
        layers=32,
    ),
    "qwen3-30b-a3b": Preset(
        "qwen3_moe",
        {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "tie_word_embeddings": False,
        },
        layers=12,  # of 48
        share=0.25,
    ),
    "tiny": Preset(
        "llama",
        {
            "vocab_size": 160,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "tie_word_embeddings": False,
        },
        layers=2,
        dtype=torch.float32,
        tolerance=1e-4,
    ),
    "tiny-moe": Preset(
        "qwen3_moe",
        {
            "vocab_size": 160,
            "hidden_size": 64,
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 128,
            "tie_word_embeddings": False,
        },
        layers=2,
        dtype=torch.float32,
        tolerance=1e-4,
    ),
}


def build_model(preset: Preset, layers: int, device: str) -> Any:
    """The model with random weights, made on the device."""
    import transformers

    config = transformers.AutoConfig.for_model(preset.kind, **preset.sizes, num_hidden_layers=layers)
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=preset.dtype, attn_implementation="sdpa")
    _spread_choices(model)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def _spread_choices(model: Any) -> None:
    """Let each router choose between whole groups of experts. Random routers leave the last expert chosen and the first
    that is not so near to each other that rounding decides, and no two runs of a model could be compared."""
    for path, module in experts_of(model).items():
        count = module.num_experts
        parent = model.get_submodule(path.rpartition(".")[0])
        for router in parent.parameters(recurse=True):
            if router.dim() == 2 and router.shape[0] == count:
                chosen = model.config.num_experts_per_tok
                router.copy_(router[::chosen].repeat_interleave(chosen, dim=0)[:count])


def shared_copy(model: nn.Module) -> Any:
    """The same modules once more, over the same Parameters and buffers."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}


def leaf_names(bank: Bank) -> list[str]:
    """What PEFT calls `target_modules`, and names of expert weights."""
    return sorted({path.rpartition(".")[2] for path in bank})


def split(bank: Bank) -> tuple[Bank, Bank]:
    """(linears, expert weights)."""
    linears = {path: pair for path, pair in bank.items() if pair[0].dim() == 3}
    return linears, {path: pair for path, pair in bank.items() if path not in linears}


def make_bank(model: nn.Module, adapters: int, rank: int) -> Bank:
    """Adapters for every linear, lm_head among them, and every expert weight; each delta is a good tenth of what it is
    added to."""
    bank: Bank = {}
    for seed, (path, module) in enumerate(linears_of(model).items()):
        weight = module.weight
        generator = torch.Generator(weight.device).manual_seed(seed)
        options: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype, "generator": generator}
        a_SRK = torch.randn(adapters, rank, module.in_features, **options) * module.in_features**-0.5
        bank[path] = a_SRK, torch.randn(adapters, module.out_features, rank, **options) * 0.05
    return bank | expert_bank(model, adapters, rank)


def adapter_source(bank: Bank, index: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """One adapter as PEFT would save it: (config, tensors)."""
    linears, experts = split(bank)
    rank = next(iter(bank.values()))[0].shape[1]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": leaf_names(linears)}
    if experts:
        config["target_parameters"] = sorted({".".join(path.split(".")[-2:]) for path in experts})
    tensors = expert_tensors(experts, index)
    for path, (a_SRK, b_SNR) in linears.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = a_SRK[index]
        tensors[f"base_model.model.{path}.lora_B.weight"] = b_SNR[index]
    return config, tensors


@contextmanager
def plain_lora(model: nn.Module, bank: Bank, adapters: Sequence[int]) -> Iterator[None]:
    """Inside, each row of a batch has its adapter by plain arithmetic in fp32, added to what the linear returns."""
    chosen = torch.tensor(list(adapters), device=next(model.parameters()).device)

    def hook_of(a_SRK: torch.Tensor, b_SNR: torch.Tensor) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor:
            h = torch.einsum("btk,brk->btr", args[0].float(), a_SRK[chosen].float())
            return (y.float() + torch.einsum("btr,bnr->btn", h, b_SNR[chosen].float())).to(y.dtype)

        return hook

    hooks = [module.register_forward_hook(hook_of(*bank[path])) for path, module in linears_of(model).items()]
    try:
        with plain_experts(model, split(bank)[1], chosen):
            yield
    finally:
        for hook in hooks:
            hook.remove()


class Context:
    """A static cache that holds random keys and values of `length` tokens less `ROOM`, and one token per request."""

    ROOM = 32

    def __init__(self, model: Any, batch: int, length: int) -> None:
        from transformers import StaticCache

        device = next(model.parameters()).device
        generator = torch.Generator(device).manual_seed(1)
        vocabulary = model.config.vocab_size
        self.token = torch.randint(0, vocabulary, (batch, 1), device=device, generator=generator)
        self.start = length - self.ROOM
        self.position = torch.full((batch, 1), self.start, device=device)
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        model(input_ids=self.token, past_key_values=self.cache)
        for layer in self.cache.layers:
            for tensor in (layer.keys, layer.values):
                tensor.normal_(generator=generator)
        self.rewind()

    def rewind(self) -> None:
        """Back to where the next token is the first that was not there: each step counts one on."""
        for layer in self.cache.layers:
            counter = getattr(layer, "cumulative_length", None)
            if isinstance(counter, torch.Tensor):
                counter.fill_(self.start)

    @property
    def bytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)


def decode_step(model: Any, context: Context) -> Any:
    """A step of one token per request, of no arguments. -> logits [batch, 1, vocabulary]"""

    def step(token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        return model(
            input_ids=token, position_ids=position, past_key_values=context.cache, use_cache=True, return_dict=False
        )[0]

    return step


def prefill_step(model: Any) -> Any:
    """A forward over whole prompts. -> logits [batch, 1, vocabulary] of their last tokens"""

    def step(ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, use_cache=False, logits_to_keep=1, return_dict=False)[0]

    return step
