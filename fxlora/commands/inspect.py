"""`fxlora inspect`: the sites of a model, and what each adapter binds to, what not, and why."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import fxlora
from fxlora.adapter import read_adapter
from fxlora.binding import BoundAdapter, bind_adapter
from fxlora.commands.models import example_inputs, load_model
from fxlora.entries import Entry
from fxlora.errors import AdapterError, Unbound, UnboundTensorError
from fxlora.passes.sites import Site, Skipped
from fxlora.renames import Rename, renames_of


def inspect_model(
    folder: Path, adapters: Sequence[Path], console: Console, *, fold: bool = True, report: Path | None = None
) -> bool:
    """Print the sites of a model and what adapters bind to. Returns whether every adapter binds in full.

    fold: sites that differ by the numbers in their names alone share a line. report: an HTML report to write too.
    """
    model = load_model(folder)
    graph = fxlora.capture(model, **example_inputs(model))
    lora = fxlora.apply(graph, max_adapters=1, max_rank=1, targets="all")
    weights = dict(model.named_parameters(remove_duplicate=False))
    console.print(*_sites(lora, fold=fold), sep="\n")
    if lora.skipped:
        console.print(_skipped(lora.skipped, fold=fold))
    rename = renames_of([model])
    binds = [_report(console, path, lora.sites, lora.skipped, weights, rename, fold=fold) for path in adapters]
    if report is not None:
        fxlora.dump(lora, report, "html", adapter=list(adapters))
        console.print(f"report: {report}", highlight=False, soft_wrap=True)
    return all(binds)


def fold_names(names: Iterable[str]) -> str:
    """Return one name for names that differ in their numbers: layers.0.q, layers.1.q, layers.2.q → layers.[0-2].q."""
    split = [re.split(r"(\d+)", name) for name in names]
    return "".join(_fold_part(parts) for parts in zip(*split, strict=True))


def _fold_part(parts: Sequence[str]) -> str:
    if len(set(parts)) == 1:
        return parts[0]
    numbers = sorted({int(part) for part in parts})
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][-1] + 1 == number:
            spans[-1][1:] = [number]
        else:
            spans.append([number])
    return "[" + ",".join("-".join(map(str, span)) for span in spans) + "]"


def _groups(rows: Iterable[tuple[str, ...]], *, fold: bool) -> list[list[tuple[str, ...]]]:
    """Gather rows whose cells are equal but for numbers in the first and the second, in order of first appearance."""
    groups: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for row in rows:
        key = (re.sub(r"\d+", "#", row[0]), re.sub(r"\d+", "#", row[1]), *row[2:]) if fold else row
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def _table(title: str, *columns: str) -> Table:
    """Return a table whose last column counts how many lines each of its lines stands for."""
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    for column in columns:
        table.add_column(column, overflow="fold", min_width=min(len(column), 12))
    table.add_column("count", justify="right", min_width=5)
    return table


def _fill(table: Table, rows: Iterable[tuple[str, ...]], *, fold: bool) -> Table:
    """Add rows; the second cell of each, a remark on its name, goes below the first."""
    for group in _groups(rows, fold=fold):
        name, remark = (fold_names(row[cell] for row in group) for cell in (0, 1))
        first = Text(name)
        if remark:
            first.append(f"\n{remark}", style="dim")
        table.add_row(first, *(Text(cell) for cell in group[0][2:]), str(len(group)))
    return table


def _also(aliases: Sequence[str]) -> str:
    return "also " + ", ".join(alias.removesuffix(".weight") for alias in aliases) if aliases else ""


def _experts(site: Site, entry: Entry) -> str:
    """Which experts an adapter has tensors for, where it is not each of them for itself."""
    remarks = [f"one {half} for all experts" for half, shared in zip("AB", entry.shared, strict=True) if shared]
    if len(entry.experts) < site.num_experts:
        remarks.append(f"{len(entry.experts)} of {site.num_experts} experts: {fold_names(map(str, entry.experts))}")
    return ", ".join(remarks)


def _sites(lora: fxlora.LoraModule, *, fold: bool) -> list[Table | Text]:
    """Return the table of sites, and below it what each row map stands for."""
    numbers: dict[str, str] = {}
    for site in lora.sites:
        numbers.setdefault(lora.row_map(site), str(1 + len(numbers)))
    title = f"{len(lora.sites)} sites in {len(lora.groups)} ops"
    table = _table(title, "site", "role", "out x in", "uses", "rows", "one op with")
    rows = (
        (
            site.name,
            _also(site.aliases),
            site.role.value,
            f"{f'{site.num_experts} x ' if site.num_experts else ''}{site.out_features} x {site.in_features}",
            str(len(site.uses)),
            numbers[lora.row_map(site)],
            ", ".join(other.name.rpartition(".")[2] for other in lora.siblings(site)),
        )
        for site in lora.sites
    )
    legend = [Text(f"  rows {number}: {text}", style="dim") for text, number in numbers.items()]
    if any(site.num_experts for site in lora.sites):
        legend.append(Text('  experts: sites only where apply is given targets="all", or their names', style="dim"))
    return [_fill(table, rows, fold=fold), *legend, Text()]


def _skipped(skipped: Sequence[Skipped], *, fold: bool) -> Table:
    table = _table(f"{len(skipped)} weights that are no site", "weight", "reason")
    return _fill(table, ((skip.name, _also(skip.aliases), skip.reason) for skip in skipped), fold=fold)


def _report(
    console: Console,
    path: Path,
    sites: Sequence[Site],
    skipped: Sequence[Skipped],
    weights: Mapping[str, torch.Tensor],
    rename: Rename,
    *,
    fold: bool,
) -> bool:
    """Print what one adapter binds to, or why it does not. Returns whether it binds in full."""
    try:
        with read_adapter(path) as adapter:
            bound = bind_adapter(adapter, sites, skipped, weights, rename)
    except UnboundTensorError as error:
        console.print(Text(f"{path.name}: does not bind, {len(error.unbound)} tensors have no site", style="bold red"))
        console.print(_unbound(error.unbound, fold=fold))
        return False
    except AdapterError as error:
        console.print(Text(f"{path.name}: refused, {type(error).__name__}: {error}", style="bold red"))
        return False
    console.print(_bound(path.name, bound, fold=fold))
    return True


def _unbound(unbound: Sequence[Unbound], *, fold: bool) -> Table:
    rows = (
        (tensor.key.removeprefix("base_model.model."), f"nearest {tensor.nearest or 'none'}", tensor.reason)
        for tensor in unbound
    )
    return _fill(_table("", "tensor", "reason"), rows, fold=fold)


def _bound(name: str, bound: BoundAdapter, *, fold: bool) -> Table:
    tensors = sum(len(entry.keys) for entry in bound.entries.values())
    title = f"{name}: binds in full, {tensors} tensors to {len(bound.entries)} sites"
    rows = (
        (site.name, _experts(site, entry), site.role.value, str(entry.rank), f"{entry.scaling:g}")
        for site, entry in bound.entries.items()
    )
    return _fill(_table(title, "site", "role", "rank", "scaling"), rows, fold=fold)
