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


def _losses(served: Served) -> Table:
    columns = list(next(iter(served.losses.values())))
    table = Table(
        title="Loss on text that no adapter was trained on (nats per token, lower is better)",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("text")
    table.add_column("answered by")
    for column in columns:
        table.add_column("bare model" if column == BASE else f"adapter {column}", justify="right")
    for text, row in served.losses.items():
        best = min(row, key=row.__getitem__)
        cells = [Text(f"{row[column]:.4f}", style="bold green" if column == best else "") for column in columns]
        table.add_row(text, "fxlora, one batch", *cells)
        peft = served.peft_losses[text]
        table.add_row(
            "", "PEFT, one by one", *(f"{peft[column]:.4f}" for column in columns), style="dim", end_section=True
        )
    return table


def _verdict(served: Served) -> Text:
    text = Text()
    _line(
        text, served.own_is_best, "each text is best under its own adapter", "some text is best under a foreign adapter"
    )
    _line(text, served.equals_peft, "every number is PEFT's own, to 4 digits", "some number differs from PEFT's")
    _line(
        text,
        served.graphs == 1,
        f"one graph, captured once in {served.capture_seconds:.1f} s, ran {served.batches} different mixes",
        f"{served.graphs} different graphs ran",
    )
    text.append(
        f"  {served.rows} rows ({served.tokens} tokens) in one batch took {served.batch_seconds:.2f} s; "
        f"{served.sites} places in the graph can carry an adapter.\n"
    )
    return text


def _line(text: Text, holds: bool, yes: str, no: str) -> None:
    text.append("  yes  " if holds else "  NO   ", style="bold green" if holds else "bold red")
    text.append((yes if holds else no) + "\n")


def _samples(served: Served) -> Table:
    table = Table(
        title="One prompt, four rows of one batch", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD
    )
    table.add_column("row")
    table.add_column("continues with", overflow="fold")
    for column, sample in served.samples.items():
        table.add_row("bare model" if column == BASE else column, Text(repr(sample)))
    return table
