"""Result rows of the decode benchmark (see `decode_run`) as a table in Markdown, as verdicts on targets, as a plot.

`python -m tests.benchmarks.decode_report FILE.json [README.md]` prints the table, or puts it between the markers
`<!-- decode: begin -->` and `<!-- decode: end -->` of a file.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
VARIANTS = ("base", "ours", "ours_none", "merged", "vllm", "peft")
WORDS = {
    "base": "no LoRA",
    "ours": "fxlora, an adapter per request",
    "ours_none": "fxlora, no adapter in the batch",
    "merged": "one adapter, merged",
    "vllm": "vLLM's ops",
    "peft": "PEFT mixed, eager",
}
BEGIN, END = "<!-- decode: begin -->", "<!-- decode: end -->"
# Of requests: how much slower than no LoRA at most, and how much less it adds than vLLM's ops at least.
RATIO_AT_MOST, SAVED_AT_LEAST, NONE_AT_MOST, MERGED_AT_MOST = {16: 1.05, 64: 1.15}, {16: 4.0, 64: 2.5}, 1.01, 1.05


def groups_of(record: Mapping[str, Any], model: str | None = None) -> dict[tuple[Any, ...], dict[str, Row]]:
    """Rows by what was measured, then by variant."""
    found: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in record["rows"]:
        if model in (None, row["model"]):
            key = row["model"], row["layers"], row["kind"], row["size"]
            found.setdefault(key, {})[row["variant"]] = row
    return dict(sorted(found.items()))


def _ms(row: Row | None) -> str:
    if row is None:
        return ""
    if row["status"] != "ok":
        return row["status"].upper()
    ms = row["ms"]["median"]
    ratio = f" ({row['ratio']['median']:.3f})" if row["variant"] != "base" and "ratio" in row else ""
    return f"{ms:.{0 if ms >= 100 else 2}f}{ratio}"


def _of(group: Mapping[str, Row], variant: str, *names: str) -> Any:
    value: Any = group.get(variant)
    for name in names:
        if not isinstance(value, Mapping) or name not in value:
            return None
        value = value[name]
    return value


def _number(value: float | None, scale: float = 1.0, digits: int = 0) -> str:
    return "" if value is None else f"{value * scale:,.{digits}f}"


def table(record: Mapping[str, Any], model: str | None = None) -> str:
    """Milliseconds of a step by variant, in brackets over no LoRA; then tokens, host time and memory of ours."""
    head = ["model", "step", *(WORDS[name] for name in VARIANTS), "tokens/s", "host us", "pools GB", "vLLM adds / ours"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for (name, layers, kind, size), group in groups_of(record, model).items():
        step = f"decode, {size} request{'s' * (size > 1)}" if kind == "decode" else f"prefill, {size} tokens"
        cells = [f"{name}, {layers} layers", step, *(_ms(group.get(variant)) for variant in VARIANTS)]
        cells += [
            _number(_of(group, "ours", "tokens_per_s")),
            _number(_of(group, "ours", "host_us", "median")),
            _number(_of(group, "ours", "pool_bytes"), 1e-9, 2),
            _number(saved(group), 1.0, 1),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", f"{record['gpu']}, {record['date']}, {_versions(record)}; ms, medians", *verdicts(record, model)]
    return "\n".join(lines)


def _versions(record: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in record["versions"].items())


def saved(group: Mapping[str, Row]) -> float | None:
    """(vllm - base) / (ours - base), each of its own rounds; infinite where ours adds nothing."""
    ours, vllm = (_of(group, name, "ratio", "median") for name in ("ours", "vllm"))
    if None in (ours, vllm) or vllm <= 1:
        return None
    return (vllm - 1) / (ours - 1) if ours > 1 else math.inf


def verdicts(record: Mapping[str, Any], model: str | None = None) -> list[str]:
    """One line for each target that a decode step was measured for."""
    lines = []
    for (name, _, kind, size), group in groups_of(record, model).items():
        if kind != "decode":
            continue
        ours, none = (_of(group, variant, "ratio", "median") for variant in ("ours", "ours_none"))
        merged, against = _of(group, "merged", "ratio", "median"), saved(group)
        checks = [
            ("over no LoRA", ours, RATIO_AT_MOST.get(size), True),
            ("over no LoRA, no adapter in the batch", none, NONE_AT_MOST, True),
            ("over one merged adapter", ours / merged if ours and merged else None, MERGED_AT_MOST, True),
            ("times less added than vLLM's ops", against, SAVED_AT_LEAST.get(size, 1.0), False),
        ]
        for words, value, limit, at_most in checks:
            if value is None or limit is None:
                continue
            met = value <= limit if at_most else value >= limit
            bound = "at most" if at_most else "at least"
            mark = "met   " if met else "MISSED"
            lines.append(f"  {mark} {name}, {size} requests: {value:.3f} {words}, {bound} {limit}")
    return lines


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Bars of the time over no LoRA, a panel for each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = {key: group for key, group in groups_of(record).items() if _of(group, "base", "status") == "ok"}
    models = list(dict.fromkeys(key[0] for key in groups))
    shown = [name for name in VARIANTS if name not in ("base", "peft")]
    figure, axes = pyplot.subplots(1, max(1, len(models)), figsize=(6 * max(1, len(models)), 3.6), squeeze=False)
    colours = {"ours": "#000000", "ours_none": "#56B4E9", "merged": "#009E73", "vllm": "#D55E00"}
    for axis, model in zip(axes.flat, models, strict=False):
        mine = [(key, group) for key, group in groups.items() if key[0] == model]
        for j, variant in enumerate(shown):
            bars = [(i, ratio) for i, (_, g) in enumerate(mine) if (ratio := _of(g, variant, "ratio", "median"))]
            if bars:
                places = [i + 0.2 * (j - 1.5) for i, _ in bars]
                axis.bar(places, [r for _, r in bars], 0.2, color=colours[variant], label=WORDS[variant])
        axis.axhline(1.0, color="#999999", linewidth=1, linestyle="--")
        axis.set_xticks(range(len(mine)), [f"{key[2]} {key[3]}" for key, _ in mine])
        axis.set(title=model, ylabel="time over no LoRA", ylim=(0.9, None))
    handles = {label: h for axis in axes.flat for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=4, frameon=False)
    figure.suptitle(f"Whole-model steps, {record['gpu']}, {record['date']}")
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def fill(text: str, record: Mapping[str, Any]) -> str:
    """A text with the table between its markers."""
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"the text has no {BEGIN} ... {END}")
    shown = table(record).split("\n  met")[0].split("\n  MISSED")[0]
    return f"{before}{BEGIN}\n{shown}\n{END}{after}"


def main(arguments: Sequence[str]) -> int:
    if not 1 <= len(arguments) <= 2:
        print(__doc__, file=sys.stderr)
        return 2
    record = json.loads(Path(arguments[0]).read_text())
    if len(arguments) == 1:
        print(table(record))
    else:
        target = Path(arguments[1])
        target.write_text(fill(target.read_text(), record))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
