"""Adapters on every weight of mixture-of-experts models against PEFT: router, experts, attention and head at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import fx, nn

import fxlora
from fxlora.errors import CapacityError, CaptureError, GraphBreakError, UnboundTensorError
from fxlora.passes.graph import op_name
from tests.models import ZOO, Entry, Inputs
from tests.oracle import TOLERANCE, Oracle, make_adapter, relative_error

ROUTED = [entry for entry in ZOO.values() if entry.experts]
BOTH_WAYS = {"qwen3moe", "mixtral", "olmoe", "deepseekv3", "gptoss"}
CASES = [(entry, way) for entry in ROUTED for way in ("grouped_mm", "batched_mm")]
CASES = [(entry, way) for entry, way in CASES if way == "grouped_mm" or entry.name in BOTH_WAYS]
NAMES: Sequence[str | None] = ("a", None, "b", "c", "a")
SAFE_MARGIN = 1e-4
Build = Callable[[], nn.Module]


def adapters_of(entry: Entry, build: Build, folder: Path) -> dict[str, Path]:
    """Rank 2 on everything; rank 3 with rsLoRA on everything; rank 4 with patterns, down_proj of another rank, no head.

    PEFT's patterns see a wrapped parameter as `module.parameter`.
    """
    everything = {"target_modules": [*entry.attention, *entry.head], "target_parameters": [*entry.experts, *entry.gate]}
    configs = {
        "a": peft.LoraConfig(r=2, lora_alpha=3, **everything),
        "b": peft.LoraConfig(r=3, lora_alpha=4, use_rslora=True, **everything),
        "c": peft.LoraConfig(
            r=4,
            lora_alpha=5,
            target_modules=[*entry.attention],
            target_parameters=[*entry.experts],
            rank_pattern={r".*\.down_proj": 5, entry.attention[0]: 1},
            alpha_pattern={r".*layers\.1.*gate_up_proj": 9},
        ),
    }
    return {
        name: make_adapter(build, config, folder / name, seed=i) for i, (name, config) in enumerate(configs.items())
    }


def served(build: Build, example: Inputs, adapters: Mapping[str, Path], **options: Any) -> Any:
    gm = fxlora.capture(build(), **{name: value.clone() for name, value in example.items()})
    lora = fxlora.apply(gm, **{"max_adapters": 4, "max_rank": 16, "targets": "all", **options})
    for name, folder in adapters.items():
        lora.load_adapter(name, folder)
    return lora


@contextmanager
def recorded_rankings() -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """(values, indices chosen) of every topk that the model's own code calls."""
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    def recorded(plain: Callable[..., Any]) -> Callable[..., Any]:
        def topk(values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            result = plain(values, *args, **kwargs)
            calls.append((values, result[1]))
            return result

        return topk

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "topk", recorded(torch.Tensor.topk))
        patch.setattr(torch, "topk", recorded(torch.topk))
        yield calls


def safe_inputs(entry: Entry, oracle: Oracle) -> tuple[Inputs, float]:
    """Inputs for which no request's choice of experts hangs on rounding, and their smallest top-k margin."""
    for seed in range(3, 13):
        inputs = entry.inputs(batch=len(NAMES), seed=seed)
        with recorded_rankings() as calls:
            for index, name in enumerate(NAMES):
                oracle.alone(name, {key: value[index : index + 1] for key, value in inputs.items()})
        margin = min(margin_of(*call) for call in calls)
        if margin > SAFE_MARGIN:
            return inputs, margin
    raise AssertionError("near-ties decide which experts are chosen, whatever the inputs")


def margin_of(values: torch.Tensor, indices: torch.Tensor) -> float:
    """How far the smallest chosen value is above the largest one left, at worst over all rows."""
    chosen = torch.zeros_like(values, dtype=torch.bool).scatter_(-1, indices, True)
    least = values.masked_fill(~chosen, torch.inf).amin(-1)
    most = values.masked_fill(chosen, -torch.inf).amax(-1)
    gaps = (least - most)[most.isfinite()]
    return float(gaps.min()) if gaps.numel() else torch.inf


