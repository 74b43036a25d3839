"""Linears of one input become one op: which join, which stay apart and why, and that every answer keeps its bits."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from peft import LoraConfig
from torch import fx, nn
from torch.nn import functional as F

import fxlora
from fxlora.kernels.registry import pools_of
from fxlora.passes.diff import graph_text
from fxlora.passes.graph import op_name
from fxlora.passes.plan import Plan, digest_of
from tests.models import ZOO
from tests.oracle import RECIPES, Oracle, make_adapter, make_adapters, tensors_of
from tests.passes.build import analysed, holder, rewritten, weight
from tests.toys.base import Adapter, clone

Body = Callable[..., Any]
K = 4


def model(body: Body, **more: torch.Tensor | nn.Module) -> nn.Module:
    """Three weights over K = 4 features: 5, 3 and 4 (square) wide, a [K, N] one, and biases."""
    members: dict[str, torch.Tensor | nn.Module] = {
        "a": weight(5, K), "b": weight(3, K), "square": weight(K, K), "kn": weight(K, 6), "c": weight(5), "d": weight(3)
    }  # fmt: skip
    return holder(body, **{**members, **more})


def planned(body: Body, *examples: torch.Tensor, **options: Any) -> Plan:
    examples = examples or (torch.randn(2, 3, K),)
    return analysed(model(body), *examples, **options).plan


def members(plan: Plan) -> list[str]:
    """The sites of each op: `ab square` is a group of two and a call alone."""
    return ["+".join(site.name for site in group.sites) for group in plan.groups]


def attention(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    q, k, v = F.linear(x, self.a, self.c), F.linear(x, self.square), F.linear(x, self.b, self.d)
    return torch.cat([q, k, v], -1).softmax(-1)


def test_q_k_and_v_become_one_node() -> None:
    assert_expected_inline(
        graph_text(rewritten(model(attention), torch.randn(2, K)).gm),
        """\
x = input x
adapter_slots = input adapter_slots
reshape = reshape(adapter_slots, (-1, 1))
segment_rows_default = fxlora::segment_rows(reshape, 2)
a = weight a
c = weight c
square = weight square
b = weight b
d = weight d
lora_linear_default = fxlora::lora_linear(x, [a, square, b], [c, None, d], reshape, None, segment_rows_default, <pool>)
getitem = getitem(lora_linear_default, 0)
getitem_1 = getitem(lora_linear_default, 1)
getitem_2 = getitem(lora_linear_default, 2)
cat = cat([getitem, getitem_1, getitem_2], -1)
softmax = softmax(cat, -1)
return softmax
""",
    )


def test_gate_and_up_become_one_node() -> None:
    body = lambda self, x: F.linear(F.silu(F.linear(x, self.a)) * F.linear(x, self.a2), self.down).softmax(-1)  # noqa: E731
    job = rewritten(model(body, a2=weight(5, K), down=weight(K, 5)), torch.randn(2, K))
    assert members(job.plan) == ["a+a2", "down"]
    assert_expected_inline(
        graph_text(job.gm),
        """\
