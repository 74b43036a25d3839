"""Serves every text under every adapter in one batch of one graph, and asks PEFT for the same numbers."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fxlora
from fxlora.demo.case import Case
from fxlora.demo.losses import row_losses

BASE = "base"
Losses = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Served:
    """What one demo measured.

    losses, peft_losses: text to column (an adapter name or "base") to mean held-out loss in nats per token. rows: rows
    of the one batch. graphs: distinct graphs run over all batches. samples: column to its continuation of the prompt.
    graph_report: the HTML report of the graph, where one was written.
    """

    losses: Losses
    peft_losses: Losses
    rows: int
    tokens: int
    sites: int
    batches: int
    shuffled_error: float
    graphs: int
    capture_seconds: float
    batch_seconds: float
    prompt: str
    samples: Mapping[str, str]
    graph_report: Path | None = None

    @property
    def own_is_best(self) -> bool:
        """Whether every text has its lowest loss under the adapter of its own kind."""
        return all(min(row, key=row.__getitem__) == text for text, row in self.losses.items())

    @property
    def holds(self) -> bool:
        """Whether everything the demo claims is so."""
        return self.own_is_best and self.equals_peft and self.order_is_free and self.graphs == 1

    @property
    def order_is_free(self) -> bool:
        """Whether rows kept their losses in a shuffled batch; one byte sent to another expert moves a row by 1e-3."""
        return self.shuffled_error < 5e-3

    @property
    def equals_peft(self) -> bool:
        """Whether every number, as printed, is PEFT's: four decimals."""
        return all(
            abs(loss - self.peft_losses[text][column]) < 1e-4
            for text, row in self.losses.items()
            for column, loss in row.items()
        )


def serve(case: Case, report: Callable[[str], None], *, graph_report: Path | None = None) -> Served:
    """Capture the model, load the adapters, run the one batch, run it again in another order, and ask PEFT.

    graph_report: an HTML file to write the report of the graph to.
    """
    columns = [BASE, *case.adapters]
    peft_base = copy.deepcopy(case.model)

    report("capturing the model as one graph")
    started = time.perf_counter()
    example = next(iter(case.texts.values()))[:2]
    graph = fxlora.capture(case.model, input_ids=example)
    lora = fxlora.apply(graph, max_adapters=len(case.adapters), max_rank=16)
    capture_seconds = time.perf_counter() - started
    for name, folder in case.adapters.items():
        lora.load_adapter(name, str(folder))
    if graph_report is not None:
        report("drawing the graph")
        fxlora.dump(lora, graph_report)

    report("serving every text under every adapter, in one batch")
    ids = torch.cat([text for text in case.texts.values() for _ in columns])
    names = [_adapter(column) for text in case.texts.values() for column in columns for _ in range(len(text))]
    codes = {lora.graph_module.code}
    started = time.perf_counter()
    losses = _batch_losses(lora, ids, names)
    batch_seconds = time.perf_counter() - started

    report("serving a third of it again, shuffled")
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))[: len(ids) // 3]
    shuffled = _batch_losses(lora, ids[order], [names[row] for row in order.tolist()])
    codes.add(lora.graph_module.code)

    report("asking PEFT, one adapter at a time")
    table = losses.view(len(case.texts), len(columns), -1).mean(dim=2).tolist()
    peft_losses = _peft_losses(peft_base, case)

    report("continuing one prompt under each adapter")
    samples = _continue(lora, case, columns)
    codes.add(lora.graph_module.code)
    return Served(
        losses={text: dict(zip(columns, row, strict=True)) for text, row in zip(case.texts, table, strict=True)},
        peft_losses=peft_losses,
        rows=len(ids),
        tokens=ids.numel(),
        sites=len(lora.sites),
        batches=3,
        shuffled_error=(shuffled - losses[order]).abs().max().item(),
        graphs=len(codes),
        capture_seconds=capture_seconds,
        batch_seconds=batch_seconds,
        prompt=case.prompt,
        samples=samples,
        graph_report=graph_report,
    )


def _adapter(column: str) -> str | None:
    return None if column == BASE else column


@torch.no_grad()
def _batch_losses(lora: Any, ids: torch.Tensor, names: list[str | None]) -> torch.Tensor:
    """Return the loss of each row of one mixed batch, fp32 [rows]."""
    return row_losses(lora(input_ids=ids, adapters=names).logits, ids)


@torch.no_grad()
def _peft_losses(base: Any, case: Case) -> Losses:
    """Return PEFT's own losses: it serves one adapter per call, so each column is a pass of its own."""
    from peft import PeftModel

    first, *others = case.adapters
    model = PeftModel.from_pretrained(base, str(case.adapters[first]), adapter_name=first).eval()
    for name in others:
        model.load_adapter(str(case.adapters[name]), adapter_name=name)
    losses: dict[str, dict[str, float]] = {text: {} for text in case.texts}

    def measure(column: str) -> None:
        for text, ids in case.texts.items():
            losses[text][column] = row_losses(model(input_ids=ids).logits, ids).mean().item()

    with model.disable_adapter():
        measure(BASE)
    for name in case.adapters:
        model.set_adapter(name)
        measure(name)
    return losses


@torch.no_grad()
def _continue(lora: Any, case: Case, columns: list[str], steps: int = 64) -> dict[str, str]:
    """Continue the prompt greedily, one row per column, all in one batch."""
    prompt = case.encode(case.prompt)
    ids = prompt.repeat(len(columns), 1)
    for _ in range(steps):
        logits = lora(input_ids=ids, adapters=[_adapter(column) for column in columns]).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(dim=-1)], dim=1)
    return {column: case.decode(row[len(prompt) :]) for column, row in zip(columns, ids, strict=True)}
