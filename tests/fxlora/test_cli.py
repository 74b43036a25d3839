"""The command line: what it prints, and its exit codes (0 done, 1 the answer is no, 2 the question was wrong)."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

import fxlora.cli
from fxlora.commands.app import app
from fxlora.commands.env import PACKAGES
from fxlora.commands.inspect import fold_names
from fxlora.demo import DATA

ADAPTERS = [str(DATA / "adapters" / kind) for kind in ("code", "docs", "licence")]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})


def hide(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """Make packages look as if they were not installed."""
    find_spec = importlib.util.find_spec

    def without(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name in packages else find_spec(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without)


def test_env_names_every_package_that_matters() -> None:
    result = run("env")
    assert result.exit_code == 0
    for name in ("python", "CUDA", *PACKAGES):
        assert name in result.output
    assert torch.__version__ in result.output


def test_without_the_extra_main_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fxlora.cli, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        fxlora.cli.main()
    assert stopped.value.code == 2
    assert "typer, rich, tqdm; pip install 'fxlora[cli]'" in capsys.readouterr().err


def test_main_starts_again_with_sleeping_threads_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr("os.execv", lambda path, arguments: started.append(arguments))
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    fxlora.cli.let_idle_threads_sleep()
    assert not started
    monkeypatch.delenv("OMP_WAIT_POLICY")
    fxlora.cli.let_idle_threads_sleep()
    assert os.environ["OMP_WAIT_POLICY"] == "passive"
    assert started == [[sys.executable, *sys.orig_argv[1:]]]


def test_demo_without_peft_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "peft")
    result = run("demo")
    assert result.exit_code == 2
    assert "fxlora demo needs peft; install with: pip install 'fxlora[demo]'" in result.output


def test_bench_outside_a_clone_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("bench", "cpu")
    assert result.exit_code == 2
    assert "runs inside a clone of fxlora" in result.output


def test_bench_hands_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("runpy.run_module", lambda name, **_: ran.append((name, sys.argv[1:])))
    monkeypatch.chdir(Path(__file__).parents[2])
    result = run("bench", "linear", "--list", "--cases", "^qkv-M1-")
    assert result.exit_code == 0, result.output
    assert ran == [("tests.benchmarks.linear", ["--list", "--cases", "^qkv-M1-"])]


def test_unknown_commands_and_models_are_refused(tmp_path: Path) -> None:
    assert run("serve").exit_code == 2
    assert run("inspect", str(tmp_path / "nowhere")).exit_code == 2
    result = run("inspect", str(tmp_path))
    assert result.exit_code == 2
    assert "UnknownModelError" in result.output


def test_inspect_shows_sites_and_what_binds() -> None:
    result = run("inspect", str(DATA / "base"), *ADAPTERS)
    assert result.exit_code == 0, result.output
    assert "model.layers.[0-3].mlp.gate" in result.output
    assert "lm_head" in result.output
    for kind in ("code", "docs", "licence"):
        assert f"{kind}: binds in full" in result.output
    assert "model.layers.2.mlp.gate" in run("inspect", str(DATA / "base"), "--every").output


def test_names_fold_over_their_numbers() -> None:
    assert fold_names(["layers.0.q"]) == "layers.0.q"
    assert fold_names([f"layers.{layer}.q" for layer in (2, 10, 0, 1)]) == "layers.[0-2,10].q"
    assert (
        fold_names([f"layers.{layer}.experts.{layer % 2}.w1" for layer in range(4)]) == "layers.[0-3].experts.[0-1].w1"
    )


def stray(folder: Path) -> Path:
    """An adapter of which two tensors name no weight."""
    shutil.copytree(ADAPTERS[1], folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    for half in ("lora_A", "lora_B"):
        key = f"base_model.model.model.layers.0.self_attn.q_proj.{half}.weight"
        tensors[key.replace("q_proj", "qq_proj")] = tensors.pop(key)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_inspect_says_what_does_not_bind_and_why(tmp_path: Path) -> None:
    folder = stray(tmp_path / "stray")
    result = run("inspect", str(DATA / "base"), str(folder))
    assert result.exit_code == 1
    assert "qq_proj" in result.output
    assert "nearest" in result.output


def test_inspect_needs_no_weights(tmp_path: Path) -> None:
    shutil.copy(DATA / "base" / "config.json", tmp_path)
    assert "architectures" in json.loads((tmp_path / "config.json").read_text())
    assert run("inspect", str(tmp_path)).exit_code == 0


def adapters_in(report: Path) -> dict[str, dict[str, Any]]:
    """What an HTML report says of each adapter."""
    data = json.loads(report.read_text(encoding="utf-8").partition('id="data">')[2].partition("</script>")[0])
    return {adapter["name"]: adapter for adapter in data["adapters"]}


def test_inspect_writes_a_report_of_what_binds_and_what_does_not(tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    result = run("inspect", str(DATA / "base"), ADAPTERS[0], str(stray(tmp_path / "stray")), "--html", str(report))
    assert result.exit_code == 1
    assert f"report: {report}" in result.output
    shown = adapters_in(report)
    assert shown["code"]["places"]
    assert not shown["code"]["unbound"]
    assert [key.split(".")[-3] for key, _, _ in shown["stray"]["unbound"]] == ["qq_proj", "qq_proj"]
    assert shown["stray"]["unbound"][0][2] == "model.layers.0.self_attn.q_proj"


def test_dump_writes_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    result = run("dump", str(DATA / "base"), "--adapter", ADAPTERS[0], "--adapter", ADAPTERS[2], "-o", str(folder))
    assert result.exit_code == 0, result.output
    assert "graph.html" in result.output
    shown = adapters_in(folder / "graph.html")
    assert {name: adapter["slot"] for name, adapter in shown.items()} == {"code": 0, "licence": 1}
    assert "adapters code, licence" in (folder / "graph.txt").read_text(encoding="utf-8")


def test_dump_writes_one_file_and_says_what_does_not_bind(tmp_path: Path) -> None:
    one = tmp_path / "gate.txt"
    options = ("--focus", "model.layers.0.mlp.gate", "-o", str(one))
    assert run("dump", str(DATA / "base"), *options).exit_code == 0
    assert one.read_text(encoding="utf-8").splitlines()[1] == "model.layers.0.mlp.gate"
    page = tmp_path / "page.html"
    result = run("dump", str(DATA / "base"), "--adapter", str(stray(tmp_path / "stray")), "-o", str(page))
    assert result.exit_code == 1
    assert "stray: UnboundTensorError: 2 adapter tensors have no site" in result.output
    assert len(adapters_in(page)["stray"]["unbound"]) == 2


def test_dump_refuses_what_it_cannot_write(tmp_path: Path) -> None:
    result = run("dump", str(DATA / "base"), "-o", str(tmp_path / "g.docx"))
    assert result.exit_code == 2
    assert "DumpFormatError: g.docx ends in no known format" in result.output
