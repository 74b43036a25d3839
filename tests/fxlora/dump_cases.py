"""What the tests of dumps draw: a toy with a shared gate and a tied table, and zoo models; a browser for reports."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import nn

import fxlora
from tests.models import ZOO
from tests.toys.base import make_adapter

H, V = 6, 13
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HOSTILE = '<script>alert("x")</script>&\u2028'


class Block(nn.Module):
    """One linear and a gate that it may share with others."""

    def __init__(self, gate: nn.Linear) -> None:
        super().__init__()
        self.up, self.gate = nn.Linear(H, H, bias=False), gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.up(x).relu() * self.gate(x).sigmoid()


class Shared(nn.Module):
    """Three blocks over one gate, and a table that is also the head: ids int64 [B, T] -> [B, T, V]."""

    def __init__(self) -> None:
        super().__init__()
        gate = nn.Linear(H, 1, bias=False)
        self.table = nn.Embedding(V, H)
        self.layers = nn.ModuleList(Block(gate) for _ in range(3))
        self.head = nn.Linear(H, V, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def shared() -> fxlora.LoraModule:
    """The toy, applied, with two adapters of ranks 2 and 3; one has a name that is markup."""
    torch.manual_seed(0)
    model = Shared().eval()
    lora = fxlora.apply(fxlora.capture(model, torch.randint(0, V, (2, 5))), max_adapters=4, max_rank=4)
    lora.load_adapter("plain", make_adapter(model, ["layers.0.up", "layers.2.gate", "head"], rank=2, seed=1))
    lora.load_adapter(HOSTILE, make_adapter(model, ["layers.0.up", "layers.1.up"], rank=3, seed=2))
    return lora


def zoo(name: str) -> fxlora.LoraModule:
    entry = ZOO[name]
    return fxlora.apply(fxlora.capture(entry.build(), **entry.inputs()), max_adapters=2, max_rank=4)


def refused() -> Any:
    """A graph whose second linear reads a mean over all requests, so that its rows cannot be told apart."""

    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.first(x).relu()
            return self.second(h + h.mean(0, keepdim=True))

    model = Mixing().eval()
    return model, torch.fx.symbolic_trace(model), torch.randn(3, 4)


def no_browser() -> str:
    """Why no report can be opened here; empty where one can."""
    if find_spec("playwright") is None:
        return "playwright is not installed"
    return "" if any(map(shutil.which, CHROMIUMS)) else "no Chromium on PATH (Debian: apt install chromium)"


@contextmanager
def page(*, flags: tuple[str, ...] = (), offline: bool = True, **options: Any) -> Iterator[Any]:
    """A page of a headless Chromium without network; console errors, page errors and requests gather on it."""
    if reason := no_browser():
        pytest.skip(reason)
    path = next(filter(None, map(shutil.which, CHROMIUMS)))
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox", *flags])
        made = browser.new_context(offline=offline, viewport={"width": 1400, "height": 900}, **options).new_page()
        made.problems, made.requests = [], []
        made.on("console", lambda m: made.problems.append(m.text) if m.type in ("error", "warning") else None)
        made.on("pageerror", lambda error: made.problems.append(str(error)))
        made.on("request", lambda request: made.requests.append(request.url))
        try:
            yield made
        finally:
            browser.close()
