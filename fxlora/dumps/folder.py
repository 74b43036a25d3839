"""`FXLORA_DUMP=folder`: every apply and every compile writes a numbered folder there, beside an index of all.

Stage: the end of the flow, or where it stopped. A refusal names the report that shows why.
"""

from __future__ import annotations

import html
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxlora.errors import DumpPathError, FxloraError

if TYPE_CHECKING:
    from fxlora.passes.pipeline import Job
    from fxlora.pool import AdapterPool

_log = logging.getLogger(__name__)
VARIABLE = "FXLORA_DUMP"
_ABOUT, _INDEX = "about.json", "index.html"
_PAGE = """<!doctype html>
<meta charset="utf-8">
<title>fxlora dumps</title>
<style>
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; margin: 40px }
td { padding: 4px 24px 4px 0 }
</style>
<h1>fxlora dumps</h1>
<table>
ROWS
</table>
"""


def dump_if_asked(
    job: Job, pool: AdapterPool | None = None, *, title: str = "", error: BaseException | None = None
) -> Path | None:
    """Dump what a job has done so far, if `FXLORA_DUMP` names a folder; the job may be complete, or have failed.

    error: why it failed; its message then ends with the path of the report. Returns the folder that was written.
    Raises DumpPathError where nothing can be written, unless the job failed: then it is only logged.
    """
    root = os.environ.get(VARIABLE)
    if not root:
        return None
    from fxlora.dumps.formats import Dump
    from fxlora.dumps.record import Record
    from fxlora.dumps.write import STEM, write_folder

    try:
        record = Record.of_job(job, pool, title=title, refusal="" if error is None else str(error))
        folder = _numbered(Path(root), record.title or "graph")
        write_folder(Dump(record), folder)
        outcome = f"refused: {type(error).__name__}" if error is not None else f"{len(record.sites)} sites"
        (folder / _ABOUT).write_text(json.dumps({"title": record.title, "outcome": outcome}), encoding="utf-8")
        _write_index(Path(root))
    except Exception as failure:
        if error is not None:  # what the job failed with matters more
            _log.warning("the graph could not be dumped to %s=%s", VARIABLE, root, exc_info=True)
            return None
        if isinstance(failure, OSError):
            raise DumpPathError(f"{VARIABLE}={root} cannot be written: {failure}") from failure
        raise
    if error is not None:
        point_to(error, folder / f"{STEM}.html")
    _log.info("dumped the graph to %s", folder)
    return folder


def point_to(error: BaseException, report: Path) -> None:
    """Add to an error where its graph is drawn: to the message of fxlora's own, as a note to any other."""
    words = f"the graph is drawn in {report}"
    if isinstance(error, FxloraError) and error.args and isinstance(error.args[0], str):
        error.args = (f"{error.args[0]}\n{words}", *error.args[1:])
    else:
        error.add_note(words)


def dump_refusal(folder: Path, lora: Any, source: Any, error: BaseException) -> None:
    """A report of an adapter that was refused, in the folder of its graph; the error's message says where."""
    from fxlora.dumps import dump

    number = 1 + len(list(folder.glob("refused-*.html")))
    try:
        point_to(error, dump(lora, folder / f"refused-{number}.html", adapter=[source]))
    except Exception:
        _log.warning("the refusal of an adapter could not be dumped to %s", folder, exc_info=True)


def _numbered(root: Path, title: str) -> Path:
    """A new folder `0001-Title`; processes that share a root never share a folder."""
    root.mkdir(parents=True, exist_ok=True)
    name = "".join(c if c.isalnum() or c in "._-" else "_" for c in title)[:60]
    number = 1 + max((int(p.name[:4]) for p in root.iterdir() if p.name[:4].isdigit()), default=0)
    while True:
        try:
            (root / f"{number:04}-{name}").mkdir()
        except FileExistsError:
            number += 1
        else:
            return root / f"{number:04}-{name}"


def _write_index(root: Path) -> None:
    rows = []
    for about in sorted(root.glob(f"*/{_ABOUT}")):
        facts = json.loads(about.read_text(encoding="utf-8"))
        name = html.escape(about.parent.name, quote=True)
        rows.append(
            f'<tr><td><a href="{name}/graph.html">{name}</a></td><td>{html.escape(facts["outcome"])}</td>'
            f'<td><a href="{name}/">every format</a></td></tr>'
        )
    (root / _INDEX).write_text(_PAGE.replace("ROWS", "\n".join(rows)), encoding="utf-8")
