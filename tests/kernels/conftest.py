"""What the interpreter does again and again in vain, left out: more than half of the time of an interpreted test.

It replaces Triton's language in every function that a kernel calls, where that is done since the launch began; it
proves of each sum of two integers that it does not overflow, which no call as small as these comes near; and it builds
the same few types and shapes anew for each value. Its many small objects need no collector as often as it comes.
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


def by_name(np_dtype: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`_get_np_dtype` of triton.runtime.interpreter, asked once for each type of elements."""
    known: dict[str, Any] = {}

    def known_dtype(dtype: Any) -> Any:
        found = known.get(name := dtype.scalar.name)
        if found is None:
            found = known[name] = np_dtype(dtype)
        return found

    return known_dtype


def alike(init: Callable[..., None]) -> Callable[..., None]:
    """`block_type.__init__`, which fills in what it found for the same element and shape before."""
    import triton.language as tl

    known: dict[Any, dict[str, Any]] = {}

    def init_once(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = [size.value if isinstance(size, tl.constexpr) else size for size in shape]
        found = known.get(key := (element_ty.name, *sizes))
        if found is None:
            init(self, element_ty, shape)
            known[key] = dict(self.__dict__)
        else:
            self.__dict__.update(found)

    return init_once


def of_known_shape(init: Callable[..., None]) -> Callable[..., None]:
    """`tensor.__init__`, which shares the shape, as the language sees it, among tensors of one type."""
    known: dict[Any, dict[str, Any]] = {}

    def init_once(self: Any, handle: Any, type: Any) -> None:
        found = known.get(type.name)
        if found is None:
            init(self, handle, type)
            known[type.name] = {"shape": self.shape, "numel": self.numel, "type": self.type, "dtype": self.dtype}
        else:
            self.handle = handle
            self.__dict__.update(found)

    return init_once


@pytest.fixture(scope="session", autouse=True)
def less_interpreting() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None:
            import triton.language as tl
            from triton.runtime import interpreter

            if hasattr(interpreter, "_LangPatchScope"):  # Triton's own affair, as is all below
                monkeypatch.setattr(interpreter, "_patch_lang", once(interpreter._patch_lang))
            options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
            monkeypatch.setattr(interpreter.interpreter_builder, "options", options)
            monkeypatch.setattr(interpreter, "_get_np_dtype", by_name(interpreter._get_np_dtype))
            monkeypatch.setattr(tl.block_type, "__init__", alike(tl.block_type.__init__))
            monkeypatch.setattr(tl.tensor, "__init__", of_known_shape(tl.tensor.__init__))
            gc.set_threshold(200_000, 50, 100)
        yield
