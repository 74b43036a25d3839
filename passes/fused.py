"""Calls that torch fuses for inference, spelled by the ops they stand for, so that each weight shows its own linear.

Stage: what `decompose` traces in the place of such a call. `nn.TransformerEncoderLayer` and `nn.MultiheadAttention`
make one of them in eval mode without gradients; spelled here is what their C++ bodies compute (ATen's transformer.cpp
and attention.cpp).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch.nn import functional

_MASKS_SOURCE, _MASKS_KEYS = 0, 1


def native_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    embed_dim: int,
    num_head: int,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    mask: torch.Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`aten::_native_multi_head_attention`: a mask that is on hides a key, whatever its dtype."""
    if query is key and key is value:
        parts = functional.linear(query, qkv_weight, qkv_bias).chunk(3, dim=-1)
    else:
        halves = zip((query, key, value), qkv_weight.chunk(3), qkv_bias.chunk(3), strict=True)
        parts = tuple(functional.linear(x, weight, bias) for x, weight, bias in halves)
    q, k, v = (part.unflatten(-1, (num_head, embed_dim // num_head)).transpose(1, 2) for part in parts)
    hidden = None if mask is None else mask.to(torch.bool)
    if hidden is not None and mask_type == _MASKS_SOURCE:
        hidden = hidden[None, None]
    elif hidden is not None and mask_type == _MASKS_KEYS:
        hidden = hidden[:, None, None, :]
    if not need_weights:
        seen = None if hidden is None else hidden.logical_not()
        attended, weights = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen), None
    else:
        scores = (q * (embed_dim // num_head) ** -0.5) @ k.transpose(-2, -1)
        scores = scores if hidden is None else scores.masked_fill(hidden, float("-inf"))
        weights = scores.softmax(-1)
        attended = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
    return functional.linear(attended.transpose(1, 2).flatten(2), proj_weight, proj_bias), weights


def encoder_layer(
    src: torch.Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: torch.Tensor,
    norm_bias_1: torch.Tensor,
    norm_weight_2: torch.Tensor,
    norm_bias_2: torch.Tensor,
    ffn_weight_1: torch.Tensor,
    ffn_bias_1: torch.Tensor,
    ffn_weight_2: torch.Tensor,
    ffn_bias_2: torch.Tensor,
    mask: torch.Tensor | None = None,
    mask_type: int | None = None,
) -> torch.Tensor:
    """`aten::_transformer_encoder_layer_fwd`."""

    def norm_1(x: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def norm_2(x: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    def attend(x: torch.Tensor) -> torch.Tensor:
        packed, out = (qkv_weight, qkv_bias), (proj_weight, proj_bias)
        return native_attention(x, x, x, embed_dim, num_heads, *packed, *out, mask, False, True, mask_type)[0]

    def feed_forward(x: torch.Tensor) -> torch.Tensor:
        inner = functional.linear(x, ffn_weight_1, ffn_bias_1)
        inner = functional.gelu(inner) if use_gelu else functional.relu(inner)
        return functional.linear(inner, ffn_weight_2, ffn_bias_2)

    if norm_first:
        x = src + attend(norm_1(src))
        return x + feed_forward(norm_2(x))
    x = norm_1(src + attend(src))
    return norm_2(x + feed_forward(x))


SPELLED: Mapping[str, Callable[..., object]] = MappingProxyType(
    {"_transformer_encoder_layer_fwd": encoder_layer, "_native_multi_head_attention": native_attention}
)
"""By the name of the call."""
