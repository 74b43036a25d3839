"""The HTML report in a real headless Chromium: it opens offline and quietly; search, tree, table and drawing work."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import fx, nn

import fxlora
from tests.fxlora.dump_cases import HOSTILE, page, refused, shared
from tests.toys.base import make_adapter


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the toy; one of its adapters does not bind and is shown all the same."""
    lora = shared()
    other = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"upp": nn.Linear(6, 6)})])})
    stray = make_adapter(other, ["layers.0.upp"], rank=1, seed=3)
    return fxlora.dump(lora, tmp_path_factory.mktemp("report") / "g.html", adapter=["plain", HOSTILE, stray])


@pytest.fixture
def opened(report: Path) -> Iterator[Any]:
    """The report in a browser; the test fails on any message of its console and any request but for the file."""
    with page() as made:
        made.goto(report.as_uri())
        yield made
        assert made.problems == []
        assert made.requests == [report.as_uri()]


def tab(made: Any, name: str) -> None:
    made.click(f"[data-tab={name}]")


def boxes(made: Any, stage: str, which: str = "") -> list[str]:
    """First lines of the boxes of one pane; `which` is a class of boxes."""
    found = made.query_selector_all(f"[data-stage={stage}] svg .box{which}")
    return [box.query_selector("text").text_content() for box in found]


def test_the_summary(opened: Any) -> None:
    text = opened.inner_text("main")
    for words in ("Shared", "sites in 5 ops", "2 of 4", "adapter memory", "nodes", "1 adapter does not bind"):
        assert words in re.sub(r"\s+", " ", text)
    assert "1 embedding" in text
    assert "expand(" in text


def test_what_does_not_bind_is_red(opened: Any) -> None:
    (first, *_) = opened.query_selector_all("td.unbound")
    assert "layers.0.upp.lora_A.weight" in first.inner_text()
    red = first.evaluate("e => getComputedStyle(e).color")
    r, g, b = (int(n) for n in re.findall(r"\d+", red)[:3])
    assert r > 2 * g
    assert r > 2 * b
    assert "nearest: layers.0.up" in opened.inner_text("#adapters")


def test_names_are_text(opened: Any) -> None:
    assert '<script>alert("x")</script>&' in opened.inner_text("#adapters")
    assert opened.evaluate("document.scripts.length") == 2


def test_the_site_table_filters_sorts_and_folds(opened: Any) -> None:
    tab(opened, "sites")

    def lines() -> list[str]:
        return [line.inner_text().split()[0] for line in opened.query_selector_all(".grid .line")]

    assert "6 sites" in opened.inner_text(".bar")
    folded = lines()
    opened.uncheck("#site-fold")
    assert len(lines()) == 6
    assert folded == lines(), "layers whose adapters differ do not fold"
    opened.fill("#site-filter", "layers.2")
    assert lines() == ["layers.0.gate", "layers.2.up"], "an alias finds its site"
    opened.fill("#site-filter", "")
    opened.click(".grid .head button:has-text('shape')")
    assert lines()[0] == "layers.0.gate"
    opened.click(".grid .head button:has-text('shape')")
    assert set(lines()[:2]) == {"table", "head"}
    opened.select_option("select", "embedding")
    assert lines() == ["table"]
    opened.fill("#site-filter", "nothing of this name")
    assert lines() == []


def test_a_site_shows_its_line_its_rows_and_its_memory(opened: Any) -> None:
    tab(opened, "sites")
    opened.uncheck("#site-fold")
    opened.click(".grid .line:has-text('layers.0.up')")
    text = opened.inner_text("#details")
    assert "x + self.up(x).relu() * self.gate(x).sigmoid()" in text, "its line in the model's source"
    assert "tests/fxlora/dump_cases.py:" in text
    assert "input ids\ndim 0 by adapter_slots" in text
    assert "adapter_slots → expand(" in text
    assert "2 linears read" in text
    assert re.search(r"rank\s+3\b", text)
    assert re.search(r"pool rows\s+16 to 31", text)
    assert len(opened.query_selector_all("#details .pool i")) == 2


def test_search_finds_sites_modules_and_nodes(opened: Any) -> None:
    opened.keyboard.press("/")
    opened.keyboard.type("layers.1 up")
    hits = [hit.inner_text() for hit in opened.query_selector_all("#hits li")]
    assert re.sub(r"\s+", " ", hits[0]) == "layers.1.up site · linear"
    assert any("module" in hit for hit in hits)
    opened.keyboard.press("Enter")
    assert opened.inner_text("#details h2") == "layers.1.up"
    opened.fill("#search", "lora_embedding_default")
    opened.keyboard.press("Enter")
    assert opened.inner_text("#details h2") == "lora_embedding_default"
    assert opened.query_selector("[data-tab=graph][aria-selected=true]")
    opened.fill("#search", "no such thing")
    assert opened.inner_text("#hits") == "nothing by this name"
    opened.keyboard.press("Escape")
    assert not opened.is_visible("#hits")


def test_the_tree_opens_by_mouse_and_by_keyboard(opened: Any) -> None:
    assert "layers.2" in opened.inner_text("#tree")
    opened.click("[data-path='layers.0'] > .row .twist")
    assert opened.is_visible("[data-path='layers.0.up']")
    opened.click("[data-path='layers.0.up'] > .row")
    assert opened.query_selector("[data-path='layers.0.up'][aria-selected=true]")
    opened.keyboard.press("ArrowLeft")
    opened.keyboard.press("ArrowLeft")
    assert not opened.is_visible("[data-path='layers.0.up']")
    opened.keyboard.press("ArrowDown")
    opened.keyboard.press("Enter")
    assert opened.inner_text(".crumbs").replace("\n", "") == "Shared/layers.1"


