"""One forward of continuous batching: whose tokens it computes, and the memory and the attention it runs with.

Stage: second of a packed request's way, requests of a step -> slots of its tokens -> the running batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fxlora.batch import NO_ADAPTER
from fxlora.errors import TransformersVersionError
from fxlora.paged_cache import PagedCaches


class PackedStep:
    """One forward of packed requests: their slots are chosen with their tokens and set when they are computed.

    The pairs of buffers of asynchronous batching need no slots of their own: slots are written in the order of the
    steps, on the stream that computes them.
    """

    def __init__(self, manager: Any, processor: Any) -> None:
        self._manager, self._io = manager, processor.inputs_and_outputs
        self._prepare, self._compute = self._io.prepare_batch_tensors, processor.model_runner.compute_batch
        self._caches: PagedCaches = manager.model._fxlora_caches
        self._updates = self._caches.adopt(processor.cache)
        self._slots = torch.empty(0, dtype=torch.int32)

    def prepare(self, requests_in_batch: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        """In place of the buffers' own; requests_in_batch: in the order of their tokens."""
        with self._noted():
            try:
                requests = [(request.state.request_id, request.query_length) for request in requests_in_batch]
            except AttributeError as error:
                raise TransformersVersionError(f"a scheduled request of transformers {error}") from error
            if self._manager.is_running():
                self._slots = self._manager.live_requests.token_slots(requests)
            else:  # made up for a warm-up
                self._slots = torch.full((sum(length for _, length in requests),), NO_ADAPTER, dtype=torch.int32)
        return self._prepare(requests_in_batch, *args, **kwargs)

    def compute(self, model: Any, batch_data: Any, *args: Any, **kwargs: Any) -> Any:
        """In place of the runner's own. Rows past the last request are padding and have no adapter."""
        with self._noted(), _on_stream(self._io.compute_stream), _open_attention(self._manager.model):
            padded = torch.full((1, batch_data["input_ids"].shape[-1]), NO_ADAPTER, dtype=torch.int32)
            padded[0, : len(self._slots)] = self._slots
            with self._manager._fxlora_runtime.live.enter(padded):
                self._caches.run_with(self._updates)
                return self._compute(model, batch_data, *args, **kwargs)

    @contextlib.contextmanager
    def _noted(self) -> Iterator[None]:
        """transformers logs what goes wrong in its thread and fails the requests; the caller shall see it as well."""
        try:
            yield
        except Exception as error:
            if self._manager.is_running():
                self._manager.failure = error
            raise


@contextlib.contextmanager
def _on_stream(stream: Any) -> Iterator[None]:
    """On the stream that computes, behind what was launched outside of it: adapters that were just loaded."""
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.default_stream(stream.device))
    with torch.cuda.stream(stream):
        yield


@contextlib.contextmanager
def _open_attention(model: Any) -> Iterator[None]:
    """With the attention function itself where transformers keeps it from torch.compile, a break in every layer.

    It does so for the sake of the cache's memory, which compiled graphs do not have here.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions

    name = model.config._attn_implementation
    kept = functions.get(name)
    original = getattr(kept, "_torchdynamo_orig_callable", None)
    if original is None:
        yield
        return
    functions[name] = original
    try:
        yield
    finally:
        del functions[name]
        if functions.get(name) is not kept:  # it was there by this name alone
            functions[name] = kept
