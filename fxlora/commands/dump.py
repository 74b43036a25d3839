"""`fxlora dump`: the graph of a model, and where adapters land on it, in every format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

import fxlora
from fxlora.adapter import read_adapter
from fxlora.commands.models import example_inputs, load_model
from fxlora.errors import AdapterError


def dump_model(
    folder: Path,
    adapters: Sequence[Path],
    output: str,
    console: Console,
    *,
    form: str | None,
    depth: int | None,
    focus: str | None,
) -> bool:
    """Write the dumps of a model and its adapters. Returns whether every adapter binds; those that do are loaded."""
    model = load_model(folder)
    graph = fxlora.capture(model, **example_inputs(model))
    lora = fxlora.apply(graph, max_adapters=max(len(adapters), 1), max_rank=max(map(largest_rank, adapters), default=1))
    shown: list[str | Path] = []
    for path in adapters:
        name = path.name if path.name not in lora.adapter_names else str(path)
        try:
            lora.load_adapter(name, path)
        except AdapterError as error:
            console.print(f"{path.name}: {type(error).__name__}: {error}", style="bold red", markup=False)
            shown.append(path)
        else:
            shown.append(name)
    written = fxlora.dump(lora, output, form, adapter=shown, depth=depth, focus=focus)
    console.print(f"{len(lora.sites)} sites, {len(adapters)} adapters: see {_report(written)}", highlight=False)
    return len(lora.adapter_names) == len(adapters)


def _report(written: Path) -> Path:
    page = written / "graph.html"
    return page if page.is_file() else written


def largest_rank(adapter: Path) -> int:
    """The largest rank that an adapter's config names; 1 for a folder that cannot be read, which loading reports."""
    try:
        with read_adapter(adapter) as read:
            return max(read.config.r, *read.config.rank_pattern.values(), 1)
    except AdapterError:
        return 1
