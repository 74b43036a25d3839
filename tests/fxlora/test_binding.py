"""Binding: every tensor of an adapter lands once, whatever its key is called, or the error lists those that do not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Embedding, ParamWrapper
from safetensors.torch import load_file, save_file
from torch import nn

from fxlora.adapter import WEIGHTS_NAME, read_adapter
from fxlora.binding import BoundAdapter, bind_adapter
from fxlora.errors import (
    AdapterDtypeError,
    AdapterFormatError,
    AdapterShapeError,
    BaseWeightMismatchError,
    ConflictingEntriesError,
    IncompletePairError,
    NonFiniteError,
    RankError,
    UnboundTensorError,
    UnsupportedAdapterError,
)
from fxlora.passes.sites import Role, Skipped
from tests.fxlora.peft_sites import ModelSites, make_site, sites_of
from tests.models import ZOO, Entry
from tests.oracle import RECIPES, config_of, make_adapter, randomize_adapter

Tensors = dict[str, torch.Tensor]
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


def bind(source: Any, model: ModelSites) -> BoundAdapter:
    with read_adapter(source) as adapter:
        return bind_adapter(adapter, model.sites, model.skipped, model.weights)


def peft_model(entry: Entry, config: peft.LoraConfig, seed: int = 0) -> Any:
    model = peft.get_peft_model(entry.build(), config)
    randomize_adapter(model, torch.Generator().manual_seed(seed))
    return model


def layers_of(model: Any) -> dict[str, Any]:
    """PEFT's own LoRA layers by base parameter path."""
    layers: dict[str, Any] = {}
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            parameter = module.parameter_name if isinstance(module, ParamWrapper) else "weight"
            layers[f"{name}.{parameter}"] = module
    return layers


def assert_equal_to_peft(bound: BoundAdapter, model: Any, sites: ModelSites) -> None:
    """Every LoRA layer of the PEFT model has one entry with its tensors, rank and scaling, and nothing else has one."""
    layers = layers_of(model)
    assert len(layers) == len(bound.entries)
    for path, layer in layers.items():
        embedding = isinstance(layer, Embedding)
        roles = (Role.EMBEDDING,) if embedding else (Role.LINEAR, Role.LOGITS)
        (site,) = [s for s in sites.sites if s.weight is sites.weights[path] and s.role in roles]
        entry = bound.entries[site]
        a_RK = layer.lora_embedding_A["default"] if embedding else layer.lora_A["default"].weight
        b_NR = layer.lora_embedding_B["default"] if embedding else layer.lora_B["default"].weight
        assert torch.equal(entry.a_RK, a_RK)
        assert torch.equal(entry.b_RN, b_NR.t())
        assert entry.scaling == layer.scaling["default"]
        assert entry.rank == layer.r["default"] == len(entry.a_RK)


@pytest.mark.parametrize("recipe", sorted(RECIPES))
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3moe"])
def test_binds_what_peft_saves(tmp_path: Path, name: str, recipe: str) -> None:
    entry = ZOO[name]
    model = peft_model(entry, config_of(entry, RECIPES[recipe]))
    model.save_pretrained(tmp_path)
    sites = sites_of(entry.build())
    bound = bind(tmp_path, sites)
    assert_equal_to_peft(bound, model, sites)
    assert len(bound.base_copies) == (
        2 if recipe == "docs" else 1 if recipe == "code" and name == "none" else len(bound.base_copies)
    )
    used = [key for item in bound.entries.values() for key in item.keys]
    assert sorted([*used, *bound.base_copies]) == sorted(load_file(tmp_path / WEIGHTS_NAME))


