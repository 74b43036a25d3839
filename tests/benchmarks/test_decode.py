"""The decode benchmark as far as a CPU can run it: a tiny model through every variant, its file, table and plot."""

from __future__ import annotations

import json
import sys
import types
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks import decode, decode_report, decode_run, decode_variants
from tests.benchmarks.decode_models import PRESETS, Preset, build_model, linears_of, make_bank, shared_copy
from tests.benchmarks.decode_run import Truth, judge

SMALL = ["--model", "tiny", "--layers", "1", "--context", "40", "--compiler", "eager", "--rounds", "2"]
SMALL += ["--request-tokens", "4"]


@pytest.fixture(scope="module", autouse=True)
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def shrink(x: Any, a: list[Any], h: Any, slots: Any, scale: float) -> None:
    """What vLLM's op of this name does: h[s, t] = A[s][slot of t] x[t]."""
    for i, a_SRK in enumerate(a):
        h[i] = torch.einsum("tk,trk->tr", x.float(), a_SRK[slots.long()].float()) * scale


def expand(h: Any, b: list[Any], y: Any, slots: Any, offset_start: int, add_inputs: bool) -> None:
    """y[t, its slice] += B[s][slot of t] h[s, t]."""
    assert add_inputs
    for i, b_SNR in enumerate(b):
        width = b_SNR.shape[1]
        y[:, offset_start : offset_start + width] += torch.einsum("tr,tnr->tn", h[i], b_SNR[slots.long()].float())
        offset_start += width