def test_both_sides_are_drawn_and_move_in_step(opened: Any) -> None:
    tab(opened, "graph")
    assert boxes(opened, "before") == ["ids" if b == "ids" else b for b in boxes(opened, "before")]
    assert "row maps" in boxes(opened, "after")
    assert "row maps" not in boxes(opened, "before")
    opened.click("[data-path='layers.0'] > .row")
    assert {"up", "gate", "relu", "mul", "add"} <= set(boxes(opened, "before"))
    opened.click("[data-stage=before] svg .box:has-text('relu')")
    assert boxes(opened, "before", ".selected") == ["relu"]
    assert boxes(opened, "after", ".linked") == ["relu"]
    opened.click("[data-stage=after] svg .box:has-text('up')")
    assert boxes(opened, "after", ".selected") == ["up"]
    assert set(boxes(opened, "before", ".linked")) == {"up", "gate"}, "one op stands for both"
    opened.dblclick("[data-stage=after] svg .box:has-text('up')")
    assert opened.inner_text(".crumbs").replace("\n", "") == "Shared/layers.0/up"
    assert "lora_linear" in boxes(opened, "after", ".site")
    opened.click("[data-stage=after] svg .box.site")
    text = opened.inner_text("#details")
    assert "stands for" in text
    assert "fxlora::lora_linear" in text
    opened.click(".tools button:has-text('Up')")
    assert opened.inner_text(".crumbs").replace("\n", "") == "Shared/layers.0"


def test_keys_reach_everything(opened: Any) -> None:
    opened.focus("[data-tab=overview]")
    opened.keyboard.press("ArrowRight")
    assert opened.query_selector("[data-tab=sites][aria-selected=true]")
    opened.focus(".grid .line")
    opened.keyboard.press("ArrowDown")
    opened.keyboard.press("Enter")
    assert opened.is_visible("#details h2")
    tab(opened, "graph")
    opened.focus("[data-stage=before] svg .box.module")
    opened.keyboard.press("Shift+Enter")
    assert "/" in opened.inner_text(".crumbs")
    opened.focus("#main")
    opened.keyboard.press("Escape")
    assert not opened.is_visible("#details")


def test_a_batch_shows_the_slot_of_each_row(opened: Any) -> None:
    tab(opened, "rows")
    opened.select_option(".requests select >> nth=0", label="plain")
    opened.select_option(".requests select >> nth=1", label="no adapter")
    row = opened.inner_text("tr:has(button:has-text('head'))")
    assert "slot 0" in row
    assert "rank 2" in row
    assert "slot \N{MINUS SIGN}1: the bare model" in row


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(report: Path, scheme: str) -> None:
    """Contrast of at least 4.5 to 1 for text and what is dimmed, in both schemes."""
    with page(color_scheme=scheme) as made:
        made.goto(report.as_uri())
        for name in ("--ink", "--dim", "--accent", "--maps", "--bad", "--good"):
            for ground in ("--bg", "--panel", *([f"{name}-soft"] if name not in ("--ink", "--dim") else ["--soft"])):
                colours = [
                    made.evaluate(f"getComputedStyle(document.documentElement).getPropertyValue('{n}').trim()")
                    for n in (name, ground)
                ]
                assert contrast(*colours) >= 4.5, (scheme, name, ground)
        body = made.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (int(re.findall(r"\d+", body)[0]) < 60) is (scheme == "dark")


def contrast(one: str, other: str) -> float:
    """WCAG's ratio of two #rgb or #rrggbb colours."""

    def luminance(colour: str) -> float:
        digits = colour.lstrip("#")
        parts = [
            int(d * 2 if len(digits) == 3 else d, 16) / 255
            for d in re.findall("." if len(digits) == 3 else "..", digits)
        ]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def test_printing_shows_summary_and_every_site(report: Path, tmp_path: Path) -> None:
    with page() as made:
        made.goto(report.as_uri())
        made.emulate_media(media="print")
        made.evaluate("window.dispatchEvent(new Event('beforeprint'))")
        text = made.inner_text("main")
        assert "layers.2.up" in text or "layers.0-2.up" in text
        assert "head" in text
        assert not made.is_visible("#side")
        assert not made.is_visible("#search")
        made.evaluate("window.dispatchEvent(new Event('afterprint'))")
        assert made.pdf(path=str(tmp_path / "a.pdf")).startswith(b"%PDF")


def test_a_refused_weight_shows_where_requests_meet(tmp_path: Path) -> None:
    _, gm, x = refused()
    lora = fxlora.apply(gm, max_adapters=1, max_rank=2, example_inputs=x)
    path = fxlora.dump(lora, tmp_path / "g.html")
    with page() as made:
        made.goto(path.as_uri())
        made.click("button.link:has-text('second.weight')")
        steps = [step.inner_text().split("\n")[0] for step in made.query_selector_all("#details .chain li")]
        assert steps == ["input x", "mean", "linear linear_1"]
        assert made.query_selector("#details .chain li.mixed button").inner_text() == "mean"
        tab(made, "graph")
        assert boxes(made, "before", ".mixed") == ["mean", "add"]
        assert made.problems == []


def test_a_plain_graph_and_a_focus(tmp_path: Path) -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    path = fxlora.dump(gm, tmp_path / "g.html", focus="2")
    with page() as made:
        made.goto(path.as_uri())
        assert made.inner_text(".crumbs").replace("\n", "") == "Sequential/2"
        assert not made.query_selector("[data-tab=sites]")
        assert len(made.query_selector_all(".pane")) == 1
        assert made.problems == []
