"""Names of earlier versions: what transformers renamed is found under its old name, everything else is left alone."""

from __future__ import annotations

import copy
import pickle
from importlib import import_module

import pytest
from torch import nn

import fxlora
from fxlora.renames import renames_of
from fxlora.signature import META_KEY
from tests.models import ZOO


def test_old_names_become_todays() -> None:
    rename = renames_of([ZOO["mixtral"].build()])
    assert rename("model.layers.3.block_sparse_moe.gate") == "model.layers.3.mlp.gate"
    assert rename("model.layers.3.block_sparse_moe.experts.7.w1") == "model.layers.3.mlp.experts.7.w1"
    assert rename("model.layers.3.self_attn.q_proj") == "model.layers.3.self_attn.q_proj"
    stacked = renames_of([ZOO["granitemoe"].build()])
    assert stacked("model.layers.0.block_sparse_moe.input_linear").endswith("block_sparse_moe.experts.gate_up_proj")


def test_other_models_have_no_old_names() -> None:
    rename = renames_of([nn.Linear(3, 4)])
    assert rename("a.block_sparse_moe.gate") == "a.block_sparse_moe.gate"


def test_a_library_without_them_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(import_module("transformers.conversion_mapping"), "get_model_conversion_mapping")
    rename = renames_of([ZOO["mixtral"].build()])
    assert rename("model.layers.3.block_sparse_moe.gate") == "model.layers.3.block_sparse_moe.gate"


def test_a_captured_graph_keeps_them() -> None:
    """Beside the graph, since its own root is no model any more; they can be copied and pickled with it."""
    entry = ZOO["mixtral"]
    renames = fxlora.capture(entry.build(), **entry.inputs()).meta[META_KEY]["renames"]
    for kept in (renames, copy.deepcopy(renames), pickle.loads(pickle.dumps(renames))):
        assert kept("model.layers.0.block_sparse_moe.gate") == "model.layers.0.mlp.gate"
