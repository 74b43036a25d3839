"""fxlora.compile: the model's methods, and generate in mixed batches, equal to PEFT token for token."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import fxlora
from fxlora.errors import (
    AlreadyAttachedError,
    BatchSizeError,
    CallError,
    CompileOptionError,
    GraphBreakError,
    NeedsExampleInputsError,
    UnknownAdapterError,
)
from tests.fxlora.generation import NAMES, WHOLE, Served, build, entry_of, prompts, served
from tests.fxlora.runtime_toys import Broken, Toy, adapter, expected
from tests.models import request

ONE_LAYER = {"num_hidden_layers": 1}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    torch._dynamo.reset()
    yield served("llama", tmp_path_factory.mktemp("llama"), ONE_LAYER)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"num_beams": 2, "cache_implementation": "static"},
        {"prefill_chunk_size": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("padded", [True, False], ids=["left-padded", "full"])
def test_generate(llama: Served, options: dict[str, Any], padded: bool) -> None:
    llama.check(prompts(llama.entry, padded=padded), **options)


def test_batches_of_any_size(llama: Served) -> None:
    for batch, names in ((1, ["code"]), (4, ["sql", "docs", None, "sql"]), (2, [None, "docs"])):
        llama.check(prompts(llama.entry, batch, 5 + batch), names)


def test_a_batch_as_large_as_its_requests_are_long(llama: Served) -> None:
    llama.check(prompts(llama.entry, 3, 3, padded=False))


def test_one_name_stands_for_all_requests(llama: Served) -> None:
    inputs = prompts(llama.entry)
    got = llama.together(inputs, "docs").sequences
    assert torch.equal(got, llama.alone("docs", inputs).sequences)
    assert not torch.equal(got, llama.alone(None, inputs).sequences)


def test_sampling_draws_what_peft_draws(llama: Served) -> None:
    inputs = prompts(llama.entry)
    options: dict[str, Any] = {"do_sample": True, "num_return_sequences": 2}
    tokens = []
    for generate in (llama.together, lambda i, n, **o: llama.alone(n, i, **o)):
        for name in ("docs", None):
            llama.alone(name, inputs)  # builds PEFT's model, which draws random numbers
            torch.manual_seed(5)
            tokens.append(generate(inputs, name, **options).sequences)
    assert torch.equal(tokens[0], tokens[2])
    assert torch.equal(tokens[1], tokens[3])
    assert not torch.equal(tokens[0], tokens[1])


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 2}, {"assistant_model": True}], ids=str)
def test_assisted_generation(llama: Served, options: dict[str, Any]) -> None:
    if "assistant_model" in options:
        options = {"assistant_model": build(llama.entry)}
    llama.check(prompts(llama.entry, 1, 6, padded=False), ["docs"], **options)


def test_max_autotune(tmp_path: Path) -> None:
    torch._dynamo.reset()
    tuned = served("llama", tmp_path, ONE_LAYER, backend="inductor", mode="max-autotune")
    tuned.check(prompts(tuned.entry), cache_implementation="static")
    torch._dynamo.reset()


def test_a_batch_around_generate_lends_its_adapters(llama: Served) -> None:
    inputs = prompts(llama.entry)
    with llama.compiled.runtime.batch(list(NAMES)):
        for options in ({"num_beams": 2}, {}):
            got = llama.compiled.generate(**inputs, **WHOLE, **options).sequences
            for i, name in enumerate(NAMES):
                assert torch.equal(got[i : i + 1], llama.alone(name, request(inputs, i), **options).sequences)
        bare = llama.together(inputs, None).sequences
    assert torch.equal(bare, llama.alone(None, inputs).sequences)
    assert torch.equal(llama.compiled.generate(**inputs, **WHOLE).sequences, bare)
    assert not torch.equal(llama.together(inputs, list(NAMES)).sequences, bare)


def test_in_inference_mode(llama: Served) -> None:
    with torch.inference_mode():
        llama.check(prompts(llama.entry))


def test_no_adapter_no_change(llama: Served) -> None:
    inputs = prompts(llama.entry)
    with torch.no_grad():
        got, want = llama.compiled(**inputs).logits, build(llama.entry)(**inputs).logits
    assert torch.equal(got, want)


def test_refusals(llama: Served) -> None:
    inputs = prompts(llama.entry)
    with pytest.raises(UnknownAdapterError, match="'nope', which is not loaded"):
        llama.compiled.generate(**inputs, adapters=["nope", None, None])
    with pytest.raises(BatchSizeError, match="names adapters for 2 requests, the call has 3 requests"):
        llama.compiled.generate(**inputs, adapters=["docs", None])
    with pytest.raises(CallError, match="continuous batching"):
        llama.compiled.generate(**inputs, adapters=["docs", None, None], cache_implementation="paged")
    with pytest.raises(AlreadyAttachedError):
        fxlora.compile(llama.model)
    with pytest.raises(AlreadyAttachedError):
        fxlora.compile(llama.compiled)
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(llama.compiled)
    llama.check(inputs)


def test_the_models_own_methods(llama: Served, tmp_path: Path) -> None:
    compiled, model = llama.compiled, llama.model
    assert isinstance(compiled, type(model))
    assert type(compiled).__name__ == type(model).__name__
    assert compiled.config is model.config
    assert compiled.device == model.device
    assert list(compiled.state_dict()) == list(model.state_dict())
    assert fxlora.runtime(compiled) is fxlora.runtime(model) is compiled.runtime
    assert compiled.adapter_names == ("sql", "docs", "code")
    assert len(compiled.sites) == 9
    assert compiled.skipped == ()
    compiled.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_the_model_itself_is_left_alone(llama: Served) -> None:
    inputs = prompts(llama.entry)
    llama.check(inputs)
    assert type(llama.model) is type(build(llama.entry))
    assert "forward" not in vars(llama.model)
    assert llama.model.generation_config.disable_compile is None
    before = counters["stats"]["unique_graphs"]
    with torch.no_grad():
        assert torch.equal(llama.model(**inputs).logits, build(llama.entry)(**inputs).logits)
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.parametrize(
    ("name", "sizes", "options"),
    [
        ("qwen3moe", ONE_LAYER, {}),
        ("gpt2", {"n_layer": 1}, {"cache_implementation": "static"}),
        ("gemma2", {}, {"cache_implementation": "static"}),
        ("mixtral", ONE_LAYER, {"num_beams": 2}),
        ("deepseekv3", {}, {}),
    ],
    ids=str,
)
def test_families(name: str, sizes: dict[str, int], options: dict[str, Any], tmp_path: Path) -> None:
    torch._dynamo.reset()
    ours = served(name, tmp_path, sizes)
    ours.check(prompts(ours.entry), **options)


LAYERS = {"encoder_layers": 1, "decoder_layers": 1}


@pytest.mark.parametrize(
    ("name", "sizes", "options"),
    [("t5", {"num_layers": 1}, {}), ("bart", LAYERS, {"num_beams": 2}), ("whisper", LAYERS, {})],
    ids=str,
)
def test_encoders_and_decoders(name: str, sizes: dict[str, int], options: dict[str, Any], tmp_path: Path) -> None:
    """The encoder is a graph of its own: adapters act in it as well, and once per request."""
    torch._dynamo.reset()
    entry = entry_of(name, **sizes)
    ours = served(name, tmp_path, sizes, example_inputs=entry.inputs())
    ours.check(prompts(entry, padded=False), **options)
    encoder = [site for site in ours.compiled.sites if ".encoder." in site.name or site.name.startswith("encoder.")]
    assert encoder
    assert all(ours.compiled.runtime.pool.sites_of("docs").count(site) for site in encoder if "q_proj" in site.name)


def test_an_encoder_whose_model_was_never_traced_is_refused(tmp_path: Path) -> None:
    entry = entry_of("whisper")
    compiled: Any = fxlora.compile(build(entry), backend="eager")
    with pytest.raises(NeedsExampleInputsError, match=r"'model\.encoder' is a graph of its own"):
        compiled.generate(**prompts(entry), max_new_tokens=2)


def test_a_plain_module() -> None:
    torch._dynamo.reset()
    model = Toy()
    compiled: Any = fxlora.compile(model, max_adapters=2, max_rank=4, backend="eager")
    compiled.load_adapter("a", adapter())
    x, names = torch.randn(3, 6), ["a", None, "a"]
    assert torch.allclose(compiled(x, adapters=names), expected(model, x, names, {"a": adapter()}), atol=1e-5)
    compiled.unload_adapter("a")
    assert torch.equal(compiled(x), model(x))
    assert not hasattr(compiled, "generate")
    assert isinstance(compiled, Toy)
    with pytest.raises(CompileOptionError, match="mode='fastest' is unknown"):
        fxlora.compile(Toy(), mode="fastest")
    bad = Toy()
    with pytest.raises(CompileOptionError):
        fxlora.compile(bad, backend="nope")
    assert isinstance(fxlora.compile(bad, backend="eager"), nn.Module)


def test_a_model_with_a_graph_break_is_refused() -> None:
    torch._dynamo.reset()
    compiled: Any = fxlora.compile(Broken(), backend="eager")
    with pytest.raises(GraphBreakError, match="the forward of this Broken is no single graph"):
        compiled(torch.randn(3, 6))


def test_a_loop_over_what_the_data_holds() -> None:
    class Loops(Toy):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for i in (x.sum(-1) > 0).nonzero():
                x = x + self.fc(x)[i]
            return x

    torch._dynamo.reset()
    compiled: Any = fxlora.compile(Loops(), max_adapters=1, max_rank=4, backend="eager")
    with pytest.raises(GraphBreakError, match="the forward of this Loops is no single graph"):
        compiled(torch.randn(3, 6))


def test_a_model_has_more_graphs_than_dynamo_allows_a_function() -> None:
    class Kinds(Toy):
        def forward(self, x: torch.Tensor, kind: str = "") -> torch.Tensor:
            return self.fc(x) * len(kind)

    torch._dynamo.reset()
    model, x = Kinds(), torch.randn(3, 6)
    compiled: Any = fxlora.compile(model, max_adapters=1, max_rank=4, backend="eager")
    for length in range(12):
        assert torch.equal(compiled(x, kind="a" * length), model(x, kind="a" * length))


def test_compiled_models_of_one_class(tmp_path: Path) -> None:
    """As many models as dynamo would allow graphs of one function: each has its own, and its own adapters."""
    torch._dynamo.reset()
    x = torch.randn(3, 6)
    for i in range(10):
        model = Toy()
        source = adapter(seed=i)
        compiled: Any = fxlora.compile(model, max_adapters=2, max_rank=4, backend="eager")
        compiled.load_adapter("a", source)
        got = compiled(x, adapters=["a", None, "a"])
        assert torch.allclose(got, expected(model, x, ["a", None, "a"], {"a": source}), atol=1e-5)


def test_the_cache_under_cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(entry_of("llama", **ONE_LAYER))
    compiled: Any = fxlora.compile(model, mode="reduce-overhead")
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(type(model), "generate", lambda self, *args, **kwargs: seen.append(kwargs))
    own = copy.deepcopy(model.generation_config)
    own.cache_implementation = "dynamic"
    choices = ({"cache_implementation": "dynamic"}, {"use_cache": False}, {"prompt_lookup_num_tokens": 2})
    for options in ({}, *choices, {"generation_config": own}):
        compiled.generate(torch.ones(1, 2, dtype=torch.long), **options)
        assert (seen.pop().get("cache_implementation") == "static") == (not options)
