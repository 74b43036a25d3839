"""From a LoraModule or a graph module to files, or to a networkx graph: what `fxlora.dump` does."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import networkx as nx
import torch
from torch import fx

from fxlora.binding import bind_adapter
from fxlora.dumps.adapters import choose_views
from fxlora.dumps.formats import ABOUT, FORMATS, Dump, format_of, missing_for, of_weights
from fxlora.dumps.graph import build_graph
from fxlora.dumps.record import Record
from fxlora.errors import DumpError, DumpFormatError, DumpPathError
from fxlora.module import LoraModule

STEM = "graph"
Dumpable = LoraModule | fx.GraphModule | torch.export.ExportedProgram | Record


@contextmanager
def _no_collections() -> Iterator[None]:
    """A dump makes objects by the hundred thousand and keeps most of them to its end: the garbage collector would walk
    all of torch's and the model's over and over for nothing, a quarter of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@_no_collections()
def write_dump(
    lora_or_gm: Dumpable,
    path: str | os.PathLike[str],
    format: str | None,
    *,
    adapter: Any,
    depth: int | None,
    focus: str | None,
) -> Path:
    """Write one file, or a folder of every format; `fxlora.dump` says what the arguments mean."""
    form = _form(format)
    target = Path(path)
    if form is None and not target.is_dir() and not str(path).endswith(("/", os.sep)):
        form = format_of(target.name)
        if form is None and target.suffix:
            raise DumpFormatError(
                f"{target.name} ends in no known format; known: {', '.join(FORMATS)}. A folder that does not exist yet "
                f"ends in a slash if its name has a dot"
            )
        folder = form is None
    else:
        folder = form is None or target.is_dir()
    made = prepared(lora_or_gm, adapter, depth, focus)
    if not folder:
        assert form is not None
        return _write(target, FORMATS[form](made))
    return write_folder(made, target, [form] if form is not None else None)


def prepared(lora_or_gm: Dumpable, adapter: Any, depth: int | None, focus: str | None) -> Dump:
    """What a dump shows, chosen and checked."""
    record = record_of(lora_or_gm)
    if depth is not None and (not isinstance(depth, int) or depth < 0):
        raise DumpError(f"depth is {depth!r}; expected a number of levels, 0 or more")
    if isinstance(lora_or_gm, LoraModule):
        bind = lora_or_gm.bind
    else:
        bind = partial(bind_adapter, sites=record.sites, skipped=record.skipped, weights=of_weights(record))
    views = choose_views(adapter, record.pool, bind)
    return Dump(record, views, depth, focus)


def record_of(lora_or_gm: Dumpable) -> Record:
    """The record of a LoraModule, or one made of a graph module. Raises DumpError for anything else."""
    if isinstance(lora_or_gm, Record):
        return lora_or_gm
    if isinstance(lora_or_gm, LoraModule):
        return lora_or_gm.record
    if isinstance(lora_or_gm, torch.export.ExportedProgram):
        return Record.of_graph(lora_or_gm.module())  # type: ignore[arg-type]
    if isinstance(lora_or_gm, fx.GraphModule):
        return Record.of_graph(lora_or_gm)
    raise DumpError(f"dump takes a LoraModule or a torch.fx.GraphModule, not a {type(lora_or_gm).__name__}")


def make_networkx(lora_or_gm: Dumpable, stage: str | None, adapter: Any) -> nx.MultiDiGraph:
    """The graph of one side of a record, as networkx has it."""
    record = record_of(lora_or_gm)
    if stage not in (None, "before", "after") or (stage == "after" and record.after is None):
        raise DumpError(f"stage={stage!r}: this graph has {'before and after' if record.after else 'before alone'}")
    snapshot = record.before if stage == "before" else record.graph
    return build_graph(record, snapshot, prepared(lora_or_gm, adapter, None, None).adapters)


def _form(format: str | None) -> str | None:
    if format is None:
        return None
    form = format if format.startswith(".") else f".{format}"
    if form not in FORMATS:
        raise DumpFormatError(f"format={format!r} is not known; known: {', '.join(FORMATS)}")
    return form


def _write(path: Path, content: str | bytes) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise DumpPathError(f"{path} cannot be written: {error}") from error
    return path


@_no_collections()
def write_folder(dump: Dump, folder: Path, forms: list[str] | None = None) -> Path:
    """Every format of a dump, or some, beside an index that says what each is and which could not be made."""
    lines = [f"# {dump.record.title or 'graph'}", ""]
    if dump.record.refusal:
        lines += [f"Refused: {dump.record.refusal}", ""]
    for form in forms or ABOUT:
        name = f"{STEM}{form}"
        if missing := missing_for(form) if forms is None else "":
            lines.append(f"- {name}: not made, {missing}")
            continue
        _write(folder / name, FORMATS[form](dump))
        lines.append(f"- [{name}]({name}): {ABOUT.get(form, 'the same, drawn')}")
    if dump.record.after is not None and forms is None:
        before = Dump(dump.record.side_before(), dump.adapters, dump.depth)
        _write(folder / "before.txt", FORMATS[".txt"](before))
        lines.append("- [before.txt](before.txt): the graph before the rewrite, repeats folded")
    if forms is None:
        _write(folder / "index.md", "\n".join(lines) + "\n")
    return folder
