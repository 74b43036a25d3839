"""Each structural break of a rewritten graph is caught; a sound one passes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

from fxlora.passes.errors import VerifyError
from fxlora.passes.graph import op_name
from fxlora.passes.pipeline import Job
from fxlora.passes.verify import verify_rewrite
from tests.passes.build import handles_of, holder, rewritten

Break = Callable[[Job], None]


def sound() -> Job:
    """Two linears, rewritten."""
    model = holder(lambda self, x: self.b(self.a(x)).softmax(-1), a=nn.Linear(3, 4), b=nn.Linear(4, 5))
    return rewritten(model, torch.randn(2, 3))


def verify(job: Job) -> None:
    verify_rewrite(job.gm, job.plan, job.results, job.weights, handles_of(job), ["x", "adapter_slots"])


def first(job: Job, name: str) -> fx.Node:
    return next(n for n in job.gm.graph.nodes if op_name(n) == name)


def test_a_sound_rewrite_passes() -> None:
    verify(sound())


def add_an_input(job: Job) -> None:
    last = [n for n in job.gm.graph.nodes if n.op == "placeholder"][-1]
    with job.gm.graph.inserting_after(last):
        job.gm.graph.placeholder("extra")


def rename_an_input(job: Job) -> None:
    next(n for n in job.gm.graph.nodes if n.op == "placeholder").target = "y"


def swap_the_inputs(job: Job) -> None:
    x, slots = [n for n in job.gm.graph.nodes if n.op == "placeholder"]
    x.prepend(slots)


def undo_a_use(job: Job) -> None:
    """A plain linear where an op was planned."""
    picked = first(job, "getitem")
    op = picked.args[0]
    with job.gm.graph.inserting_before(picked):
        plain = job.gm.graph.call_function(nn.functional.linear, (op.args[0], op.args[1][0]))
    picked.replace_all_uses_with(plain)
    job.gm.graph.erase_node(picked)
    job.gm.graph.erase_node(op)


def add_an_op(job: Job) -> None:
    op = first(job, "fxlora::lora_linear")
    with job.gm.graph.inserting_after(op):
        job.gm.graph.node_copy(op)


def keep_a_replaced_call(job: Job) -> None:
    """The planned use is one that still stands in the graph."""
    use = job.plan.uses[0]
    object.__setattr__(use, "node", first(job, "softmax"))


def leave_the_ops_unread(job: Job) -> None:
    softmax = first(job, "softmax")
    x = next(n for n in job.gm.graph.nodes if n.op == "placeholder")
    softmax.replace_input_with(softmax.args[0], x)
    for node in reversed(list(job.gm.graph.nodes)):
        if op_name(node) == "getitem":
            if node.users:
                node.replace_all_uses_with(x)
            job.gm.graph.erase_node(node)


def read_a_weight_twice(job: Job) -> None:
    weight = next(n for n in job.gm.graph.nodes if n.op == "get_attr")
    with job.gm.graph.inserting_after(weight):
        job.gm.graph.get_attr(str(weight.target))


BREAKS: dict[Break, str] = {
    add_an_input: "signature changed.*extra",
    rename_an_input: r"signature changed.*found \['y'",
    swap_the_inputs: "signature changed",
    undo_a_use: "2 ops were planned, 1 fxlora ops",
    add_an_op: "2 ops were planned, 3 fxlora ops",
    keep_a_replaced_call: r"replaced calls still stand in the graph: \['softmax'\]",
    leave_the_ops_unread: "the result of linear is not member 0 of lora_linear_default",
    read_a_weight_twice: "1 weights are read through more than one node",
}


@pytest.mark.parametrize("damage", BREAKS, ids=lambda damage: damage.__name__)
def test_each_break_is_caught(damage: Break) -> None:
    job = sound()
    damage(job)
    with pytest.raises(VerifyError, match=BREAKS[damage]):
        verify(job)


def siblings() -> Job:
    """Two linears of one input, alike in shape, as one op."""
    model = holder(lambda self, x: self.a(x).relu() + self.b(x).tanh(), a=nn.Linear(3, 4), b=nn.Linear(3, 4))
    return rewritten(model, torch.randn(2, 3))


def picks(job: Job) -> list[fx.Node]:
    return [n for n in job.gm.graph.nodes if op_name(n) == "getitem"]


def swap_the_picks(job: Job) -> None:
    for node, index in zip(picks(job), (1, 0), strict=True):
        node.args = (node.args[0], index)


def pick_one_twice(job: Job) -> None:
    picks(job)[1].args = picks(job)[0].args


def swap_the_weights(job: Job) -> None:
    op = first(job, "fxlora::lora_linear")
    op.args = (op.args[0], op.args[1][::-1], *op.args[2:])


def swap_the_readers(job: Job) -> None:
    relu, tanh = first(job, "relu"), first(job, "tanh")
    relu.args, tanh.args = tanh.args, relu.args


def take_another_handle(job: Job) -> None:
    op = first(job, "fxlora::lora_linear")
    op.args = (*op.args[:-1], 7)


def leave_a_member_unread(job: Job) -> None:
    tanh = first(job, "tanh")
    tanh.args = (picks(job)[0],)


def forget_a_member(job: Job) -> None:
    (group,) = job.plan.groups
    object.__setattr__(group, "uses", group.uses[:1])


GROUP_BREAKS: dict[Break, str] = {
    swap_the_picks: "the result of linear is not member 0 of",
    pick_one_twice: "the result of linear_1 is not member 1 of",
    swap_the_weights: r"does not read the weights of \['a', 'b'\], in order",
    swap_the_readers: r"is not read by what read linear: \['relu'\]",
    take_another_handle: r"does not have the handle of \['a', 'b'\]",
    leave_a_member_unread: r"is not read by what read linear_1: \['tanh'\]",
    forget_a_member: "the groups do not hold each of the 2 planned uses once",
}


@pytest.mark.parametrize("damage", GROUP_BREAKS, ids=lambda damage: damage.__name__)
def test_each_break_of_a_group_is_caught(damage: Break) -> None:
    job = siblings()
    assert len(job.plan.groups) == 1
    verify(job)
    damage(job)
    with pytest.raises(VerifyError, match=GROUP_BREAKS[damage]):
        verify(job)


def experts() -> Job:
    """Two weights of experts over one routing, rewritten."""

    def body(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        ids = x.argmax(-1)
        h = torch.bmm(self.a[ids], x.unsqueeze(-1)).relu()
        return torch.bmm(self.b[ids], h).squeeze(-1)

    model = holder(body, a=torch.randn(3, 4, 3), b=torch.randn(3, 5, 4))
    return rewritten(model, torch.randn(7, 3), targets="all")


def take_another_table(job: Job) -> None:
    """A table of the same routing, but of other rows."""
    op, table = first(job, "fxlora::lora_experts"), first(job, "fxlora::segment_experts")
    slots = next(n for n in job.gm.graph.nodes if n.target == "adapter_slots")
    with job.gm.graph.inserting_before(op):
        other = job.gm.graph.call_function(table.target, (slots, *table.args[1:]))
    op.args = (*op.args[:5], other, op.args[6])


def count_other_experts(job: Job) -> None:
    table = first(job, "fxlora::segment_experts")
    table.args = (*table.args[:3], 4, table.args[4])


def forget_the_routing(job: Job) -> None:
    table = first(job, "fxlora::segment_experts")
    table.args = (table.args[0], None, None, *table.args[3:])


def take_the_other_weight(job: Job) -> None:
    one, two = [n for n in job.gm.graph.nodes if op_name(n) == "fxlora::lora_experts"]
    two.args = (two.args[0], one.args[1], *two.args[2:])


def read_around_an_op(job: Job) -> None:
    relu = first(job, "relu")
    relu.args = (next(n for n in job.gm.graph.nodes if n.op == "placeholder"),)


EXPERT_BREAKS: dict[Break, str] = {
    take_another_table: "does not read the table of its own rows over 3 experts",
    count_other_experts: "does not read the table of its own rows over 3 experts",
    forget_the_routing: "does not read the table of its own rows over 3 experts",
    take_the_other_weight: r"does not read the weights of \['b'\]",
    read_around_an_op: "is not read by what read bmm",
}


@pytest.mark.parametrize("damage", EXPERT_BREAKS, ids=lambda damage: damage.__name__)
def test_each_break_of_experts_is_caught(damage: Break) -> None:
    job = experts()
    assert len(job.plan.groups) == 2
    assert sum(op_name(n) == "fxlora::segment_experts" for n in job.gm.graph.nodes) == 1
    verify(job)
    damage(job)
    with pytest.raises(VerifyError, match=EXPERT_BREAKS[damage]):
        verify(job)


def test_a_read_of_an_erased_node_is_caught() -> None:
    """torch's own lint sees it first, or the check here does."""
    job = sound()
    softmax = first(job, "softmax")
    graph = fx.Graph()
    softmax.args = (graph.placeholder("elsewhere"), -1)
    with pytest.raises((VerifyError, RuntimeError), match="elsewhere"):
        verify(job)


def test_a_use_before_its_definition_is_caught() -> None:
    job = sound()
    op = first(job, "fxlora::lora_linear")
    op.append(op.args[3])
    with pytest.raises((VerifyError, RuntimeError), match="before it has been defined"):
        verify(job)


def test_one_unread_op_is_caught() -> None:
    model = holder(lambda self, x: (self.a(x), self.b(x)), a=nn.Linear(3, 4), b=nn.Linear(3, 4))
    job = rewritten(model, torch.randn(2, 3))
    output = next(n for n in job.gm.graph.nodes if n.op == "output")
    output.args = ((output.args[0][0],),)
    with pytest.raises(VerifyError):
        verify(job)
