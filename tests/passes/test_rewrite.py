"""Golden texts of rewritten graphs, and what a rewrite owes: one node per row map, base answers, arguments read late.

`EXPECTTEST_ACCEPT=1 pytest tests/passes/test_rewrite.py` writes the texts anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import fx, nn
from torch.nn import functional as F

from fxlora.kernels.registry import register_runtime, unregister_runtime
from fxlora.passes.diff import graph_text
from fxlora.passes.graph import op_name
from fxlora.passes.pipeline import Job, rewrite
from tests.passes.build import analysed, holder, rewritten, weight

Body = Callable[..., Any]
aten = torch.ops.aten


def texts(model: nn.Module, *examples: torch.Tensor, **options: Any) -> tuple[str, str]:
    """Graph text before and after the whole rewrite."""
    job = analysed(model, *examples, **options)
    before = graph_text(job.gm)
    rewrite(job, dict.fromkeys(job.plan.site_groups, 1))
    return before, graph_text(job.gm)


def test_linear_and_embedding() -> None:
    model = holder(
        lambda self, ids: self.proj(aten.embedding.default(self.table, ids).relu()).softmax(-1),
        table=weight(7, 3),
        proj=nn.Linear(3, 5, bias=False),
    )
    before, after = texts(model, torch.randint(0, 7, (2, 4)))
    assert_expected_inline(
        before,
        """\
ids = input ids
table = weight table
embedding_default = embedding(table, ids)
relu = relu(embedding_default)
weight = weight proj.weight
linear = linear(relu, weight, None)
softmax = softmax(linear, -1)
return softmax
""",
    )
    assert_expected_inline(
        after,
        """\
ids = input ids
adapter_slots = input adapter_slots
unsqueeze = unsqueeze(adapter_slots, 1)
sym_size_int = sym_size(ids, 0)
sym_size_int_1 = sym_size(ids, 1)
broadcast_to = expand(unsqueeze, (sym_size_int, sym_size_int_1))
reshape = reshape(broadcast_to, (-1,))
reshape_1 = reshape(reshape, (-1, 1))
segment_rows_default = fxlora::segment_rows(reshape_1, 2)
table = weight table
lora_embedding_default = fxlora::lora_embedding(ids, table, reshape_1, None, segment_rows_default, <pool>)
relu = relu(lora_embedding_default)
weight = weight proj.weight
lora_linear_default = fxlora::lora_linear(relu, [weight], [None], reshape_1, None, segment_rows_default, <pool>)
getitem = getitem(lora_linear_default, 0)
softmax = softmax(getitem, -1)
return softmax
""",
    )


def test_tied_head_with_logits() -> None:
    model = holder(
        lambda self, ids: torch.tanh(F.linear(aten.embedding.default(self.table, ids)[:, -1:], self.table) / 30) * 30,
        table=weight(7, 3),
    )
    before, after = texts(model, torch.randint(0, 7, (2, 4)))
    assert_expected_inline(
        before,
        """\
ids = input ids
table = weight table
embedding_default = embedding(table, ids)
getitem = getitem(embedding_default, (:, -1:))
linear = linear(getitem, table)
truediv = div(linear, 30)
tanh = tanh(truediv)
mul = mul(tanh, 30)
return mul
""",
    )
    assert_expected_inline(
        after,
        """\
ids = input ids
adapter_slots = input adapter_slots
reshape_2 = reshape(adapter_slots, (-1, 1))
segment_rows_default_1 = fxlora::segment_rows(reshape_2, 2)
unsqueeze = unsqueeze(adapter_slots, 1)
sym_size_int = sym_size(ids, 0)
sym_size_int_1 = sym_size(ids, 1)
broadcast_to = expand(unsqueeze, (sym_size_int, sym_size_int_1))
reshape = reshape(broadcast_to, (-1,))
reshape_1 = reshape(reshape, (-1, 1))
segment_rows_default = fxlora::segment_rows(reshape_1, 2)
table = weight table
lora_embedding_default = fxlora::lora_embedding(ids, table, reshape_1, None, segment_rows_default, <pool>)
getitem = getitem(lora_embedding_default, (:, -1:))
lora_logits_default = fxlora::lora_logits(getitem, table, None, reshape_2, None, segment_rows_default_1, <pool>)
truediv = div(lora_logits_default, 30)
tanh = tanh(truediv)
mul = mul(tanh, 30)
return mul
""",
    )


def gated() -> nn.Module:
    """A router gate on two paths, called by both."""
    gate = nn.Linear(3, 4, bias=False)
    runner = holder(lambda self, x: self.gate(x), gate=gate)
    return holder(lambda self, x: (self.gate(x) + self.runner(x.tanh())).softmax(-1), gate=gate, runner=runner)


def test_gate_shared_by_two_paths() -> None:
    before, after = texts(gated(), torch.randn(2, 3))
    assert_expected_inline(
        before,
        """\
