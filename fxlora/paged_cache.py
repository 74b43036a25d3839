"""The paged cache of continuous batching, as compiled graphs see it: one op that stores new keys and values and reads.

Stage: run time, in steps of continuous batching. The memory of the cache is no input of a graph: its views of one
tensor, written in every layer, would be copied whole by functionalization, which is why transformers keeps its own
update out of torch.compile and so breaks the graph in every layer.

Letters: T new tokens, L tokens read, H heads, D head dim.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fxlora.errors import ContinuousBatchingError, TransformersVersionError

Update = Callable[[torch.Tensor, torch.Tensor, int, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(keys [T, H, D], values [T, H, D], layer, read_index [L] or [0], write_index [T]) -> keys, values [L, H, D]; those
given where nothing is read."""

_numbers = itertools.count()
_running: dict[int, Mapping[int, Update]] = {}


@torch.library.custom_op("fxlora_cache::paged_cache_update", mutates_args=())
def paged_cache_update(
    key: torch.Tensor, value: torch.Tensor, read_index: torch.Tensor, write_index: torch.Tensor, layer: int, cache: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`Update` of the cache that the step of a model runs with. cache: number of the model (`PagedCache.number`)."""
    updates = _running.get(cache)
    if updates is None:
        raise ContinuousBatchingError("a step of continuous batching runs outside of its manager: no cache is set")
    keys, values = updates[layer](key, value, layer, read_index, write_index)
    if read_index.shape[0] != 0:
        return keys.contiguous(), values.contiguous()
    # Those given, which an op may not return as they are.
    return keys.clone(memory_format=torch.contiguous_format), values.clone(memory_format=torch.contiguous_format)


@paged_cache_update.register_fake
def _(
    key: torch.Tensor, value: torch.Tensor, read_index: torch.Tensor, write_index: torch.Tensor, layer: int, cache: int
) -> tuple[torch.Tensor, torch.Tensor]:
    length = read_index.shape[0] if read_index.shape[0] != 0 else key.shape[0]
    return key.new_empty(length, *key.shape[1:]), value.new_empty(length, *value.shape[1:])


class PagedCaches:
    """The caches that one model's steps run with, one after another; graphs hold their common number."""

    def __init__(self) -> None:
        self.number = next(_numbers)

    def run_with(self, updates: Mapping[int, Update]) -> None:
        """Let steps use a cache, from now on. updates: by layer, from `adopt`."""
        _running[self.number] = updates

    def close(self) -> None:
        """Let go of the cache."""
        _running.pop(self.number, None)

    def adopt(self, cache: Any) -> Mapping[int, Update]:
        """Put the op in the place of a new cache's own updates, on that object alone; returns these, by layer.

        Raises TransformersVersionError for a cache of unknown make.
        """
        if hasattr(cache, "layer_to_allocator"):
            return self._adopt_allocators(cache)
        if hasattr(cache, "layer_index_to_group_indices"):
            return self._adopt_groups(cache)
        raise TransformersVersionError(
            f"the paged cache of continuous batching ({type(cache).__name__}) has neither layer_to_allocator nor "
            f"layer_index_to_group_indices, by which a layer finds its memory"
        )

    def _adopt_allocators(self, cache: Any) -> Mapping[int, Update]:
        number = self.number
        updates = {layer: allocator.update for layer, allocator in cache.layer_to_allocator.items()}

        def update(
            key: torch.Tensor, value: torch.Tensor, layer: int, read_index: torch.Tensor, write_index: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.ops.fxlora_cache.paged_cache_update(key, value, read_index, write_index, layer, number)

        for allocator in cache.layer_to_allocator.values():
            allocator.update = update
        original = getattr(cache.update, "_torchdynamo_orig_callable", None)
        if original is not None:
            cache.update = types.MethodType(original, cache)
        return updates

    def _adopt_groups(self, cache: Any) -> Mapping[int, Update]:
        number, original = self.number, cache.update
        groups = {layer: places[0] for layer, places in cache.layer_index_to_group_indices.items()}
        count = max(groups.values()) + 1

        def update(
            key_states: torch.Tensor,
            value_states: torch.Tensor,
            layer_idx: int,
            read_index: Sequence[torch.Tensor],
            write_index: Sequence[torch.Tensor],
        ) -> tuple[torch.Tensor, torch.Tensor]:
            group = groups[layer_idx]
            key, value = (states.squeeze(0).transpose(0, 1) for states in (key_states, value_states))
            return torch.ops.fxlora_cache.paged_cache_update(
                key, value, read_index[group], write_index[group], layer_idx, number
            )

        def own(
            key: torch.Tensor, value: torch.Tensor, layer: int, read_index: torch.Tensor, write_index: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            states = (x.transpose(0, 1).unsqueeze(0) for x in (key, value))
            return original(*states, layer, [read_index] * count, [write_index] * count)

        cache.update = update
        return dict.fromkeys(groups, own)
