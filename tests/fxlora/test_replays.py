"""Which calls go to CUDA graphs. What they compute there is in test_compile_cuda.py."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import pytest
import torch

import fxlora
from fxlora.replays import Replays
from tests.fxlora.generation import build, entry_of

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

CONFIG = transformers.LlamaConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=2)


def fill(cache: Any, length: int = 3) -> None:
    for i in range(2):
        cache.update(torch.ones(1, 2, length, 16), torch.ones(1, 2, length, 16), i)


def test_a_call_is_replayed_once_its_caches_have_their_memory() -> None:
    calls: list[str] = []

    def replayed(ids: Any, past_key_values: Any = None) -> None:
        calls.append("replayed")

    def plain(ids: Any, past_key_values: Any = None) -> None:
        calls.append("plain")
        if past_key_values is not None:
            fill(getattr(past_key_values, "self_attention_cache", past_key_values))

    forward = Replays(replayed, plain)
    assert list(inspect.signature(forward).parameters) == ["ids", "past_key_values"]
    static, growing = transformers.StaticCache(CONFIG, max_cache_len=8), transformers.DynamicCache(config=CONFIG)
    both = transformers.EncoderDecoderCache(
        transformers.StaticCache(CONFIG, max_cache_len=8), transformers.StaticCache(CONFIG, max_cache_len=4)
    )
    forward(1)
    for cache in (static, growing, both):
        forward(1, past_key_values=cache)
        forward(1, cache)
    with forward.paused():
        forward(1, static)
    forward(1, static)
    assert calls == ["replayed", "plain", "replayed", "plain", "plain", "plain", "replayed", "plain", "replayed"]
    kept = [layer.keys._dynamo_static_input_type for layer in (*static.layers, *both.self_attention_cache.layers)]
    assert set(kept) == {"unguarded"}
    assert not hasattr(growing.layers[0].keys, "_dynamo_static_input_type")


@pytest.mark.parametrize("prefill", [None, 4])
def test_generate_prefills_outside_of_cuda_graphs(prefill: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(entry_of("llama", num_hidden_layers=1))
    compiled: Any = fxlora.compile(model, mode="reduce-overhead")
    calls: list[tuple[str, int]] = []

    def through(name: str) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            calls.append((name, kwargs["input_ids"].shape[1]))
            return model.forward(*args, **kwargs)

        return forward

    forward = Replays(through("replayed"), through("plain"))
    monkeypatch.setitem(compiled.__dict__, "forward", forward)
    ids = torch.randint(3, 50, (2, 9))
    for _ in range(2):
        compiled.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, prefill_chunk_size=prefill)
        lengths = [9] if prefill is None else [4, 4, 1]
        assert calls == [*(("plain", n) for n in lengths), *[("replayed", 1)] * 3]
        calls.clear()


def test_an_encoder_is_not_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    module, modes = sys.modules["fxlora.compile"], []
    own = vars(module)["_compiled_forward"]

    def compiled_forward(model: Any, backend: Any) -> Any:
        modes.append(backend.keywords["mode"])
        return own(model, backend)

    monkeypatch.setattr(module, "_compiled_forward", compiled_forward)
    entry = entry_of("t5")
    compiled: Any = fxlora.compile(build(entry), mode="reduce-overhead", example_inputs=entry.inputs(2, 5))
    assert modes == ["reduce-overhead", None]
    compiled.get_encoder()
    assert modes == ["reduce-overhead", None, None]
