"""Expert weights of the decode benchmark's mixtures: their adapters, as files hold them and by plain arithmetic.

For expert modules as transformers builds them: `gate_up_proj` [E, 2 I, K] and `down_proj` [E, K, I], an activation
`act_fn`, and a forward of (x [T, K], experts [T, k], weights [T, k]).

Letters: T tokens, k experts of a token, S adapters, E experts, R rank, K in-features, N out-features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

NAMES = ("gate_up_proj", "down_proj")  # in the order of registration, which PEFT's keys follow
ExpertBank = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""By path of a weight: A [S, E, R, K] and B [S, E, N, R] of all adapters; their scaling is 1."""


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold expert weights, by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if all(isinstance(getattr(module, name, None), nn.Parameter) for name in NAMES)
    }


def expert_bank(model: nn.Module, adapters: int, rank: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Adapters for every expert of every weight."""
    bank = {}
    for path, module in experts_of(model).items():
        for seed, name in enumerate(NAMES):
            weight = getattr(module, name)
            count, out, features = weight.shape
            generator = torch.Generator(weight.device).manual_seed(1000 + seed)
            options = {"device": weight.device, "dtype": weight.dtype, "generator": generator}
            a_SERK = torch.randn(adapters, count, rank, features, **options) * features**-0.5
            bank[f"{path}.{name}"] = a_SERK, torch.randn(adapters, count, out, rank, **options) * 0.05
    return bank


def expert_tensors(bank: ExpertBank, index: int) -> dict[str, torch.Tensor]:
    """One adapter as PEFT saves `target_parameters`: A expert by expert, B rank by rank, the first weight's inside."""
    tensors = {}
    for path, (a_SERK, b_SENR) in bank.items():
        module, _, name = path.rpartition(".")
        inner = ".base_layer" if name == NAMES[0] else ""
        tensors[f"base_model.model.{module}{inner}.lora_A.weight"] = a_SERK[index].flatten(0, 1)
        tensors[f"base_model.model.{module}{inner}.lora_B.weight"] = b_SENR[index].permute(1, 2, 0).flatten(1)
    return tensors


@contextmanager
def plain_experts(model: nn.Module, bank: ExpertBank, chosen: torch.Tensor) -> Iterator[None]:
    """Inside, experts run one after the other, each token with its adapter by plain arithmetic in fp32.

    chosen: int64, the adapter of each request; a batch's tokens are its requests' one after the other.
    """
    modules = experts_of(model)
    for path, module in modules.items():
        pairs = [bank[f"{path}.{name}"] for name in NAMES]
        module.forward = _plain_forward(module, pairs, chosen)
    try:
        yield
    finally:
        for module in modules.values():
            del module.forward


def _plain_forward(
    module: nn.Module, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], chosen: torch.Tensor
) -> Callable[..., torch.Tensor]:
    def product(x: torch.Tensor, which: int, expert: int, slots: torch.Tensor) -> torch.Tensor:
        a_SERK, b_SENR = pairs[which]
        y = nn.functional.linear(x, getattr(module, NAMES[which])[expert])
        h = torch.einsum("tk,trk->tr", x.float(), a_SERK[slots, expert].float())
        return (y.float() + torch.einsum("tr,tnr->tn", h, b_SENR[slots, expert].float())).to(x.dtype)

    def forward(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        slots = chosen.repeat_interleave(hidden_states.shape[0] // len(chosen))
        total = torch.zeros_like(hidden_states, dtype=torch.float32)
        for expert in top_k_index.unique().tolist():
            tokens, places = torch.where(top_k_index == expert)
            gate, up = product(hidden_states[tokens], 0, expert, slots[tokens]).chunk(2, dim=-1)
            y = product(module.act_fn(gate) * up, 1, expert, slots[tokens])
            total.index_add_(0, tokens, y.float() * top_k_weights[tokens, places, None].float())
        return total.to(hidden_states.dtype)

    return forward
