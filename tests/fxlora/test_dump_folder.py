"""`FXLORA_DUMP`, reports that errors point to, and `explain`: what a user has when something was refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxlora
from fxlora.dumps.folder import dump_if_asked
from fxlora.errors import (
    AlreadyAppliedError,
    BatchSizeError,
    BatchTypeError,
    DumpPathError,
    FxloraError,
    RowsNotProvenError,
    UnboundTensorError,
    UnknownAdapterError,
)
from fxlora.passes.diff import Snapshot
from tests.fxlora.dump_cases import HOSTILE, refused, shared
from tests.passes.build import analysed, rewritten
from tests.toys.base import make_adapter


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FXLORA_DUMP", str(tmp_path / "dumps"))
    return tmp_path / "dumps"


def data_of(report: Path) -> dict[str, Any]:
    text = report.read_text(encoding="utf-8")
    return json.loads(text.partition('id="data">')[2].partition("</script>")[0])


def test_nothing_is_written_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FXLORA_DUMP", raising=False)
    monkeypatch.chdir(tmp_path)
    assert shared().dump_folder is None
    assert list(tmp_path.iterdir()) == []


def test_every_apply_gets_a_numbered_folder(root: Path) -> None:
    first, second = shared(), shared()
    assert first.dump_folder == root / "0001-Shared"
    assert second.dump_folder == root / "0002-Shared"
    for path in (first.dump_folder, second.dump_folder):
        assert (path / "graph.html").is_file()
        assert (path / "graph.diff.txt").read_text(encoding="utf-8").startswith("pass")
    index = (root / "index.html").read_text(encoding="utf-8")
    assert index.index("0001-Shared/graph.html") < index.index("0002-Shared/graph.html")
    assert index.count("6 sites") == 2


def test_a_job_of_a_compile_can_be_dumped(root: Path) -> None:
    """As the backend of torch.compile does, which has no LoraModule."""
    job = rewritten(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5)), torch.randn(2, 3))
    folder = dump_if_asked(job, title="compiled")
    assert folder == root / "0001-compiled"
    text = (folder / "graph.txt").read_text(encoding="utf-8")
    assert "compiled (after the rewrite)" in text
    assert "fxlora::lora_linear" in text
    assert "fxlora::" not in (folder / "before.txt").read_text(encoding="utf-8")


def test_a_refused_target_points_to_its_picture(root: Path) -> None:
    _, gm, x = refused()
    with pytest.raises(RowsNotProvenError) as caught:
        fxlora.apply(gm, targets=["second"], example_inputs=x)
    report = root / "0001-Mixing" / "graph.html"
    assert str(caught.value).endswith(f"the graph is drawn in {report}")
    data = data_of(report)
    assert "mean over the request dim" in data["refusal"]
    (skip,) = data["skipped"]
    assert skip["name"] == "second.weight"
    nodes, texts = data["stages"][0]["nodes"], data["texts"]
    (call,) = skip["calls"]
    assert nodes[call][0] == "linear_1"
    mixed = {node[0]: texts[node[6]] for node in nodes if node[7]}
    assert list(mixed) == ["mean", "add", "linear_1"]
    assert all(text.startswith("mixed: mean over the request dim mixes requests") for text in mixed.values())
    assert "refused: RowsNotProvenError" in (root / "index.html").read_text(encoding="utf-8")


def test_a_refused_adapter_points_to_its_report(root: Path) -> None:
    model, gm, x = refused()
    lora = fxlora.apply(gm, max_adapters=1, max_rank=2, example_inputs=x)
    with pytest.raises(UnboundTensorError) as caught:
        lora.load_adapter("mine", make_adapter(model, ["first", "second"], rank=2, seed=1))
    report = root / "0001-Mixing" / "refused-1.html"
    assert str(caught.value).endswith(f"the graph is drawn in {report}")
    assert [item.key.split(".")[-3] for item in caught.value.unbound] == ["second", "second"]
    (adapter,) = data_of(report)["adapters"]
    assert adapter["slot"] is None
    assert [key for key, _, _ in adapter["unbound"]] == [item.key for item in caught.value.unbound]
    assert lora.adapter_names == ()


def test_a_job_that_fails_early_is_dumped_too(root: Path) -> None:
    with pytest.raises(FxloraError, match="targets names 'nothing'"):
        fxlora.apply(shared().base, targets=["nothing"])
    folders = sorted(path.name for path in root.iterdir() if path.is_dir())
    assert folders == ["0001-Shared", "0002-Shared"]
    assert "refused: " in (root / "0002-Shared" / "graph.diff.txt").read_text(encoding="utf-8")
    with pytest.raises(AlreadyAppliedError):
        fxlora.apply(shared().graph_module)


def test_a_path_that_cannot_be_written_is_an_error_but_hides_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FXLORA_DUMP", str(tmp_path / "file"))
    with pytest.raises(DumpPathError, match="FXLORA_DUMP="):
        shared()
    _, gm, x = refused()
    with pytest.raises(RowsNotProvenError, match="mixes requests, at mean"):
        fxlora.apply(gm, targets=["second"], example_inputs=x)


def test_a_snapshot_stays_as_it_was() -> None:
    job = analysed(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), torch.randn(2, 3))
    snapshot, text = Snapshot.of(job.gm), Snapshot.of(job.gm).text()
    relu = next(n for n in job.gm.graph.nodes if "relu" in n.name)
    relu.replace_all_uses_with(relu.args[0])
    job.gm.graph.erase_node(relu)
    assert snapshot.text() == text
    assert Snapshot.of(job.gm).text() != text


def test_explain_says_which_slot_and_why() -> None:
    lora = shared()
    text = lora.explain(1, ["plain", HOSTILE, None])
    assert text.startswith(f"request 1: adapter {HOSTILE!r}, slot 1\n  rows 1: adapter_slots -> expand(")
    assert "    layers.0-1.up (2 sites), linear: rank 3, scaling 1.33333\n" in text
    assert "    layers.2.up, linear: adds nothing here\n" in text
    assert "    head, logits: adds nothing here\n" in text
    bare = lora.explain(2, ["plain", HOSTILE, None])
    assert bare.startswith(
        "request 2: no adapter, slot -1: the base model alone\n  rows 1: adapter_slots -> expand(*, *)"
    )
    assert "    layers.0-2.up (3 sites), linear: adds nothing here\n" in bare
    assert lora.explain(adapters=["plain", None]).count("request ") == 2
    assert lora.explain(3, "plain").startswith("request 3: adapter 'plain', slot 0\n")


def test_explain_names_what_is_no_site() -> None:
    _, gm, x = refused()
    text = fxlora.apply(gm, max_adapters=1, max_rank=2, example_inputs=x).explain(0)
    assert text.splitlines()[-2:] == [
        "no site",
        "  second.weight: its rows mix requests: mean over the request dim mixes requests, at mean (node mean)",
    ]


def test_explain_per_token() -> None:
    model = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 4)).eval()
    gm = fxlora.capture(model, torch.ones(2, 3).long())
    lora = fxlora.apply(gm, max_adapters=2, max_rank=2, batch_dims=(0, 1))
    lora.load_adapter("a", make_adapter(model, ["1"], rank=2, seed=1))
    names = [["a", None, "a"], [None, None, "a"]]
    assert lora.explain((0, 0), names).startswith("request 0, token 0: adapter 'a'")
    assert lora.explain((0, 1), names).startswith("request 0, token 1: no adapter")
    whole = lora.explain(0, names)
    assert "request 0: no adapter" in whole
    assert "request 0: adapter 'a'" in whole


@pytest.mark.parametrize(("row", "adapters", "error"), [
    (2, ["plain", None], BatchSizeError), (-1, "plain", BatchSizeError), ((0, 0), ["plain"], BatchSizeError),
    (0, ["nobody"], UnknownAdapterError),
])  # fmt: skip
def test_explain_refuses_what_a_call_would(row: Any, adapters: Any, error: type[FxloraError]) -> None:
    with pytest.raises(error):
        shared().explain(row, adapters)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("plain", "row is 'plain'; expected the number of a request, or None for every request; the adapters"),
        (1.5, "row is 1.5; expected the number of a request"),
        ({"row": 1}, "expected the number of a request"),
        ((0, "a"), "row is (0, 'a')"),
    ],
)
def test_what_is_no_row_to_explain(row: Any, words: str) -> None:
    x = torch.randn(3, 4)
    lora = fxlora.apply(torch.fx.symbolic_trace(nn.Linear(4, 4)), max_adapters=1, max_rank=2, example_inputs=x)
    with pytest.raises(BatchTypeError, match=re.escape(words)):
        lora.explain(row)
