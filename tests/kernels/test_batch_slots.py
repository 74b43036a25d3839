"""The op that reads the slots of the running batch: shape, copy, refusals, and what torch makes of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from fxlora.kernels.errors import OpInputError, PlanMismatchError, RuntimeGoneError
from fxlora.kernels.ops import batch_slots
from fxlora.kernels.registry import SitePool, register_runtime, slots_behind, unregister_runtime

DIGEST = 0xBA7C4


def pool(device: str) -> SitePool:
    return SitePool.allocate(
        kind="linear",
        pool_rows=16,
        in_features=3,
        out_features=5,
        max_adapters=2,
        max_rank=4,
        dtype=torch.float32,
        device=device,
    )


@pytest.fixture
def runtime(device: str) -> Iterator[tuple[int, torch.Tensor]]:
    """A handle and the buffer behind it, of 8 entries."""
    buffer = torch.tensor([3, 1, -1, 2, 0, -1, -1, 7], dtype=torch.int32, device=device)
    handles = register_runtime(DIGEST, [(pool(device),), (pool(device),)], {buffer.device: buffer})
    assert slots_behind(handles[0]) is slots_behind(handles[1])
    yield handles[1], buffer
    unregister_runtime(handles)


def test_the_sizes_are_those_of_the_dims_asked_for(runtime: tuple[int, torch.Tensor]) -> None:
    handle, buffer = runtime
    like = buffer.new_empty(3, 5, 2)
    assert batch_slots(like, [0], handle).tolist() == [3, 1, -1]
    assert batch_slots(like, [0, 2], handle).tolist() == [[3, 1], [-1, 2], [0, -1]]
    assert batch_slots(like, [1], handle).dtype == torch.int32
    assert batch_slots(like[:0], [0], handle).shape == (0,)


def test_the_result_is_a_copy_and_follows_the_buffer(runtime: tuple[int, torch.Tensor]) -> None:
    handle, buffer = runtime
    like = buffer.new_empty(4)
    first = batch_slots(like, [0], handle)
    buffer.fill_(5)
    assert first.tolist() == [3, 1, -1, 2]
    assert batch_slots(like, [0], handle).tolist() == [5, 5, 5, 5]


def test_a_call_past_the_buffer_is_refused(runtime: tuple[int, torch.Tensor]) -> None:
    handle, buffer = runtime
    with pytest.raises(OpInputError, match="9 rows to choose adapters for; max_tokens is 8"):
        batch_slots(buffer.new_empty(3, 3), [0, 1], handle)


def test_a_call_on_another_device_is_refused() -> None:
    handles = register_runtime(DIGEST, [(pool("cpu"),)], {})
    with pytest.raises(OpInputError, match="a call on cpu; the slots of a batch are kept on"):
        batch_slots(torch.empty(2), [0], handles[0])
    unregister_runtime(handles)


def test_handles_without_slots_and_gone_handles_are_refused() -> None:
    handles = register_runtime(DIGEST, [(pool("cpu"),)])
    with pytest.raises(PlanMismatchError, match="takes the slots of a batch as an input"):
        batch_slots(torch.empty(2), [0], handles[0])
    unregister_runtime(handles)
    with pytest.raises(RuntimeGoneError):
        batch_slots(torch.empty(2), [0], handles[0])


def test_slots_go_with_their_runtime() -> None:
    buffers = {torch.device("cpu"): torch.zeros(2, dtype=torch.int32)}
    handles = register_runtime(DIGEST, [(pool("cpu"),)], buffers)
    unregister_runtime(handles)
    with pytest.raises(RuntimeGoneError):
        slots_behind(handles[0])


def test_opcheck(runtime: tuple[int, torch.Tensor]) -> None:
    handle, buffer = runtime
    opcheck(batch_slots, (buffer.new_empty(3, 2, dtype=torch.float32, requires_grad=True), [0, 1], handle))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_one_graph_for_all_sizes_reads_the_buffer_anew(runtime: tuple[int, torch.Tensor], backend: str) -> None:
    handle, buffer = runtime
    graphs = CompileCounterWithBackend(backend)
    compiled = torch.compile(lambda x: batch_slots(x, [0], handle) + 1, backend=graphs, dynamic=True, fullgraph=True)
    assert compiled(buffer.new_empty(3, 2)).tolist() == [4, 2, 0]
    buffer.fill_(1)
    assert compiled(buffer.new_empty(5, 4)).tolist() == [2] * 5
    assert graphs.frame_count == 1
