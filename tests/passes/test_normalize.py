"""Any graph module to one form: leaves inlined, one node per weight, applied graphs refused."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import fxlora.kernels.ops  # noqa: F401  registers torch.ops.fxlora
from fxlora.passes.errors import AlreadyAppliedError
from fxlora.passes.normalize import copy_graph, count_weight_nodes, inline_modules, refuse_applied, unify_weights
from tests.passes.build import holder, traced, weight


class LeafTracer(fx.Tracer):
    """Keeps every module below the root as one call."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def leaf_trace(model: nn.Module) -> fx.GraphModule:
    return fx.GraphModule(model, LeafTracer().trace(model))


def calls(gm: fx.GraphModule) -> list[Any]:
    return [n.target for n in gm.graph.nodes if n.op.startswith("call")]


def weights_read(gm: fx.GraphModule) -> list[str]:
    return [str(n.target) for n in gm.graph.nodes if n.op == "get_attr"]


def finish(gm: fx.GraphModule) -> fx.GraphModule:
    gm.graph.lint()
    gm.recompile()
    return gm


def test_leaves_become_functionals_over_their_weights() -> None:
    model = holder(lambda self, x: self.act(self.proj(x)), proj=nn.Linear(3, 4), act=nn.GELU())
    gm = traced(model)
    assert inline_modules(gm) == []
    assert calls(gm) == [F.linear, F.gelu]
    assert weights_read(gm) == ["proj.weight", "proj.bias"]
    x = torch.randn(2, 3)
    assert torch.equal(finish(gm)(x), model(x))


def test_nested_modules_are_inlined_to_the_bottom() -> None:
    inner = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.ReLU(), nn.Linear(3, 4)))
    gm = leaf_trace(holder(lambda self, x: self.inner(x) + 1, inner=inner))
    assert inline_modules(gm) == []
    assert calls(gm) == [F.linear, F.relu, F.linear, operator.add]
    assert weights_read(gm) == ["inner.0.weight", "inner.0.bias", "inner.1.1.weight", "inner.1.1.bias"]


def test_a_graph_module_inside_is_inlined() -> None:
    inner = fx.symbolic_trace(holder(lambda self, x: x @ self.w, w=weight(3, 4)))
    gm = leaf_trace(holder(lambda self, x: self.inner(x), inner=inner))
    assert inline_modules(gm) == []
    assert calls(gm) == [operator.matmul]
    assert weights_read(gm) == ["inner.w"]


def test_several_results_are_inlined_where_each_is_picked() -> None:
    pair = holder(lambda self, x: (x + 1, {"two": x * 2}), scale=weight(1))
    model = holder(lambda self, x: self.pair(x)[0] * self.pair(x)[1]["two"], pair=pair)
    gm = leaf_trace(model)
    assert inline_modules(gm) == []
    x = torch.randn(2)
    assert torch.equal(finish(gm)(x), (x + 1) * (x * 2))


def test_several_results_passed_on_whole_stay_opaque() -> None:
    pair = holder(lambda self, x: (x + 1, x * 2), scale=weight(1))
    gm = leaf_trace(holder(lambda self, x: torch.stack(self.pair(x)), pair=pair))
    assert inline_modules(gm) == ["pair"]


@pytest.mark.parametrize("kind", ["pre", "post"])
@pytest.mark.parametrize("make", [lambda: nn.Linear(3, 3), lambda: nn.BatchNorm1d(3)], ids=["linear", "batch_norm"])
def test_hooks_keep_a_module_opaque(kind: str, make: Any) -> None:
    """Inlining would drop what the hook does."""
    model = holder(lambda self, x: self.proj(x), proj=make().eval())
    if kind == "pre":
        model.proj.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    else:
        model.proj.register_forward_hook(lambda module, args, out: out * 2)
    gm = traced(model)
    x = torch.randn(2, 3)
    assert inline_modules(gm) == ["proj"]
    assert torch.equal(finish(gm)(x), model(x))


def test_hooks_of_inner_modules_survive_inlining() -> None:
    inner = nn.Sequential(nn.Linear(3, 3))
    inner[0].register_forward_hook(lambda module, args, out: out * 2)
    model = holder(lambda self, x: self.inner(x), inner=inner)
    gm = leaf_trace(model)
    inline_modules(gm)
    x = torch.randn(2, 3)
    assert torch.equal(finish(gm)(x), model(x))


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