x = input x
weight = weight gate.weight
linear = linear(x, weight, None)
tanh = tanh(x)
linear_1 = linear(tanh, weight, None)
add = add(linear, linear_1)
softmax = softmax(add, -1)
return softmax
""",
    )
    assert_expected_inline(
        after,
        """\
x = input x
adapter_slots = input adapter_slots
reshape = reshape(adapter_slots, (-1, 1))
segment_rows_default = fxlora::segment_rows(reshape, 2)
weight = weight gate.weight
lora_linear_default = fxlora::lora_linear(x, [weight], [None], reshape, None, segment_rows_default, <pool>)
getitem = getitem(lora_linear_default, 0)
tanh = tanh(x)
lora_linear_default_1 = fxlora::lora_linear(tanh, [weight], [None], reshape, None, segment_rows_default, <pool>)
getitem_1 = getitem(lora_linear_default_1, 0)
add = add(getitem, getitem_1)
softmax = softmax(add, -1)
return softmax
""",
    )


def count(gm: fx.GraphModule) -> Counter[str]:
    return Counter(op_name(n).removeprefix("fxlora::") for n in gm.graph.nodes)


def test_both_uses_of_a_site_share_weight_handle_and_rows() -> None:
    gm = rewritten(gated(), torch.randn(2, 3)).gm
    ops = [n for n in gm.graph.nodes if op_name(n) == "fxlora::lora_linear"]
    assert len(ops) == 2
    assert ops[0].args[1:] == ops[1].args[1:]
    assert count(gm)["segment_rows"] == 1


def test_one_segment_rows_per_distinct_row_map() -> None:
    """Rows of all tokens (thrice, reached by different views), of the last token, and of pairs of tokens."""

    def body(self: nn.Module, x: torch.Tensor) -> Any:
        flat = x.reshape(-1, 6)
        again = self.b(x.transpose(0, 1).contiguous().transpose(0, 1))
        return self.a(flat).sum(-1), again, self.c(x + 1), self.d(x[:, -1]), self.e(x[:, 0]), self.f(x.repeat(2, 1, 1))

    model = holder(body, **{name: nn.Linear(6, 3) for name in "abcdef"})
    gm = rewritten(model, torch.randn(2, 4, 6)).gm
    assert count(gm)["segment_rows"] == 3
    by_weight = {
        n.args[1][0].target[0]: n.args[5].name for n in gm.graph.nodes if op_name(n) in ("fxlora::lora_linear",)
    }
    groups: dict[str, set[str]] = {}
    for name, segments in by_weight.items():
        groups.setdefault(segments, set()).add(name)
    assert sorted(map(sorted, groups.values())) == [["a", "b", "c"], ["d", "e"], ["f"]]


def test_the_slots_are_the_last_input_and_maps_follow_the_batch() -> None:
    job = rewritten(holder(lambda self, x: self.p(x).sum(-1), p=nn.Linear(3, 5)), torch.randn(2, 4, 3))
    assert [n.target for n in job.gm.graph.nodes if n.op == "placeholder"] == ["x", "adapter_slots"]
    rows = next(n for n in job.gm.graph.nodes if op_name(n) == "fxlora::segment_rows").args[0]
    recorded: dict[str, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            if op_name(n) == "fxlora::lora_linear":
                return [torch.zeros(1)]
            recorded[n.name] = super().run_node(n)
            return recorded[n.name]

    Recorder(job.gm, garbage_collect_values=False).run(torch.randn(3, 2, 3), torch.tensor([0, -1, 1]).int())
    assert recorded[rows.name].flatten().tolist() == [0, 0, -1, -1, 1, 1]
    assert recorded[rows.name].dtype == torch.int32


@contextmanager
def served(job: Job) -> Iterator[fx.GraphModule]:
    """The rewritten graph over sites that own no memory: it computes what the base computes."""
    groups = job.plan.site_groups
    handles = register_runtime(job.plan.digest, [(None,) * len(sites) for sites in groups])
    try:
        yield rewrite(job, dict(zip(groups, handles, strict=True)))
    finally:
        unregister_runtime(handles)


B, T, K, N = 2, 3, 4, 5
SPELLINGS: dict[str, Body] = {
    "linear with bias": lambda self, x: F.linear(x, self.w, self.b),
    "x @ w.T": lambda self, x: x @ self.w.T,
    "x @ kn by the identity": lambda self, x: x @ self.square.permute(0, 1),
    "x @ kn": lambda self, x: x @ self.kn,
    "addmm": lambda self, x: torch.addmm(self.b, x.reshape(-1, K), self.kn),
    "addmm of a matrix": lambda self, x: torch.addmm(x.reshape(-1, K)[:, :1], x.reshape(-1, K), self.kn),
    "w @ x": lambda self, x: self.w @ x.transpose(1, 2),
    "einsum moved": lambda self, x: torch.einsum("bti,oi->otb", x, self.w),
    "einsum from the front": lambda self, x: torch.einsum("ibt,io->bto", x.permute(2, 0, 1), self.kn),
    "bmm": lambda self, x: torch.bmm(x, self.w.t().expand(B, -1, -1)),
    "bmm of kn": lambda self, x: torch.bmm(x, self.kn.expand(B, -1, -1)),
    "cast": lambda self, x: F.linear(x.double(), self.w.double()),
    "square": lambda self, x: (x @ self.square) @ self.square,
    "square transposed": lambda self, x: x @ self.square.t(),
    "site after site": lambda self, x: F.linear(F.linear(F.linear(x, self.square), self.w), self.kn),
    "bias of a site": lambda self, x: F.linear(x, self.w, self.b) @ self.w + F.linear(x, self.square),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_without_adapters_the_rewritten_graph_is_the_base(spelling: str) -> None:
    model = holder(SPELLINGS[spelling], w=weight(N, K), kn=weight(K, N), square=weight(K, K), b=weight(N))
    x = torch.randn(B, T, K)
    job = analysed(model, x)
    assert job.plan.uses, job.plan.skipped
    with served(job) as gm:
        assert count(gm)["lora_linear"] + count(gm)["lora_logits"] == len(job.plan.uses)
        got = gm(x, torch.full((B,), -1, dtype=torch.int32))
    want = model(x)
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
    "body",
    [
        lambda self, ids: F.embedding(ids, self.table),
        lambda self, ids: F.embedding(ids, self.table.double()) @ self.square.double(),
        lambda self, ids: torch.index_select(self.table, 0, ids[:, 0]),
    ],
)
def test_embeddings_without_adapters_are_the_base(body: Body) -> None:
    model = holder(body, table=weight(7, K), square=weight(K, K))
    ids = torch.randint(0, 7, (B, T))
    job = analysed(model, ids)
    with served(job) as gm:
        assert count(gm)["lora_embedding"] == 1
        assert torch.equal(gm(ids, torch.full((B,), -1, dtype=torch.int32)), model(ids))


@pytest.mark.parametrize(
    "body",
    [
        lambda self, x: self.w @ (self.square @ x.transpose(1, 2)),
        lambda self, x: torch.addmm(F.linear(x[:, 0], self.w), x[:, 1], self.kn),
        lambda self, x: torch.einsum("...i,oi->...o", F.linear(x, self.square), self.w),
    ],
    ids=["w @ (w @ x)", "addmm of a site's output", "einsum with dots"],
)
def test_a_site_that_reads_another_ones_output(body: Body) -> None:
    model = holder(body, w=weight(N, K), kn=weight(K, N), square=weight(K, K))
    x = torch.randn(B, T, K)
    with served(analysed(model, x)) as gm:
        assert torch.allclose(gm(x, torch.full((B,), -1, dtype=torch.int32)), model(x), atol=1e-5)
