"""Toys whose rows keep to their request all the way: accepted, and each request gets its own adapter."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from tests.toys.base import Inputs, Sizes, Toy, Verdict, register

POSITIVE: list[Toy] = []
ROWS = Verdict.ROWS
Tensor = torch.Tensor
Self = Any
FIXED = {"alone": False}
TOKENS_FIRST: dict[str, Any] = {"batch_dims": {"x": 1}, "output_dim": 1}


def tokens_first(sizes: Sizes, generator: torch.Generator) -> Inputs:
    """x in the order [T, B, H]."""
    return {"x": torch.randn(sizes.tokens, sizes.batch, sizes.features, generator=generator)}


def flat_tokens(sizes: Sizes, generator: torch.Generator) -> Inputs:
    """One token per request: x [B, H]."""
    return {"x": torch.randn(sizes.batch, sizes.features, generator=generator)}


def token_ids(sizes: Sizes, generator: torch.Generator) -> Inputs:
    """ids int64 [B, T]."""
    return {"x": torch.randint(0, 13, (sizes.batch, sizes.tokens), generator=generator)}


def with_lengths(sizes: Sizes, generator: torch.Generator) -> Inputs:
    """x [B, T, H] beside the length of each request, int64 [B]."""
    x = torch.randn(sizes.batch, sizes.tokens, sizes.features, generator=generator)
    return {"x": x, "lengths": torch.randint(1, sizes.tokens + 1, (sizes.batch,), generator=generator)}


def with_kept(sizes: Sizes, generator: torch.Generator) -> Inputs:
    """x [B, T, H] beside token positions that all requests keep, int64 [2]."""
    x = torch.randn(sizes.batch, sizes.tokens, sizes.features, generator=generator)
    return {"x": x, "kept": torch.tensor([sizes.tokens - 1, 1])}


def with_cache(sizes: Sizes, generator: torch.Generator) -> Inputs:
    """x [B, T, H] beside a cache of earlier tokens [B, 2, H]."""
    x = torch.randn(sizes.batch, sizes.tokens, sizes.features, generator=generator)
    return {"x": x, "cache": torch.randn(sizes.batch, 2, sizes.features, generator=generator)}


LENGTHS: dict[str, Any] = {"inputs_of": with_lengths, "batch_dims": {"x": 0, "lengths": 0}}
CACHE: dict[str, Any] = {"inputs_of": with_cache, "batch_dims": {"x": 0, "cache": 0}}


@register(POSITIVE, ROWS)
def plain_rows(self: Self, x: Tensor) -> Tensor:
    return self.proj(x)


@register(POSITIVE, ROWS)
def shifted_projection(self: Self, x: Tensor) -> Tensor:
    """The token before the first is zeros, to which no adapter adds anything."""
    before = self.proj(x.new_zeros(x.shape[0], 1, x.shape[2]))
    return torch.cat([before, self.proj(x)[:, :-1]], dim=1)


@register(POSITIVE, ROWS, inputs_of=flat_tokens)
def one_token_each(self: Self, x: Tensor) -> Tensor:
    return self.proj(self.norm(x).tanh())


@register(POSITIVE, ROWS)
def functional_weight(self: Self, x: Tensor) -> Tensor:
    return F.linear(x, self.proj.weight)


@register(POSITIVE, ROWS)
def flatten_and_unflatten(self: Self, x: Tensor) -> Tensor:
    return self.proj(x.flatten(0, 1)).view(x.shape[0], x.shape[1], -1)


@register(POSITIVE, ROWS)
def tokens_first_inside(self: Self, x: Tensor) -> Tensor:
    return self.proj(x.permute(1, 0, 2).reshape(-1, x.shape[2])).view(x.shape[1], x.shape[0], -1).transpose(0, 1)


@register(POSITIVE, ROWS)
def reshaped_across_dims_and_back(self: Self, x: Tensor) -> Tensor:
    return self.proj(x.reshape(x.shape[1], x.shape[0], x.shape[2])).reshape(x.shape[0], x.shape[1], -1)


@register(POSITIVE, ROWS, inputs_of=tokens_first, **TOKENS_FIRST)
def tokens_first_input(self: Self, x: Tensor) -> Tensor:
    return self.proj(x - x.mean(0))


@register(POSITIVE, ROWS, inputs_of=tokens_first, **TOKENS_FIRST)
def tokens_first_attention(self: Self, x: Tensor) -> Tensor:
    y = x.transpose(0, 1)
    weights = torch.bmm(self.query(y), self.key(y).transpose(1, 2)).softmax(-1)
    return self.proj(torch.bmm(weights, y)).transpose(0, 1)


@register(POSITIVE, ROWS, **FIXED)
def permuted_and_back(self: Self, x: Tensor) -> Tensor:
    return self.proj(x[self.perm])[self.inverse]


@register(POSITIVE, ROWS, **FIXED)
def undone_before_the_site(self: Self, x: Tensor) -> Tensor:
    return self.proj(x + x[self.perm][self.inverse].tanh())


@register(POSITIVE, ROWS, **FIXED)
def index_put_undone(self: Self, x: Tensor) -> Tensor:
    return self.proj(torch.zeros_like(x).index_put((self.perm,), x[self.perm]) + x)


@register(POSITIVE, ROWS)
def halves_of_the_batch(self: Self, x: Tensor) -> Tensor:
    half = x.shape[0] // 2
    return torch.cat([self.proj(x[:half]), self.proj(x[half:])])


@register(POSITIVE, ROWS)
def stacked_streams(self: Self, x: Tensor) -> Tensor:
    both = self.proj(torch.stack([x, -x]))
    return both[0] * both[1].sigmoid()


@register(POSITIVE, ROWS)
def doubled_batch(self: Self, x: Tensor) -> Tensor:
    first, second = self.proj(torch.cat([x, x.tanh()])).chunk(2)
    return first + second


@register(POSITIVE, ROWS)
def beams(self: Self, x: Tensor) -> Tensor:
    wide = self.proj(x.repeat_interleave(3, dim=0))
    return wide.view(x.shape[0], 3, x.shape[1], -1).sum(1)


@register(POSITIVE, ROWS)
def expanded_beams(self: Self, x: Tensor) -> Tensor:
    b, t, h = x.shape
    return self.proj(x[:, None].expand(b, 3, t, h).reshape(b * 3, t, h)).view(b, 3, t, -1).mean(1)


@register(POSITIVE, ROWS)
def class_token_in_front(self: Self, x: Tensor) -> Tensor:
    token = self.position[:1].expand(x.shape[0], -1, -1)
    return self.proj(torch.cat([token, x], dim=1))


@register(POSITIVE, ROWS)
def pooled_first_token(self: Self, x: Tensor) -> Tensor:
    return self.proj(torch.cat([self.position[:1].expand(x.shape[0], -1, -1), x], 1).cumsum(1)[:, 0] + x[:, 0])


@register(POSITIVE, ROWS)
def last_token(self: Self, x: Tensor) -> Tensor:
    return self.proj(x[:, -1])


@register(POSITIVE, ROWS, **LENGTHS)
def last_token_by_length(self: Self, x: Tensor, lengths: Tensor) -> Tensor:
    return self.proj(x[torch.arange(x.shape[0]), lengths - 1])


@register(POSITIVE, ROWS, **LENGTHS)
def gather_by_length(self: Self, x: Tensor, lengths: Tensor) -> Tensor:
    index = (lengths - 1)[:, None, None].expand(-1, 1, x.shape[2])
    return self.proj(x.gather(1, index).squeeze(1))


@register(POSITIVE, ROWS, **LENGTHS)
def masked_by_length(self: Self, x: Tensor, lengths: Tensor) -> Tensor:
    live = torch.arange(x.shape[1])[None] < lengths[:, None]
    kept = x.masked_fill(~live[..., None], 0.0)
    return self.proj(kept.sum(1) / lengths[:, None])


@register(POSITIVE, ROWS, **LENGTHS)
def masked_attention(self: Self, x: Tensor, lengths: Tensor) -> Tensor:
    live = (torch.arange(x.shape[1])[None] < lengths[:, None])[:, None]
    return self.proj(F.scaled_dot_product_attention(self.query(x), self.key(x), x, attn_mask=live))


@register(POSITIVE, ROWS)
def logits_to_keep_int(self: Self, x: Tensor) -> Tensor:
    return self.proj(x[:, slice(-2, None), :])


@register(POSITIVE, ROWS, inputs_of=with_kept)
def logits_to_keep_tensor(self: Self, x: Tensor, kept: Tensor) -> Tensor:
    return self.proj(x[:, kept, :])


@register(POSITIVE, ROWS, inputs_of=with_kept)
def tokens_index_selected(self: Self, x: Tensor, kept: Tensor) -> Tensor:
    return self.proj(x.index_select(1, kept))


@register(POSITIVE, ROWS)
def gram_within_a_request(self: Self, x: Tensor) -> Tensor:
    return self.proj(x @ x.transpose(1, 2) @ x)


@register(POSITIVE, ROWS)
def softmax_attention(self: Self, x: Tensor) -> Tensor:
    weights = (self.query(x) @ self.key(x).transpose(-1, -2)).softmax(-1)
    return self.proj(weights @ x)


@register(POSITIVE, ROWS)
def heads_by_view(self: Self, x: Tensor) -> Tensor:
    b, t, h = x.shape
    heads = x[..., None].expand(b, t, h, 2).reshape(b, t, 2, h).transpose(1, 2)
    mixed = F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
    return self.proj(mixed.transpose(1, 2).reshape(b, t, 2, h).sum(2))


@register(POSITIVE, ROWS)
def grouped_key_heads(self: Self, x: Tensor) -> Tensor:
    b, t, h = x.shape
    keys = self.key(x)[:, None, None].expand(b, 2, 3, t, h).reshape(b, 6, t, h)
    heads = self.query(x)[:, None].expand(b, 6, t, h)
    return self.proj(F.scaled_dot_product_attention(heads, keys, keys).sum(1))


@register(POSITIVE, ROWS)
def heads_folded_into_the_batch(self: Self, x: Tensor) -> Tensor:
    b, t, h = x.shape
    folded = torch.stack([x, -x], 1).reshape(b * 2, t, h)
    weights = torch.baddbmm(torch.zeros(1, 1, 1), folded, folded.transpose(1, 2)).softmax(-1)
    return self.proj(torch.bmm(weights, folded).view(b, 2, t, h)[:, 0])


@register(POSITIVE, ROWS)
def einsum_attention(self: Self, x: Tensor) -> Tensor:
    weights = torch.einsum("bth,bsh->bts", self.query(x), self.key(x)).softmax(-1)
    return self.proj(torch.einsum("bts,bsh->bth", weights, x))


@register(POSITIVE, ROWS, **CACHE)
def cached_keys(self: Self, x: Tensor, cache: Tensor) -> Tensor:
    keys = torch.cat([cache, x], dim=1)
    return self.proj(F.scaled_dot_product_attention(x, keys, keys))


@register(POSITIVE, ROWS, traceable=False, **CACHE)
def cache_written_in_place(self: Self, x: Tensor, cache: Tensor) -> Tensor:
    keys = cache.new_zeros(x.shape[0], x.shape[1] + 2, x.shape[2])
    keys[:, :2] = cache
    keys[:, 2:] = x
    return self.proj(F.scaled_dot_product_attention(x, keys, keys))


@register(POSITIVE, ROWS)
def expert_dispatch_and_return(self: Self, x: Tensor) -> Tensor:
    rows = x.flatten(0, 1)
    weights, chosen = self.router(rows).softmax(-1).topk(2, dim=-1)
    order = chosen.flatten().argsort(stable=True)
    served = self.proj(rows[torch.div(order, 2, rounding_mode="floor")])
    back = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0]))
    mixed = (served[back].view(-1, 2, served.shape[-1]) * weights[..., None]).sum(1)
    return mixed.view(x.shape[0], x.shape[1], -1)


@register(POSITIVE, ROWS)
def experts_after_the_site(self: Self, x: Tensor) -> Tensor:
    rows = self.proj(x).flatten(0, 1)
    weights, chosen = self.router(x).flatten(0, 1).softmax(-1).topk(2, dim=-1)
    served = torch.einsum("rn,rkmn->rkm", rows, self.experts[chosen])
    return (served * weights[..., None]).sum(1).view(x.shape[0], x.shape[1], -1)


@register(POSITIVE, ROWS)
def dense_mixture(self: Self, x: Tensor) -> Tensor:
    gates = torch.zeros_like(self.router(x)).scatter(-1, self.router(x).topk(2, -1)[1], 1.0)
    return self.proj(x * gates.sum(-1, keepdim=True) + gates.mean(-1, keepdim=True))


@register(POSITIVE, ROWS)
def index_add_by_token(self: Self, x: Tensor) -> Tensor:
    rows = x.flatten(0, 1)
    order = self.router(rows).argmax(-1).argsort(stable=True)
    served = self.proj(rows[order])
    out = torch.zeros_like(served).index_add(0, order, served)
    return out.view(x.shape[0], x.shape[1], -1)


@register(POSITIVE, ROWS)
def max_over_tokens(self: Self, x: Tensor) -> Tensor:
    values, positions = x.max(1)
    return self.proj(values + positions)


@register(POSITIVE, ROWS)
def sorted_tokens(self: Self, x: Tensor) -> Tensor:
    return self.proj(x.sort(1)[0])


@register(POSITIVE, ROWS)
def running_sum_of_tokens(self: Self, x: Tensor) -> Tensor:
    return self.proj(x.cumsum(1))


@register(POSITIVE, ROWS)
def tokens_rolled(self: Self, x: Tensor) -> Tensor:
    return self.proj(x + x.roll(1, 1))


@register(POSITIVE, ROWS)
def tokens_flipped(self: Self, x: Tensor) -> Tensor:
    return self.proj(x + x.flip(1))


@register(POSITIVE, ROWS)
def windows_of_tokens(self: Self, x: Tensor) -> Tensor:
    return self.proj(x.unfold(1, 2, 1).sum(-1))


@register(POSITIVE, ROWS)
def convolution_over_tokens(self: Self, x: Tensor) -> Tensor:
    return self.proj(self.conv(x.transpose(1, 2)).transpose(1, 2))


@register(POSITIVE, ROWS, traceable=False)
def token_shift_by_view_write(self: Self, x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 1:] += x[:, :-1]
    return self.proj(y)


@register(POSITIVE, ROWS, traceable=False)
def tensor_made_of_a_tensor(self: Self, x: Tensor) -> Tensor:
    return self.proj(torch.as_tensor(x, dtype=torch.float32))


@register(POSITIVE, ROWS)
def batch_norm_in_eval_mode(self: Self, x: Tensor) -> Tensor:
    return self.proj(self.batch_norm(x.transpose(1, 2)).transpose(1, 2))


@register(POSITIVE, ROWS)
def positions_added(self: Self, x: Tensor) -> Tensor:
    return self.proj(x + self.position)


@register(POSITIVE, ROWS, inputs_of=token_ids)
def looked_up_tokens(self: Self, x: Tensor) -> Tensor:
    return self.proj(self.table(x) + self.table.weight[x].tanh())


@register(POSITIVE, ROWS)
def where_by_own_sign(self: Self, x: Tensor) -> Tensor:
    return self.proj(torch.where(x.sum(-1, keepdim=True) > 0, x, -x))


@register(POSITIVE, ROWS)
def site_feeds_site(self: Self, x: Tensor) -> Tensor:
    return self.proj(self.back(self.proj(self.back(self.proj(x)))))


@register(POSITIVE, ROWS)
def two_outputs(self: Self, x: Tensor) -> dict[str, Tensor]:
    y = self.proj(x)
    return {"answers": y, "pooled": y.mean(1)}


@register(POSITIVE, ROWS)
def difference_to_the_own_neighbour(self: Self, x: Tensor) -> Tensor:
    return self.proj(torch.diff(x, dim=1, prepend=x[:, :1], append=torch.zeros_like(x[:, :1])))
