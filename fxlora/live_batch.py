"""The running batch of one runtime: whose adapters compiled graphs read, in memory at a fixed address.

Stage: last of a request's way under torch.compile, slots -> buffer -> op `batch_slots`. One thread at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fxlora.batch import NO_ADAPTER
from fxlora.errors import BatchInUseError, BatchNotServedError, BatchSizeError


@dataclass
class Batch:
    """One batch while it runs.

    Attributes:
        slots: int32 of the batch's sizes, [requests] or [requests, tokens]; of no dims where all have one slot, [n, 1]
            where each request has one for all its tokens, however many a call brings.
        served: Whether a compiled graph ran.
    """

    slots: torch.Tensor
    served: bool = False

    @property
    def names_adapters(self) -> bool:
        """Whether any request has an adapter."""
        return bool((self.slots != NO_ADAPTER).any())


class LiveBatch:
    """The slot buffers of a runtime, by device, and the batch whose slots they hold.

    Attributes:
        max_tokens: Entries of a buffer: requests (or tokens, where adapters are chosen per token) of the largest batch.
        buffers: int32 [max_tokens] by device, at fixed addresses; -1 outside of a batch and past its end.
    """

    def __init__(self, max_tokens: int) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens is {max_tokens}; expected at least 1")
        self.max_tokens = max_tokens
        self.buffers: dict[torch.device, torch.Tensor] = {}
        self._stack: list[Batch] = []
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._calls = 0  # running outside of a batch, in any thread
        self._captured = False

    def reserve(self, device: torch.device) -> None:
        """Make the buffer of a device, if there is none."""
        with torch.inference_mode(False):
            buffer = torch.full((self.max_tokens,), NO_ADAPTER, dtype=torch.int32, device=device)
        if buffer.device not in self.buffers:
            self.buffers[buffer.device] = buffer
            if self._stack:
                self._write(self._stack[-1])

    @contextmanager
    def enter(self, slots: torch.Tensor) -> Iterator[Batch]:
        """Run a batch. Inside another one of the same thread it takes its place, and gives it back at the end.

        slots: see `Batch.slots`, on the CPU. Raises BatchInUseError, BatchSizeError, and at the end BatchNotServedError
        when adapters were named and nothing compiled ran.
        """
        batch = Batch(slots)
        self._acquire()
        try:
            self._stack.append(batch)
            try:
                self._write(batch)
                yield batch
            finally:
                self._stack.pop()
                self._write(self._stack[-1] if self._stack else Batch(torch.tensor(NO_ADAPTER, dtype=torch.int32)))
        finally:
            with self._lock:
                if not self._stack:
                    self._owner = None
        if batch.served:
            for outer in self._stack:
                outer.served = True
        elif batch.names_adapters and not self._captured:
            raise BatchNotServedError(
                "the batch named adapters, but no compiled graph of this runtime ran inside it: call the compiled "
                "model (torch.compile gives up a function that it had to compile too often, and runs it uncompiled)"
            )

    @property
    def running(self) -> Batch | None:
        """The running batch of this thread."""
        return self._stack[-1] if self._stack and self._owner == threading.get_ident() else None

    def expand(self, times: int) -> None:
        """Let every request of the running batch stand for `times` adjacent rows (beams, returned sequences)."""
        batch = self.running
        if batch is None or times == 1 or not batch.slots.dim():
            return
        batch.slots = batch.slots.repeat_interleave(times, dim=0)
        self._write(batch)

    def begin_call(self, sizes: tuple[int, ...]) -> bool:
        """Before a compiled graph runs: does its call fit the batch? Returns what `end_call` takes.

        sizes: of the call's request dims. Raises BatchSizeError or BatchInUseError.
        """
        self._check_room(torch.Size(sizes).numel())
        if _is_capturing():
            self._captured = True  # replays of the caller's own CUDA graph cannot be seen from here
        batch = self.running
        if batch is None:
            self._begin_outside()
            return True
        expected = tuple(batch.slots.shape)
        if len(sizes) == 2 and expected == (sizes[0], 1):
            self._write(Batch(batch.slots.expand(sizes)))
        elif expected and expected != sizes:
            raise BatchSizeError(f"the batch names adapters for {_words(expected)}, the call has {_words(sizes)}")
        batch.served = True
        return False

    def end_call(self, outside: bool) -> None:
        """After a compiled graph ran."""
        if outside:
            with self._lock:
                self._calls -= 1

    def _begin_outside(self) -> None:
        with self._lock:
            if self._owner not in (None, threading.get_ident()):
                raise BatchInUseError("another thread runs a batch of this runtime, whose adapters this call would get")
            self._calls += 1

    def _acquire(self) -> None:
        if _is_capturing():
            raise BatchInUseError(
                "a batch cannot start while a CUDA graph is captured: each replay would set its adapters again. Start "
                "the batch first, capture inside it; a batch around a replay decides what the replay reads"
            )
        with self._lock:
            if self._owner not in (None, threading.get_ident()):
                raise BatchInUseError("another thread runs a batch of this runtime; batches run one after another")
            if self._calls:
                raise BatchInUseError("a call outside of any batch still runs, and would get this batch's adapters")
            self._owner = threading.get_ident()

    def _check_room(self, count: int) -> None:
        if count > self.max_tokens:
            raise BatchSizeError(f"{count} rows to choose adapters for; max_tokens={self.max_tokens}")

    def _write(self, batch: Batch) -> None:
        """Ordered on the current stream, without waiting for it."""
        self._check_room(batch.slots.numel())
        for buffer in self.buffers.values():
            if not batch.slots.dim():
                buffer.fill_(int(batch.slots))
                continue
            flat = batch.slots.flatten()
            if buffer.is_cuda:
                flat = flat.pin_memory()
            buffer[: len(flat)].copy_(flat, non_blocking=True)
            buffer[len(flat) :].fill_(NO_ADAPTER)


def _is_capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _words(sizes: tuple[int, ...]) -> str:
    return f"{sizes[0]} requests" if len(sizes) == 1 else f"{sizes[0]} requests of {sizes[1]} tokens"
