"""Graphs as text: modules nested, repeats folded, sites marked; what each pass did; golden texts of whole models."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from expecttest import assert_expected_inline
from torch import fx, nn

import fxlora
from fxlora.dumps.modules import module_stack
from fxlora.dumps.text import graph_text
from fxlora.dumps.tree import fold_names
from fxlora.dumps.write import make_networkx
from fxlora.passes.diff import NodeState
from tests.fxlora.dump_cases import shared, zoo

GOLDEN = Path(__file__).parent / "golden"
of_pinned_torch = pytest.mark.skipif(
    not torch.__version__.startswith("2.13."),
    reason="another torch traces another graph; the texts are of the pinned one",
)


def text(made: object, tmp_path: Path, **options: object) -> str:
    return fxlora.dump(made, tmp_path / "g.txt", **options).read_text(encoding="utf-8")


@of_pinned_torch
def test_a_shared_gate_and_a_tied_table(tmp_path: Path) -> None:
    made = re.sub(r"\bs\d+\b", "s", text(shared(), tmp_path))
    assert_expected_inline(
        made.replace("\\u2028", ""),
        """\
Shared (after the rewrite): 38 nodes; 6 sites in 5 calls; adapters plain, <script>alert("x")</script>&
inputs
  l_ids_ (ids) i64[s, s]
  adapter_slots
row maps
  unsqueeze = unsqueeze(adapter_slots, 1)
  sym_size_int = sym_size(l_ids_, 0)
  sym_size_int_1 = sym_size(l_ids_, 1)
  broadcast_to = expand(unsqueeze, (sym_size_int, sym_size_int_1))
  reshape = reshape(broadcast_to, (-1,))
  reshape_1 = reshape(reshape, (-1, 1))
  segment_rows_default = fxlora::segment_rows(reshape_1, 4)
table
  lora_embedding_default = fxlora::lora_embedding(l_ids_, self.weight, reshape_1, None, segment_rows_default, <pool>) : f32[s, s, 6]  # table: embedding, rows 1
layers.0
  up
    lora_linear_default = fxlora::lora_linear(lora_embedding_default, [self.weight, layers.0.gate.weight], [None, None], reshape_1, None, segment_rows_default, <pool>)  # up + gate: linear, rows 1
    getitem = getitem(lora_linear_default, 0) : f32[s, s, 6]
  gate
    getitem_1 = getitem(lora_linear_default, 1) : f32[s, s, 1]
  relu = relu(getitem) : f32[s, s, 6]
  sigmoid = sigmoid(getitem_1) : f32[s, s, 1]
  mul = mul(relu, sigmoid) : f32[s, s, 6]
  x_1 = add(lora_embedding_default, mul) : f32[s, s, 6]
layers.1
  up
    lora_linear_default_1 = fxlora::lora_linear(x_1, [self.weight, layers.0.gate.weight], [None, None], reshape_1, None, segment_rows_default, <pool>)  # up + layers.0.gate: linear, rows 1
    getitem_2 = getitem(lora_linear_default_1, 0) : f32[s, s, 6]
  gate
    getitem_3 = getitem(lora_linear_default_1, 1) : f32[s, s, 1]
  relu_1 = relu(getitem_2) : f32[s, s, 6]
  sigmoid_1 = sigmoid(getitem_3) : f32[s, s, 1]
  mul_1 = mul(relu_1, sigmoid_1) : f32[s, s, 6]
  x_2 = add(x_1, mul_1) : f32[s, s, 6]
layers.2 as layers.1
head
  lora_logits_default = fxlora::lora_logits(x_3, self.weight, None, reshape_1, None, segment_rows_default, <pool>) : f32[s, s, 13]  # head: logits, rows 1
return (lora_logits_default,)
""",  # noqa: E501
    )


def test_a_traced_module(tmp_path: Path) -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    lora = fxlora.apply(gm, max_adapters=2, max_rank=2, example_inputs=torch.randn(2, 3))
    assert_expected_inline(
        text(lora, tmp_path),
        """\