class Rankings(fx.Interpreter):
    """Runs a graph and keeps the indices of every topk."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.indices: list[torch.Tensor] = []

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if op_name(n) == "topk":
            self.indices.append(result[1])
        return result


def chosen_experts(lora: Any, inputs: Inputs, names: Sequence[str | None]) -> list[torch.Tensor]:
    """What every topk of the rewritten graph chooses for a batch."""
    slots = torch.tensor([-1 if name is None else lora.pool.slot_of(name) for name in names], dtype=torch.int32)
    interpreter = Rankings(lora.graph_module)
    interpreter.run(*lora._signature.flatten((), inputs), slots, enable_io_processing=False)
    return interpreter.indices


@pytest.mark.parametrize(("entry", "implementation"), CASES, ids=[f"{entry.name}-{way}" for entry, way in CASES])
@torch.no_grad()
def test_a_mixed_batch_equals_peft_and_so_do_the_experts_chosen(
    entry: Entry, implementation: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    build = entry.with_experts(implementation)
    adapters = adapters_of(entry, build, tmp_path)
    lora, oracle = served(build, entry.inputs(), adapters), Oracle(build, adapters)
    inputs, margin = safe_inputs(entry, oracle)
    error = oracle.check(lora(**inputs, adapters=list(NAMES)), inputs, NAMES)
    record_property("peft_error", f"{error:.1e}")
    record_property("top_k_margin", f"{margin:.1e}")
    print(f"{entry.name} {implementation}: error {error:.1e}, top-k margin {margin:.1e}")
    assert_same_experts(oracle, lora, inputs)
    experts = [site for site in lora.sites if site.num_experts]
    assert experts
    for site in experts:
        (pool,) = [room.pool for other, room in lora.pool._rooms.items() if other is site]
        assert [bool(rank) for rank in pool.rank.tolist()[:3]] == [True] * 3, f"{site.name} holds no adapter"
    for name in {"a", "b", "c"}:
        lora.unload_adapter(name)
    base = lora(**inputs, adapters=None)
    for index in range(len(NAMES)):
        mine = {key: value[index : index + 1] for key, value in inputs.items()}
        assert relative_error(base.logits[index : index + 1], oracle.alone(None, mine)["logits"]) <= TOLERANCE


def assert_same_experts(oracle: Oracle, lora: Any, inputs: Inputs) -> None:
    """Every topk of the graph chooses for each request what PEFT's model chooses for it alone."""
    together = chosen_experts(lora, inputs, NAMES)
    for index, name in enumerate(NAMES):
        with recorded_rankings() as calls:
            oracle.alone(name, {key: value[index : index + 1] for key, value in inputs.items()})
        assert len(calls) == len(together)
        for (_, alone), batch in zip(calls, together, strict=True):
            rows = batch.reshape(len(NAMES), -1, batch.shape[-1])[index]
            assert torch.equal(rows.sort(-1).values, alone.reshape(rows.shape).sort(-1).values)


@torch.no_grad()
def test_one_pool_serves_both_ways_of_computing_experts(tmp_path: Path) -> None:
    """Grouped and gathered products read one parameter: sites of the same name, role, sizes and memory."""
    entry = ZOO["qwen3moe"]
    builds = [entry.with_experts(implementation) for implementation in ("grouped_mm", "batched_mm")]
    loras = [served(build, entry.inputs(), {}) for build in builds]
    facts = [
        [(site.parameter, site.role, site.num_experts, site.in_features, site.out_features) for site in lora.sites]
        for lora in loras
    ]
    assert facts[0] == facts[1]
    assert loras[0].pool.bytes == loras[1].pool.bytes


def ops_of(lora: Any, name: str) -> list[fx.Node]:
    return [node for node in lora.graph_module.graph.nodes if op_name(node) == f"fxlora::{name}"]


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_the_layers_of_a_model_share_rows_and_tables(implementation: str) -> None:
    """One table a layer for gate_up and down; no copy of the experts' weights is left in the graph."""
    entry = ZOO["qwen3moe"]
    lora = served(entry.with_experts(implementation), entry.inputs(), {})
    tables, ops = ops_of(lora, "segment_experts"), ops_of(lora, "lora_experts")
    assert (len(tables), len(ops)) == (2, 4)
    assert [op.args[5] for op in ops] == [tables[0], tables[0], tables[1], tables[1]]
    names = {op_name(node) for node in lora.graph_module.graph.nodes}
    assert not names & {"bmm", "grouped_mm", "_grouped_mm", "grouped_mm_fallback"}
    gathered = [n for n in lora.graph_module.graph.nodes if op_name(n) == "getitem" and "experts" in str(n.args[0])]
    assert not gathered


def test_experts_are_sites_only_where_targets_asks_for_them(tmp_path: Path) -> None:
    entry = ZOO["olmoe"]
    build = entry.with_experts("grouped_mm")
    adapters = adapters_of(entry, build, tmp_path)
    lora = served(build, entry.inputs(), {}, targets=None)
    assert not [site for site in lora.sites if site.num_experts]
    with pytest.raises(UnboundTensorError, match=r'adapter memory for 5 experts.*targets="all"') as caught:
        lora.load_adapter("a", adapters["a"])
    assert all(".experts." in item.key for item in caught.value.unbound)
    named = served(build, entry.inputs(), {}, targets=["experts.down_proj", "q_proj"])
    assert {site.name.rpartition(".")[2] for site in named.sites} == {"down_proj", "q_proj"}
    with pytest.raises(UnboundTensorError, match="`targets` does not name it"):
        named.load_adapter("a", adapters["a"])


