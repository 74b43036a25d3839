"""The demo's small model: a byte-level Qwen3-MoE, one token per byte, about a million parameters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

VOCAB = 257
START = 256
WINDOW = 128


def new_model(seed: int) -> Any:
    """Return an untrained fp32 Qwen3-MoE: 4 layers, 4 experts of which each byte visits 2, tied embeddings."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        intermediate_size=128,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        bos_token_id=START,
        eos_token_id=START,
        pad_token_id=START,
        use_cache=False,
    )
    return Qwen3MoeForCausalLM(config).eval()


def load_model(folder: Path) -> Any:
    """Return the model saved in `folder`, fp32 on the CPU."""
    import torch
    from transformers import Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def encode(text: str) -> torch.Tensor:
    """Return the bytes of `text` as int64 token ids of shape [bytes]."""
    import torch

    return torch.tensor(list(text.encode("utf-8")), dtype=torch.int64)


def decode(ids: torch.Tensor) -> str:
    """Return the text of token ids of shape [bytes]; broken UTF-8 becomes a replacement mark."""
    return bytes(token for token in ids.tolist() if token < START).decode("utf-8", errors="replace")
