"""The three kinds of text the demo's adapters are trained on, all found on any machine that runs Python.

Code is the standard library, docs is `pydoc_data.topics`, licence is the licence files of installed packages and, on
Debian, the common licences. The held-out text of each kind is fixed by name (of licence, it is Python's own), is cut
out of the training text paragraph by paragraph, and is saved beside the adapters, since the standard library changes
from one Python to the next.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

KINDS = ("code", "docs", "licence")
EXCERPTS, EXCERPT_BYTES = 6, 512

HELD_OUT_MODULES = ("sched.py", "queue.py", "textwrap.py", "shelve.py")
HELD_OUT_TOPICS = ("exceptions", "global", "naming", "try", "typesmethods", "with")
COMMON_LICENCES = Path("/usr/share/common-licenses")
SHINGLE = 40


def training_texts() -> dict[str, str]:
    """Return the training text of each kind, without any paragraph that shares 40 characters with a held-out text."""
    sources = {"code": _modules(), "docs": _topics(), "licence": _licences()}
    held_out = held_out_sources()
    return {kind: _without(sources[kind], held_out[kind]) for kind in KINDS}


def held_out_texts() -> dict[str, str]:
    """Return the held-out text of each kind, cut to 6 excerpts of 512 bytes spread over its sources."""
    return {kind: _excerpts(text) for kind, text in held_out_sources().items()}


def held_out_sources() -> dict[str, str]:
    """Return the whole of each text that training never sees."""
    import pydoc_data.topics

    topics = pydoc_data.topics.topics
    library = Path(os.__file__).parent
    return {
        "code": "\n\n".join(_read(library / name) for name in HELD_OUT_MODULES),
        "docs": "\n\n".join(_ascii(topics[name]) for name in HELD_OUT_TOPICS),
        "licence": _python_licence(library),
    }


def _modules() -> list[str]:
    library = Path(os.__file__).parent
    return [_read(path) for path in sorted(library.glob("*.py")) if path.name not in HELD_OUT_MODULES]


def _topics() -> list[str]:
    import pydoc_data.topics

    return [_ascii(text) for name, text in sorted(pydoc_data.topics.topics.items()) if name not in HELD_OUT_TOPICS]


def _licences() -> list[str]:
    common = sorted(COMMON_LICENCES.iterdir()) if COMMON_LICENCES.is_dir() else []
    texts = [_read(path) for path in common if not path.is_symlink()]
    names = ("LICENSE", "LICENCE", "COPYING", "NOTICE")
    for distribution in sorted(metadata.distributions(), key=lambda found: found.metadata["Name"].lower()):
        for file in distribution.files or ():
            if file.name.upper().startswith(names) and (path := Path(str(file.locate()))).is_file():
                texts.append(_read(path))
    return texts


def _python_licence(library: Path) -> str:
    """Return the terms of Python's own licence, from the file that `license()` prints."""
    for folder in (library, library.parent):
        for name in ("LICENSE.txt", "LICENSE"):
            if (folder / name).is_file():
                return _read(folder / name)
    raise FileNotFoundError(f"no LICENSE.txt of Python beside {library}")


def _read(path: Path) -> str:
    return _ascii(path.read_text(encoding="utf-8", errors="ignore"))


def _ascii(text: str) -> str:
    """Return `text` without what is not ASCII: one character is one byte is one token."""
    return text.encode("ascii", errors="ignore").decode("ascii")


def _without(texts: Iterable[str], held_out: str) -> str:
    """Join the paragraphs of `texts`, each once, leaving out those that `held_out` holds in whole or in part."""
    squeezed = " ".join(held_out.split())
    forbidden = {squeezed[at : at + SHINGLE] for at in range(len(squeezed) - SHINGLE + 1)}
    kept: dict[str, str] = {}
    for text in texts:
        for paragraph in text.split("\n\n"):
            words = " ".join(paragraph.split())
            parts = (words[at : at + SHINGLE] for at in range(len(words) - SHINGLE + 1))
            if words and words not in kept and words not in squeezed and forbidden.isdisjoint(parts):
                kept[words] = paragraph
    return "\n\n".join(kept.values())


def _excerpts(text: str) -> str:
    """Cut the excerpts, evenly spread, each from the start of a line on."""
    starts = [text.index("\n", part * (len(text) - 2 * EXCERPT_BYTES) // EXCERPTS) + 1 for part in range(EXCERPTS)]
    return "".join(text[start : start + EXCERPT_BYTES] for start in starts)
