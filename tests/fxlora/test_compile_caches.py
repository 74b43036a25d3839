"""What is compiled once: one graph for all mixes of adapters, and code that caches on disk share between processes."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

import fxlora
from tests.fxlora.generation import build, entry_of, prompts
from tests.oracle import RECIPES, Oracle, make_adapters

ROOT = Path(__file__).parent.parent.parent

CACHED = """
import json, sys
import torch
from torch._dynamo.utils import counters
from tests.fxlora.runtime_toys import Toy, adapter, attached, expected

seed, report = int(sys.argv[1]), []
plans = [{}, {"max_adapters": 5}, {"targets": ["fc"]}, {}]
for i, plan in enumerate(plans):
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(i)
    model, x = Toy().requires_grad_(), torch.randn(4, 6)
    sources = {"a": adapter(seed=seed), "b": adapter(seed=seed + 1, rank=3)}
    runtime = attached(model, sources, **plan)
    names = ["b", None, "a", "b"]
    with runtime.batch(names):
        got = torch.compile(model, backend="fxlora", options={"backend": "inductor"})(x)
    want, base = expected(model, x, names, sources), model(x)
    report.append({
        "plan": plan,
        "error": float((got - want).abs().max()),
        "moved": float((want - base).abs().max()),
        "hit": counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"],
        "miss": counters["inductor"]["fxgraph_cache_miss"],
    })
print(json.dumps(report))
"""


def run_cached(folder: Path, seed: int) -> list[dict[str, Any]]:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder), "TORCHINDUCTOR_FX_GRAPH_CACHE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CACHED, str(seed)], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_plan_is_part_of_the_identity_of_compiled_code_and_the_adapters_are_not(tmp_path: Path) -> None:
    """Every plan misses once; another process, with other adapters, hits for each of them and is right."""
    first, second = run_cached(tmp_path, 0), run_cached(tmp_path, 10)
    for run in (*first, *second):
        assert run["error"] < 1e-5, run
        assert run["moved"] > 1e-1, run
    assert [run["miss"] for run in first] == [1] * 4, first
    assert all(run["hit"] for run in second), second
    assert [run["miss"] for run in second] == [0] * 4, second


def test_fifty_batches_compile_nothing(tmp_path: Path) -> None:
    """Any mix, batch, length, load, unload and rank: no graph and no recompile after the kinds of call are warm."""
    torch._dynamo.reset()
    counters.clear()
    entry = entry_of("llama", num_hidden_layers=1)
    folders = make_adapters(entry, tmp_path)
    compiled: Any = fxlora.compile(build(entry), max_adapters=3, max_rank=16, backend="eager")
    oracle = Oracle(lambda: build(entry), folders)
    choose = random.Random(3)

    def step(batch: int, length: int) -> None:
        for name in set(RECIPES) - set(compiled.adapter_names):
            if choose.random() < 0.7:
                compiled.load_adapter(name, folders[name])
        for name in compiled.adapter_names:
            if choose.random() < 0.3:
                compiled.unload_adapter(name)
        names = [choose.choice([None, *compiled.adapter_names]) for _ in range(batch)]
        inputs = prompts(entry, batch, length)
        compiled.generate(**inputs, adapters=names, max_new_tokens=3, do_sample=False)
        with torch.no_grad():
            logits = compiled(**inputs, adapters=names, use_cache=False).logits
        if any(names):
            oracle.check({"logits": logits}, inputs, names)

    for batch, length in ((2, 6), (3, 5)):
        step(batch, length)
    before = counters["stats"]["unique_graphs"]
    for _ in range(50):  # torch compiles a batch of one for itself
        step(choose.randint(2, 6), choose.randint(4, 12))
    assert counters["stats"]["unique_graphs"] == before
    assert before <= 4  # the trace of attach, prefill, decode, and calls without a cache


def test_the_whole_stack_under_inductor(tmp_path: Path) -> None:
    """In grad mode, on weights that require grad: one compile for all batches and lengths, PEFT's numbers."""
    torch._dynamo.reset()
    entry = entry_of("llama", num_hidden_layers=1)
    folders = make_adapters(entry, tmp_path)
    model = build(entry).requires_grad_(True)
    compiled: Any = fxlora.compile(model, max_adapters=4, max_rank=16)
    for name, folder in folders.items():
        compiled.load_adapter(name, folder)
    oracle = Oracle(lambda: build(entry), folders)
    assert torch.is_grad_enabled()
    counters.clear()
    for batch, length, names in ((3, 7, ["docs", None, "code"]), (4, 9, ["sql", "code", None, "docs"])):
        inputs = entry.inputs(batch, length)
        out = compiled(**inputs, adapters=names, use_cache=False)
        assert not out.logits.requires_grad
        oracle.check({"logits": out.logits}, inputs, names)
    assert counters["stats"]["unique_graphs"] == 1
    ids = prompts(entry, padded=False)["input_ids"]
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    mixed = compiled.generate(ids, adapters=["docs", None, "code"], **options)
    bare = build(entry).generate(ids, disable_compile=True, **options)
    assert torch.equal(mixed[1], bare[1])
    assert not torch.equal(mixed, bare)
