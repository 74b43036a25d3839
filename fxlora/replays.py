"""Which calls of a compiled model run as CUDA graphs, under the modes that use them.

Stage: between a compiled model's forward and its graphs. A CUDA graph owns what it returns until its next replay. A
cache whose memory a call makes, or grows, would be lost there by the next call, so such a call runs the same graphs
outside of CUDA graphs; so does a prefill, whose length would have a recording of its own each time.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch

# The modes of torch.compile that use CUDA graphs, and what each is without them.
WITHOUT_GRAPHS: Mapping[str | None, str | None] = {
    "reduce-overhead": None,
    "max-autotune": "max-autotune-no-cudagraphs",
}


class Replays:
    """A forward that is replayed where its caches stay where they are, and run where they do not."""

    def __init__(self, replayed: Callable[..., Any], plain: Callable[..., Any]) -> None:
        functools.update_wrapper(self, replayed)  # transformers reads the signature of a forward
        self._replayed, self._plain = replayed, plain
        self._filled: WeakSet[Any] = WeakSet()  # static caches that a call has been through: they have their memory
        self._paused = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        caches = _caches(args, kwargs)
        if not self._paused and all(cache in self._filled for cache in caches):
            return self._replayed(*args, **kwargs)
        result = self._plain(*args, **kwargs)
        for cache in caches:
            if cache.is_compileable and cache not in self._filled:
                self._filled.add(cache)
                _keep_addresses(cache)
        return result

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Calls inside run outside of CUDA graphs."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1


def _caches(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """The caches of transformers among the arguments of a call."""
    module = sys.modules.get("transformers.cache_utils")
    return [] if module is None else [v for v in (*args, *kwargs.values()) if isinstance(v, module.Cache)]


def _keep_addresses(cache: Any) -> None:
    """Tell torch that the memory of a static cache stays where it is, as transformers does for one made outside of a
    graph: a tensor that is written to, and may move, would keep its graph from being recorded."""
    parts = (getattr(cache, name, None) for name in ("self_attention_cache", "cross_attention_cache"))
    for layers in [part.layers for part in parts if part is not None] or [cache.layers]:
        for layer in layers:
            for value in vars(layer).values():
                for tensor in value.values() if isinstance(value, dict) else (value,):
                    if isinstance(tensor, torch.Tensor):
                        torch._dynamo.mark_static_address(tensor)
