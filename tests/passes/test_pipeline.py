"""The ordered passes and their runner: a report for each, lint after each edit, errors that keep their type."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import fx, nn

import fxlora.passes.pipeline as pipeline
from fxlora.passes.errors import AlreadyAppliedError, BatchDimsError, GraphError, TargetError
from fxlora.passes.pipeline import SLOTS_NAME, Job, analyse, rewrite
from tests.passes.build import analysed, handles_of, holder, job_of, rewritten

ANALYSIS = ["normalize", "size_graph", "open_calls", "find_linear_sites", "prove_rows", "make_plan", "find_siblings"]
EDITS = ["rewrite_sites", "verify_rewrite"]


def model() -> nn.Module:
    return holder(lambda self, x: self.b(self.a(x).relu()), a=nn.Linear(3, 4), b=nn.Linear(4, 5))


def test_every_pass_reports_in_order() -> None:
    job = rewritten(model(), torch.randn(2, 3))
    assert [r.name for r in job.reports] == ANALYSIS + EDITS
    assert all(r.seconds >= 0 for r in job.reports)


def test_reports_count_nodes_on_both_sides() -> None:
    """Only normalize and rewrite_sites change the graph, and each report starts where the last one ended."""
    job = rewritten(model(), torch.randn(2, 3))
    for before, after in zip(job.reports, job.reports[1:], strict=False):
        assert before.nodes_after == after.nodes_before
    changed = {r.name for r in job.reports if r.nodes_before != r.nodes_after}
    assert changed == {"normalize", "rewrite_sites"}
    assert job.reports[-1].nodes_after == len(job.gm.graph.nodes)


def test_diffs_are_made_under_debug_logging_only(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=pipeline.log.name):
        assert not any(r.diff for r in rewritten(model(), torch.randn(2, 3)).reports)
    with caplog.at_level(logging.DEBUG, logger=pipeline.log.name):
        reports = {r.name: r.diff for r in rewritten(model(), torch.randn(2, 3)).reports}
    assert "+linear = linear(x, " in reports["normalize"]
    assert "fxlora::lora_logits" in reports["rewrite_sites"]
    assert reports["prove_rows"] == ""
    assert "rewrite_sites: " in caplog.text


def test_analysis_ends_with_a_plan_and_leaves_the_ops_alone() -> None:
    job = job_of(model(), torch.randn(2, 3))
    plan = analyse(job)
    assert plan is job.plan
    assert [site.name for site in plan.sites] == ["a", "b"]
    assert not any("fxlora" in str(n.target) for n in job.gm.graph.nodes)


def test_the_slots_are_the_last_input() -> None:
    gm = rewritten(model(), torch.randn(2, 3)).gm
    assert [n.target for n in gm.graph.nodes if n.op == "placeholder"] == ["x", SLOTS_NAME]
    assert "adapter_slots" in gm.code, "recompiled"


@pytest.mark.parametrize(
    ("options", "error"),
    [({"targets": ["nothing"]}, TargetError), ({"batch_dims": {"y": 0}}, BatchDimsError)],
)
def test_an_exception_keeps_its_type(options: dict[str, object], error: type[GraphError]) -> None:
    with pytest.raises(error) as caught:
        analysed(model(), torch.randn(2, 3), **options)
    assert type(caught.value) is error


def test_a_defect_inside_a_pass_is_not_dressed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(job: Job) -> None:
        raise ZeroDivisionError("inside")

    job = job_of(model(), torch.randn(2, 3))
    with pytest.raises(ZeroDivisionError, match="inside"):
        pipeline._run(job, "broken", broken)
    assert job.reports == []


def test_an_edit_that_breaks_the_graph_fails_the_lint_of_its_own_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def corrupt(gm: fx.GraphModule, *rest: object) -> dict[fx.Node, fx.Node]:
        output = next(n for n in gm.graph.nodes if n.op == "output")
        output.args = (fx.Graph().placeholder("elsewhere"),)
        return {}

    job = analysed(model(), torch.randn(2, 3))
    monkeypatch.setattr(pipeline, "rewrite_sites", corrupt)
    with pytest.raises(RuntimeError, match="elsewhere"):
        rewrite(job, handles_of(job))
    assert job.reports[-1].name == "find_siblings"


def test_a_rewrite_that_forgets_a_use_fails_verification(monkeypatch: pytest.MonkeyPatch) -> None:
    job = analysed(model(), torch.randn(2, 3))
    monkeypatch.setattr(pipeline, "rewrite_sites", lambda *rest: {})
    with pytest.raises(GraphError, match="2 ops were planned, 0 fxlora ops"):
        rewrite(job, handles_of(job))


def test_applying_twice_is_refused() -> None:
    gm = rewritten(model(), torch.randn(2, 3)).gm
    with pytest.raises(AlreadyAppliedError):
        analysed(gm, torch.randn(2, 3), torch.zeros(2).int())


def test_an_exception_gains_the_name_of_its_pass() -> None:
    with pytest.raises(TargetError) as caught:
        analysed(model(), torch.randn(2, 3), targets=["nothing"])
    assert "make_plan" in "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
