"""Graphs as text: one line a node, handles hidden; diffs show what changed and nothing else."""

from __future__ import annotations

import torch
from torch import fx, nn

from fxlora.passes.diff import graph_diff, graph_text
from fxlora.passes.pipeline import rewrite
from tests.passes.build import analysed, holder, traced, weight


def lines(gm: fx.GraphModule) -> list[str]:
    return graph_text(gm).splitlines()


def test_one_line_a_node() -> None:
    gm = traced(holder(lambda self, x, y: torch.add(x, self.w, alpha=2).view(-1, 3), w=weight(3)))
    assert lines(gm) == [
        "x = input x",
        "y = input y",
        "w = weight w",
        "add = add(x, w, alpha=2)",
        "view = view(add, -1, 3)",
        "return view",
    ]
    assert graph_text(gm).endswith("return view\n")


def test_nested_arguments_show_nodes_by_name() -> None:
    gm = traced(lambda x, y: {"a": torch.cat([x, y], dim=1)[:, 1:-1], "b": (x, None), "c": x.to(torch.float64)})
    text = graph_text(gm)
    assert "cat = cat([x, y], dim=1)" in text
    assert "getitem = getitem(cat, (:, 1:-1))" in text
    assert "to = to(x, torch.float64)" in text
    assert "return {a: getitem, b: (x, None), c: to}" in text


def test_slices_may_hold_nodes() -> None:
    assert "getitem(x, (:size,))" in graph_text(traced(lambda x: x[: x.size(0),]))
    assert "getitem(x, (::size,))" in graph_text(traced(lambda x: x[:: x.size(0),]))


def test_unknown_calls_keep_their_mark() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_module("proj", (x,)))
    assert "proj = ?proj(x)" in graph_text(fx.GraphModule({"proj": nn.Linear(2, 2)}, graph))


def test_handles_do_not_show() -> None:
    """They differ from run to run; two rewrites of one model are the same text."""
    shown = []
    for handle in (1, 987654321):
        model = holder(lambda self, ids: self.p(self.e(ids)), e=nn.Embedding(7, 3), p=nn.Linear(3, 4))
        job = analysed(model, torch.randint(0, 7, (2, 4)))
        rewrite(job, dict.fromkeys(job.plan.site_groups, handle))
        shown.append(graph_text(job.gm))
    assert shown[0] == shown[1]
    assert shown[0].count("<pool>") == 2
    assert "segment_rows(reshape_1, 2)" in shown[0], "what is no handle stays"


def test_equal_texts_have_no_diff() -> None:
    assert graph_diff("a\nb\n", "a\nb\n") == ""


def test_a_diff_shows_the_change_with_one_line_around_it() -> None:
    before = "\n".join("abcdefg")
    assert graph_diff(before, before.replace("d", "D")).splitlines() == [
        "--- before",
        "+++ after",
        "@@ -3,3 +3,3 @@",
        " c",
        "-d",
        "+D",
        " e",
    ]


def test_a_diff_of_graphs_names_the_ops() -> None:
    plain, scaled = traced(lambda x: x.relu()), traced(lambda x: x.relu() * 2)
    changed = [line for line in graph_diff(graph_text(plain), graph_text(scaled)).splitlines() if line[0] in "+-"]
    assert changed == ["--- before", "+++ after", "-return relu", "+mul = mul(relu, 2)", "+return mul"]
