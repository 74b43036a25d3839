"""Toys that mix requests behind the prover's back: keyword operands, aliases, writes, accidents of sizes and indices.

Each was once accepted. An adapter on `proj` must be refused.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from tests.toys.base import DISTINCT, Inputs, Sizes, Toy, Verdict, register

HOSTILE: list[Toy] = []
MIXED, REPORTED = Verdict.MIXED, Verdict.REPORTED
Tensor = torch.Tensor
Self = Any
WRITES: dict[str, Any] = {"traceable": False}


def flat_tokens(sizes: Sizes, generator: torch.Generator) -> Inputs:
    """One token per request: x [B, H]."""
    return {"x": torch.randn(sizes.batch, sizes.features, generator=generator)}


def token_ids(sizes: Sizes, generator: torch.Generator) -> Inputs:
    """ids int64 [B, T]."""
    return {"x": torch.randint(0, 13, (sizes.batch, sizes.tokens), generator=generator)}


def with_index(sizes: Sizes, generator: torch.Generator) -> Inputs:
    """x [B, T, H] beside one index of the caller, int64 [1], negative: the last request."""
    x = torch.randn(sizes.batch, sizes.tokens, sizes.features, generator=generator)
    return {"x": x, "index": torch.tensor([-1])}


def with_repeats(sizes: Sizes, generator: torch.Generator) -> Inputs:
    """x [B, T, H] beside indices of the caller with repeats, int64 [B]: 0, 0, 1, 1, 2 ..."""
    x = torch.randn(sizes.batch, sizes.tokens, sizes.features, generator=generator)
    return {"x": x, "index": torch.arange(sizes.batch) // 2}


INDEX: dict[str, Any] = {"inputs_of": with_index, "alone": False}
REPEATS: dict[str, Any] = {"inputs_of": with_repeats, "alone": False}


@register(HOSTILE, MIXED, inputs_of=flat_tokens)
def linear_with_itself(self: Self, x: Tensor) -> Tensor:
    return self.proj(F.linear(x, x)[:, :1].expand(-1, x.shape[1]))


@register(HOSTILE, MIXED)
def convolution_with_itself(self: Self, x: Tensor) -> Tensor:
    y = x.transpose(1, 2)
    return self.proj(x * F.conv1d(y, y).mean((1, 2))[:, None, None])


@register(HOSTILE, MIXED)
def layer_norm_weight_of_the_batch(self: Self, x: Tensor) -> Tensor:
    return self.proj(F.layer_norm(x, self.norm.normalized_shape, x.mean((0, 1))))


@register(HOSTILE, MIXED)
def rms_norm_weight_of_the_batch(self: Self, x: Tensor) -> Tensor:
    return self.proj(F.rms_norm(x, list(self.norm.normalized_shape), weight=x.mean((0, 1))))


@register(HOSTILE, MIXED)
def batch_norm_statistics_of_the_batch(self: Self, x: Tensor) -> Tensor:
    return self.proj(F.batch_norm(x.transpose(1, 2), x.mean((0, 1)), x.var((0, 1))).transpose(1, 2))


@register(HOSTILE, MIXED)
def batch_norm_statistics_read_after_training(self: Self, x: Tensor) -> Tensor:
    norm = self.batch_norm
    F.batch_norm(x.transpose(1, 2), norm.running_mean, norm.running_var, training=True)
    return self.proj(x + norm.running_mean)


@register(HOSTILE, MIXED)
def difference_to_the_neighbour(self: Self, x: Tensor) -> Tensor:
    return self.proj(torch.diff(x, dim=1, prepend=x.flip(0)[:, :1]))


@register(HOSTILE, MIXED)
def maximum_by_keyword(self: Self, x: Tensor) -> Tensor:
    return self.proj(x + torch.max(self.position, other=x.flip(0)))


@register(HOSTILE, MIXED)
def repeats_told_by_the_batch(self: Self, x: Tensor) -> Tensor:
    first = (x.sum((0, 2)) > 0).long()[0] + 1
    repeats = torch.stack([first, x.shape[1] - first])
    return self.proj(x + self.table.weight[:2].repeat_interleave(repeats, dim=0, output_size=x.shape[1]))


@register(HOSTILE, MIXED)
def sum_by_index_add(self: Self, x: Tensor) -> Tensor:
    nowhere = torch.zeros(x.shape[0], dtype=torch.long)
    total = torch.zeros_like(x[:1]).index_add(0, nowhere, x)
    return (self.proj(x[-1:]) + self.proj(total)).expand(x.shape[0], -1, -1)


@register(HOSTILE, MIXED, **INDEX)
def absolute_index(self: Self, x: Tensor, index: Tensor) -> Tensor:
    return self.proj(x[index] + x[index.abs()]).expand(x.shape[0], -1, -1)


@register(HOSTILE, MIXED, **INDEX)
def clamped_index(self: Self, x: Tensor, index: Tensor) -> Tensor:
    return self.proj(x[index] + x[index.clamp(min=0)]).expand(x.shape[0], -1, -1)


@register(HOSTILE, MIXED, **REPEATS)
def repeated_index(self: Self, x: Tensor, index: Tensor) -> Tensor:
    used, back = x[index], index.argsort()
    return self.proj(x[back] + torch.zeros_like(x).index_add(0, index, x)) + self.proj(used)


@register(HOSTILE, MIXED, **REPEATS)
def index_overwritten_by_the_caller(self: Self, x: Tensor, index: Tensor) -> Tensor:
    positions = torch.arange(x.shape[0])
    positions.copy_(index)
    return self.proj(x + x[positions])


@register(HOSTILE, MIXED, **WRITES)
def transposed_view_of_what_was_written(self: Self, x: Tensor) -> Tensor:
    b = x.shape[0]
    pairs = x[:, None].expand(-1, b, -1, -1).clone()
    swapped = pairs.transpose(0, 1)
    pairs[:] = x[None].expand(b, -1, -1, -1)
    return self.proj(swapped + x[None]).sum(1)


@register(HOSTILE, MIXED)
def alias_by_idle_dropout(self: Self, x: Tensor) -> Tensor:
    y = x * 2
    F.dropout(y, 0.1, False).add_(x.flip(0))
    return self.proj(y)


@register(HOSTILE, MIXED)
def alias_by_plus(self: Self, x: Tensor) -> Tensor:
    y = x * 2
    (+y).add_(x.flip(0))
    return self.proj(y)


@register(HOSTILE, MIXED)
def alias_by_real_conjugate(self: Self, x: Tensor) -> Tensor:
    y = x * 2
    y.conj().resolve_conj().add_(x.flip(0))
    return self.proj(y)


@register(HOSTILE, MIXED)
def alias_by_inplace_relu(self: Self, x: Tensor) -> Tensor:
    y = x * 2
    F.relu(y, inplace=True).add_(x.flip(0))
    return self.proj(y)


@register(HOSTILE, MIXED, inputs_of=token_ids)
def alias_by_long(self: Self, x: Tensor) -> Tensor:
    y = x + 0
    y.long().copy_(x.flip(0))
    return self.proj(self.table(x) + self.table(y))


@register(HOSTILE, MIXED)
def alias_by_data(self: Self, x: Tensor) -> Tensor:
    y = x * 2
    y.data.copy_(x.flip(0))
    return self.proj(y)


@register(HOSTILE, MIXED, **WRITES)
def remainder_in_place(self: Self, x: Tensor) -> Tensor:
    y = x * 2
    same = y
    y %= x.flip(0).abs() + 3
    return self.proj(same)


@register(HOSTILE, MIXED)
def write_into_a_list(self: Self, x: Tensor) -> Tensor:
    y = x * 2
    torch._foreach_add_([y], [x.flip(0)])
    return self.proj(y)


@register(HOSTILE, MIXED)
def write_into_a_piece(self: Self, x: Tensor) -> Tensor:
    y = x * 2
    y.unbind(0)[0].add_(x[-1])
    return self.proj(y)


@register(HOSTILE, MIXED)
def write_into_an_older_view(self: Self, x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    view = y[1:]
    y.copy_(x)
    view.add_(x[:-1])
    return self.proj(y)


@register(HOSTILE, MIXED, **WRITES)
def byte_mask(self: Self, x: Tensor) -> Tensor:
    y = x.clone()
    y[torch.ones(x.shape[0], dtype=torch.uint8)] = x[0] * 2
    return self.proj(y)


@torch.library.custom_op("fxlora_tests::add_into", mutates_args=("target",))
def add_into(source: Tensor, target: Tensor) -> None:
    """Adds the neighbours' rows into the second operand."""
    target.add_(source.flip(0))


