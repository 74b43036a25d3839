"""Prints what a demo measured: the table of losses, what it proves, and one prompt continued by each row."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fxlora.demo.serve import BASE, Served


def show(console: Console, served: Served) -> None:
    """Print the whole report of one demo."""
    console.print(_losses(served))
    console.print(_verdict(served))
    console.print(_samples(served))
    if served.graph_report is not None:
        line = f"  The graph before and after, and where each adapter landed: {served.graph_report}"
        console.print(line, highlight=False, soft_wrap=True)


def _losses(served: Served) -> Table:
    columns = list(next(iter(served.losses.values())))
    table = Table(
        title="Held-out loss (nats per token, lower is better)",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("text")
    table.add_column("by")
    for column in columns:
        table.add_column("no adapter" if column == BASE else column, justify="right")
    for text, row in served.losses.items():
        best = min(row, key=row.__getitem__)
        cells = [Text(f"{row[column]:.4f}", style="bold green" if column == best else "") for column in columns]
        table.add_row(text, "fxlora", *cells)
        peft = [f"{served.peft_losses[text][column]:.4f}" for column in columns]
        table.add_row("", "PEFT", *peft, style="dim", end_section=True)
    return table


def _verdict(served: Served) -> Text:
    text = Text()
    _line(
        text, served.own_is_best, "each text is best under its own adapter", "some text is best under a foreign adapter"
    )
    _line(text, served.equals_peft, "every number is PEFT's own, to 4 digits", "some number differs from PEFT's")
    _line(text, served.order_is_free, "each row answers alike in a shuffled batch", "some row changed when shuffled")
    _line(
        text,
        served.graphs == 1,
        f"one graph, captured once ({served.capture_seconds:.1f} s), served {served.batches} different mixes",
        f"{served.graphs} different graphs ran",
    )
    seconds = f"{served.batch_seconds:.2f} s"
    text.append(f"\n  fxlora served all {served.rows} rows ({served.tokens} tokens) in one batch: {seconds}.\n")
    text.append(f"  PEFT took one call per text and adapter. The graph has {served.sites} places for adapters.\n")
    return text


def _line(text: Text, holds: bool, yes: str, no: str) -> None:
    text.append("  yes  " if holds else "  NO   ", style="bold green" if holds else "bold red")
    text.append((yes if holds else no) + "\n")


def _samples(served: Served) -> Table:
    table = Table(
        title=f"{served.prompt!r}, continued by the rows of one batch",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("adapter")
    table.add_column("continues with", overflow="fold")
    for column, sample in served.samples.items():
        table.add_row("no adapter" if column == BASE else column, Text(" ".join(sample.split())))
    return table