Sequential (after the rewrite): 13 nodes; 2 sites in 2 calls
inputs
  input_1 (input) f32[*, 3]
  adapter_slots
row maps
  reshape = reshape(adapter_slots, (-1, 1))
  segment_rows_default = fxlora::segment_rows(reshape, 2)
0
  lora_linear_default = fxlora::lora_linear(input_1, [self.weight], [self.bias], reshape, None, segment_rows_default, <pool>)  # 0: linear, rows 1
  getitem = getitem(lora_linear_default, 0) : f32[*, 4]
1
  relu = relu(getitem, inplace=False) : f32[*, 4]
2
  lora_logits_default = fxlora::lora_logits(relu, self.weight, self.bias, reshape, None, segment_rows_default, <pool>) : f32[*, 2]  # 2: logits, rows 1
return lora_logits_default : f32[*, 2]
""",  # noqa: E501
    )


def test_a_graph_that_was_never_applied(tmp_path: Path) -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.Linear(3, 4), nn.ReLU()))
    assert_expected_inline(
        text(gm, tmp_path),
        """\
Sequential: 4 nodes
inputs
  input_1 (input)
0
  _0 = Linear(input_1)
1
  _1 = ReLU(_0)
return _1
""",
    )


@of_pinned_torch
@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_zoo_models(name: str, tmp_path: Path) -> None:
    """The whole text of two models. EXPECTTEST_ACCEPT=1 writes the files anew."""
    if not transformers.__version__.startswith("5.23."):
        pytest.skip("another transformers is another model; the texts are of the pinned one")
    made, golden = text(zoo(name), tmp_path), GOLDEN / f"{name}.txt"
    if os.environ.get("EXPECTTEST_ACCEPT"):
        golden.write_text(made, encoding="utf-8")
    assert made == golden.read_text(encoding="utf-8")


def test_layers_fold_to_the_first_of_their_kind(tmp_path: Path) -> None:
    made = text(shared(), tmp_path)
    assert "layers.2 as layers.1" in made or "layers.1-2 as layers.0" in made
    assert made.count("up.weight") + made.count("self.weight") >= 2


def test_layers_that_differ_do_not_fold(tmp_path: Path) -> None:
    """One layer of three has another activation: it stands open between the others."""

    class Layer(nn.Module):
        def __init__(self, tanh: bool) -> None:
            super().__init__()
            self.up, self.tanh = nn.Linear(3, 3), tanh

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.up(x).tanh() if self.tanh else self.up(x).relu()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer(tanh=i == 2) for i in range(5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    made = text(fxlora.capture(Model(), torch.randn(2, 3)), tmp_path)
    assert "layers.1 as layers.0\n" in made
    assert "layers.3-4 as layers.0\n" in made
    assert "\nlayers.2\n" in made
    assert made.count("tanh(") == 1


def test_layers_that_read_another_input_do_not_fold(tmp_path: Path) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.up(x) * mask

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(4))

        def forward(self, x: torch.Tensor, long: torch.Tensor, short: torch.Tensor) -> torch.Tensor:
            for i, layer in enumerate(self.layers):
                x = layer(x, short if i % 2 else long)
            return x

    inputs = [torch.randn(2, 3) for _ in range(3)]
    made = text(fxlora.capture(Model(), *inputs), tmp_path)
    assert "layers.2 as layers.0\n" in made
    assert "layers.3 as layers.1\n" in made


def test_a_module_that_is_called_again(tmp_path: Path) -> None:
    """One layer called three times is shown once."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Sequential(nn.Linear(3, 3), nn.Tanh())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.layer(self.layer(x)))

    made = text(fxlora.apply(fxlora.capture(Model(), torch.randn(2, 3))), tmp_path)
    assert "\nlayer\n" in made
    assert "\nlayer again, 2 times\n" in made
    assert made.count("tanh(") == 1