def test_untraceable_modules_stay_opaque_unless_nobody_reads_them() -> None:
    gm = leaf_trace(holder(lambda self, x: self.branch(x), branch=Branching()))
    assert inline_modules(gm) == ["branch"]

    def unread(self: Any, x: torch.Tensor) -> torch.Tensor:
        self.branch(x)
        return x + 1

    gm = leaf_trace(holder(unread, branch=Branching()))
    assert inline_modules(gm) == []
    assert "branch" in calls(gm)


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_in_eval_mode_is_its_functional(affine: bool) -> None:
    norm = nn.BatchNorm1d(3, affine=affine, eps=0.1).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(1, 2)
    model = holder(lambda self, x: self.norm(x), norm=norm)
    gm = traced(model)
    assert inline_modules(gm) == []
    assert calls(gm) == [F.batch_norm]
    x = torch.randn(5, 3)
    assert torch.equal(finish(gm)(x), model(x))


def test_batch_norm_in_training_is_never_taken_for_its_eval_form() -> None:
    model = holder(lambda self, x: self.norm(x), norm=nn.BatchNorm1d(3)).train()
    gm = traced(model)
    inline_modules(gm)
    assert not any(n.target is F.batch_norm and n.args[5] is False for n in gm.graph.nodes)


def test_one_node_per_tensor() -> None:
    """Two reads, another name and another Parameter over the same memory: one node, the earliest."""
    model = holder(lambda self, x: x @ self.a + x @ self.a + x @ self.b + x @ self.c, a=weight(3, 3))
    model.b, model.c = model.a, nn.Parameter(model.a.data, requires_grad=False)
    gm = traced(model)
    x, before = torch.randn(2, 3), model
    count = len(weights_read(gm))
    assert max(count_weight_nodes(gm).values()) == count > 1
    assert unify_weights(gm) == count - 1
    assert weights_read(gm) == ["a"]
    assert list(count_weight_nodes(gm).values()) == [1]
    assert torch.equal(finish(gm)(x), before(x))


def test_equal_values_are_not_one_tensor() -> None:
    model = holder(lambda self, x: x @ self.a + x @ self.b, a=torch.ones(3, 3), b=torch.ones(3, 3))
    gm = traced(model)
    assert unify_weights(gm) == 0
    assert weights_read(gm) == ["a", "b"]


def test_a_graph_with_our_ops_is_refused() -> None:
    gm = traced(lambda x: x)
    refuse_applied(gm)
    node = next(iter(gm.graph.nodes))
    with gm.graph.inserting_after(node):
        gm.graph.call_function(torch.ops.fxlora.segment_rows.default, (node, 2))
    with pytest.raises(AlreadyAppliedError, match=r"segment_rows.*load_adapter"):
        refuse_applied(gm)


def test_the_copy_shares_weights_and_leaves_the_original_alone() -> None:
    gm = traced(holder(lambda self, x: self.proj(x), proj=nn.Linear(3, 4)))
    text = str(gm.graph)
    copy, mapping = copy_graph(gm)
    assert set(mapping) == {n for n in gm.graph.nodes if n.op != "output"}
    assert copy.proj.weight is gm.proj.weight
    inline_modules(copy)
    assert str(gm.graph) == text
    assert calls(gm) == ["proj"]


class Summing(nn.Module):
    def forward(self, *xs: torch.Tensor) -> torch.Tensor:
        return xs[0] - xs[1]


class Optional(nn.Module):
    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        return x * 2 if scale is None else x


def test_variadic_modules_keep_all_their_arguments() -> None:
    model = holder(lambda self, x: self.inner(x, x * 10), inner=Summing())
    gm = leaf_trace(model)
    inline_modules(gm)
    x = torch.randn(3)
    assert torch.equal(finish(gm)(x), model(x))


def test_arguments_left_out_are_traced_as_left_out() -> None:
    model = holder(lambda self, x: self.inner(x), inner=Optional())
    gm = leaf_trace(model)
    inline_modules(gm)
    x = torch.randn(3)
    assert torch.equal(finish(gm)(x), model(x))
