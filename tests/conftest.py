"""What every test gets: sleeping OpenMP threads, seeds, poisoned memory in the kernels, a device, the `gpu` marker.

Triton bodies run on CUDA, or on CPU tensors when TRITON_INTERPRET=1 is set before the first import of
fxlora.kernels.ops. One process can therefore not hold both CPU bodies and interpreted ones.
tests/kernels/test_interpreter.py starts a second pytest with that variable over every test marked `interpreted`, so
that one run covers both; by hand:
    TRITON_INTERPRET=1 pytest tests/kernels -m interpreted
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TORCH_FAKE_TENSOR_DISPATCH_CACHE", "0")  # models of few layers fill it, and never read it

import random
import sys
import types
from collections.abc import Callable, Iterator
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import pytest
import torch

INT_POISON = 1 << 30
POISONING = {"on": True}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs CUDA, skipped without it")
    config.addinivalue_line("markers", "interpreted: small enough to run again on interpreted Triton bodies")
    config.addinivalue_line("markers", "long: takes minutes; runs first, or a process would wait for it at the end")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs CUDA")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fills uninitialised memory so that reading it shows: NaN, or an integer no table or id reaches."""
    if not POISONING["on"] or type(tensor) is not torch.Tensor or tensor.is_meta:
        return tensor
    if tensor.is_floating_point():
        return tensor.fill_(float("nan"))
    return tensor if tensor.dtype == torch.bool else tensor.fill_(min(INT_POISON, torch.iinfo(tensor.dtype).max))


class PoisonedTorch(types.ModuleType):
    """torch, as the kernels see it during tests: `empty` and its kin return poisoned memory."""

    def __getattr__(self, name: str) -> Any:
        found = getattr(torch, name)
        return poisoned(found) if name in ("empty", "empty_like", "empty_strided") else found


def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda *args, **kwargs: poison(make(*args, **kwargs))


def new_empty_for_kernels(plain: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Tensor.new_empty whose memory is poisoned where fxlora.kernels asked for it, and plain for everyone else."""

    def new_empty(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        made = plain(self, *args, **kwargs)
        return poison(made) if sys._getframe(1).f_globals.get("__name__", "").startswith("fxlora.kernels.") else made

    return new_empty


@pytest.fixture(scope="session", autouse=True)
def poison_empty_memory_of_the_kernels() -> Iterator[None]:
    """Replaces the name `torch` inside every module of fxlora.kernels; elsewhere dynamo must see the real one.

    Where Triton bodies run, `Tensor.new_empty` too: the CPU bodies do without it.
    """
    kernels = import_module("fxlora.kernels")
    fake = PoisonedTorch("torch")
    patched = []
    for info in iter_modules(kernels.__path__, "fxlora.kernels."):
        try:
            module = import_module(info.name)
        except ModuleNotFoundError as error:
            if error.name != "triton":
                raise
            continue
        if getattr(module, "torch", None) is torch:
            patched.append(module)
            module.torch = fake
    with pytest.MonkeyPatch.context() as patch:
        if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
            patch.setattr(torch.Tensor, "new_empty", new_empty_for_kernels(torch.Tensor.new_empty))
        yield
    for module in patched:
        module.torch = torch


@pytest.fixture
def plain_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """No poison: the launches that write it would keep those of an op from overlapping."""
    monkeypatch.setitem(POISONING, "on", False)


@pytest.fixture(autouse=True)
def seed() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def device() -> str:
    """Where the op under test runs: a GPU if there is one; the CPU for interpreted kernels."""
    return "cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"
