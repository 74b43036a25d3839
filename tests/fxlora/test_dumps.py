"""Dumps as files: every format, round trips, the same bytes twice, errors, and nothing touched on the way."""

from __future__ import annotations

import ast
import importlib.util
import json
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
from torch import fx, nn

import fxlora
from fxlora.dumps.adapters import delta_norm
from fxlora.dumps.formats import FORMATS
from fxlora.errors import (
    DumpError,
    DumpFocusError,
    DumpFormatError,
    DumpPackageError,
    DumpPathError,
    UnknownAdapterError,
)
from fxlora.passes.graph import op_name
from tests.fxlora.dump_cases import HOSTILE, shared, zoo
from tests.toys.base import make_adapter

needs_pydot = pytest.mark.skipif(importlib.util.find_spec("pydot") is None, reason="pydot is not installed")
needs_graphviz = pytest.mark.skipif(shutil.which("dot") is None, reason="graphviz is not installed")


@pytest.fixture(scope="module")
def lora() -> fxlora.LoraModule:
    return shared()


def of_kind(graph: nx.MultiDiGraph, kind: str) -> dict[str, dict[str, Any]]:
    return {node: facts for node, facts in graph.nodes(data=True) if facts["kind"] == kind}


def test_the_graph_is_the_graph(lora: fxlora.LoraModule) -> None:
    """Every node and every operand of the graph module is in the networkx graph, once."""
    graph = fxlora.to_networkx(lora)
    nodes = list(lora.graph_module.graph.nodes)
    assert {n.name for n in nodes} == {
        n for n, facts in graph.nodes(data=True) if facts["kind"] not in ("site", "adapter")
    }
    for node in nodes:
        data = [source for source, _, kind in graph.in_edges(node.name, data="kind") if kind == "data"]
        assert set(data) == {n.name for n in node.all_input_nodes}
    order = [facts["order"] for _, facts in graph.nodes(data=True) if "order" in facts]
    assert sorted(order) == list(range(len(nodes)))


def test_sharing_is_visible(lora: fxlora.LoraModule) -> None:
    weights = {facts["label"]: facts for facts in of_kind(fxlora.to_networkx(lora), "weight").values()}
    gate = weights["layers.0.gate.weight"]
    assert gate["names"] == [f"layers.{i}.gate.weight" for i in range(3)]
    assert gate["roles"] == ["linear"]
    table = weights["table.weight"]
    assert table["names"] == ["table.weight", "head.weight"]
    assert sorted(table["roles"]) == ["embedding", "logits"]
    assert (table["shape"], table["dtype"], table["bytes"]) == ([13, 6], "float32", 13 * 6 * 4)


def test_sites_lead_from_their_weight_to_their_ops(lora: fxlora.LoraModule) -> None:
    graph = fxlora.to_networkx(lora)
    sites = of_kind(graph, "site")
    assert {(f["label"], f["role"]) for f in sites.values()} == {(s.name, s.role.value) for s in lora.sites}
    for name, facts in sites.items():
        (weight,) = [a for a, _, kind in graph.in_edges(name, data="kind") if kind == "weight"]
        assert facts["parameter"] in graph.nodes[weight]["names"]
        ops = [b for _, b, kind in graph.out_edges(name, data="kind") if kind == "use"]
        assert len(ops) == facts["uses"] == (3 if facts["label"] == "layers.0.gate" else 1)
        assert all(graph.nodes[op]["label"].startswith("fxlora::lora_") for op in ops)
        assert facts["rows"] == lora.row_map(next(s for s in lora.sites if s.name == facts["label"]))


def test_before_and_after(lora: fxlora.LoraModule) -> None:
    graph = fxlora.to_networkx(lora, stage="before")
    assert not of_kind(graph, "row_map")
    for name in of_kind(graph, "site"):
        ops = [graph.nodes[b]["label"] for _, b, kind in graph.out_edges(name, data="kind") if kind == "use"]
        assert set(ops) <= {"linear", "embedding"}
    maps = of_kind(fxlora.to_networkx(lora), "row_map")
    assert {facts["label"] for facts in maps.values()} >= {"fxlora::segment_rows", "reshape"}


