"""The commands, their arguments and their exit codes: 0 done, 1 the answer is no, 2 the question was wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    help="LoRA as a compiler pass: many adapters in one batch of one graph.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class DemoModel(StrEnum):
    """The models `fxlora demo` can serve."""

    tiny = "tiny"
    smollm2 = "smollm2"


class Benchmark(StrEnum):
    """The benchmarks `fxlora bench` can run."""

    cpu = "cpu"
    experts = "experts"
    shapes = "shapes"
    linear = "linear"
    decode = "decode"


@app.command()
def demo(
    model: Annotated[
        DemoModel, typer.Option(help="tiny ships with fxlora; smollm2 is a real 135 M one.")
    ] = DemoModel.tiny,
) -> None:
    """Serve three adapters and the bare model in one batch, and compare every number with PEFT."""
    with refusals():
        require("fxlora demo", "transformers", "peft")
        quieten()
        from fxlora.demo.run import run_demo

        if not run_demo(model.value, Console()):
            raise typer.Exit(1)


@app.command()
def inspect(
    model: Annotated[Path, typer.Argument(help="A folder that transformers can load.", exists=True, file_okay=False)],
    adapters: Annotated[list[Path] | None, typer.Argument(help="PEFT adapter folders.")] = None,
    every: Annotated[bool, typer.Option("--every", help="A line for every site, not one per kind of layer.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write an HTML report, too.", dir_okay=False)] = None,
) -> None:
    """Show where adapters can go in a model, and what each given adapter binds to, what not, and why."""
    with refusals():
        require("fxlora inspect", "transformers")
        quieten()
        from fxlora.commands.inspect import inspect_model

        if not inspect_model(model, adapters or [], Console(), fold=not every, report=html):
            raise typer.Exit(1)


@app.command()
def dump(
    model: Annotated[Path, typer.Argument(help="A folder that transformers can load.", exists=True, file_okay=False)],
    output: Annotated[str, typer.Option("--output", "-o", help="A folder, or a file whose suffix names its format.")],
    adapter: Annotated[list[Path] | None, typer.Option(help="A PEFT adapter folder; may be given again.")] = None,
    form: Annotated[str | None, typer.Option("--format", help="html, txt, json, dot, svg, ...")] = None,
    depth: Annotated[int | None, typer.Option(help="Levels of modules that text and drawings open.")] = None,
    focus: Annotated[str | None, typer.Option(help="The path of one module to show.")] = None,
) -> None:
    """Write the graph of a model, before and after, and where each adapter lands, in every format."""
    with refusals():
        require("fxlora dump", "transformers")
        quieten()
        from fxlora.commands.dump import dump_model

        if not dump_model(model, adapter or [], output, Console(), form=form, depth=depth, focus=focus):
            raise typer.Exit(1)


@app.command()
def env() -> None:
    """Show the versions of everything that matters in a bug report."""
    from fxlora.commands.env import show_environment

    show_environment(Console())


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context, which: Annotated[Benchmark, typer.Argument(help="Which benchmark.")]) -> None:
    """Run a benchmark of the repository: works inside a clone. Options that follow are the benchmark's own."""
    from fxlora.commands.bench import run_benchmark

    with refusals():
        run_benchmark(which.value, context.args)


@contextmanager
def refusals() -> Iterator[None]:
    """Print an error of fxlora as one message, without a traceback, and exit with 2."""
    from fxlora.errors import FxloraError

    try:
        yield
    except FxloraError as error:
        Console(stderr=True).print(f"{type(error).__name__}: {error}", style="red", highlight=False, markup=False)
        raise typer.Exit(2) from error


def require(command: str, *packages: str) -> None:
    """Raise `MissingPackageError` unless every package can be imported."""
    from importlib.util import find_spec

    from fxlora.commands.errors import MissingPackageError

    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise MissingPackageError(command, missing, "pip install 'fxlora[demo]'")


def quieten() -> None:
    """Keep the progress bars and advice of transformers and PEFT out of the output."""
    import warnings

    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="transformers|peft")