@register(HOSTILE, MIXED)
def custom_op_writes_its_second_operand(self: Self, x: Tensor) -> Tensor:
    y = x * 2
    torch.ops.fxlora_tests.add_into(x, y)
    return self.proj(y)


@fx.wrap
def look(x: Tensor) -> Tensor:
    """Writes into what it is shown."""
    x.add_(x.flip(0))
    return x.sum()


@register(HOSTILE, MIXED)
def opaque_function_writes_its_operand(self: Self, x: Tensor) -> Tensor:
    y = x * 2
    look(y)
    return self.proj(y)


def _gelu(x: Tensor) -> Tensor:
    return x - x.mean(0)


_module = ModuleType("torchtools")
sys.modules["torchtools"] = _module
_gelu.__module__, _gelu.__name__, _gelu.__qualname__ = "torchtools", "gelu", "gelu"
_module.gelu = _gelu  # type: ignore[attr-defined]
gelu = _gelu
fx.wrap("gelu")


@register(HOSTILE, MIXED)
def function_named_like_a_torch_op(self: Self, x: Tensor) -> Tensor:
    return self.proj(gelu(x))


@register(HOSTILE, MIXED, inputs_of=flat_tokens)
def einsum_capital_beside_an_ellipsis(self: Self, x: Tensor) -> Tensor:
    return self.proj(torch.einsum("Hk,...k->H...", x, x)[:, :1].expand(-1, x.shape[1]))


@register(HOSTILE, REPORTED, inputs_of=flat_tokens)
def einsum_capital_without_an_arrow(self: Self, x: Tensor) -> Tensor:
    return self.proj(torch.einsum("Ab,bc", torch.ones_like(x), x.T)[:, :1].expand(-1, x.shape[1]))


@register(HOSTILE, MIXED, alone=False, sizes=(DISTINCT,))
def a_permutation_for_odd_batches(self: Self, x: Tensor) -> Tensor:
    b = x.shape[0]
    there, back = (torch.arange(b) * 2) % b, (torch.arange(b) * ((b + 1) // 2)) % b
    return self.proj(x + x[there][back])


@register(HOSTILE, MIXED, alone=False, sizes=(Sizes(67, 2, 3),))
def clamped_positions_of_a_large_batch(self: Self, x: Tensor) -> Tensor:
    return self.proj(x + x[torch.arange(x.shape[0]).clamp(max=63)])


@register(HOSTILE, MIXED, **WRITES)
def rows_zeroed_by_a_choice_over_the_batch(self: Self, x: Tensor) -> Tensor:
    y = x.clone()
    y[x.sum((1, 2)).argmax()[None]] = self.position
    return self.proj(y)
