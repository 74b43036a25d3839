"""Draws result files of `tests.benchmarks.linear`: cost over base against the rows of a batch, one panel per shape.

`python -m tests.benchmarks.plot OUT.png RUN.json [RUN.json ...]`; of a case in several files the last one counts. Needs
matplotlib (`pip install 'fxlora[bench]'`).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
PANELS = ("4096x4096", "2048x4096", "14336x4096", "4096x28672", "2048x128", "lm_head", "qkv")
RANK = 16
# Okabe and Ito's colours: told apart with any kind of colour vision, and by marker in print.
STYLES = {
    "ours": ("#000000", "o"),
    "vllm": ("#D55E00", "s"),
    "vllm_dual": ("#E69F00", "D"),
    "sglang": ("#0072B2", "^"),
    "sglang_v2": ("#0072B2", "^"),
    "sglang_csgmv": ("#56B4E9", "v"),
    "gathered_bmm": ("#009E73", "x"),
}


def curves(rows: Sequence[Row], shape: str) -> dict[str, list[tuple[int, float]]]:
    """By implementation, (rows of the batch, cost over base, plain), at rank 16 and the most adapters measured."""
    chosen: dict[int, Row] = {}
    for row in rows:
        if row["status"] != "ok" or not re.fullmatch(rf"{shape}-M\d+-a\d+-r{RANK}", row["name"]):
            continue
        if row["rows"] not in chosen or row["adapters"] > chosen[row["rows"]]["adapters"]:
            chosen[row["rows"]] = row
    found: dict[str, list[tuple[int, float]]] = {}
    for size, row in sorted(chosen.items()):
        for name in STYLES:
            if name in row["us"]:
                ratio = row["us"][name]["plain"]["median"] / row["us"]["base"]["plain"]["median"]
                found.setdefault(name, []).append((size, ratio))
    return found


def draw(
    record: Mapping[str, Any],
    path: Path,
    shapes: Sequence[str] = PANELS,
    what: str = "LoRA linear",
    base: str = "matmul",
) -> None:
    """Write the plot of one record, as the JSON file holds it: a panel for each shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = {shape: curves(record["rows"], shape) for shape in shapes}
    panels = {shape: lines for shape, lines in found.items() if lines}
    columns = min(4, max(1, len(panels)))
    height = max(1, -(-len(panels) // columns))
    figure, axes = pyplot.subplots(height, columns, figsize=(4.2 * columns, 3.4 * height), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (shape, lines) in zip(axes.flat, panels.items(), strict=False):
        for name, points in lines.items():
            colour, marker = STYLES[name]
            axis.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=5, label=name)
        axis.axhline(1.0, color="#999999", linewidth=1, linestyle="--")
        axis.set(title=shape, xscale="log", yscale="log", xlabel="rows in the batch", ylabel=f"time over plain {base}")
        axis.grid(visible=True, which="both", alpha=0.2)
        sizes = sorted({size for points in lines.values() for size, _ in points})
        axis.set_xticks(sizes, [str(size) for size in sizes], minor=False)
        axis.set_xticks([], minor=True)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
    handles = {label: h for axis in axes.flat for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=len(STYLES), frameon=False)
    figure.suptitle(f"{what}, rank {RANK}, bf16, {record['gpu']}, {record['date']}")
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def merge(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One record of several: rows by name, the last one counts; the rest as in the last record."""
    rows = {row["name"]: row for record in records for row in record["rows"] if row["status"] != "skipped"}
    return {**records[-1], "rows": list(rows.values())}


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python -m tests.benchmarks.plot OUT.png RUN.json [RUN.json ...]")
    draw(merge([json.loads(Path(name).read_text()) for name in sys.argv[2:]]), Path(sys.argv[1]))
