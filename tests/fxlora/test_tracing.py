"""Models that log, set themselves up at their first call, write to their own attributes, or hold recurrent layers."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxlora
from fxlora.tracing import can_ignore_logs
from tests.toys.base import make_adapter, merged

log = logging.getLogger(__name__)


class Model(nn.Module):
    """A linear over x [B, T, H] behind whatever a test is about."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(6, 6)

    def before(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(self.before(x))


class Logs(Model):
    def before(self, x: torch.Tensor) -> torch.Tensor:
        log.warning("sequences of %s", x.shape[1])
        return x


class SetsItselfUp(Model):
    lock = threading.Lock()
    ready = False

    def before(self, x: torch.Tensor) -> torch.Tensor:
        if not self.ready:
            with self.lock:
                self.ready = True
        return x


class WritesAttributes(Model):
    width = 0

    def before(self, x: torch.Tensor) -> torch.Tensor:
        self.width = x.shape[-1]
        return x


class Recurrent(Model):
    def __init__(self, kind: Any = nn.LSTM, batch_first: bool = True) -> None:
        super().__init__()
        self.layer = kind(6, 6, num_layers=2, batch_first=batch_first)

    def before(self, x: torch.Tensor) -> torch.Tensor:
        if self.layer.batch_first:
            return self.layer(x)[0]
        return self.layer(x.transpose(0, 1))[0].transpose(0, 1)


MODELS: list[Callable[[], Model]] = [
    Logs,
    SetsItselfUp,
    WritesAttributes,
    Recurrent,
    lambda: Recurrent(nn.GRU, batch_first=False),
]


def captured(model: nn.Module, x: torch.Tensor) -> Any:
    return fxlora.apply(fxlora.capture(model, x), max_adapters=2, max_rank=4)


def compiled(model: nn.Module, x: torch.Tensor) -> Any:
    torch._dynamo.reset()
    return fxlora.compile(model, max_adapters=2, max_rank=4, backend="eager")


@pytest.mark.parametrize("serve", [captured, compiled])
@pytest.mark.parametrize("build", MODELS, ids=["logs", "lock", "attributes", "lstm", "gru"])
@torch.no_grad()
def test_a_mixed_batch_is_served(build: Callable[[], Model], serve: Any) -> None:
    if build is Logs and not can_ignore_logs():
        pytest.skip("this torch cannot leave out what a model logs")
    torch.manual_seed(0)
    model, x = build().eval().requires_grad_(False), torch.randn(3, 5, 6)
    adapter, ignored = make_adapter(model, ["proj"], 2, 11), torch._dynamo.config.ignore_logger_methods
    served = serve(model, x)
    served.load_adapter("a", adapter)
    got = served(x, adapters=["a", None, "a"])
    with_adapter, without = merged(Model(), None), model.proj(model.before(x))
    with_adapter.proj.load_state_dict(model.proj.state_dict())
    expected = merged(with_adapter, adapter).proj(model.before(x))
    expected[1] = without[1]
    assert torch.allclose(got, expected, atol=1e-5)
    assert not torch.allclose(got, without, atol=1e-3)
    assert torch._dynamo.config.ignore_logger_methods == ignored, "settings hold around fxlora's traces alone"


def test_a_model_that_fails_fails_with_its_own_words() -> None:
    class Fails(Model):
        def before(self, x: torch.Tensor) -> torch.Tensor:
            with threading.Lock():
                return x

    with pytest.raises(fxlora.errors.GraphBreakError, match="lock"):
        compiled(Fails(), torch.randn(3, 5, 6))(torch.randn(3, 5, 6))