class Toy(nn.Module):
    """fc [5, 6]; gate [3, 6] under two paths; emb and head tied [7, 6]; a conv; a wrapped 3-D parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 5)
        self.gate = nn.Linear(6, 3, bias=False)
        self.runner = nn.Module()
        self.runner.gate = self.gate
        self.emb = nn.Embedding(7, 6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.emb.weight
        self.experts = nn.Module()
        self.experts.up = nn.Parameter(torch.randn(2, 4, 6))
        self.experts.down = nn.Parameter(torch.randn(2, 6, 4))

    def get_output_embeddings(self) -> nn.Module:
        return self.head


@pytest.fixture(scope="module")
def toy() -> ModelSites:
    torch.manual_seed(0)
    return sites_of(Toy())


def pair(path: str, in_features: int, out_features: int, rank: int = 4, embedding: bool = False) -> Tensors:
    marker, end = ("lora_embedding_", "") if embedding else ("lora_", ".weight")
    return {
        f"{path}.{marker}A{end}": torch.randn(rank, in_features),
        f"{path}.{marker}B{end}": torch.randn(out_features, rank),
    }


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: f"base_model.model.{key}",
        lambda key: key,
        lambda key: f"base_model.model._orig_mod.{key}",
        lambda key: f"_orig_mod.base_model.model.{key}",
        lambda key: f"module.base_model.model.{key}",
        lambda key: f"base_model.model._fsdp_wrapped_module.{key}",
        lambda key: key.replace(".weight", ".default.weight"),
        lambda key: key.replace(".weight", ""),
        lambda key: key.replace(".weight", ".sql"),
    ],
)
def test_spellings_of_one_key(toy: ModelSites, rename: Callable[[str], str]) -> None:
    tensors = {rename(key): tensor for key, tensor in pair("fc", 6, 5).items()}
    (site, entry), *rest = bind((CONFIG, tensors), toy).entries.items()
    assert not rest
    assert site is toy.of("fc")
    assert entry.keys == tuple(tensors)
    assert torch.equal(entry.a_RK, tensors[entry.keys[0]])
    assert torch.equal(entry.b_RN, tensors[entry.keys[1]].t())


@pytest.mark.parametrize("tail", ["", ".weight", ".default", ".default.weight"])
def test_spellings_of_an_embedding_key(toy: ModelSites, tail: str) -> None:
    tensors = {key + tail: tensor for key, tensor in pair("emb", 7, 6, embedding=True).items()}
    assert list(bind((CONFIG, tensors), toy).entries) == [toy.of("emb", Role.EMBEDDING)]


@pytest.mark.parametrize("path", ["gate", "runner.gate"])
def test_any_alias_reaches_the_one_site(toy: ModelSites, path: str) -> None:
    site = toy.of("gate")
    assert site is toy.of("runner.gate")
    assert list(bind((CONFIG, pair(path, 6, 3)), toy).entries) == [site]


def test_an_alias_that_only_the_weights_know(toy: ModelSites) -> None:
    weights = {**toy.weights, "extra.path.weight": toy.weights["fc.weight"]}
    model = ModelSites(toy.sites, toy.skipped, weights)
    assert list(bind((CONFIG, pair("extra.path", 6, 5)), model).entries) == [toy.of("fc")]


@pytest.mark.parametrize("path", ["emb", "head"])
def test_a_tied_weight_binds_by_the_role_of_the_key(toy: ModelSites, path: str) -> None:
    as_head = bind((CONFIG, pair(path, 6, 7)), toy)
    as_embedding = bind((CONFIG, pair(path, 7, 6, embedding=True)), toy)
    assert list(as_head.entries) == [toy.of("head", Role.LOGITS)]
    assert list(as_embedding.entries) == [toy.of("emb", Role.EMBEDDING)]


def test_equal_entries_under_two_aliases_are_one(toy: ModelSites) -> None:
    one = pair("gate", 6, 3)
    two = {f"runner.{key}": tensor.clone() for key, tensor in one.items()}
    ((site, entry),) = bind((CONFIG, {**one, **two}), toy).entries.items()
    assert site is toy.of("gate")
    assert entry.keys == (*one, *two)


@pytest.mark.parametrize("differ", ["lora_A", "lora_B", "scaling"])
def test_different_entries_under_two_aliases_are_an_error(toy: ModelSites, differ: str) -> None:
    one = pair("gate", 6, 3)
    two = {f"runner.{key}": tensor.clone() for key, tensor in one.items()}
    config = dict(CONFIG)
    if differ == "scaling":
        config["alpha_pattern"] = {"runner.gate": 9}
    else:
        two[f"runner.gate.{differ}.weight"][1, 2] += 1e-6
    with pytest.raises(ConflictingEntriesError, match=r"runner\.gate\.lora_A.*gate\.weight"):
        bind((config, {**one, **two}), toy)


def test_two_adapters_in_one_file_are_an_error(toy: ModelSites) -> None:
    tensors = {
        key.replace(".weight", f".{name}.weight"): tensor
        for name in ("sql", "docs")
        for key, tensor in pair("fc", 6, 5).items()
    }
    with pytest.raises(AdapterFormatError, match="two adapters in one file"):
        bind((CONFIG, tensors), toy)


def test_every_unbound_tensor_is_listed_with_reason_and_nearest(toy: ModelSites) -> None:
    tensors = {
        **pair("fc", 6, 5),
        **pair("fcc", 6, 5),
        **pair("gate", 3, 6, embedding=True),
        **pair("fc.bias", 6, 5),
        **pair("experts", 6, 8, rank=8),
        **pair("experts.base_layer", 4, 12, rank=8),
        "fc.lora_B.bias": torch.randn(5),
        "fc.lora_magnitude_vector": torch.randn(5),
        "head.modules_to_save.weight": torch.randn(7, 6),
        "emb.token_adapter.trainable_tokens_delta": torch.randn(2, 6),
        "fc.lora_C.weight": torch.randn(5, 4),
        "fc.lora_A.a.b.weight": torch.randn(4, 6),
    }
    with pytest.raises(UnboundTensorError) as caught:
        bind((CONFIG, tensors), toy)
    reasons = {item.key: item.reason for item in caught.value.unbound}
    assert reasons.keys() == tensors.keys() - pair("fc", 6, 5).keys()
    assert all(key in str(caught.value) for key in reasons)
    assert reasons["fcc.lora_A.weight"] == "no weight of this name"
    assert reasons["gate.lora_embedding_A"] == "gate.weight is read as linear, the key asks for embedding"
    assert reasons["experts.lora_A.weight"] == "not targeted: expert weights"
    assert reasons["experts.base_layer.lora_B.weight"] == "not targeted: expert weights"
    assert "bias of lora_B" in reasons["fc.lora_B.bias"]
    assert "DoRA" in reasons["fc.lora_magnitude_vector"]
    assert "saved whole" in reasons["head.modules_to_save.weight"]
    assert "embedding rows" in reasons["emb.token_adapter.trainable_tokens_delta"]
    assert "neither a LoRA tensor" in reasons["fc.lora_C.weight"]
    assert "a.b.weight after lora_A" in reasons["fc.lora_A.a.b.weight"]
    nearest = {item.key: item.nearest for item in caught.value.unbound}
    assert nearest["fcc.lora_A.weight"] == "fc"


def test_a_skipped_weight_gives_its_reason(toy: ModelSites) -> None:
    kept = tuple(site for site in toy.sites if site is not toy.of("gate"))
    model = ModelSites(kept, (Skipped("runner.gate.weight", "rows not provable", ("gate.weight",)),), toy.weights)
    with pytest.raises(UnboundTensorError, match=r"gate\.lora_A\.weight: rows not provable"):
        bind((CONFIG, pair("gate", 6, 3)), model)
    unread = ModelSites(kept, (), toy.weights)
    with pytest.raises(UnboundTensorError, match=r"gate\.weight is not read by the graph"):
        bind((CONFIG, pair("gate", 6, 3)), unread)


@pytest.mark.parametrize("path", ["fc.layers.1", "fc.layers.1.q_proj", "fc.layers.1.mlp.up_proj"])
def test_a_skipped_module_gives_its_reason_for_all_below_it(toy: ModelSites, path: str) -> None:
    model = ModelSites(toy.sites, (Skipped("fc.layers.1", "on another pipeline stage"),), toy.weights)
    with pytest.raises(UnboundTensorError) as caught:
        bind((CONFIG, pair(path, 6, 5)), model)
    assert {item.reason for item in caught.value.unbound} == {"on another pipeline stage"}
    with pytest.raises(UnboundTensorError, match="no weight of this name"):
        bind((CONFIG, pair("fc.layers.10", 6, 5)), model)


def test_two_parameter_objects_over_one_memory_are_one_weight(toy: ModelSites) -> None:
    twin = nn.Parameter(toy.weights["fc.weight"].detach())
    model = ModelSites(toy.sites, (), {"twin.weight": twin, **{k: v.detach() for k, v in toy.weights.items()}})
    for path in ("twin", "fc"):
        assert list(bind((CONFIG, pair(path, 6, 5)), model).entries) == [toy.of("fc")]


def test_a_weight_read_as_linear_and_as_logits_is_ambiguous(toy: ModelSites) -> None:
    both = (*toy.sites, make_site("fc", toy.of("fc").weight, Role.LOGITS))
    with pytest.raises(UnboundTensorError, match="read as linear and as logits"):
        bind((CONFIG, pair("fc", 6, 5)), ModelSites(both, (), toy.weights))


def test_a_parameter_wrapped_by_peft_in_a_tied_weight_is_not_guessed(toy: ModelSites) -> None:
    config = {**CONFIG, "target_parameters": ["emb.weight"]}
    with pytest.raises(UnboundTensorError, match=r"target_parameters names emb\.weight"):
        bind((config, pair("emb", 6, 7)), toy)


@pytest.mark.parametrize("half", ["lora_A.weight", "lora_B.weight"])
def test_an_incomplete_pair(toy: ModelSites, half: str) -> None:
    tensors = {**pair("fc", 6, 5), **pair("gate", 6, 3)}
    del tensors[f"gate.{half}"]
    other = half.replace(".weight", "")
    with pytest.raises(IncompletePairError, match=f"1 LoRA pairs are incomplete: gate.* has no {other} beside it"):
        bind((CONFIG, tensors), toy)


@pytest.mark.parametrize(
    ("a_shape", "b_shape", "error", "words"),
    [
        ((4, 5), (5, 4), AdapterShapeError, r"site fc takes A \[R, 6\] and B \[5, R\]"),
        ((4, 6), (6, 4), AdapterShapeError, r"is \[4, 6\] and .* is \[6, 4\]"),
        ((4, 6), (5, 3), AdapterShapeError, "site fc"),
        ((6, 4), (4, 5), AdapterShapeError, "site fc"),
        ((8, 6), (5, 8), RankError, "so rank 8, but the config gives fc rank 4"),
        ((4, 6, 1, 1), (5, 4, 1, 1), UnsupportedAdapterError, "convolutions"),
        ((4, 6, 1), (5, 4, 1), UnsupportedAdapterError, "convolutions"),
        ((24,), (5, 4), AdapterShapeError, "not gathered"),
        ((0, 6), (5, 0), AdapterShapeError, "not gathered"),
    ],
)
def test_shapes(
    toy: ModelSites, a_shape: tuple[int, ...], b_shape: tuple[int, ...], error: type[Exception], words: str
) -> None:
    tensors = {"fc.lora_A.weight": torch.randn(a_shape), "fc.lora_B.weight": torch.randn(b_shape)}
    with pytest.raises(error, match=words):
        bind((CONFIG, tensors), toy)


def test_bad_values_name_their_key(toy: ModelSites) -> None:
    tensors = pair("fc", 6, 5)
    tensors["fc.lora_B.weight"][0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"fc\.lora_B\.weight"):
        bind((CONFIG, tensors), toy)
    tensors["fc.lora_B.weight"] = torch.ones(5, 4, dtype=torch.int64)
    with pytest.raises(AdapterDtypeError, match=r"fc\.lora_B\.weight"):
        bind((CONFIG, tensors), toy)


@pytest.mark.parametrize("key", ["emb.base_layer.weight", "emb.weight", "base_model.model.head.base_layer.weight"])
def test_a_copy_of_the_base_is_checked_and_consumed(toy: ModelSites, key: str) -> None:
    base = toy.weights["emb.weight"].detach()
    bound = bind((CONFIG, {**pair("fc", 6, 5), key: base.clone()}), toy)
    assert bound.base_copies == (key,)
    wrong = base.clone()
    wrong[3, 2] += 0.25
    with pytest.raises(BaseWeightMismatchError, match=r"differs from this model's by up to 0\.25"):
        bind((CONFIG, {**pair("fc", 6, 5), key: wrong}), toy)
    with pytest.raises(BaseWeightMismatchError, match=r"is \[8, 6\], the base weight of this model \[7, 6\]"):
        bind((CONFIG, {**pair("fc", 6, 5), key: torch.randn(8, 6)}), toy)


def test_a_copy_is_compared_in_the_coarser_dtype(toy: ModelSites) -> None:
    base = toy.weights["emb.weight"].detach()
    for dtype in (torch.bfloat16, torch.float64):
        bind((CONFIG, {**pair("fc", 6, 5), "emb.base_layer.weight": base.to(dtype)}), toy)
    off = base.to(torch.bfloat16)
    off[0, 0] *= 1 + 2**-7
    with pytest.raises(BaseWeightMismatchError):
        bind((CONFIG, {**pair("fc", 6, 5), "emb.base_layer.weight": off}), toy)


def test_a_file_without_lora_tensors(toy: ModelSites) -> None:
    with pytest.raises(AdapterFormatError, match="no LoRA tensors"):
        bind((CONFIG, {"emb.weight": toy.weights["emb.weight"].detach().clone()}), toy)


def test_weight_names_may_carry_compile_wrappers(toy: ModelSites) -> None:
    weights = {f"_orig_mod.{name}": weight for name, weight in toy.weights.items()}
    assert list(bind((CONFIG, pair("fc", 6, 5)), ModelSites(toy.sites, (), weights)).entries) == [toy.of("fc")]


def test_a_model_whose_own_path_starts_like_peft_prefix() -> None:
    inner = nn.Module()
    inner.model = nn.Module()
    inner.model.fc = nn.Linear(6, 5)
    outer = nn.Module()
    outer.base_model = inner
    sites = sites_of(outer)
    for prefix in ("", "base_model.model."):
        tensors = pair(f"{prefix}base_model.model.fc", 6, 5)
        assert list(bind((CONFIG, tensors), sites).entries) == [sites.of("base_model.model.fc")]


def test_patterns_see_a_module_by_path_and_a_wrapped_parameter_by_its_own(tmp_path: Path) -> None:
    entry = ZOO["qwen3moe"]
    config = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=["q_proj"],
        target_parameters=["mlp.gate.weight"],
        rank_pattern={"layers.0.mlp.gate.weight": 5, "layers.1.mlp.gate": 6, "q_proj": 3},
        alpha_pattern={r"layers\.1\..*weight": 11, r"layers\.0\.self_attn\.q_proj": 7},
    )
    model = peft_model(entry, config)
    model.save_pretrained(tmp_path)
    sites = sites_of(entry.build())
    bound = bind(tmp_path, sites)
    assert_equal_to_peft(bound, model, sites)
    gates = [bound.entries[sites.of(f"model.layers.{layer}.mlp.gate")] for layer in (0, 1)]
    assert [(gate.rank, gate.scaling) for gate in gates] == [(5, 3 / 5), (2, 11 / 2)]


@pytest.mark.parametrize("targets", [["experts.down_proj"], ["experts.gate_up_proj", "experts.down_proj"]])
def test_expert_parameters_are_unbound_with_their_reason(tmp_path: Path, targets: list[str]) -> None:
    entry = ZOO["qwen3moe"]
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=targets)
    peft_model(entry, config).save_pretrained(tmp_path)
    with pytest.raises(UnboundTensorError) as caught:
        bind(tmp_path, sites_of(entry.build()))
    assert len(caught.value.unbound) == 2 * 2 * len(targets)
    for item in caught.value.unbound:
        assert ".experts." in item.key
        assert item.reason == "not targeted: expert weights"


class TwoWrapped(nn.Module):
    """A block whose two 2-D parameters PEFT wraps one around the other."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Module()
        self.block.zeta = nn.Parameter(torch.randn(5, 6))
        self.block.plain = nn.Parameter(torch.randn(2, 6))
        self.block.alpha = nn.Parameter(torch.randn(4, 6))


