"""Toys that mix requests: an adapter on `proj` must be refused, for no row of it belongs to one request.

SHARED toys feed `proj` from rows that belong to no request; REPORTED toys mix only after `proj`, in an output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from tests.toys.base import SQUARE, Inputs, Sizes, Toy, Verdict, register

NEGATIVE: list[Toy] = []
MIXED, SHARED, REPORTED = Verdict.MIXED, Verdict.SHARED, Verdict.REPORTED
Tensor = torch.Tensor
Self = Any
FIXED = {"alone": False}


def flat_tokens(sizes: Sizes, generator: torch.Generator) -> Inputs:
    """One token per request: x [B, H]."""
    return {"x": torch.randn(sizes.batch, sizes.features, generator=generator)}


@register(NEGATIVE, MIXED)
def mean_over_batch(self: Self, x: Tensor) -> Tensor:
    return self.proj(x + x.mean(0, keepdim=True))


@register(NEGATIVE, MIXED)
def mean_over_batch_and_tokens(self: Self, x: Tensor) -> Tensor:
    return self.proj(x - x.mean((0, 1)))


@register(NEGATIVE, MIXED)
def standardise_over_batch(self: Self, x: Tensor) -> Tensor:
    return self.proj(x / (x.var(0, unbiased=False) + 1e-3).sqrt())


@register(NEGATIVE, MIXED)
def divide_by_global_norm(self: Self, x: Tensor) -> Tensor:
    return self.proj(x / x.norm())


@register(NEGATIVE, MIXED)
def quantise_by_batch_maximum(self: Self, x: Tensor) -> Tensor:
    scale = x.abs().amax() / 127
    return self.proj((x / scale).round() * scale)


@register(NEGATIVE, MIXED)
def softmax_over_batch(self: Self, x: Tensor) -> Tensor:
    return self.proj(x.softmax(0))


@register(NEGATIVE, MIXED)
def logsumexp_over_batch(self: Self, x: Tensor) -> Tensor:
    return self.proj(x - torch.logsumexp(x, dim=0))


@register(NEGATIVE, MIXED)
def max_over_batch(self: Self, x: Tensor) -> Tensor:
    values, _ = x.max(0)
    return self.proj(x - values)


@register(NEGATIVE, MIXED)
def median_over_batch(self: Self, x: Tensor) -> Tensor:
    return self.proj(x - x.median(dim=0).values)


@register(NEGATIVE, MIXED)
def sort_over_batch(self: Self, x: Tensor) -> Tensor:
    return self.proj(x.sort(0)[0])


@register(NEGATIVE, MIXED)
def cumsum_over_batch(self: Self, x: Tensor) -> Tensor:
    return self.proj(x.cumsum(0))


@register(NEGATIVE, MIXED)
def cumsum_over_flat_tokens(self: Self, x: Tensor) -> Tensor:
    return self.proj(x.flatten(0, 1).cumsum(0).view_as(x))


@register(NEGATIVE, MIXED, **FIXED)
def add_permuted(self: Self, x: Tensor) -> Tensor:
    return self.proj(x + x[self.perm])


@register(NEGATIVE, MIXED, **FIXED)
def add_index_selected(self: Self, x: Tensor) -> Tensor:
    return self.proj(x + torch.index_select(x, 0, self.perm))


@register(NEGATIVE, MIXED, **FIXED)
def undo_the_wrong_permutation(self: Self, x: Tensor) -> Tensor:
    return self.proj(x + x[self.perm][self.perm])


@register(NEGATIVE, MIXED)
def add_first_request(self: Self, x: Tensor) -> Tensor:
    return self.proj(x + x[:1])


@register(NEGATIVE, MIXED)
def add_selected_request(self: Self, x: Tensor) -> Tensor:
    return self.proj(x + x[-1])


@register(NEGATIVE, MIXED, since="2.12")
def add_the_largest_request(self: Self, x: Tensor) -> Tensor:
    return self.proj(x + x[x.sum((1, 2)).argmax()])


@register(NEGATIVE, MIXED)
def roll_over_batch(self: Self, x: Tensor) -> Tensor:
    return self.proj(x + torch.roll(x, 1, 0))


@register(NEGATIVE, MIXED)
def roll_over_flat_tokens(self: Self, x: Tensor) -> Tensor:
    return self.proj(x + x.flatten(0, 1).roll(1, 0).view_as(x))


@register(NEGATIVE, MIXED)
def flip_over_batch(self: Self, x: Tensor) -> Tensor:
    return self.proj(x + x.flip(0))


@register(NEGATIVE, MIXED)
def repeat_shifted(self: Self, x: Tensor) -> Tensor:
    return self.proj(x + x.repeat(2, 1, 1)[1 : x.shape[0] + 1])


@register(NEGATIVE, MIXED)
def repeat_interleave_shifted(self: Self, x: Tensor) -> Tensor:
    return self.proj(x + x.repeat_interleave(2, dim=0)[1 : x.shape[0] + 1])


@register(NEGATIVE, MIXED)
def cat_shifted(self: Self, x: Tensor) -> Tensor:
    return self.proj(x + torch.cat([x[-1:], x[:-1]]))


@register(NEGATIVE, MIXED)
def unfold_over_batch(self: Self, x: Tensor) -> Tensor:
    windows = torch.cat([x, x[:1]]).unfold(0, 2, 1)
    return self.proj(windows.sum(-1))


@register(NEGATIVE, MIXED, traceable=False)
def shift_by_view_write(self: Self, x: Tensor) -> Tensor:
    y = x.clone()
    y[1:] += x[:-1]
    return self.proj(y)


@register(NEGATIVE, MIXED)
def shift_by_view_of_a_view(self: Self, x: Tensor) -> Tensor:
    y = x.clone()
    y.transpose(0, 1)[:, 1:].copy_(x.transpose(0, 1)[:, :-1])
    return self.proj(y)


@register(NEGATIVE, MIXED)
def write_after_the_view_was_taken(self: Self, x: Tensor) -> Tensor:
    y = x.clone()
    rows = y.flatten(0, 1)
    y.add_(x[:1])
    return self.proj(rows).view(x.shape[0], x.shape[1], -1)


@register(NEGATIVE, MIXED)
def in_place_add_of_mean(self: Self, x: Tensor) -> Tensor:
    y = x * 2
    y.add_(y.mean(0))
    return self.proj(y)


@register(NEGATIVE, MIXED)
def scatter_over_batch(self: Self, x: Tensor) -> Tensor:
    index = torch.zeros_like(x, dtype=torch.long)
    return self.proj(x + torch.zeros_like(x).scatter_add(0, index, x)[:1])


@register(NEGATIVE, MIXED, **FIXED)
def index_put_permuted(self: Self, x: Tensor) -> Tensor:
    return self.proj(x + torch.zeros_like(x).index_put((self.perm,), x))


@register(NEGATIVE, MIXED, **FIXED)
def index_copy_permuted(self: Self, x: Tensor) -> Tensor:
    return self.proj(x.index_copy(0, self.perm, x * 2))


@register(NEGATIVE, MIXED, **FIXED)
def gather_over_batch(self: Self, x: Tensor) -> Tensor:
    index = self.perm[:, None, None].expand(-1, x.shape[1], x.shape[2])
    return self.proj(x + x.gather(0, index))


@register(NEGATIVE, MIXED)
def masked_by_batch_mean(self: Self, x: Tensor) -> Tensor:
    level = x.sum(-1, keepdim=True)
    return self.proj(x.masked_fill(level > level.mean(), 0.0))


@register(NEGATIVE, MIXED)
def where_from_neighbour(self: Self, x: Tensor) -> Tensor:
    return self.proj(torch.where(x > x.flip(0), x, -x))


@register(NEGATIVE, MIXED)
def write_through_a_view_that_einsum_made(self: Self, x: Tensor) -> Tensor:
    y = x.clone()
    view = torch.einsum("btf->tbf", y)
    view.copy_(view.roll(1, 1))
    return self.proj(y)


@register(NEGATIVE, MIXED, traceable=False)
def write_through_as_tensor(self: Self, x: Tensor) -> Tensor:
    y = x.clone()
    view = torch.as_tensor(y)
    view.copy_(view.roll(1, 0))
    return self.proj(y)


@register(NEGATIVE, MIXED)
def lerp_to_neighbour(self: Self, x: Tensor) -> Tensor:
    return self.proj(torch.lerp(x, x.roll(1, 0), 0.3))


@register(NEGATIVE, MIXED, **FIXED)
def multiply_by_constant_over_batch(self: Self, x: Tensor) -> Tensor:
    return self.proj((self.mix @ x.flatten(1)).view_as(x))


@register(NEGATIVE, MIXED, inputs_of=flat_tokens)
def gram_of_flat_rows(self: Self, x: Tensor) -> Tensor:
    return self.proj(x @ x.T @ x)


@register(NEGATIVE, MIXED, inputs_of=flat_tokens)
def gram_of_flat_rows_other_order(self: Self, x: Tensor) -> Tensor:
    return self.proj(x @ (x.T @ x))


@register(NEGATIVE, MIXED, inputs_of=flat_tokens)
def attention_over_flat_rows(self: Self, x: Tensor) -> Tensor:
    weights = (self.query(x) @ self.key(x).T).softmax(-1)
    return self.proj(weights @ x)


@register(NEGATIVE, MIXED, inputs_of=flat_tokens)
def sdpa_over_flat_rows(self: Self, x: Tensor) -> Tensor:
    return self.proj(F.scaled_dot_product_attention(x[None], x[None], x[None])[0])


@register(NEGATIVE, MIXED)
def attention_over_batch_per_token(self: Self, x: Tensor) -> Tensor:
    y = x.transpose(0, 1)
    weights = (self.query(y) @ self.key(y).transpose(1, 2)).softmax(-1)
    return self.proj((weights @ y).transpose(0, 1))


@register(NEGATIVE, MIXED)
def sdpa_over_batch_dim(self: Self, x: Tensor) -> Tensor:
    y = x.transpose(0, 1)
    return self.proj(F.scaled_dot_product_attention(self.query(y), self.key(y), y).transpose(0, 1))


@register(NEGATIVE, MIXED)
def sdpa_over_all_tokens(self: Self, x: Tensor) -> Tensor:
    y = x.reshape(1, 1, -1, x.shape[2])
    return self.proj(F.scaled_dot_product_attention(y, y, y, is_causal=True).reshape(x.shape))


@register(NEGATIVE, MIXED)
def keys_of_the_neighbour(self: Self, x: Tensor) -> Tensor:
    return self.proj(F.scaled_dot_product_attention(x, x.roll(1, 0), x))


@register(NEGATIVE, MIXED)
def mask_of_the_neighbour(self: Self, x: Tensor) -> Tensor:
    bias = (x @ x.transpose(1, 2)).flip(0)
    return self.proj(F.scaled_dot_product_attention(x, x, x, attn_mask=bias))


@register(NEGATIVE, MIXED)
def bmm_that_sums_requests(self: Self, x: Tensor) -> Tensor:
    y = x.permute(1, 2, 0)
    return self.proj(torch.bmm(x.transpose(0, 1), torch.bmm(y, y.transpose(1, 2))).transpose(0, 1))


@register(NEGATIVE, MIXED)
def einsum_over_batch(self: Self, x: Tensor) -> Tensor:
    weights = torch.einsum("bth,cth->bc", x, x)
    return self.proj(torch.einsum("bc,cth->bth", weights, x))


@register(NEGATIVE, MIXED)
def einsum_drops_the_batch(self: Self, x: Tensor) -> Tensor:
    return self.proj(x + torch.einsum("bth->th", x))


@register(NEGATIVE, MIXED)
def outer_product_of_requests(self: Self, x: Tensor) -> Tensor:
    pairs = x[:, None] - x[None]
    return self.proj(pairs.sum(1))


@register(NEGATIVE, MIXED)
def misread_as_tokens_first(self: Self, x: Tensor) -> Tensor:
    y = x.reshape(x.shape[1], x.shape[0], x.shape[2]).transpose(0, 1)
    return self.proj(x + y)


@register(NEGATIVE, MIXED, sizes=(SQUARE,))
def transpose_of_a_square(self: Self, x: Tensor) -> Tensor:
    return self.proj(x + x.transpose(0, 1))


@register(NEGATIVE, MIXED, sizes=(SQUARE,))
def features_swapped_with_batch(self: Self, x: Tensor) -> Tensor:
    return self.proj(x + x.transpose(0, 2))


@register(NEGATIVE, MIXED)
def strided_over_the_whole_storage(self: Self, x: Tensor) -> Tensor:
    y = x.contiguous()
    b, t, h = x.shape
    return self.proj(x + torch.as_strided(torch.cat([y, y]), (b, t, h), (t * h, h, 1), h))


@register(NEGATIVE, MIXED)
def capacity_of_experts(self: Self, x: Tensor) -> Tensor:
    rows = x.flatten(0, 1)
    chosen = F.one_hot(self.router(rows).argmax(-1), 4)
    kept = ((chosen.cumsum(0) * chosen) <= 2).all(-1, keepdim=True)
    return self.proj(rows * kept).view(x.shape[0], x.shape[1], -1)


@register(NEGATIVE, MIXED)
def dispatch_without_return(self: Self, x: Tensor) -> Tensor:
    rows = x.flatten(0, 1)
    order = self.router(rows).argmax(-1).argsort(stable=True)
    return self.proj(rows + rows[order]).view(x.shape[0], x.shape[1], -1)


@register(NEGATIVE, MIXED, train=True)
def batch_norm_in_train_mode(self: Self, x: Tensor) -> Tensor:
    return self.proj(self.batch_norm(x.transpose(1, 2)).transpose(1, 2))


@register(NEGATIVE, MIXED)
def group_norm_with_requests_as_channels(self: Self, x: Tensor) -> Tensor:
    return self.proj(F.group_norm(x.transpose(0, 1), 1).transpose(0, 1))


@register(NEGATIVE, MIXED)
def convolution_along_the_batch(self: Self, x: Tensor) -> Tensor:
    return self.proj(self.conv(x.permute(1, 2, 0)).permute(2, 0, 1))


@register(NEGATIVE, MIXED)
def distance_to_every_request(self: Self, x: Tensor) -> Tensor:
    far = torch.cdist(x.flatten(1), x.flatten(1))
    return self.proj(x * far.sum(1)[:, None, None])


@register(NEGATIVE, SHARED)
def position_rows(self: Self, x: Tensor) -> Tensor:
    return self.proj(self.position) + x.sum(-1, keepdim=True)


@register(NEGATIVE, SHARED)
def looked_up_positions(self: Self, x: Tensor) -> Tensor:
    return x.sum(-1, keepdim=True) * self.proj(self.table(torch.arange(x.shape[1])))


@register(NEGATIVE, REPORTED)
def mean_of_the_answers(self: Self, x: Tensor) -> Tensor:
    y = self.proj(x)
    return y - y.mean(0)


@register(NEGATIVE, REPORTED)
def loss_beside_the_answers(self: Self, x: Tensor) -> tuple[Tensor, Tensor]:
    y = self.proj(x)
    return y, y.pow(2).mean()


@register(NEGATIVE, REPORTED, **FIXED)
def answers_plus_permuted(self: Self, x: Tensor) -> Tensor:
    y = self.proj(x)
    return y + y[self.perm]


@register(NEGATIVE, REPORTED)
def attention_over_the_answers(self: Self, x: Tensor) -> Tensor:
    y = self.proj(x).transpose(0, 1)
    return F.scaled_dot_product_attention(y, y, y).transpose(0, 1)
