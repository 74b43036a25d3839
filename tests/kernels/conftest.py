"""What the interpreter does again and again in vain, left out: half of the time of an interpreted test.

It replaces Triton's language in every function that a kernel calls, where that is done since the launch began; and it
proves of each sum of two integers that it does not overflow, which no call as small as these comes near. Its many small
objects need no collector as often as it comes.
"""

from __future__ import annotations

import gc
import inspect
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest


def once(patch_lang: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`_patch_lang` of triton.runtime.interpreter, where the language that a function sees is not replaced yet."""
    import triton.language as tl
    from triton.runtime import interpreter

    seen: dict[int, list[Any]] = {}  # by the globals of functions, which live as long as their modules

    def patch_once(function: Any) -> Any:
        names = function.__globals__
        langs = seen.get(id(names))
        if langs is None:
            langs = seen[id(names)] = [
                value for value in names.values() if inspect.ismodule(value) and value in (tl, tl.core)
            ]
        if langs and not any(tl.core.is_builtin(lang.load) for lang in langs):
            return interpreter._LangPatchScope()
        return patch_lang(function)

    return patch_once


@pytest.fixture(scope="session", autouse=True)
def less_interpreting() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None:
            from triton.runtime import interpreter

            if hasattr(interpreter, "_LangPatchScope"):  # Triton's own affair
                monkeypatch.setattr(interpreter, "_patch_lang", once(interpreter._patch_lang))
            options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
            monkeypatch.setattr(interpreter.interpreter_builder, "options", options)
            gc.set_threshold(200_000, 50, 100)
        yield
