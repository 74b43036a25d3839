"""The op that stands for the paged cache: its shapes, what it returns, and what is proven of its rows."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxlora import attach
from fxlora.errors import ContinuousBatchingError, TransformersVersionError, UnboundTensorError
from fxlora.paged_cache import PagedCaches, paged_cache_update
from tests.fxlora.runtime_toys import adapter

HEADS, WIDTH = 2, 3


class Store:
    """Memory of one layer, as transformers has it."""

    def __init__(self) -> None:
        self.keys, self.values = torch.zeros(20, HEADS, WIDTH), torch.zeros(20, HEADS, WIDTH)

    def update(self, key: Any, value: Any, layer: int, read: torch.Tensor, write: torch.Tensor) -> tuple[Any, Any]:
        self.keys[write], self.values[write] = key, value
        return (self.keys[read], self.values[read]) if len(read) else (key, value)


@pytest.fixture
def caches() -> Iterator[PagedCaches]:
    made = PagedCaches()
    yield made
    made.close()


def arguments(read: int, tokens: int = 4) -> tuple[torch.Tensor, ...]:
    key = torch.randn(HEADS, tokens, WIDTH).transpose(0, 1)  # strided, as layers give them
    return key, torch.randn(tokens, HEADS, WIDTH), torch.arange(read) + 1, torch.arange(tokens) + 5


@pytest.mark.parametrize("read", [0, 7])
def test_it_stores_and_reads_and_is_an_op(read: int, caches: PagedCaches) -> None:
    store = Store()
    updates = caches.adopt(types.SimpleNamespace(layer_to_allocator={0: store}, update=None))
    caches.run_with(updates)
    key, value, read_index, write_index = arguments(read)
    keys, values = paged_cache_update(key, value, read_index, write_index, 0, caches.number)
    assert torch.equal(store.keys[write_index], key)
    assert torch.equal(keys, store.keys[read_index] if read else key)
    assert torch.equal(values, store.values[read_index] if read else value)
    assert keys.is_contiguous()
    torch.library.opcheck(paged_cache_update, (key, value, read_index, write_index, 0, caches.number))


def test_a_cache_of_either_make_is_served_alike(caches: PagedCaches) -> None:
    grouped_store, plain_store = Store(), Store()

    def grouped(key: Any, value: Any, layer: int, read: Any, write: Any) -> Any:
        key, value = (x.squeeze(0).transpose(0, 1) for x in (key, value))
        return grouped_store.update(key, value, layer, read[1], write[1])

    old = types.SimpleNamespace(layer_index_to_group_indices={0: (1, 0), 1: (0, 0)}, update=grouped)
    new = types.SimpleNamespace(layer_to_allocator={0: plain_store, 1: Store()}, update=None)
    key, value, read, write = arguments(7)
    caches.run_with(caches.adopt(old))
    other = torch.zeros(0, dtype=torch.int64)
    got = old.update(*(x.transpose(0, 1).unsqueeze(0) for x in (key, value)), 0, [other, read], [other, write])
    caches.run_with(caches.adopt(new))
    want = plain_store.update(key, value, 0, read, write)
    assert all(map(torch.equal, got, want))


def test_what_is_refused(caches: PagedCaches) -> None:
    with pytest.raises(TransformersVersionError, match="layer_to_allocator"):
        caches.adopt(types.SimpleNamespace())
    with pytest.raises(ContinuousBatchingError, match="no cache is set"):
        paged_cache_update(*arguments(0), 0, caches.number)


class Attends(nn.Module):
    """Attention over a paged cache, one linear behind it."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.fc = nn.Linear(HEADS * WIDTH, 8)

    def forward(self, x: torch.Tensor, mask: torch.Tensor, read: torch.Tensor, write: torch.Tensor) -> torch.Tensor:
        states = x.flatten(0, 1).unflatten(-1, (HEADS, WIDTH))
        keys, values = torch.ops.fxlora_cache.paged_cache_update(states, states, read, write, 0, self.number)
        query, key, value = (t.transpose(0, 1).unsqueeze(0) for t in (states, keys, values))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.fc(out.transpose(1, 2).flatten(2))


def call() -> tuple[torch.Tensor, ...]:
    key, _, read, write = arguments(7)
    return key.reshape(1, 4, HEADS * WIDTH).contiguous(), torch.zeros(1, 1, 4, 7), read, write


def test_rows_of_packed_queries_are_proven(caches: PagedCaches) -> None:
    model = Attends(caches.number)
    runtime = attach(model, max_adapters=2, max_rank=2, batch_dims={"x": (0, 1)})
    source = adapter(k=HEADS * WIDTH, n=8)
    runtime.load_adapter("one", source)
    caches.run_with({0: Store().update})
    step = torch.compile(model, backend=runtime.backend, fullgraph=True, options={"backend": "eager"})
    inputs = call()
    with torch.no_grad():
        bare = model(*inputs)
        with runtime.batch([["one", None, "one", None]]):
            got = step(*inputs)
    changed = (got - bare).abs().amax(-1)[0] > 1e-3
    assert changed.tolist() == [True, False, True, False]


def test_a_batch_of_whole_requests_is_refused(caches: PagedCaches) -> None:
    model = Attends(caches.number)
    runtime = attach(model, max_adapters=2, max_rank=2)
    runtime.load_adapter("one", adapter(k=HEADS * WIDTH, n=8))
    caches.run_with({0: Store().update})
    step = torch.compile(model, backend=runtime.backend, fullgraph=True, options={"backend": "eager"})
    x, *rest = call()
    x = x.transpose(0, 1).contiguous()
    with torch.no_grad(), pytest.raises(UnboundTensorError, match="a paged cache holds"), runtime.batch(["one"] * 4):
        step(x, *rest)
