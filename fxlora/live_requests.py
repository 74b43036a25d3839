"""The adapter of each request that continuous batching serves, from its submission to its last token.

Stage: first of a packed request's way, adapter of a request -> slots of a step's tokens. Requests are submitted in one
thread and packed into steps in another.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fxlora.batch import NO_ADAPTER
from fxlora.errors import BatchTypeError, CallError, ContinuousBatchingError, UnknownAdapterError
from fxlora.runtime import Runtime

_CHILD = "__child#"  # how transformers names the further sequences of a request


@dataclass
class _Request:
    """adapter, slot: of all its sequences. unfinished: how many of them. forked: whether more than one runs."""

    adapter: str | None
    slot: int
    unfinished: int
    forked: bool = False


class LiveRequests:
    """Adapters of the live requests. While a request lives its adapter cannot be unloaded, so its slot is its own."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._lock = threading.Lock()
        self._live: dict[str, _Request] = {}
        self._cancelled: dict[str, str | None] = {}

    def add(self, request_id: str, adapter: str | None, sequences: int = 1) -> None:
        """Take in a request. Raises UnknownAdapterError, BatchTypeError, or CallError for an id that is in use."""
        if not (adapter is None or isinstance(adapter, str)):
            raise BatchTypeError(f"adapter is {adapter!r} ({type(adapter).__name__}); expected a name or None")
        with self._lock:
            if request_id in self._live:
                raise CallError(f"request {request_id!r} is still being served; give a new request another id")
            slot = NO_ADAPTER if adapter is None else self._runtime.hold_adapter(adapter)
            self._live[request_id] = _Request(adapter, slot, sequences)
            self._cancelled.pop(request_id, None)

    def finish(self, request_id: str) -> None:
        """One sequence is complete or has failed; requests that are not known are ignored."""
        with self._lock:
            owner = self._owner(request_id)
            if owner is not None:
                request = self._live[owner]
                request.unfinished -= 1
                if request.unfinished < 1:
                    self._drop(owner)

    def cancel(self, request_id: str) -> None:
        """A sequence was cancelled; with a request that has not forked yet go all of its sequences."""
        with self._lock:
            owner = self._owner(request_id)
            if owner is None:
                return
            request = self._live[owner]
            # The step that is being packed may hold it still.
            self._cancelled[request_id] = request.adapter
            request.unfinished -= 1
            if request.unfinished < 1 or (request_id == owner and not request.forked):
                self._cancelled[owner] = request.adapter
                self._drop(owner)

    def clear(self) -> None:
        """Forget all requests."""
        with self._lock:
            for owner in list(self._live):
                self._drop(owner)
            self._cancelled.clear()

    def token_slots(self, requests: Sequence[tuple[str, int]]) -> torch.Tensor:
        """requests: id and number of tokens of each, in the order of a step. Returns the slot of each token, int32."""
        with self._lock:
            slots = [self._slot(request_id) for request_id, _ in requests]
        lengths = torch.tensor([length for _, length in requests], dtype=torch.int64)
        return torch.tensor(slots, dtype=torch.int32).repeat_interleave(lengths)

    def _slot(self, request_id: str) -> int:
        owner = self._owner(request_id)
        if owner is not None:
            request = self._live[owner]
            request.forked |= owner != request_id
            return request.slot
        parent = request_id.rpartition(_CHILD)[0]
        known = next((name for name in (request_id, parent) if name in self._cancelled), None)
        if known is None:
            raise ContinuousBatchingError(
                f"request {request_id!r} was not submitted with `add_request`, so its adapter is not known"
            )
        adapter = self._cancelled[known]
        if adapter is None:
            return NO_ADAPTER
        slots = self._runtime.pool.slots
        if adapter not in slots:
            raise UnknownAdapterError(f"request {request_id!r} still runs, and its adapter {adapter!r} was unloaded")
        return slots[adapter]

    def _owner(self, request_id: str) -> str | None:
        """The request that a sequence is of."""
        if request_id in self._live:
            return request_id
        parent = request_id.rpartition(_CHILD)[0]
        return parent if parent in self._live else None

    def _drop(self, owner: str) -> None:
        request = self._live.pop(owner)
        if request.adapter is not None:
            self._runtime.release_adapter(request.adapter)