def test_adapters_with_norms(lora: fxlora.LoraModule) -> None:
    """Norms from Gram matrices are those of the deltas themselves."""
    graph = fxlora.to_networkx(lora)
    adapters = of_kind(graph, "adapter")
    assert {facts["label"] for facts in adapters.values()} == {"plain", HOSTILE.replace("\u2028", "\\u2028")}
    checked = 0
    for adapter, site, facts in graph.edges(data=True):
        if facts["kind"] != "adapter":
            continue
        own = next(
            s for s in lora.sites if s.name == graph.nodes[site]["label"] and s.role.value == graph.nodes[site]["role"]
        )
        name = lora.adapter_names[graph.nodes[adapter]["slot"]]
        place = lora.pool.placements(name)[own]
        delta = place.scaling * place.b_rows.t().double() @ place.a_rows.double()
        assert facts["rank"] == len(place.a_rows) == {"plain": 2}.get(name, 3)
        assert facts["delta_norm"] == pytest.approx(delta.norm().item(), rel=1e-9)
        assert facts["weight_norm"] == pytest.approx(own.weight.double().norm().item(), rel=1e-9)
        assert (facts["start"], facts["rows"], facts["pool_rows"]) == (place.start, 16, 64)
        checked += 1
    assert checked == 5
    one = fxlora.to_networkx(lora, adapter="plain")
    assert [facts["label"] for facts in of_kind(one, "adapter").values()] == ["plain"]


@pytest.mark.parametrize(("a_parts", "b_parts"), [(4, 4), (1, 4), (4, 1), (1, 1)])
def test_norms_of_a_weight_in_parts(a_parts: int, b_parts: int) -> None:
    """Expert weights: one delta for each expert; rank rows alone are those of all."""
    site = type("", (), {"weight": torch.empty(4, 5, 7)})()
    a, b = torch.randn(a_parts * 3, 7), torch.randn(b_parts * 3, 5)
    pairs = zip(a.view(-1, 3, 7).expand(4, 3, 7), b.view(-1, 3, 5).expand(4, 3, 5), strict=True)
    whole = torch.stack([2.0 * y.t().double() @ x.double() for x, y in pairs]).norm()
    assert delta_norm(site, a, b, rank=3, scaling=2.0) == pytest.approx(whole.item(), rel=1e-9)


@pytest.mark.parametrize("suffix", [".json", ".graphml"])
def test_round_trips_are_equal(lora: fxlora.LoraModule, suffix: str, tmp_path: Path) -> None:
    for made in (lora, lora.base, fx.symbolic_trace(nn.Sequential(nn.Linear(2, 3), nn.ReLU()))):
        graph, path = fxlora.to_networkx(made), tmp_path / f"g{suffix}"
        fxlora.dump(made, path)
        back = fxlora.load_graph(path)
        assert type(back) is nx.MultiDiGraph
        assert dict(back.nodes(data=True)) == dict(graph.nodes(data=True))
        assert list(back.edges(keys=True, data=True)) == list(graph.edges(keys=True, data=True))
        assert back.graph == graph.graph
        assert nx.utils.graphs_equal(back, graph)


def test_an_exported_program_is_a_graph_too() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    graph = fxlora.to_networkx(torch.export.export(model, (torch.randn(2, 3),)))
    assert {f["label"] for f in of_kind(graph, "weight").values()} == {"0.weight", "0.bias"}
    calls = {f["label"]: f["module"] for f in of_kind(graph, "call").values()}
    assert (calls["linear"], calls["relu"]) == ("0", "1")


