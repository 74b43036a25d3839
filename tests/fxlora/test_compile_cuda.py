"""CUDA graphs: adapters change between replays with right answers, and a replay moves no pool and no weight."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import StaticCache

import fxlora
from fxlora import Runtime
from fxlora.errors import BatchInUseError
from tests.fxlora.generation import build, entry_of, prompts, served
from tests.oracle import CHANGED, make_adapters, relative_error

pytestmark = pytest.mark.gpu

# Every weight and every pool is larger than all that a decode step has for inputs.
SIZES = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 640, "num_hidden_layers": 2}
MIXES: Sequence[Sequence[str | None]] = (["docs", None, "code"], ["code", "docs", None], [None, "sql", "docs"])
PROMPT, BATCH, ROOM = 7, 3, 16
TOLERANCE = 1e-4


class Decoder:
    """A decode step over a StaticCache at fixed addresses, which can be put back to where prefill left it."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.entry = entry_of("llama", **SIZES)
        self.adapters = make_adapters(self.entry, folder)
        self.model = build(self.entry, "cuda")
        self.runtime: Runtime = fxlora.attach(self.model, max_adapters=4, max_rank=16)
        for name, path in self.adapters.items():
            self.runtime.load_adapter(name, path)
        self.ids = prompts(self.entry, BATCH, PROMPT, padded=False, device="cuda")["input_ids"]
        self.token = self.ids[:, -1:].clone()
        self.position = torch.full((BATCH, 1), PROMPT, device="cuda")
        self.cache = StaticCache(config=self.model.config, max_cache_len=ROOM)
        self.step = torch.compile(self._step, backend=self.runtime.backend, fullgraph=True, **options)
        self.bare = self._step
        self._prefilled: list[torch.Tensor] = []

    def _step(self, token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        return self.model(token, position_ids=position, past_key_values=self.cache, return_dict=False)[0]

    def state(self) -> list[torch.Tensor]:
        """Everything that a step writes: keys, values and counters of the cache."""
        return [value for layer in self.cache.layers for value in vars(layer).values() if torch.is_tensor(value)]

    def prefill(self) -> None:
        """The prompt, without adapters: what the first half of each request has left behind."""
        self.model(self.ids[:, :-1], past_key_values=self.cache)
        self._prefilled = [value.clone() for value in self.state()]

    def restore(self) -> None:
        for value, kept in zip(self.state(), self._prefilled, strict=True):
            value.copy_(kept)

    def expected(self, names: Sequence[str | None]) -> torch.Tensor:
        """The rewritten graph without CUDA graphs is tested elsewhere; here PEFT, request by request."""
        import peft

        rows = []
        for i, name in enumerate(names):
            base = build(self.entry, "cuda")
            model = base if name is None else peft.PeftModel.from_pretrained(base, str(self.adapters[name])).eval()
            cache = StaticCache(config=base.config, max_cache_len=ROOM)
            base_ids = self.ids[i : i + 1, :-1]
            self.model(base_ids, past_key_values=cache)
            rows.append(model(self.token[i : i + 1], position_ids=self.position[:1], past_key_values=cache).logits)
        return torch.cat(rows)


@pytest.fixture
def decoder(tmp_path: Path) -> Iterator[Callable[..., Decoder]]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield lambda **options: Decoder(tmp_path, **options)


def check(got: torch.Tensor, decoder: Decoder, names: Sequence[str | None]) -> None:
    want, base = decoder.expected(names), decoder.expected([None] * BATCH)
    assert relative_error(got, want) < TOLERANCE
    for i, name in enumerate(names):
        assert name is None or relative_error(want[i], base[i]) > CHANGED


def copied_bytes(run: Callable[[], object], folder: Path) -> list[int]:
    """Bytes of every copy on or to the device while `run` runs."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        run()
        torch.cuda.synchronize()
    trace = folder / "trace.json"
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    assert any(event.get("cat") == "kernel" for event in events), "the profiler saw no kernel"
    return [int(event["args"]["bytes"]) for event in events if event.get("cat") == "gpu_memcpy"]


def check_copies(decoder: Decoder, run: Callable[[], object], folder: Path) -> None:
    pools = [2 * room.pool.a.nbytes for room in decoder.runtime.pool._rooms.values()]
    weights = [weight.nbytes for weight in decoder.model.parameters() if weight.dim() > 1]
    copies = copied_bytes(run, folder)
    assert sum(copies) < min(pools + weights) / 4, copies


def test_adapters_swap_between_replays_of_a_captured_step(decoder: Callable[..., Decoder], tmp_path: Path) -> None:
    ours = decoder()
    ours.prefill()
    graph = torch.cuda.CUDAGraph()
    with ours.runtime.batch(list(MIXES[0])):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                ours.restore()
                ours.step(ours.token, ours.position)
        torch.cuda.current_stream().wait_stream(stream)
        ours.restore()
        with torch.cuda.graph(graph):
            logits = ours.step(ours.token, ours.position)
    for names in (*MIXES, [None] * BATCH):
        ours.restore()
        with ours.runtime.batch(list(names)):
            graph.replay()
        check(logits, ours, names)
    check_copies(ours, graph.replay, tmp_path)
    ours.runtime.unload_adapter("docs")
    ours.runtime.load_adapter("again", ours.adapters["docs"])
    ours.restore()
    with ours.runtime.batch(["again", None, "code"]):
        graph.replay()
    check(logits, ours, MIXES[0])
    ours.restore()
    graph.replay()  # outside of any batch
    check(logits, ours, [None] * BATCH)


def test_a_step_captured_without_a_batch_serves_those_around_its_replays(decoder: Callable[..., Decoder]) -> None:
    ours = decoder()
    ours.prefill()
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ours.step(ours.token, ours.position)
    torch.cuda.current_stream().wait_stream(stream)
    ours.restore()
    with torch.cuda.graph(graph):
        logits = ours.step(ours.token, ours.position)
    for names in MIXES:
        ours.restore()
        with ours.runtime.batch(list(names)):
            graph.replay()
        check(logits, ours, names)


def test_a_batch_cannot_start_during_a_capture(decoder: Callable[..., Decoder]) -> None:
    ours = decoder()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device="cuda")
        with pytest.raises(BatchInUseError, match="while a CUDA graph is captured"):
            ours.runtime.batch(list(MIXES[0])).__enter__()


def test_reduce_overhead_replays_with_the_adapters_of_each_batch(
    decoder: Callable[..., Decoder], tmp_path: Path
) -> None:
    ours = decoder(mode="reduce-overhead")
    ours.prefill()

    def run(names: Sequence[str | None]) -> torch.Tensor:
        ours.restore()
        torch.compiler.cudagraph_mark_step_begin()
        with ours.runtime.batch(list(names)):
            return ours.step(ours.token, ours.position).clone()

    for _ in range(3):
        run(MIXES[0])
    for names in (*MIXES, [None] * BATCH):
        check(run(names), ours, names)

    def replay() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        ours.step(ours.token, ours.position)

    replay()
    check_copies(ours, replay, tmp_path)


@pytest.mark.parametrize("mode", [None, "reduce-overhead", "max-autotune"])
def test_generate(mode: str | None, tmp_path: Path) -> None:
    """Prefill and decode over both caches, twice, so that the second run replays what the first recorded."""
    torch._dynamo.reset()
    ours = served("llama", tmp_path, {"num_hidden_layers": 1}, backend="inductor", device="cuda", mode=mode)
    inputs = prompts(ours.entry, device="cuda")
    for options in ({"cache_implementation": "static"}, {}):
        for names in (["docs", None, "code"], [None, "sql", "docs"], ["docs", None, "code"]):
            got = ours.together(inputs, names, **options).sequences
            for i, name in enumerate(names):
                mine = {key: value[i : i + 1] for key, value in inputs.items()}
                assert torch.equal(got[i : i + 1], ours.alone(name, mine, **options).sequences)
        assert not torch.equal(got, ours.together(inputs, None, **options).sequences)