def test_nested_wrapped_parameters_are_told_apart(tmp_path: Path) -> None:
    base = TwoWrapped()
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=[], target_parameters=["block.alpha", "block.zeta"])
    model: Any = peft.get_peft_model(copy.deepcopy(base), config)
    randomize_adapter(model, torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path)
    assert sum(".base_layer." in key for key in load_file(tmp_path / WEIGHTS_NAME)) == 2
    weights: Tensors = dict(base.named_parameters())
    sites = [make_site(name, weights[name]) for name in ("block.zeta", "block.alpha")]
    sites = [type(site)(**{**vars(site), "parameter": site.name}) for site in sites]
    bound = bind(tmp_path, ModelSites(tuple(sites), (), weights))
    wrappers: list[Any] = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    assert len(wrappers) == 2
    for layer in wrappers:
        (site,) = [site for site in sites if site.name == f"block.{layer.parameter_name}"]
        assert torch.equal(bound.entries[site].a_RK, layer.lora_A["default"].weight)
        assert torch.equal(bound.entries[site].b_RN, layer.lora_B["default"].weight.t())


def test_tied_training_saves_both_roles(tmp_path: Path) -> None:
    entry = ZOO["qwen3"]
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    model = peft_model(entry, config)
    model.save_pretrained(tmp_path)
    sites = sites_of(entry.build())
    bound = bind(tmp_path, sites)
    embedding = bound.entries[sites.of("model.embed_tokens", Role.EMBEDDING)]
    logits = bound.entries[sites.of("lm_head", Role.LOGITS)]
    assert torch.equal(logits.a_RK, embedding.b_RN)
    assert torch.equal(logits.b_RN, embedding.a_RK)


def test_an_adapter_of_another_model_names_what_is_near(tmp_path: Path) -> None:
    entry = ZOO["llama"]
    folder = make_adapter(entry.build, config_of(entry, RECIPES["sql"]), tmp_path)
    with pytest.raises(UnboundTensorError) as caught:
        bind(folder, sites_of(ZOO["gpt2"].build()))
    assert len(caught.value.unbound) == len(load_file(folder / WEIGHTS_NAME))
    with pytest.raises(UnboundTensorError) as caught:
        bind(folder, sites_of(entry.build().get_submodule("model")))
    first = caught.value.unbound[0]
    assert first.key.removeprefix("base_model.model.model.").startswith(first.nearest or "none")


def test_changed_embedding_is_refused(tmp_path: Path) -> None:
    entry = ZOO["llama"]
    folder = make_adapter(entry.build, config_of(entry, RECIPES["docs"]), tmp_path)
    tensors: Mapping[str, torch.Tensor] = load_file(folder / WEIGHTS_NAME)
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    save_file({**tensors, key: tensors[key] * 1.5}, folder / WEIGHTS_NAME)
    with pytest.raises(BaseWeightMismatchError, match="embed_tokens"):
        bind(folder, sites_of(entry.build()))
