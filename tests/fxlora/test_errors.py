"""Errors: one tree under FxloraError, exported and documented, and messages that stay readable."""

from __future__ import annotations

import inspect

import pytest

import fxlora.errors
import fxlora.kernels.errors
import fxlora.passes.errors
from fxlora.errors import AdapterError, BatchError, FxloraError, Unbound, UnboundTensorError, UnknownAdapterError

ROOMS = (fxlora.errors, fxlora.kernels.errors, fxlora.passes.errors)


def own_errors(module: object) -> list[type[Exception]]:
    classes = [value for value in vars(module).values() if inspect.isclass(value)]
    return [cls for cls in classes if issubclass(cls, Exception)]


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.__name__)
def test_every_error_of_every_room_is_exported_and_documented(room: object) -> None:
    for error in own_errors(room):
        assert getattr(fxlora.errors, error.__name__) is error
        assert error.__name__ in fxlora.errors.__all__
        assert issubclass(error, FxloraError)
        assert error.__doc__


def test_an_unknown_adapter_is_both_an_adapter_and_a_batch_error() -> None:
    assert issubclass(UnknownAdapterError, AdapterError)
    assert issubclass(UnknownAdapterError, BatchError)


def test_unbound_keeps_all_and_prints_the_first_hundred() -> None:
    unbound = tuple(Unbound(f"key{i}", "no weight of this name", f"near{i}") for i in range(120))
    error = UnboundTensorError(unbound, bound=7)
    lines = str(error).splitlines()
    assert error.unbound == unbound
    assert lines[0].startswith("120 adapter tensors have no site (7 have one)")
    assert lines[100] == "  key99: no weight of this name; nearest: near99"
    assert lines[101] == "  and 20 more (see .unbound)"
    assert len(lines) == 102