def test_memory_of_experts_is_packed_and_runs_out_by_name(tmp_path: Path) -> None:
    """5 experts of rank 3 take 15 rows, rounded once; what does not fit says what was asked and what is free."""
    entry = ZOO["qwen3moe"]
    build = entry.with_experts("grouped_mm")
    adapters = adapters_of(entry, build, tmp_path)
    lora = served(build, entry.inputs(), {}, max_rank=5, expert_pool_rows=7)
    lora.load_adapter("b", adapters["b"])
    site = next(site for site in lora.sites if site.name.endswith("gate_up_proj"))
    room = lora.pool._rooms[site]
    assert (room.a_extents.rows, room.a_extents.free, room.b_extents.free) == (48, 32, 32)
    lora.load_adapter("c", adapters["c"])
    with pytest.raises(CapacityError, match=r"A of rank 2 over 5 experts.*expert_pool_rows") as caught:
        lora.load_adapter("a", adapters["a"])
    assert (caught.value.asked, caught.value.free, caught.value.largest_free) == (16, 0, 0)
    assert set(lora.adapter_names) == {"b", "c"}
    lora.unload_adapter("b")
    lora.load_adapter("a", adapters["a"])
    with pytest.raises(CapacityError, match="expert_pool_rows=3 at 5 experts cannot hold one adapter of max_rank 5"):
        served(build, entry.inputs(), {}, max_rank=5, expert_pool_rows=3)


@torch.no_grad()
def test_modules_that_peft_turns_into_parameters(tmp_path: Path) -> None:
    """gate_proj, up_proj and down_proj as PEFT converts them: one pair of double rank and alpha for gate and up."""
    entry = ZOO["qwen3moe"]
    build = entry.with_experts("grouped_mm")
    modules = ["q_proj", "gate", "gate_proj", "up_proj", "down_proj"]
    adapters = {
        name: make_adapter(
            build, peft.LoraConfig(r=rank, lora_alpha=5, use_rslora=rslora, target_modules=modules), folder
        )
        for name, rank, rslora, folder in (("a", 2, False, tmp_path / "a"), ("b", 3, True, tmp_path / "b"))
    }
    lora = served(build, entry.inputs(), adapters)
    pools = {site.name.rpartition(".")[2]: lora.pool._rooms[site].pool for site in lora.sites if site.num_experts}
    assert [pools[leaf].rank.tolist()[:2] for leaf in ("gate_up_proj", "down_proj")] == [[4, 6], [2, 3]]
    inputs, names = entry.inputs(batch=4, seed=3), ["a", "b", None, "b"]
    Oracle(build, adapters).check(lora(**inputs, adapters=names), inputs, names)


@torch.no_grad()
def test_what_computes_its_experts_one_by_one_is_told_how_not_to() -> None:
    entry = ZOO["mixtral"]
    model, said = entry.with_experts("eager")(), r'\(.*model\.set_experts_implementation\("grouped_mm"\)'
    with pytest.raises(CaptureError, match=said):
        fxlora.capture(model, **entry.inputs())
    torch._dynamo.reset()
    served: Any = fxlora.compile(model, max_adapters=1, max_rank=4, backend="eager")
    with pytest.raises(GraphBreakError, match=said):
        served(**entry.inputs())
    model.set_experts_implementation("grouped_mm")
    torch._dynamo.reset()
    assert served(**entry.inputs()).logits.shape[0] == len(entry.inputs()["input_ids"])


def test_questions_about_the_device_stand_between_the_calls() -> None:
    """Dynamo leaves some in the graph, as `torch.cuda.get_device_capability` that the grouped GEMM of transformers
    asks for: they are handed nothing and change nothing."""
    entry = ZOO["qwen3moe"]
    gm = fxlora.capture(entry.build(), **entry.inputs())
    plain = len(fxlora.apply(fxlora.capture(entry.build(), **entry.inputs()), targets="all").groups)
    for node in list(gm.graph.nodes):
        if node.op == "call_function":
            with gm.graph.inserting_before(node):
                gm.graph.call_function(torch.get_num_threads)
    gm.recompile()
    lora = fxlora.apply(gm, targets="all")
    assert len(lora.groups) == plain
    assert {node.target for node in gm.graph.nodes} > {torch.get_num_threads}