class Meta:
    def prepare_tensors(self, ids: torch.Tensor) -> None:
        self.ids = ids

    def meta_args(self, rows: int, specialize: bool) -> tuple[Any, ...]:
        assert rows == len(self.ids)
        return (self.ids,)


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder that stands for vLLM's ops, by plain arithmetic."""
    for name in ("vllm", "vllm.lora", "vllm.lora.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    ops: Any = types.ModuleType("vllm.lora.ops.triton_ops")
    ops.lora_shrink, ops.lora_expand = shrink, expand
    monkeypatch.setitem(sys.modules, ops.__name__, ops)
    stand_in: Any = types.ModuleType("peers")
    stand_in.vllm_meta = lambda ids, count: Meta()
    monkeypatch.setattr(decode, "load_peers", lambda folder: stand_in)
    return tmp_path


def test_every_variant_runs_and_is_right(peers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = peers / "decode.json"
    arguments = [*SMALL, "--batch", "3", "--prefill", "8", "--variants", "a,b,c,d,e", "--json", str(path)]
    plot = ["--plot", str(peers / "plot.png")] if find_spec("matplotlib") else []
    assert decode.main([*arguments, "--peers", str(peers), *plot]) == 0
    rows = decode.read_rows(path)
    variants = {"base", "ours", "ours_none", "vllm", "peft", "merged"}
    assert {(row["kind"], row["variant"]) for row in rows.values()} == {
        (kind, variant) for kind in ("decode", "prefill") for variant in variants
    }
    for row in rows.values():
        assert row["status"] == "ok"
        assert row["error"] < PRESETS["tiny"].tolerance
        assert row["ms"]["median"] > 0
        assert row["ratio"]["median"] == 1.0 or row["variant"] != "base"
        assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["ms"]["median"] * 1e3)
    assert not plot or (peers / "plot.png").stat().st_size > 0
    assert "| tiny, 1 layers | decode, 3 requests |" in capsys.readouterr().out
    # What is there is not run again.
    assert decode.planned(decode.arguments_parser().parse_args(arguments)) == []
    assert len(decode.planned(decode.arguments_parser().parse_args([*arguments, "--again"]))) == 2


def test_time_that_runs_out_leaves_the_times_of_what_was_built(tmp_path: Path) -> None:
    path = tmp_path / "decode.json"
    arguments = [*SMALL, "--batch", "2", "--variants", "a,b", "--json", str(path)]
    assert decode.main([*arguments, "--max-seconds", "79"]) == 0  # too late for a second variant, not for the first
    rows = decode.read_rows(path)
    assert [row["variant"] for row in rows.values()] == ["base"]
    assert all(row["ms"]["median"] > 0 for row in rows.values())
    left = decode.planned(decode.arguments_parser().parse_args(arguments))
    assert [variants for _, variants in left] == [["ours"]]


def test_a_mixture(tmp_path: Path) -> None:
    path = tmp_path / "decode.json"
    arguments = ["--model", "tiny-moe", *SMALL[2:], "--batch", "3", "--prefill", "8", "--variants", "a,b"]
    assert decode.main([*arguments, "--json", str(path)]) == 0
    rows = decode.read_rows(path).values()
    assert {row["variant"] for row in rows} == {"base", "ours", "ours_none"}
    assert all(row["error"] < PRESETS["tiny-moe"].tolerance for row in rows)
    sites = {row["sites"] for row in rows if row["variant"] == "ours"}
    assert sites == {7}  # q, k, v, o, two expert weights, lm_head


def test_a_variant_that_fails_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(work: Any) -> Any:
        built = decode_variants.build_base(work)
        return {"ours": built["base"]}

    monkeypatch.setitem(decode_variants.BUILDERS, "ours", wrong)  # no adapter at all
    path = tmp_path / "decode.json"
    arguments = [*SMALL, "--batch", "2", "--variants", "a,b,c", "--json", str(path)]
    assert decode.main(arguments) == 1
    rows = {row["variant"]: row for row in decode.read_rows(path).values()}
    assert rows["base"]["status"] == "ok"
    assert rows["ours"]["status"] == "red"
    assert "ms" not in rows["ours"]
    assert rows["vllm"]["status"] == "error"
    assert "no --peers folder" in rows["vllm"]["reason"]
    assert "RED" in capsys.readouterr().out
    left = decode.planned(decode.arguments_parser().parse_args(arguments))
    assert [variants for _, variants in left] == [["ours", "vllm"]]


def test_a_batch_without_effect_is_red() -> None:
    bare = torch.ones(2, 1, 5)
    truth = Truth(mixed=bare + 1e-6, first=bare, bare=bare)
    assert "change the logits" in judge("ours", bare, truth, 1e-4)[1]
    assert judge("base", bare, truth, 1e-4) == (0.0, "")
    assert "not finite" in judge("base", bare / 0, truth, 1e-4)[1]
    assert "relative error" in judge("base", 2 * bare, truth, 1e-4)[1]
    half = torch.cat([bare[:1], 2 * bare[1:]])
    assert judge("base", half, truth, 1e-4, share=0.5) == (0.0, "")
    assert judge("base", half, truth, 1e-4)[1]


def test_shapes() -> None:
    """Parameters of the real ones, which nothing here builds."""
    billions = {"qwen3-8b": 8.19, "llama-3.1-8b": 8.03}
    for name, expected in billions.items():
        model = build_model(PRESETS[name], PRESETS[name].layers, "meta")
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(expected, abs=0.01)
        assert len(linears_of(model)) == 7 * PRESETS[name].layers + 1


def test_a_shared_copy_has_the_same_parameters_and_modules_of_its_own() -> None:
    model = build_model(Preset("llama", PRESETS["tiny"].sizes, 1, torch.float32), 1, "cpu")
    shared = shared_copy(model)
    assert [id(p) for p in shared.parameters()] == [id(p) for p in model.parameters()]
    assert not {id(m) for m in shared.modules()} & {id(m) for m in model.modules()}
    assert set(make_bank(model, 2, 4)) == set(linears_of(shared))


def test_the_plan_is_printed_and_nothing_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert decode.main(["--list", "--json", str(tmp_path / "none.json"), "--prefill", "2048"]) == 0
    shown = capsys.readouterr().out
    for name in ("qwen3-8b-L36-decode-16", "llama-3.1-8b-L32-decode-64", "qwen3-8b-L36-prefill-2048"):
        assert name in shown
    with pytest.raises(SystemExit, match="no model"):
        decode.main(["--model", "none"])
    with pytest.raises(SystemExit, match="no variant"):
        decode.main(["--variants", "z"])


def record_of(**ms: float) -> dict[str, Any]:
    given = decode_run.Measurement("qwen3-8b", 36, "decode", 16)
    rows = []
    for variant, value in ms.items():
        ratio = {"median": value / ms["base"]}
        rows.append(given.row(variant, "ok", ms={"median": value}, ratio=ratio, tokens_per_s=1.0))
    return {"gpu": "a GPU", "date": "a day", "versions": {"torch": "2"}, "rows": rows}


def test_targets_and_the_table_in_a_text() -> None:
    record = record_of(base=10.0, ours=10.4, ours_none=10.2, vllm=12.0, merged=10.1)
    lines = decode_report.verdicts(record)
    assert [line.split()[0] for line in lines] == ["met", "MISSED", "met", "met"]
    assert "5.000 times less added" in lines[-1]
    text = f"before\n{decode_report.BEGIN}\nold\n{decode_report.END}\nafter\n"
    filled = decode_report.fill(text, record)
    assert filled.startswith("before\n")
    assert filled.endswith("after\n")
    assert "old" not in filled
    assert "10.40 (1.040)" in filled
    assert "MISSED" not in filled
    assert decode_report.fill(filled, record) == filled
    with pytest.raises(ValueError, match="has no"):
        decode_report.fill("nothing", record)


def test_the_file_keeps_what_other_runs_found(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    given = decode_run.Measurement("tiny", 2, "decode", 3)
    decode.add_rows(path, [given.row("base", "ok", ms={"median": 1.0}), given.row("ours", "error", reason="x")])
    decode.add_rows(path, [given.row("base", "error", reason="later"), given.row("ours", "ok", ms={"median": 2.0})])
    assert {row["variant"]: row["status"] for row in json.loads(path.read_text())["rows"]} == {
        "base": "ok",
        "ours": "ok",
    }
