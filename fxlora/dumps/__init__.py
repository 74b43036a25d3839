"""Graph dumps: text, data and pictures of a graph before and after the rewrite.

The functions here import what they need when they are called: nobody who dumps nothing pays for it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import networkx as nx

    from fxlora.dumps.write import Dumpable


def dump(
    lora_or_gm: Dumpable,
    path: str | os.PathLike[str],
    format: str | None = None,
    *,
    adapter: Any = None,
    depth: int | None = None,
    focus: str | None = None,
) -> Path:
    """Write a graph, and all that fxlora decided about it, to a file or to a folder of every format.

    Nothing is run and no graph is changed. The same dump twice is equal byte by byte.

    Args:
        lora_or_gm: What `fxlora.apply` returned, or any graph module or exported program.
        path: A file whose suffix names the format (`.html`, `.txt`, `.diff.txt`, `.raw.py`, `.json`, `.graphml`,
            `.dot`, `.svg`, `.png`, `.me.json`), or a folder, which gets every format and an index.
        format: The format, where the suffix does not say it; a folder then gets this one alone.
        adapter: By default all loaded adapters are shown. A loaded adapter's name shows that one; a PEFT folder, or
            (config, tensors), is bound for the dump and not loaded, and what does not bind is shown; a list is several.
        depth: How many levels of modules text and drawings open. focus: the path of one module: they show it alone.

    Returns:
        The path written.

    Raises:
        DumpError: DumpFormatError for an unknown format, DumpPathError where nothing can be written, DumpFocusError
            for an unknown module, DumpPackageError where a format's package is missing.
        UnknownAdapterError: `adapter` is neither loaded nor a folder.
    """
    from fxlora.dumps.write import write_dump

    return write_dump(lora_or_gm, path, format, adapter=adapter, depth=depth, focus=focus)


def to_networkx(
    lora_or_gm: Dumpable, *, stage: Literal["before", "after"] | None = None, adapter: Any = None
) -> nx.MultiDiGraph:
    """A graph as a networkx MultiDiGraph of weights, calls, row maps, sites and adapters (`fxlora/dumps/graph.py`).

    stage: for a LoraModule the side of the rewrite, by default "after". adapter: as in `fxlora.dump`.
    """
    from fxlora.dumps.write import make_networkx

    return make_networkx(lora_or_gm, stage, adapter)


def load_graph(path: str | os.PathLike[str]) -> nx.MultiDiGraph:
    """The networkx graph in a `.json` or `.graphml` file that `fxlora.dump` wrote.

    Raises DumpPathError for a file that cannot be read, DumpFormatError for one that holds no such graph.
    """
    from fxlora.dumps.files import read_graph

    return read_graph(Path(path))
