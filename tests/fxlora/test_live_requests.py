"""Which adapter each live request has, and how long it keeps the adapter loaded."""

from __future__ import annotations

import pytest

from fxlora import Runtime, attach
from fxlora.errors import (
    AdapterInUseError,
    BatchTypeError,
    CallError,
    ContinuousBatchingError,
    UnknownAdapterError,
)
from fxlora.live_requests import LiveRequests
from tests.fxlora.runtime_toys import Toy, adapter


@pytest.fixture
def toy() -> Toy:
    return Toy()


@pytest.fixture
def runtime(toy: Toy) -> Runtime:
    made = attach(toy, max_adapters=3, max_rank=4)
    for seed, name in enumerate(("one", "two")):
        made.load_adapter(name, adapter(seed=seed))
    return made


@pytest.fixture
def live(runtime: Runtime) -> LiveRequests:
    return LiveRequests(runtime)


def test_slots_follow_the_order_and_the_lengths_of_a_step(live: LiveRequests) -> None:
    live.add("a", "two")
    live.add("b", None)
    live.add("c", "one")
    assert live.token_slots([("c", 2), ("b", 1), ("a", 3)]).tolist() == [0, 0, -1, 1, 1, 1]
    assert live.token_slots([]).tolist() == []


def test_what_cannot_be_taken_in(live: LiveRequests, runtime: Runtime) -> None:
    live.add("a", "one")
    with pytest.raises(CallError, match="'a' is still being served"):
        live.add("a", "two")
    with pytest.raises(UnknownAdapterError, match=r"'gone'.*\['one', 'two'\]"):
        live.add("b", "gone")
    with pytest.raises(BatchTypeError, match="3"):
        live.add("b", 3)  # type: ignore[arg-type]
    with pytest.raises(ContinuousBatchingError, match="'b' was not submitted"):
        live.token_slots([("a", 1), ("b", 1)])
    runtime.unload_adapter("two")  # the refused calls hold nothing


def test_an_adapter_is_held_until_its_last_request_is_finished(live: LiveRequests, runtime: Runtime) -> None:
    live.add("a", "one")
    live.add("b", "one")
    live.finish("a")
    live.finish("unknown")
    with pytest.raises(AdapterInUseError, match="1 requests"):
        runtime.unload_adapter("one")
    live.finish("b")
    runtime.unload_adapter("one")
    live.add("a", None)  # an id that is free again


def test_sequences_of_one_request_share_its_adapter(live: LiveRequests, runtime: Runtime) -> None:
    live.add("a", "two", sequences=3)
    assert live.token_slots([("a__child#0", 1), ("a", 1), ("a__child#1", 1)]).tolist() == [1, 1, 1]
    for done in ("a", "a__child#1"):
        live.finish(done)
        with pytest.raises(AdapterInUseError):
            runtime.unload_adapter("two")
    live.finish("a__child#0")
    runtime.unload_adapter("two")


def test_a_request_cancelled_before_it_forks_takes_its_sequences_along(live: LiveRequests, runtime: Runtime) -> None:
    live.add("a", "two", sequences=3)
    live.cancel("a")
    live.cancel("unknown")
    assert live.token_slots([("a", 1), ("a__child#0", 1)]).tolist() == [1, 1]  # the step that was being packed
    runtime.unload_adapter("two")
    with pytest.raises(UnknownAdapterError, match="'a' still runs"):
        live.token_slots([("a", 1)])


def test_one_cancelled_after_the_fork_leaves_the_others(live: LiveRequests, runtime: Runtime) -> None:
    live.add("a", "two", sequences=2)
    live.token_slots([("a", 1), ("a__child#0", 1)])
    live.cancel("a")
    with pytest.raises(AdapterInUseError):
        runtime.unload_adapter("two")
    live.finish("a__child#0")
    runtime.unload_adapter("two")


def test_clear_lets_all_go(live: LiveRequests, runtime: Runtime) -> None:
    live.add("a", "one")
    live.add("b", "two", sequences=2)
    live.clear()
    runtime.unload_adapter("one")
    runtime.unload_adapter("two")
    with pytest.raises(ContinuousBatchingError):
        live.token_slots([("a", 1)])