x = input x
adapter_slots = input adapter_slots
reshape = reshape(adapter_slots, (-1, 1))
segment_rows_default = fxlora::segment_rows(reshape, 2)
a = weight a
a2 = weight a2
lora_linear_default = fxlora::lora_linear(x, [a, a2], [None, None], reshape, None, segment_rows_default, <pool>)
getitem = getitem(lora_linear_default, 0)
getitem_1 = getitem(lora_linear_default, 1)
silu = silu(getitem, inplace=False)
mul = mul(silu, getitem_1)
down = weight down
lora_linear_default_1 = fxlora::lora_linear(mul, [down], [None], reshape, None, segment_rows_default, <pool>)
getitem_2 = getitem(lora_linear_default_1, 0)
softmax = softmax(getitem_2, -1)
return softmax
""",
    )


def own_norm(self: nn.Module, x: torch.Tensor) -> Any:
    h = x.relu()
    one = F.linear(h, self.a)
    h.mul_(2)
    return one, F.linear(h, self.b), F.linear(h, self.square)


def through_a_view(self: nn.Module, x: torch.Tensor) -> Any:
    h = x.relu()
    view = h.view(-1, K)
    one = F.linear(h, self.a)
    view.select(0, 0).zero_()
    return one, F.linear(h, self.b), F.linear(h, self.square)


def first_by_itself(self: nn.Module, x: torch.Tensor) -> Any:
    one = F.linear(x, self.a)
    return one.mul_(2), F.linear(x, self.b)


def weight_written(self: nn.Module, x: torch.Tensor) -> Any:
    """A weight that the graph itself writes is no site."""
    one = F.linear(x, self.a)
    self.b.mul_(1)
    return one, F.linear(x, self.b), F.linear(x, self.square)


def bias_written(self: nn.Module, x: torch.Tensor) -> Any:
    one = F.linear(x, self.a, self.c)
    self.d.add_(1)
    two = F.linear(x, self.b, self.d)
    self.d.sub_(1)
    return one, two, F.linear(x, self.square)


def computed_bias(self: nn.Module, x: torch.Tensor) -> Any:
    one = F.linear(x, self.a)
    return one, F.linear(x, self.b, one.detach()[0, 0, :3]), F.linear(x, self.square)


def bias_made_before(self: nn.Module, x: torch.Tensor) -> Any:
    d = self.d * 2
    return F.linear(x, self.a) + F.linear(x, self.b, d).sum(), F.linear(x, self.square)


def late_views_and_casts(self: nn.Module, x: torch.Tensor) -> Any:
    one = F.linear(x, self.a.float(), self.c)
    two = F.linear(x, self.b.clone().contiguous(), self.d.detach())
    return one, two, (x @ self.kn.to(torch.float32)), (x @ self.square.t())


def cast_between(self: nn.Module, x: torch.Tensor) -> Any:
    return F.linear(x, self.a), F.linear(x.double(), self.b.double()), F.linear(x, self.square)


def same_cast(self: nn.Module, x: torch.Tensor) -> Any:
    return F.linear(x.double(), self.a.double()), F.linear(x.double(), self.b.double())


def cast_of_what_changed(self: nn.Module, x: torch.Tensor) -> Any:
    h = x.relu()
    first = h.double()
    h.mul_(2)
    second = h.double()
    return F.linear(first, self.a.double()), F.linear(second, self.b.double())


def flattened(self: nn.Module, x: torch.Tensor) -> Any:
    one = torch.addmm(self.c, x.view(-1, K), self.a.t())
    return one, torch.addmm(self.d, x.view(-1, K), self.b.t()), F.linear(x, self.square)


def twice_on_one_input(self: nn.Module, x: torch.Tensor) -> Any:
    one, two = F.linear(x, self.square), F.linear(x, self.square)
    return one.mul_(2), two


def on_two_paths(self: nn.Module, x: torch.Tensor) -> Any:
    y = x.tanh()
    one, two = F.linear(x, self.square) + x, F.linear(y, self.square)
    return F.linear(x, self.a) + one.sum(), F.linear(y, self.b) + two.sum()


def in_another_order(self: nn.Module, x: torch.Tensor) -> Any:
    """One input, its rows along other dims: 4 or 7 of them for each request."""
    y = x.transpose(1, 2)
    return F.linear(y, self.seven), torch.einsum("bit,oi->bto", y, self.b)


def in_another_spelling(self: nn.Module, x: torch.Tensor) -> Any:
    return F.linear(x, self.a), torch.einsum("bti,oi->otb", x, self.b), self.square @ x.transpose(1, 2)


def addends(self: nn.Module, x: torch.Tensor) -> Any:
    h = x.reshape(-1, K)
    one = F.linear(h, self.square)
    return torch.addmm(one, h, self.square2), torch.addmm(h, h, self.square3)


def chained(self: nn.Module, x: torch.Tensor) -> Any:
    one = F.linear(x, self.square)
    return F.linear(F.linear(one, self.square2), self.a), F.linear(x, self.b), F.linear(one, self.kn.t())


def one_linear_between(self: nn.Module, x: torch.Tensor) -> Any:
    return F.linear(F.linear(x, self.square), self.a), F.linear(x, self.b)


def unrelated_write(self: nn.Module, x: torch.Tensor) -> Any:
    one = F.linear(x, self.a)
    self.d.add_(1)
    return one, F.linear(x, self.b)


@fx.wrap
def unknown(x: torch.Tensor) -> torch.Tensor:
    """A call of which nothing is known: it may write anything."""
    return x * 2


def opaque_call(self: nn.Module, x: torch.Tensor) -> Any:
    one = F.linear(x, self.a)
    two = unknown(self.d)
    return one, F.linear(x, self.b) + two


def through_a_shared_storage(self: nn.Module, x: torch.Tensor) -> Any:
    one = F.linear(x, self.a)
    self.part.zero_()
    return one, F.linear(x, self.whole), F.linear(x, self.b)


GROUPS: Mapping[Body, list[str]] = {
    attention: ["a+square+b"],
    own_norm: ["a", "b+square"],
    through_a_view: ["a", "b+square"],
    first_by_itself: ["a+b"],
    weight_written: ["a+square"],
    bias_written: ["a+square", "b"],
    computed_bias: ["a+square", "b"],
    bias_made_before: ["a+b+square"],
    late_views_and_casts: ["a+b+kn+square"],
    cast_between: ["a+square", "b"],
    same_cast: ["a+b"],
    cast_of_what_changed: ["a", "b"],
    flattened: ["a+b", "square"],
    twice_on_one_input: ["square+square"],
    on_two_paths: ["square+a", "square+b"],
    in_another_order: ["seven", "b"],
    in_another_spelling: ["a+b", "square"],
    addends: ["square+square2+square3"],
    chained: ["square", "square2+kn", "a", "b"],
    one_linear_between: ["square+b", "a"],
    unrelated_write: ["a+b"],
    opaque_call: ["a", "b"],
    through_a_shared_storage: ["a+b", "whole"],
}


def toy(body: Body) -> nn.Module:
    """A model whose outputs are no logits: each ends in a softmax."""

    def outputs(self: nn.Module, x: torch.Tensor) -> Any:
        return tuple(value.softmax(-1) for value in flat(body(self, x)))

    whole = weight(6, K)
    return model(outputs, square2=weight(K, K), square3=weight(K, K), seven=weight(5, 7), whole=whole, part=whole[:3])


def adapter_of(lora: Any, seed: int, rank: int, leave_out: Sequence[str] = ()) -> Adapter:
    """A random adapter over every site of a toy but some."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for site in lora.sites:
        if site.name in leave_out:
            continue
        key = f"base_model.model.{site.name}.lora"
        tensors[f"{key}_A.weight"] = torch.randn(rank, site.in_features, generator=generator)
        tensors[f"{key}_B.weight"] = torch.randn(site.out_features, rank, generator=generator)
    names = [site.name for site in lora.sites if site.name not in leave_out]
    return {"peft_type": "LORA", "r": rank, "lora_alpha": rank + 1, "target_modules": names}, tensors


