"""Continuous batching with an adapter per request, against PEFT's generation of each request alone."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import fxlora
from fxlora.errors import (
    AdapterInUseError,
    BatchDimsError,
    BatchSizeError,
    BatchTypeError,
    CallError,
    CompileOptionError,
    RowsNotProvenError,
    TransformersVersionError,
    UnknownAdapterError,
)
from tests.fxlora.generation import build, entry_of
from tests.models import VOCAB
from tests.oracle import RECIPES, Recipe, config_of, make_adapter, make_adapters

transformers = pytest.importorskip("transformers")

FIVE: Mapping[str, Recipe] = {
    **RECIPES,
    "law": Recipe(rank=5, alpha=6, parts=("attention", "embedding")),
    "chat": Recipe(rank=3, alpha=8, parts=("mlp", "head"), rslora=True),
}
ENTRY = entry_of("llama", max_position_embeddings=128)
GREEDY: Mapping[str, Any] = {"do_sample": False, "eos_token_id": -1}


@torch.no_grad()
def greedy(model: Any, prompt: Sequence[int], new_tokens: int) -> list[int]:
    """The most likely tokens of one request by itself."""
    ids, cache = torch.tensor([list(prompt)]), transformers.DynamicCache()
    tokens: list[int] = []
    while len(tokens) < new_tokens:
        ids = model(input_ids=ids, past_key_values=cache).logits[:, -1:].argmax(-1)
        tokens.append(int(ids))
    return tokens


class Served:
    """A model that serves five adapters, and the tokens of each request alone."""

    def __init__(self, folder: Path) -> None:
        self.entry = replace(ENTRY)
        self.folders = {
            name: make_adapter(lambda: build(self.entry), config_of(self.entry, recipe), folder / name, seed=seed)
            for seed, (name, recipe) in enumerate(FIVE.items())
        }
        self.model = build(self.entry)
        self.serving: Any = fxlora.continuous_batching(self.model, max_adapters=6, max_rank=16, backend="eager")
        for name, path in self.folders.items():
            self.serving.load_adapter(name, path)
        self._alone: dict[str | None, nn.Module] = {}

    def alone(self, name: str | None, prompt: Sequence[int], new_tokens: int) -> list[int]:
        if name not in self._alone:
            base = build(self.entry)
            self._alone[name] = base if name is None else peft.PeftModel.from_pretrained(base, str(self.folders[name]))
        return greedy(self._alone[name].eval(), prompt, new_tokens)

    def manager(self, new_tokens: int = 4, sequences: int = 1, **options: Any) -> Any:
        generation = transformers.GenerationConfig(max_new_tokens=new_tokens, **GREEDY)
        generation.num_return_sequences = sequences  # its constructor refuses several greedy ones
        return self.serving.continuous_batching_context_manager(
            generation_config=generation, continuous_batching_config=cache_of(**options)
        )


def cache_of(**options: Any) -> Any:
    """A config of a small paged cache, whatever this version calls its pages."""
    kind = transformers.ContinuousBatchingConfig
    size = "page_size" if "page_size" in kind.__dataclass_fields__ else "block_size"
    return kind(**{size: 16, "num_blocks": 128, "max_batch_tokens": 64, **options})


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(tmp_path_factory.mktemp("adapters"))


def results_of(manager: Any, count: int, within_s: float = 60) -> dict[str, Any]:
    """The finished requests by id."""
    found: dict[str, Any] = {}
    end = time.monotonic() + within_s
    while len(found) < count and time.monotonic() < end and manager.is_running():
        result = manager.get_result(timeout=0.2)
        if result is not None and result.is_finished():
            assert result.error is None
            found[result.request_id] = result
    assert len(found) == count
    return found


def prompt_of(rng: random.Random, longest: int = 40) -> list[int]:
    return [rng.randrange(3, VOCAB) for _ in range(rng.randint(1, longest))]


def test_two_hundred_requests_that_join_at_random_equal_each_alone(served: Served) -> None:
    rng = random.Random(0)
    names: list[str | None] = [*FIVE, None]
    todo = [(rng.choice(names), prompt_of(rng), rng.randint(1, 6)) for _ in range(200)]
    submitted: dict[str, tuple[str | None, list[int], int]] = {}
    found: dict[str, Any] = {}
    with served.manager() as manager:
        while len(found) < len(todo):
            for name, prompt, count in todo[len(submitted) :][: rng.randint(0, 30)]:
                submitted[manager.add_request(prompt, max_new_tokens=count, adapter=name)] = (name, prompt, count)
            found |= results_of(manager, min(rng.randint(0, 20), len(submitted) - len(found)))
    assert list(found) != list(submitted)  # they finished in another order
    changed = dict.fromkeys(FIVE, 0)
    for request_id, (name, prompt, count) in submitted.items():
        tokens = found[request_id].generated_tokens
        assert tokens == served.alone(name, prompt, count), f"{request_id} ({name})"
        if name is not None:
            changed[name] += tokens != served.alone(None, prompt, count)
    assert min(changed.values()) > 5, f"requests whose tokens an adapter changed: {changed}"


def test_one_prompt_under_every_adapter(served: Served) -> None:
    # Longer than a block of the cache: blocks shared by prompt would bring keys of another adapter.
    prompt = prompt_of(random.Random(1), 1) + list(range(3, 39))
    names: list[str | None] = [*FIVE, None, "sql", None]
    with served.manager() as manager:
        ids = [manager.add_request(prompt, adapter=name) for name in names]
        first = results_of(manager, len(ids))
        again = manager.add_requests([prompt] * len(names), adapters=names[::-1])
        second = results_of(manager, len(ids))
    want = [served.alone(name, prompt, 4) for name in names]
    assert [first[i].generated_tokens for i in ids] == want
    assert [second[i].generated_tokens for i in again] == want[::-1]
    assert len({tuple(tokens) for tokens in want}) == 6


def test_generate_batch(served: Served) -> None:
    rng = random.Random(2)
    prompts = [prompt_of(rng) for _ in range(7)]
    names = ["docs", None, "sql", "code", None, "law", "chat"]

    def tokens(adapters: Any) -> list[list[int]]:
        config = transformers.GenerationConfig(max_new_tokens=4, **GREEDY)
        results = served.serving.generate_batch(
            prompts, adapters=adapters, generation_config=config, continuous_batching_config=cache_of()
        )
        return [result.generated_tokens for result in results.values()]

    mixed = tokens(names)
    base = [served.alone(None, prompt, 4) for prompt in prompts]
    assert mixed == [served.alone(name, prompt, 4) for name, prompt in zip(names, prompts, strict=True)]
    assert mixed != base
    assert tokens("docs") == [served.alone("docs", prompt, 4) for prompt in prompts] != base
    assert tokens(None) == base
    for wrong, error in (
        (["docs"], BatchSizeError),
        ("gone", UnknownAdapterError),
        ([*names[:-1], "gone"], UnknownAdapterError),
        ([*names[:-1], 3], BatchTypeError),
        (torch.zeros(7, dtype=torch.int32), BatchTypeError),
    ):
        with pytest.raises(error):
            tokens(wrong)


def test_a_prompt_longer_than_a_step(served: Served) -> None:
    """It is split over several steps, and has its adapter in each."""
    rng = random.Random(3)
    long, short = [rng.randrange(3, VOCAB) for _ in range(90)], [5, 6, 7]
    with served.manager(max_batch_tokens=16) as manager:
        ids = [manager.add_request(p, adapter=n) for p, n in ((long, "docs"), (short, "sql"), (long[::-1], None))]
        found = results_of(manager, 3)
    want = [served.alone("docs", long, 4), served.alone("sql", short, 4), served.alone(None, long[::-1], 4)]
    assert [found[i].generated_tokens for i in ids] == want
    assert want[0] != served.alone(None, long, 4)


def test_a_small_cache_that_evicts_requests(served: Served) -> None:
    """Requests that were put back start again under the same id, and keep their adapter."""
    rng = random.Random(4)
    names = [rng.choice([*FIVE, None]) for _ in range(12)]
    prompts = [prompt_of(rng, 30) for _ in names]
    with served.manager(new_tokens=12, num_blocks=10) as manager:
        ids = manager.add_requests(prompts, adapters=names)
        found = results_of(manager, len(ids))
    for request_id, name, prompt in zip(ids, names, prompts, strict=True):
        assert found[request_id].generated_tokens == served.alone(name, prompt, 12)


def test_padding_has_no_adapter(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that go into CUDA graphs are padded to a few sizes; here they are padded without any."""
    from transformers.generation.continuous_batching.model_runner import ModelRunner

    made, computed = ModelRunner.__init__, ModelRunner.compute_batch
    steps: list[tuple[int, list[int]]] = []

    def padded(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        self.pad_inputs = True

    def seen(self: Any, model: Any, batch_data: Any) -> None:
        computed(self, model, batch_data)
        (buffer,) = served.serving.runtime.live.buffers.values()
        steps.append((batch_data["input_ids"].shape[1], buffer.tolist()))

    monkeypatch.setattr(ModelRunner, "__init__", padded)
    monkeypatch.setattr(ModelRunner, "compute_batch", seen)
    rng = random.Random(6)
    names = ["docs", None, "code"]
    prompts = [prompt_of(rng, 6) for _ in names]
    with served.manager(q_padding_interval_size=32, kv_padding_interval_size=64) as manager:
        ids = manager.add_requests(prompts, adapters=names)
        found = results_of(manager, 3)
    want = [served.alone(name, prompt, 4) for name, prompt in zip(names, prompts, strict=True)]
    assert [found[i].generated_tokens for i in ids] == want
    assert {tokens for tokens, _ in steps} <= {32, 64}
    slots = served.serving.runtime.pool.slots
    served_slots = {slot for _, buffer in steps for slot in buffer}
    assert served_slots == {-1, slots["docs"], slots["code"]}
    assert all(set(buffer[sum(map(len, prompts)) :]) == {-1} for _, buffer in steps)


@pytest.mark.parametrize("name", ["qwen3moe", "gemma2"])
def test_families(name: str, tmp_path: Path) -> None:
    """Routed experts; attention that transformers runs eagerly, outside of torch.compile."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    kept = dict(ALL_ATTENTION_FUNCTIONS)
    entry = entry_of(name)
    folders = make_adapters(entry, tmp_path)
    serving: Any = fxlora.continuous_batching(build(entry), max_adapters=4, max_rank=16, backend="eager")
    models: dict[str | None, Any] = {None: build(entry)}
    for adapter, folder in folders.items():
        serving.load_adapter(adapter, folder)
        models[adapter] = peft.PeftModel.from_pretrained(build(entry), str(folder)).eval()
    names = ["code", None, "docs", "sql", "docs"]
    prompts = [prompt_of(random.Random(seed), 20) for seed in range(len(names))]
    results = serving.generate_batch(
        prompts,
        adapters=names,
        generation_config=transformers.GenerationConfig(max_new_tokens=6, **GREEDY),
        continuous_batching_config=cache_of(),
    )
    want = [greedy(models[name], prompt, 6) for name, prompt in zip(names, prompts, strict=True)]
    assert [result.generated_tokens for result in results.values()] == want
    assert want != [greedy(models[None], prompt, 6) for prompt in prompts]
    assert dict(ALL_ATTENTION_FUNCTIONS) == kept


def test_under_inductor(served: Served, tmp_path: Path) -> None:
    entry = entry_of("llama", num_hidden_layers=1)
    folder = make_adapter(lambda: build(entry), config_of(entry, FIVE["docs"]), tmp_path / "docs")
    serving: Any = fxlora.continuous_batching(build(entry), max_adapters=2, max_rank=8)
    serving.load_adapter("docs", folder)
    bare: Any = build(entry)
    merged: Any = peft.PeftModel.from_pretrained(build(entry), str(folder)).merge_and_unload()
    prompts = [[3, 4, 5, 6], [7, 8, 9], [7, 8, 9]]
    results = serving.generate_batch(
        prompts,
        adapters=["docs", "docs", None],
        generation_config=transformers.GenerationConfig(max_new_tokens=3, **GREEDY),
        continuous_batching_config=cache_of(),
    )
    models = {"docs": merged, None: bare}
    want = [greedy(models[name], p, 3) for name, p in zip(("docs", "docs", None), prompts, strict=True)]
    assert [result.generated_tokens for result in results.values()] == want
    assert want[1] != want[2]


def test_returned_sequences_keep_their_adapter(served: Served) -> None:
    prompt = [9, 8, 7, 6]
    with served.manager(sequences=3) as manager:
        manager.add_request(prompt, request_id="one", adapter="docs")
        found = results_of(manager, 3)
        served.serving.unload_adapter("docs")
    served.serving.load_adapter("docs", served.folders["docs"])
    want = served.alone("docs", prompt, 4)
    assert len(found) == 3
    assert all(result.generated_tokens == want for result in found.values())
    assert want != served.alone(None, prompt, 4)


def test_adapters_come_and_go_while_requests_run(served: Served) -> None:
    serving, prompt = served.serving, list(range(3, 20))
    with served.manager(new_tokens=100) as manager:
        busy = manager.add_request(prompt, max_new_tokens=90, adapter="docs")
        with pytest.raises(AdapterInUseError, match="docs"):
            serving.unload_adapter("docs")
        assert "docs" in serving.adapter_names
        serving.unload_adapter("sql")
        with pytest.raises(UnknownAdapterError, match=r"sql.*docs"):
            manager.add_request(prompt, adapter="sql")
        with pytest.raises(UnknownAdapterError):
            manager.add_requests([prompt, prompt], adapters=["docs", "sql"])
        serving.load_adapter("new", served.folders["sql"])
        other = manager.add_request(prompt, max_new_tokens=4, adapter="new")
        found = results_of(manager, 2)
        assert set(found) == {busy, other}  # nothing of the refused call was added
        serving.unload_adapter("docs")
    serving.unload_adapter("new")
    for name in ("sql", "docs"):
        serving.load_adapter(name, served.folders[name])
    assert found[other].generated_tokens == served.alone("sql", prompt, 4)
    assert found[busy].generated_tokens == served.alone("docs", prompt, 90)


def test_a_cancelled_request_lets_its_adapter_go(served: Served) -> None:
    prompt = list(range(3, 30))
    with served.manager(new_tokens=100) as manager:
        manager.add_request(prompt, request_id="gone", adapter="docs")
        kept = manager.add_request(prompt, max_new_tokens=20, adapter="code")
        with pytest.raises(CallError, match="gone"):
            manager.add_request(prompt, request_id="gone", adapter="code")
        manager.cancel_request("gone")
        served.serving.unload_adapter("docs")
        found = results_of(manager, 1)
    served.serving.load_adapter("docs", served.folders["docs"])
    assert found[kept].generated_tokens == served.alone("code", prompt, 20)


def test_requests_of_a_context_that_ended_hold_nothing(served: Served) -> None:
    with served.manager(new_tokens=100) as manager:
        manager.add_request([3, 4, 5], adapter="docs")
        manager.stop(hard_stop=True)
    served.serving.unload_adapter("docs")
    served.serving.load_adapter("docs", served.folders["docs"])


def test_classes_of_transformers_stay_as_they_are(served: Served) -> None:
    from transformers.generation import continuous_batching as room
    from transformers.generation.continuous_batching.cache import PagedAttentionCache

    def methods() -> list[Any]:
        kinds = (PagedAttentionCache, room.ContinuousBatchingManager, type(served.model))
        return [dict(vars(kind)) for kind in kinds]

    before = methods()
    with served.manager() as manager:
        manager.add_request([3, 4], adapter="sql")
        results_of(manager, 1)
        assert methods() == before
    assert methods() == before
    # The bare model still batches as ever.
    config = transformers.GenerationConfig(max_new_tokens=4, **GREEDY)
    bare = served.model.generate_batch([[3, 4]], generation_config=config, continuous_batching_config=cache_of())
    assert next(iter(bare.values())).generated_tokens == served.alone(None, [3, 4], 4)


def test_generate_with_a_cache_of_whole_requests_is_refused(served: Served) -> None:
    """Its keys of earlier calls are of no packed row, so a graph per token cannot tell whose they are."""
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    with pytest.raises(RowsNotProvenError):
        served.serving.generate(ids, adapters=["sql", None], max_new_tokens=4, do_sample=False)


def test_the_number_of_graphs_does_not_grow(served: Served) -> None:
    rng = random.Random(5)

    def serve(rounds: int) -> None:
        with served.manager(new_tokens=3) as manager:
            for _ in range(rounds):
                names = [rng.choice([*FIVE, None]) for _ in range(rng.randint(1, 9))]
                results_of(manager, len(manager.add_requests([prompt_of(rng) for _ in names], adapters=names)))

    serve(12)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    serve(12)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


def test_what_cannot_be_served_is_refused(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TransformersVersionError, match="generate_batch"):
        fxlora.continuous_batching(nn.Linear(2, 2))
    per_request: Any = fxlora.compile(build(served.entry), max_adapters=1, max_rank=4, backend="eager")
    with pytest.raises(BatchDimsError, match=r"\(0, 1\)"):
        fxlora.continuous_batching(per_request)
    with pytest.raises(CompileOptionError, match="max_rank"):
        fxlora.continuous_batching(served.serving, max_rank=4)
    graphed = fxlora.compile(build(served.entry), 1, 4, mode="reduce-overhead", batch_dims=(0, 1))
    with pytest.raises(CompileOptionError, match="use_cuda_graph"):
        fxlora.continuous_batching(graphed)
    with pytest.raises(CompileOptionError, match="varlen_compile_config"), served.manager(default_compile_level=1):
        pass
    with pytest.raises(BatchSizeError, match="max_tokens"), served.manager(max_batch_tokens=8200, num_blocks=4):
        pass

    with monkeypatch.context() as patched:
        patched.setattr(served.model.config, "_attn_implementation_internal", "flash_attention_2")
        with pytest.raises(CompileOptionError, match="sdpa"), served.manager():
            pass

    from transformers.generation.continuous_batching.model_runner import ModelRunner

    monkeypatch.setattr(ModelRunner, "step", ModelRunner.compute_batch, raising=False)
    monkeypatch.delattr(ModelRunner, "compute_batch")
    with (
        pytest.raises(TransformersVersionError, match=r"batch_processor\.model_runner\.compute_batch"),
        served.manager(),
    ):
        pass


def test_what_fails_in_a_step_is_raised_to_the_caller(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("the forward failed")

    serving: Any = fxlora.continuous_batching(served.serving)
    monkeypatch.setitem(serving.__dict__, "forward", fail)
    config = transformers.GenerationConfig(max_new_tokens=4, **GREEDY)
    with pytest.raises(RuntimeError, match="the forward failed"):
        serving.generate_batch(
            [[3, 4]], adapters="sql", generation_config=config, continuous_batching_config=cache_of()
        )
    serving.unload_adapter("sql")  # the failed request holds it no longer
    serving.load_adapter("sql", served.folders["sql"])


@pytest.mark.parametrize("make", [lambda made: made, lambda made: fxlora.continuous_batching(made)])
def test_a_compiled_model_is_taken_as_it_is(served: Served, make: Callable[[Any], Any]) -> None:
    again = make(served.serving)
    assert again.runtime is served.serving.runtime
    assert fxlora.runtime(again) is served.serving.runtime