def test_a_graph_without_modules_takes_them_from_its_weights() -> None:
    """make_fx records none."""
    from torch.fx.experimental.proxy_tensor import make_fx

    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(2, 3)
    gm = make_fx(lambda x: torch.func.functional_call(model, dict(model.named_parameters()), (x,)))(x)
    lora = fxlora.apply(gm, max_adapters=2, max_rank=2, model=model)
    graph = make_networkx(lora, None, None)
    modules = {facts.get("module") for _, facts in graph.nodes(data=True) if facts["kind"] == "call"}
    assert {"0", "2"} <= modules
    assert "\n0\n" in graph_text(graph)


@pytest.mark.parametrize(
    ("recorded", "path"),
    [
        ("L['self'].model.layers.1", "model.layers.1"),
        ("L['self']", ""),
        ("L['original'].__self__.model.norm", "model.norm"),
        ("G['net'].encoder", "encoder"),
        ("getattr(L['self'].layers, '0').up", "layers.0.up"),
        ("L['self']._modules['layers']._modules['0']", "layers.0"),
        ("model.layers.1@2", "model.layers.1"),
        ("self.x", "self.x"),
    ],
)
def test_modules_go_by_their_own_paths(recorded: str, path: str) -> None:
    """Tracers write them in forms of their own."""
    node = fx.Graph().placeholder("x")
    node.meta["nn_module_stack"] = {"key": (recorded, nn.Linear)}
    assert module_stack(NodeState(node, node.op, node.target, (), {})) == [(path, "Linear")]


def test_a_model_behind_a_wrapper_has_its_own_paths(tmp_path: Path) -> None:
    """`*args` of the wrapper are what dynamo names its modules by."""

    def wrapper(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *args: forward(*args)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.inner = nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 4))

        @wrapper
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(self.up(x))

    lora = fxlora.apply(fxlora.capture(Two(), torch.randn(3, 4)), max_adapters=1, max_rank=2)
    assert text(lora, tmp_path, focus="inner.0").splitlines()[1] == "inner.0"


def test_depth_and_focus(tmp_path: Path) -> None:
    lora = zoo("qwen3")
    shallow = text(lora, tmp_path, depth=1)
    assert "embed_tokens: 1 call, 1 site" in shallow
    assert len(shallow) < len(text(lora, tmp_path)) / 2
    only = text(lora, tmp_path, focus="model.layers.0.self_attn").splitlines()
    assert only[1] == "model.layers.0.self_attn"
    assert any("# q_proj + k_proj + v_proj: linear, rows 1" in line for line in only)
    assert not any("lm_head" in line for line in only)


def test_every_pass_is_in_the_diff(tmp_path: Path) -> None:
    lora = shared()
    made = fxlora.dump(lora, tmp_path / "g.diff.txt").read_text(encoding="utf-8")
    for report in lora.reports:
        assert re.search(rf"^{report.name} +[\d.]+ +{report.nodes_before} +{report.nodes_after} ", made, re.M), report
    assert "== rewrite_sites" in made
    assert re.search(r"^\+\d+ fxlora::lora_linear$", made, re.M)
    assert re.search(r"^-embedding = embedding\(", made, re.M) or "-x = embedding(" in made
    assert re.search(r"^\+lora_embedding_default = fxlora::lora_embedding\(.*<pool>\)$", made, re.M)


def test_a_diff_is_of_the_graph_as_it_was(tmp_path: Path) -> None:
    """Later edits of a graph do not reach what a pass reported."""
    lora = shared()
    first = fxlora.dump(lora, tmp_path / "a.diff.txt").read_bytes()
    node = next(n for n in lora.graph_module.graph.nodes if n.op == "output")
    with lora.graph_module.graph.inserting_before(node):
        node.args = (lora.graph_module.graph.call_function(torch.neg, (node.args[0][0],)),)
    assert fxlora.dump(lora, tmp_path / "b.diff.txt").read_bytes() == first


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        (["a"], "a"),
        (["l.1", "l.2", "l.3"], "l.1-3"),
        (["l.0", "l.2", "l.3", "l.9"], "l.0,2-3,9"),
        (["a", "b"], "a, b"),
        (["l.1.x.2", "l.2.x.3"], "l.1.x.2, l.2.x.3"),
    ],
)
def test_names_fold(names: list[str], folded: str) -> None:
    assert fold_names(names) == folded