def test_a_loaded_graph_can_be_asked(lora: fxlora.LoraModule, tmp_path: Path) -> None:
    """Which weights does the embedding's op feed? A path question, on the file alone."""
    graph = fxlora.load_graph(fxlora.dump(lora, tmp_path / "g.json"))
    (embedding,) = [n for n, f in graph.nodes(data=True) if f.get("label") == "fxlora::lora_embedding"]
    assert "output" in nx.descendants(graph, embedding)
    assert nx.is_directed_acyclic_graph(graph)


@needs_pydot
@needs_graphviz
def test_a_folder_holds_every_format(lora: fxlora.LoraModule, tmp_path: Path) -> None:
    folder = fxlora.dump(lora, tmp_path / "all")
    names = {path.name for path in folder.iterdir()}
    assert names == {f"graph{suffix}" for suffix in FORMATS if suffix != ".png"} | {"index.md", "before.txt"}
    index = (folder / "index.md").read_text(encoding="utf-8")
    for name in names - {"index.md"}:
        assert f"]({name})" in index
    assert all((folder / name).stat().st_size > 100 for name in names)
    ast.parse((folder / "graph.raw.py").read_text(encoding="utf-8"))
    assert ET.fromstring((folder / "graph.svg").read_bytes()).tag.endswith("svg")
    assert fxlora.dump(lora, tmp_path / "g.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_dump_twice_is_the_same_bytes(lora: fxlora.LoraModule, tmp_path: Path) -> None:
    one, two = (fxlora.dump(lora, tmp_path / name) for name in ("one", "two"))
    for path in sorted(one.iterdir()):
        assert path.read_bytes() == (two / path.name).read_bytes(), path.name


def test_another_process_dumps_the_same_bytes(tmp_path: Path) -> None:
    """No ids, no addresses, no handles, no order of sets: all but the times of the passes."""
    script = (
        "import sys, fxlora; from tests.fxlora.dump_cases import shared; "
        "[shared() for _ in range(int(sys.argv[2]))]; fxlora.dump(shared(), sys.argv[1] + '/')"
    )
    for name, earlier in (("one", 0), ("two", 1)):
        command = [sys.executable, "-c", script, str(tmp_path / name), str(earlier)]
        subprocess.run(command, check=True, cwd=Path(__file__).parents[2], capture_output=True)
    for path in sorted((tmp_path / "one").iterdir()):
        if path.name in ("graph.diff.txt", "graph.html"):  # times
            continue
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_code_compiles_and_hides_handles(lora: fxlora.LoraModule, tmp_path: Path) -> None:
    code = fxlora.dump(lora, tmp_path / "g.raw.py").read_text(encoding="utf-8")
    ast.parse(code)
    assert code.count("torch.ops.fxlora.lora_") == sum(
        op_name(n).startswith("fxlora::lora_") for n in lora.graph_module.graph.nodes
    )
    assert not any(str(handle) in code for handle in lora.pool.handles.values())


def test_nothing_is_run_and_nothing_changes(
    lora: fxlora.LoraModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def state() -> list[Any]:
        return [(n, n.op, n.target, n.args, n.kwargs, sorted(n.meta)) for n in lora.graph_module.graph.nodes]

    ids = torch.randint(0, 13, (2, 5))
    before, answer, code = state(), lora(ids, adapters=["plain", None]), lora.graph_module.code
    monkeypatch.setattr(fx.GraphModule, "__call__", lambda *a, **k: pytest.fail("a graph was run"))
    monkeypatch.setattr(nn.Module, "_call_impl", lambda *a, **k: pytest.fail("a module was run"))
    fxlora.dump(lora, tmp_path / "all")
    monkeypatch.undo()
    assert state() == before
    assert lora.graph_module.code == code
    assert torch.equal(lora(ids, adapters=["plain", None]), answer)


def test_a_suffix_or_a_format_says_what_is_written(lora: fxlora.LoraModule, tmp_path: Path) -> None:
    assert fxlora.dump(lora, tmp_path / "a.diff.txt").read_text(encoding="utf-8").startswith("pass")
    assert fxlora.dump(lora, tmp_path / "a.txt").read_text(encoding="utf-8").startswith("Shared")
    assert "graphs" in json.loads(fxlora.dump(lora, tmp_path / "a.me.json").read_text(encoding="utf-8"))
    assert fxlora.dump(lora, tmp_path / "b.log", "txt").read_bytes() == (tmp_path / "a.txt").read_bytes()
    assert fxlora.dump(lora, tmp_path, "json") == tmp_path
    assert (tmp_path / "graph.json").is_file()
    assert fxlora.dump(lora, str(tmp_path / "v1.2") + "/", "txt") == tmp_path / "v1.2"


def test_what_cannot_be_dumped_is_refused(lora: fxlora.LoraModule, tmp_path: Path) -> None:
    with pytest.raises(DumpFormatError, match=r"no known format; known: \.txt, \.diff\.txt"):
        fxlora.dump(lora, tmp_path / "g.docx")
    with pytest.raises(DumpFormatError, match="format='pdf' is not known"):
        fxlora.dump(lora, tmp_path / "g", "pdf")
    with pytest.raises(
        DumpFocusError, match=r"focus='layers.0.upp' is no module of this graph; nearest: \['layers.0.up'"
    ):
        fxlora.dump(lora, tmp_path / "g.txt", focus="layers.0.upp")
    with pytest.raises(DumpError, match="depth is -1"):
        fxlora.dump(lora, tmp_path / "g.txt", depth=-1)
    with pytest.raises(DumpError, match="not a Linear"):
        fxlora.dump(nn.Linear(2, 2), tmp_path / "g.txt")
    with pytest.raises(UnknownAdapterError, match="neither loaded nor a folder; loaded: \\['plain'"):
        fxlora.dump(lora, tmp_path / "g.txt", adapter="nobody")
    with pytest.raises(DumpError, match="this graph has before alone"):
        fxlora.to_networkx(lora.base, stage="after")
    (tmp_path / "file").write_text("")
    with pytest.raises(DumpPathError, match="cannot be written"):
        fxlora.dump(lora, tmp_path / "file" / "g.txt")
    with pytest.raises(DumpPathError, match="cannot be written"):
        fxlora.dump(lora, tmp_path / "file" / "below")
    with pytest.raises(DumpPathError, match="cannot be read"):
        fxlora.load_graph(tmp_path / "none.json")
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(DumpFormatError, match="holds no graph"):
        fxlora.load_graph(tmp_path / "other.json")
    assert not list(tmp_path.glob("g*"))


def test_without_pydot_or_graphviz(lora: fxlora.LoraModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One format says what it needs; a folder goes on without it and says so."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, package=None: None if name == "pydot" else find_spec(name)
    )
    monkeypatch.setitem(sys.modules, "pydot", None)
    with pytest.raises(DumpPackageError, match=r"a \.dot needs pydot: pip install 'fxlora\[dump\]'"):
        fxlora.dump(lora, tmp_path / "g.dot")
    folder = fxlora.dump(lora, tmp_path / "all")
    assert "graph.dot: not made, pydot is not installed" in (folder / "index.md").read_text(encoding="utf-8")
    assert not (folder / "graph.dot").exists()
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(DumpPackageError, match="apt install graphviz"):
        fxlora.dump(lora, tmp_path / "g.svg")


@needs_pydot
def test_dot_is_read_by_pydot(lora: fxlora.LoraModule, tmp_path: Path) -> None:
    import pydot

    made = fxlora.dump(lora, tmp_path / "g.dot", depth=2).read_text(encoding="utf-8")
    (dot,) = pydot.graph_from_dot_data(made)
    labels = [node.get_label() for node in all_nodes(dot)]
    assert any("lora_embedding" in label for label in labels if label)
    assert any("row maps" in label for label in labels if label)
    assert any('<script>alert(\\"x\\")' in label for label in labels if label), "a name stays text"
    clusters = {sub.get_label() for sub in dot.get_subgraphs()}
    assert {'"layers.0"', '"layers.1"'} <= clusters
    names = {node.get_name() for node in all_nodes(dot)}
    assert all(edge.get_source() in names and edge.get_destination() in names for edge in dot.get_edges())


def all_nodes(dot: Any) -> list[Any]:
    own = [node for node in dot.get_nodes() if node.get_name() not in ("node", "edge", "graph")]
    return own + [node for sub in dot.get_subgraphs() for node in all_nodes(sub)]


@needs_pydot
@needs_graphviz
def test_graphviz_lays_out_a_model_and_one_module(tmp_path: Path) -> None:
    made = zoo("qwen3")
    whole = fxlora.dump(made, tmp_path / "a.svg").read_text(encoding="utf-8")
    part = fxlora.dump(made, tmp_path / "b.svg", focus="model.layers.1.mlp").read_text(encoding="utf-8")
    assert "scaled_dot_product_attention" not in part
    assert "down_proj" in part
    assert "layers.1" in whole
    small = fxlora.dump(made, tmp_path / "c.dot", depth=0).read_text(encoding="utf-8")
    assert len(small) < len(fxlora.dump(made, tmp_path / "a.dot").read_text(encoding="utf-8"))


def test_names_are_text_everywhere(lora: fxlora.LoraModule, tmp_path: Path) -> None:
    page = fxlora.dump(lora, tmp_path / "g.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "\u2028" not in page
    assert page.count("</script>") == 2
    assert "<!--" not in page.partition('id="data"')[2]
    ET.fromstring(fxlora.dump(lora, tmp_path / "g.graphml").read_bytes())


def test_control_characters_in_names(tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module("odd\x01]]>name", nn.Linear(3, 3))
    gm = fx.symbolic_trace(model)
    lora = fxlora.apply(gm, max_adapters=1, max_rank=1, example_inputs=torch.randn(2, 3))
    lora.load_adapter("bell\x07", make_adapter(model, ["odd\x01]]>name"], rank=1, seed=1))
    for suffix in (".graphml", ".json"):
        path = fxlora.dump(lora, tmp_path / f"g{suffix}")
        assert nx.utils.graphs_equal(fxlora.load_graph(path), fxlora.to_networkx(lora))
    for suffix in (".html", ".txt", ".me.json"):
        assert b"\x07" not in fxlora.dump(lora, tmp_path / f"g{suffix}").read_bytes()


def test_the_file_for_model_explorer(lora: fxlora.LoraModule, tmp_path: Path) -> None:
    data = json.loads(fxlora.dump(lora, tmp_path / "g.me.json").read_text(encoding="utf-8"))
    graphs = {graph["id"]: {node["id"]: node for node in graph["nodes"]} for graph in data["graphs"]}
    assert list(graphs) == ["before", "after"]
    for nodes in graphs.values():
        for node in nodes.values():
            assert all(edge["sourceNodeId"] in nodes for edge in node["incomingEdges"])
    linked = {
        i: attr["value"]["nodeIds"]
        for i, node in graphs["after"].items()
        for attr in node["attrs"]
        if attr["key"] == "linked"
    }
    calls = [node.name for site in lora.sites for node in site.uses]
    assert set(calls) <= set(graphs["before"])
    assert set(calls) <= set(graphs["after"]), "what took the place of a call has its id"
    assert {call for ids in linked.values() for call in ids} == set(calls)
    assert graphs["after"]["linear"]["namespace"] == "layers/0/up"


def test_dumps_cost_nothing_to_those_who_do_not_dump() -> None:
    script = "import sys, fxlora; print([m for m in ('networkx', 'fxlora.dumps.write') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
