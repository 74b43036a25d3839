"""The running batch: what the buffer holds when, who may write it, and which calls fit."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from fxlora.errors import BatchInUseError, BatchNotServedError, BatchSizeError
from fxlora.live_batch import LiveBatch

CPU = torch.device("cpu")


def slots(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.fixture
def live() -> LiveBatch:
    made = LiveBatch(6)
    made.reserve(CPU)
    return made


def call(live: LiveBatch, *sizes: int) -> None:
    live.end_call(live.begin_call(sizes))


def in_thread(run: Callable[[], None]) -> BaseException | None:
    raised: list[BaseException] = []

    def body() -> None:
        try:
            run()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join(30)
    return raised[0] if raised else None


def test_the_buffer_holds_the_batch_and_no_adapter_around_it(live: LiveBatch) -> None:
    buffer = live.buffers[CPU]
    address = buffer.data_ptr()
    assert buffer.tolist() == [-1] * 6
    with live.enter(slots(2, -1, 0)):
        call(live, 3)
        assert buffer.tolist() == [2, -1, 0, -1, -1, -1]
    assert buffer.tolist() == [-1] * 6
    with live.enter(torch.tensor(1, dtype=torch.int32)):
        call(live, 5)
        assert buffer.tolist() == [1] * 6
    assert buffer.tolist() == [-1] * 6
    assert live.buffers[CPU] is buffer
    assert buffer.data_ptr() == address


def test_a_batch_inside_a_batch_takes_its_place_until_it_ends(live: LiveBatch) -> None:
    buffer = live.buffers[CPU]
    with live.enter(slots(2, 2)):
        call(live, 2)
        with live.enter(slots(0, 1, 1)):
            assert buffer.tolist() == [0, 1, 1, -1, -1, -1]
            call(live, 3)
            with pytest.raises(BatchSizeError, match="names adapters for 3 requests, the call has 2 requests"):
                live.begin_call((2,))
        assert buffer.tolist() == [2, 2, -1, -1, -1, -1]
        call(live, 2)


def test_an_error_inside_gives_the_buffer_back(live: LiveBatch) -> None:
    with pytest.raises(ZeroDivisionError), live.enter(slots(2, 2)):
        raise ZeroDivisionError
    assert live.buffers[CPU].tolist() == [-1] * 6
    with live.enter(slots(1)):
        call(live, 1)


def test_a_buffer_made_inside_a_batch_holds_it(live: LiveBatch) -> None:
    late = LiveBatch(4)
    with late.enter(slots(1, 0)):
        late.reserve(CPU)
        assert late.buffers[CPU].tolist() == [1, 0, -1, -1]
        call(late, 2)
    assert late.buffers[CPU].tolist() == [-1] * 4


def test_expanded_requests_keep_their_slots(live: LiveBatch) -> None:
    with live.enter(slots(2, -1, 0)):
        live.expand(2)
        assert live.buffers[CPU].tolist() == [2, 2, -1, -1, 0, 0]
        call(live, 6)
        with pytest.raises(BatchSizeError, match="12 rows to choose adapters for; max_tokens=6"):
            live.expand(2)
    live.expand(5)
    assert live.buffers[CPU].tolist() == [-1] * 6


def test_slots_per_token(live: LiveBatch) -> None:
    with live.enter(slots([0, 1, 1], [2, -1, 0])):
        call(live, 2, 3)
        assert live.buffers[CPU].tolist() == [0, 1, 1, 2, -1, 0]
        with pytest.raises(BatchSizeError, match=r"2 requests of 3 tokens, the call has 2 requests of 2 tokens"):
            live.begin_call((2, 2))


def test_one_slot_for_all_tokens_of_a_request_fits_calls_of_any_length(live: LiveBatch) -> None:
    with live.enter(slots([1], [2])):
        call(live, 2, 3)
        assert live.buffers[CPU].tolist() == [1, 1, 1, 2, 2, 2]
        call(live, 2, 1)
        assert live.buffers[CPU].tolist()[:2] == [1, 2]


@pytest.mark.parametrize("inside", [True, False])
def test_a_call_larger_than_the_buffer_is_refused(live: LiveBatch, inside: bool) -> None:
    if inside:
        with pytest.raises(BatchSizeError, match="7 rows"), live.enter(slots(*[0] * 7)):
            pass
        assert live.buffers[CPU].tolist() == [-1] * 6
    else:
        with pytest.raises(BatchSizeError, match="7 rows"):
            live.begin_call((7,))


def test_adapters_that_nothing_served_are_an_error(live: LiveBatch) -> None:
    with pytest.raises(BatchNotServedError, match="no compiled graph of this runtime ran"), live.enter(slots(0, -1)):
        pass
    with live.enter(slots(-1, -1)):
        pass
    with live.enter(slots(0, 1)), live.enter(slots(1)):
        call(live, 1)


def test_batches_of_two_threads_never_meet(live: LiveBatch) -> None:
    def enter() -> None:
        with live.enter(slots(0)):
            call(live, 1)

    with live.enter(slots(1, 2)):
        assert isinstance(in_thread(enter), BatchInUseError)
        assert isinstance(in_thread(lambda: call(live, 2)), BatchInUseError)
        assert live.buffers[CPU].tolist()[:2] == [1, 2]
        call(live, 2)
    assert in_thread(enter) is None


def test_a_batch_waits_for_no_call_of_another_thread(live: LiveBatch) -> None:
    outside = live.begin_call((2,))
    with pytest.raises(BatchInUseError, match="a call outside of any batch still runs"), live.enter(slots(0)):
        pass
    assert in_thread(lambda: call(live, 2)) is None
    live.end_call(outside)
    with live.enter(slots(0)):
        call(live, 1)


def test_the_buffer_can_be_written_after_inference_mode() -> None:
    live = LiveBatch(3)
    with torch.inference_mode():
        live.reserve(CPU)
    with live.enter(slots(1, 1)):
        call(live, 2)


def test_sizes_below_one() -> None:
    with pytest.raises(ValueError, match="max_tokens is 0"):
        LiveBatch(0)


@pytest.mark.parametrize("inside", [True, False])
def test_under_capture(live: LiveBatch, inside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No batch starts, but one that runs may be captured; later replays need no call."""
    capturing = {"on": False}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing["on"])
    with live.enter(slots(1, 1)) if inside else nullcontext():
        capturing["on"] = True
        call(live, 2)
        with pytest.raises(BatchInUseError, match="while a CUDA graph is captured"), live.enter(slots(0, 0)):
            pass
        capturing["on"] = False
    with live.enter(slots(0, 2)):
        assert live.buffers[CPU].tolist()[:2] == [0, 2]