def flat(value: Any) -> list[Any]:
    return [t for item in value for t in flat(item)] if isinstance(value, tuple) else [value]


@pytest.mark.parametrize("body", GROUPS, ids=lambda body: body.__name__)
def test_which_linears_join(body: Body) -> None:
    """Grouped or not, with adapters on some members or on all, every bit is the same; and the base answers hold."""
    made, x = toy(body), torch.randn(3, 7, K)
    plan = analysed(made, x).plan
    assert members(plan) == GROUPS[body], [group.reason for group in plan.groups]
    answers = []
    for grouped in (True, False):
        gm = fx.symbolic_trace(made)
        lora = fxlora.apply(gm, max_adapters=2, max_rank=8, example_inputs=(x,), group_siblings=grouped)
        assert len(lora.groups) == (len(GROUPS[body]) if grouped else len(plan.uses))
        assert all(row.max_rel_error < 1e-5 for row in lora.check(x.clone()))
        lora.load_adapter("all", adapter_of(lora, 1, 3))
        lora.load_adapter("some", adapter_of(lora, 2, 8, leave_out=["square"] if len(lora.sites) > 1 else []))
        answers.append(flat(lora(x.clone(), adapters=["all", None, "some"])))
    for one, other in zip(*answers, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(answers[0][0], flat(made(x.clone()))[0])


def test_reasons_say_why_not() -> None:
    reasons = {
        own_norm: r"apart from a: mul_ \(node mul_.*\) writes in between",
        bias_written: r"apart from a: add_ \(node add_.*\) writes in between",
        computed_bias: r"apart from a: it needs linear \(node linear.*\), which comes later",
        in_another_order: "apart from seven: its rows follow another map",
        chained: "apart from square: linears made from its result come first",
    }
    for body, words in reasons.items():
        said = [group.reason for group in analysed(toy(body), torch.randn(3, 7, K)).plan.groups]
        assert any(re.search(words, reason) for reason in said), said


def test_grouping_can_be_turned_off() -> None:
    plan = planned(attention, group_siblings=False)
    assert members(plan) == ["a", "square", "b"]
    assert plan.digest != planned(attention).digest
    assert plan.sites[0].parameter == planned(attention).sites[0].parameter


def test_the_digest_covers_members_and_their_order() -> None:
    other = lambda self, x: attention(self, x) + F.linear(x.tanh(), self.square).sum()  # noqa: E731
    digests = {planned(body).digest for body in (attention, other)}
    plan = planned(attention)
    (group,) = plan.groups
    for uses in (group.uses[::-1], group.uses[:2], group.uses):
        digests.add(digest_of(plan.sites, plan.shape, [replace(group, uses=uses)]))
    assert len(digests) == 4
    assert digest_of(plan.sites, plan.shape, plan.groups) == plan.digest


def test_an_untargeted_linear_is_not_dragged_along() -> None:
    job = rewritten(model(attention), torch.randn(2, K), targets=["a", "b"])
    assert members(job.plan) == ["a+b"]
    assert [n.args[1].target for n in job.gm.graph.nodes if op_name(n) == "linear"] == ["square"]


def test_a_site_in_two_groups_has_one_pool() -> None:
    """Called on two paths: both groups read the same memory, through handles of their own."""
    made = toy(on_two_paths)
    lora = fxlora.apply(fx.symbolic_trace(made), max_adapters=2, max_rank=8, example_inputs=(torch.randn(2, 3, K),))
    first, second = (pools_of(lora.pool.handles[group.sites]) for group in lora.groups)
    assert first[0] is second[0]
    assert first[1] is not second[1]
    (square,) = [site for site in lora.sites if site.name == "square"]
    assert sorted(site.name for site in lora.siblings(square)) == ["a", "b"]


def test_a_node_moved_for_one_group_stays_there_for_the_next() -> None:
    """The weight of `square` is read by two groups, the first of which stands earlier."""

    def body(self: nn.Module, x: torch.Tensor) -> Any:
        y = x.tanh()
        one, two = F.linear(x, self.a), F.linear(y, self.b)
        late = self.square.clone()
        return one, two, F.linear(y, late), F.linear(x, late)

    job = rewritten(toy(body), torch.randn(2, 3, K))
    assert members(job.plan) == ["a+square", "b+square"]


def test_equal_views_are_read_once() -> None:
    """Decomposed graphs make one view of x for each linear; the group keeps the first."""
    gm = rewritten(toy(flattened), torch.randn(2, 3, K)).gm
    assert sum(op_name(n) == "view" for n in gm.graph.nodes) == 1
    answers = rewritten(toy(cast_of_what_changed), torch.randn(2, 3, K)).gm
    assert sum(op_name(n) == "double" for n in answers.graph.nodes) == 4


def ops_of(lora: Any) -> list[list[str]]:
    """For each fxlora op over linears, the last names of its members."""
    return [[site.name.rpartition(".")[2] for site in group.sites] for group in lora.groups]


LAYER = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
FAMILIES = {
    "llama": [["embed_tokens"], *LAYER, *LAYER, ["lm_head"]],
    "qwen3moe": [["embed_tokens"], *[*LAYER[:2], ["gate"]] * 2, ["lm_head"]],
    "gpt2": [["wte"], *[["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]] * 2, ["lm_head"]],
}


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_models(name: str, tmp_path: Path) -> None:
    """The ops of a layer; the bits of the ungrouped graph; PEFT's answers; adapters on q and v alone."""
    entry = ZOO[name]
    gm, inputs = fxlora.capture(entry.build(), **entry.inputs()), entry.inputs(batch=4, seed=7)
    recipes = {"all": RECIPES["docs"], "code": RECIPES["code"]}
    adapters = make_adapters(entry, tmp_path, recipes)
    if name != "gpt2":
        config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"])
        adapters["qv"] = make_adapter(entry.build, config, tmp_path / "qv")
    names = ["all", None, "qv" if "qv" in adapters else "code", "code"]
    outputs = []
    for grouped in (True, False):
        lora = fxlora.apply(gm, max_adapters=3, max_rank=16, group_siblings=grouped)
        for adapter, folder in adapters.items():
            lora.load_adapter(adapter, folder)
        if grouped:
            assert ops_of(lora) == FAMILIES[name]
        ops = sum(op_name(n).startswith("fxlora::lora") for n in lora.graph_module.graph.nodes)
        assert ops == (len(FAMILIES[name]) if grouped else len(lora.sites))
        outputs.append(lora(**clone(inputs), adapters=names))
    assert torch.equal(*(tensors_of(output)["logits"] for output in outputs))
    Oracle(entry.build, adapters).check(outputs[0], inputs, names)
