"""Reading adapters: what peft saves is read as it is; features not served and broken files are refused by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

from fxlora.adapter import CONFIG_NAME, INDEX_NAME, PICKLE_NAME, WEIGHTS_NAME, count_nonfinite, read_adapter
from fxlora.adapter_config import INERT_KEYS, READ_KEYS, REFUSED_KEYS, AdapterConfig, pattern_key
from fxlora.errors import (
    AdapterConfigError,
    AdapterDtypeError,
    AdapterFileError,
    AdapterFormatError,
    NonFiniteError,
    PickledAdapterError,
    RankError,
    UnsupportedAdapterError,
)
from tests.models import ZOO
from tests.oracle import RECIPES, config_of, make_adapter

MINIMAL = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
KEYS = ("base_model.model.fc.lora_A.weight", "base_model.model.fc.lora_B.weight")


def tensors() -> dict[str, torch.Tensor]:
    return {KEYS[0]: torch.randn(4, 6), KEYS[1]: torch.randn(5, 4)}


def write(folder: Path, config: object = None, weights: Mapping[str, torch.Tensor] | None = None) -> Path:
    (folder / CONFIG_NAME).write_text(config if isinstance(config, str) else json.dumps(config or MINIMAL))
    save_file(dict(weights or tensors()), folder / WEIGHTS_NAME)
    return folder


def test_reads_what_peft_saves(tmp_path: Path) -> None:
    entry = ZOO["llama"]
    folder = make_adapter(entry.build, config_of(entry, RECIPES["docs"]), tmp_path / "docs")
    with read_adapter(folder) as adapter:
        expected = load_file(folder / WEIGHTS_NAME)
        assert list(adapter.tensors) == sorted(expected)
        assert len(adapter.tensors) == len(expected) > 20
        for key, tensor in expected.items():
            assert torch.equal(adapter.tensors[key], tensor)
        assert (adapter.config.r, adapter.config.lora_alpha, adapter.config.use_rslora) == (4, 5.0, True)
        assert set(adapter.config.target_modules or ()) >= {"q_proj", "lm_head", "embed_tokens"}
        assert adapter.origin == str(folder)


def test_a_pair_in_memory_reads_like_a_folder(tmp_path: Path) -> None:
    given_tensors = tensors()
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["fc"]).to_dict()
    pair = read_adapter((config, given_tensors))
    folder = read_adapter(write(tmp_path, MINIMAL, given_tensors))
    assert pair.config.r == folder.config.r == 4
    for key in KEYS:
        assert torch.equal(pair.tensors[key], folder.tensors[key])
    with pytest.raises(KeyError):
        folder.tensors["lora_A"]


def test_the_file_is_read_lazily_and_let_go(tmp_path: Path) -> None:
    adapter = read_adapter(write(tmp_path))
    first = adapter.tensors[KEYS[0]].clone()
    adapter.tensors.close()
    assert torch.equal(adapter.tensors[KEYS[0]], first)
    adapter.tensors.close()
    (tmp_path / WEIGHTS_NAME).unlink()
    with pytest.raises(AdapterFormatError, match=WEIGHTS_NAME):
        adapter.tensors[KEYS[0]]


def test_every_key_of_the_installed_peft_is_classified() -> None:
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert fields <= READ_KEYS | INERT_KEYS | REFUSED_KEYS.keys()
    groups = (READ_KEYS, INERT_KEYS, frozenset(REFUSED_KEYS))
    assert sum(map(len, groups)) == len(frozenset().union(*groups))


def test_peft_defaults_are_accepted() -> None:
    config = AdapterConfig.from_mapping(peft.LoraConfig().to_dict())
    assert config == AdapterConfig(r=8, lora_alpha=8.0, peft_version=peft.__version__)


ON: Mapping[str, Any] = {
    "use_dora": True,
    "lora_bias": True,
    "bias": "lora_only",
    "modules_to_save": ["score"],
    "trainable_token_indices": {"embed_tokens": [1, 2]},
    "layer_replication": [[0, 2], [1, 3]],
    "alora_invocation_tokens": [7, 8],
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 3},
    "kasa_config": {"beta": 0.1},
    "monteclora_config": {"num_samples": 2},
    "velora_config": {"num_groups": 64},
    "megatron_config": {"hidden_size": 8},
    "enable_lora": [True, False, True],
}


@pytest.mark.parametrize("key", sorted(REFUSED_KEYS))
def test_features_not_served_are_refused_by_name(key: str) -> None:
    with pytest.raises(UnsupportedAdapterError, match=key):
        AdapterConfig.from_mapping({**MINIMAL, key: ON[key]})
    values: tuple[Any, ...] = (None, False, [], {})
    for off in values:
        AdapterConfig.from_mapping({**MINIMAL, key: off})


@pytest.mark.parametrize("peft_type", ["ADALORA", "LOHA", "IA3", peft.PeftType.ADALORA, None, 3])
def test_other_methods_are_refused(peft_type: object) -> None:
    with pytest.raises(UnsupportedAdapterError, match="peft_type"):
        AdapterConfig.from_mapping({**MINIMAL, "peft_type": peft_type})


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "orthogonal", "eva", "mica"])
def test_inits_that_leave_the_base_alone_are_accepted(init: object) -> None:
    AdapterConfig.from_mapping({**MINIMAL, "init_lora_weights": init})


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq", "lora_ga", "new"])
def test_inits_that_change_the_base_or_are_unknown_are_refused(init: str) -> None:
    with pytest.raises(UnsupportedAdapterError, match="init_lora_weights"):
        AdapterConfig.from_mapping({**MINIMAL, "init_lora_weights": init})


def test_a_pissa_adapter_is_refused_because_it_belongs_to_another_base(tmp_path: Path) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(6, 5)

    base: Any = Model()
    weight = base.fc.weight.detach().clone()
    model: Any = peft.get_peft_model(base, peft.LoraConfig(r=2, init_lora_weights="pissa", target_modules=["fc"]))
    model.save_pretrained(tmp_path)
    assert not torch.allclose(base.fc.base_layer.weight, weight, atol=1e-3)
    with pytest.raises(UnsupportedAdapterError, match="path_initial_model_for_weight_conversion"):
        read_adapter(tmp_path)


def test_unknown_keys_are_refused_only_when_on() -> None:
    with pytest.raises(UnsupportedAdapterError, match=r"lora_gate = 0\.5"):
        AdapterConfig.from_mapping({**MINIMAL, "lora_gate": 0.5})
    AdapterConfig.from_mapping({**MINIMAL, "lora_gate": None, "lora_swirl": False, "lora_list": []})


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"r": None}, AdapterConfigError, "has no r"),
        ({"lora_alpha": None}, AdapterConfigError, "has no lora_alpha"),
        ({"r": 0}, RankError, "r is 0"),
        ({"r": -4}, RankError, "r is -4"),
        ({"r": "8"}, AdapterConfigError, "r is '8'"),
        ({"r": True}, AdapterConfigError, "r is True"),
        ({"r": 8.0}, AdapterConfigError, "r is 8.0"),
        ({"lora_alpha": "16"}, AdapterConfigError, "lora_alpha is '16'"),
        ({"lora_alpha": float("nan")}, NonFiniteError, "lora_alpha is nan"),
        ({"lora_alpha": float("inf")}, NonFiniteError, "lora_alpha is inf"),
        ({"lora_alpha": 10**400}, NonFiniteError, "lora_alpha"),
        ({"use_rslora": "false"}, AdapterConfigError, "use_rslora"),
        ({"rank_pattern": ["q"]}, AdapterConfigError, "rank_pattern"),
        ({"rank_pattern": {"q_proj": 0}}, RankError, "q_proj"),
        ({"rank_pattern": {"q_proj": 2.5}}, AdapterConfigError, "q_proj"),
        ({"rank_pattern": {"q_proj(": 2}}, AdapterConfigError, "regular expression"),
        ({"alpha_pattern": {"q_proj": None}}, AdapterConfigError, "q_proj"),
        ({"target_parameters": "gate.weight"}, AdapterConfigError, "target_parameters"),
        ({"target_modules": [3]}, AdapterConfigError, "target_modules"),
    ],
)
def test_each_bad_value_has_its_error(change: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        AdapterConfig.from_mapping({**MINIMAL, **change})
    assert type(caught.value) is error


def test_a_config_without_r_lists_what_it_has() -> None:
    with pytest.raises(AdapterConfigError, match=r"no r; it has \['lora_alpha', 'peft_type'\]"):
        AdapterConfig.from_mapping({"peft_type": "LORA", "lora_alpha": 8})


@pytest.mark.parametrize("text", ["", "{", '{"r": 8,}', "[" * 100_000, "\udc80"])
def test_malformed_json(tmp_path: Path, text: str) -> None:
    write(tmp_path)
    (tmp_path / CONFIG_NAME).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(AdapterFormatError, match="not valid JSON"):
        read_adapter(tmp_path)


def test_json_that_is_no_object(tmp_path: Path) -> None:
    with pytest.raises(AdapterFormatError, match="JSON list; expected an object"):
        read_adapter(write(tmp_path, "[1]"))


def test_missing_folder_file_and_files(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="does not exist"):
        read_adapter(tmp_path / "nowhere")
    write(tmp_path)
    with pytest.raises(AdapterFileError, match="is a file"):
        read_adapter(tmp_path / CONFIG_NAME)
    (tmp_path / WEIGHTS_NAME).unlink()
    with pytest.raises(AdapterFileError, match=f"has no {WEIGHTS_NAME}; found .*{CONFIG_NAME}"):
        read_adapter(tmp_path)


def test_a_parent_of_adapters_names_them(tmp_path: Path) -> None:
    (tmp_path / "sql").mkdir()
    write(tmp_path / "sql")
    with pytest.raises(AdapterFileError, match=r"its folders \['sql'\] have one"):
        read_adapter(tmp_path)


def test_a_pickle_is_refused_unopened(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / WEIGHTS_NAME).unlink()
    (tmp_path / PICKLE_NAME).mkdir()  # opening it would raise IsADirectoryError
    with pytest.raises(PickledAdapterError, match=f"{PICKLE_NAME} only, a pickle, which is not opened"):
        read_adapter(tmp_path)


def test_safetensors_win_over_a_pickle_beside_them(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / PICKLE_NAME).write_bytes(b"not a pickle")
    assert len(read_adapter(tmp_path).tensors) == 2


@pytest.mark.parametrize("size", [0, 7, 90])
def test_a_cut_safetensors_file(tmp_path: Path, size: int) -> None:
    path = write(tmp_path) / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(AdapterFormatError, match="not a readable safetensors file"):
        read_adapter(tmp_path)


def test_no_tensors_and_wrong_sources(tmp_path: Path) -> None:
    with pytest.raises(AdapterFormatError, match="holds no tensors"):
        read_adapter((MINIMAL, {}))
    with pytest.raises(AdapterFormatError, match="not int"):
        read_adapter(3)  # type: ignore[arg-type]
    with pytest.raises(AdapterFormatError, match=r"found \(dict, list\)"):
        read_adapter((MINIMAL, []))  # type: ignore[arg-type]
    with pytest.raises(AdapterFormatError, match="maps 'x' to list"):
        read_adapter((MINIMAL, {"x": [1.0]}))  # type: ignore[dict-item]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_not_finite(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    weights = {key: tensor.to(dtype) for key, tensor in tensors().items()}
    weights[KEYS[1]][2, 3] = value
    adapter = read_adapter(write(tmp_path, MINIMAL, weights))
    assert adapter.tensors[KEYS[0]].dtype == dtype
    with pytest.raises(NonFiniteError, match=r"lora_B.weight holds 1 NaN or infinite values among 20"):
        adapter.tensors[KEYS[1]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.uint8])
def test_tensors_that_are_not_floating_point(tmp_path: Path, dtype: torch.dtype) -> None:
    adapter = read_adapter(write(tmp_path, MINIMAL, {**tensors(), KEYS[0]: torch.ones(4, 6, dtype=dtype)}))
    with pytest.raises(AdapterDtypeError, match=f"lora_A.weight is {dtype}"):
        adapter.tensors[KEYS[0]]


def test_count_nonfinite_in_every_float_dtype() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2):
        values = torch.tensor([1.0, float("nan"), 2.0]).to(dtype)
        assert count_nonfinite(values) == 1
    assert count_nonfinite(torch.empty(0, 3)) == 0


PATHS = ("model.layers.0.self_attn.q_proj", "model.layers.10.mlp.experts.gate_up_proj", "q_proj", "xq_proj", "")
PATTERNS = (
    "q_proj",
    r"layers\.0\..*",
    "layers.0.self_attn.q_proj",
    ".*q_proj",
    r"[0-9]+\.mlp.experts.gate_up_proj",
    "model.layers.10.mlp.experts.gate_up_proj",
    "^model.*",
    "proj",
    "a|q_proj",
    "",
)


@given(patterns=st.lists(st.sampled_from(PATTERNS), unique=True), path=st.sampled_from(PATHS))
@settings(max_examples=200, deadline=None)
def test_patterns_match_as_in_peft(patterns: list[str], path: str) -> None:
    assert pattern_key(patterns, path) == get_pattern_key(patterns, path)
    ranks = {pattern: 2 + index for index, pattern in enumerate(patterns)}
    config = AdapterConfig.from_mapping({**MINIMAL, "rank_pattern": ranks, "alpha_pattern": ranks})
    assert config.rank_of(path) == ranks.get(get_pattern_key(list(ranks), path), 4)


def test_scaling_is_alpha_over_r_or_over_its_root() -> None:
    patterns = {"rank_pattern": {"q_proj": 9}, "alpha_pattern": {"k_proj": 2.5}}
    plain = AdapterConfig.from_mapping({**MINIMAL, **patterns})
    rooted = AdapterConfig.from_mapping({**MINIMAL, **patterns, "use_rslora": True})
    assert [plain.scaling_of(f"x.{name}_proj") for name in "qkv"] == [8 / 9, 2.5 / 4, 2.0]
    assert [rooted.scaling_of(f"x.{name}_proj") for name in "qkv"] == [8 / 3, 1.25, 4.0]


def shards(folder: Path, files: Mapping[str, list[str]], listed: Mapping[str, str]) -> Path:
    """A folder whose tensors stand in several files beside an index."""
    write(folder)
    (folder / WEIGHTS_NAME).unlink()
    for name, keys in files.items():
        save_file({key: tensors()[key] for key in keys}, folder / name)
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    return folder


def test_tensors_in_several_files(tmp_path: Path) -> None:
    files = {"adapter_model-1.safetensors": [KEYS[0]], "adapter_model-2.safetensors": [KEYS[1]]}
    listed = {key: name for name, keys in files.items() for key in keys}
    with read_adapter(shards(tmp_path, files, listed)) as adapter:
        assert {key: list(adapter.tensors[key].shape) for key in adapter.tensors} == {KEYS[0]: [4, 6], KEYS[1]: [5, 4]}


@pytest.mark.parametrize(
    ("files", "listed", "words"),
    [
        ({"a": [KEYS[0]], "b": [KEYS[0]]}, {KEYS[0]: "a", KEYS[1]: "b"}, "another file of the adapter holds too"),
        ({"a": [KEYS[0]]}, {KEYS[0]: "a", KEYS[1]: "a"}, "not where it says"),
        ({"a": list(KEYS)}, {KEYS[0]: "a"}, "not listed"),
        ({"a": [KEYS[0]]}, {KEYS[0]: "a", KEYS[1]: "b"}, "is not a readable safetensors file"),
        ({}, {KEYS[0]: "../a"}, "not beside it"),
        ({}, {KEYS[0]: 3}, "no weight_map"),
    ],
)
def test_an_index_that_does_not_fit_its_files(files: Any, listed: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterFormatError, match=words):
        read_adapter(shards(tmp_path, files, listed))


@pytest.mark.parametrize(
    ("change", "words"),
    [(torch.Tensor.to_sparse, "stored as torch.sparse_coo"), (lambda t: t.to("meta"), "on the meta device")],
)
def test_tensors_that_hold_no_dense_values(change: Any, words: str) -> None:
    adapter = read_adapter((MINIMAL, {key: change(tensor) for key, tensor in tensors().items()}))
    with pytest.raises(AdapterFormatError, match=f"{KEYS[0]} is {words}"):
        adapter.tensors[KEYS[0]]
