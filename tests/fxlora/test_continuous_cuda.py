"""Continuous batching on a GPU: inductor, CUDA graphs over padded steps, and steps that overlap."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

import fxlora
from tests.fxlora.generation import build, entry_of
from tests.models import VOCAB
from tests.oracle import RECIPES, config_of, make_adapter

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.gpu

ENTRY = entry_of("llama", max_position_embeddings=128, num_hidden_layers=1)
NEW = 5


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("adapters")
    return {
        name: make_adapter(lambda: build(ENTRY), config_of(ENTRY, recipe), base / name, seed=seed)
        for seed, (name, recipe) in enumerate(RECIPES.items())
    }


@torch.no_grad()
def greedy(model: Any, prompt: list[int]) -> list[int]:
    ids, cache = torch.tensor([prompt], device="cuda"), transformers.DynamicCache()
    tokens: list[int] = []
    while len(tokens) < NEW:
        ids = model(input_ids=ids, past_key_values=cache).logits[:, -1:].argmax(-1)
        tokens.append(int(ids))
    return tokens


@pytest.mark.parametrize(
    "options",
    [{}, {"use_cuda_graph": True, "use_async_batching": False}, {"use_cuda_graph": True, "use_async_batching": True}],
    ids=["plain", "graphs", "overlapping"],
)
def test_each_request_equals_itself_alone(options: dict[str, Any], folders: dict[str, Path]) -> None:
    torch._dynamo.reset()
    serving: Any = fxlora.continuous_batching(build(ENTRY, "cuda"), max_adapters=4, max_rank=16)
    models: dict[str | None, Any] = {None: build(ENTRY, "cuda")}
    for name, folder in folders.items():
        serving.load_adapter(name, folder)
        models[name] = peft.PeftModel.from_pretrained(build(ENTRY, "cuda"), str(folder)).eval()
    rng = random.Random(0)
    names = [rng.choice([*folders, None]) for _ in range(24)]
    prompts = [[rng.randrange(3, VOCAB) for _ in range(rng.randint(1, 30))] for _ in names]
    kind = transformers.ContinuousBatchingConfig
    size = "page_size" if "page_size" in kind.__dataclass_fields__ else "block_size"
    config = kind(**{size: 16, "num_blocks": 128, "max_batch_tokens": 64, **options})
    results = serving.generate_batch(
        prompts,
        adapters=names,
        generation_config=transformers.GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1),
        continuous_batching_config=config,
    )
    want = [greedy(models[name], prompt) for name, prompt in zip(names, prompts, strict=True)]
    assert [result.generated_tokens for result in results.values()] == want
    bare = [greedy(models[None], prompt) for prompt in prompts]
    assert sum(a != b for a, b in zip(want, bare, strict=True)) > 10
